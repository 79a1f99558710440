"""A small vision tower for the starter, trained on pictures that are drawn on the fly. See docs/vision.md."""
