"""What runs in Foundry Local's own environment."""
