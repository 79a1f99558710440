"""Benchmarks that the artifact and PyTorch both answer: what people ask of a model, beside what its tokens say.

lm-eval is the harness on both sides: its prompts, filters and metrics. Ours are the model that is asked, items that
need no network, and the judgement, item by item.
"""
