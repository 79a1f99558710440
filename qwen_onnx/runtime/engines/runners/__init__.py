"""Artifacts that onnxruntime-genai cannot run here, run by their own engine in an environment of its own.

``client`` is what verification uses; ``worker`` and the backends run in the other environment and import nothing of
ours but each other.
"""
