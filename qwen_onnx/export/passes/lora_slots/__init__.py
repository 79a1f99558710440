"""``LoraSlots``: inputs beside the matrices of a graph, which an adapter fills while the model is served."""
