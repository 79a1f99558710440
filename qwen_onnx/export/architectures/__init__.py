"""What each architecture needs of the exporter."""
