"""The host's side of a decoder of fixed shapes: what export calibrates with and what runs the artifact.

Imported in the environment of onnxruntime-qnn as well: numpy and onnxruntime only.
"""
