"""Programs that train what the repository carries; not in the wheel."""
