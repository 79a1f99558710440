"""``FisherGptq``: GPTQ weighted by the loss, with the grid of each matrix chosen for a size or a KLD."""
