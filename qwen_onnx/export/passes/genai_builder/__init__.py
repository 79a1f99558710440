"""``GenAIModelBuilder``: the graph, by onnxruntime-genai's builder."""
