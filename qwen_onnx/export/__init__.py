"""Export: run a plan through Olive, judge what came out, read the graph back."""
