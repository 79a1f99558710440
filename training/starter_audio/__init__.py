"""A small audio tower for the starter, trained on digits that espeak-ng says. See docs/audio.md."""
