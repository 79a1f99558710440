"""Our Olive passes, a folder each."""
