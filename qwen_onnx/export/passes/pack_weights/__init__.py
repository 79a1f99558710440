"""``PackWeights``: codes in planes of bits and scales in half precision, which ONNX Runtime folds when it loads."""
