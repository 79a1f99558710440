"""What there is to build: recipes, pipelines, and the plans composed of them."""
