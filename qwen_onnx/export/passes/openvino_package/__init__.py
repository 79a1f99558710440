"""``OpenVINOPackage``: the files around OpenVINO's IR that onnxruntime-genai reads."""
