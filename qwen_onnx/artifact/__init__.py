"""A built thing is a value: its manifest, checksums, locks and publication by one rename."""
