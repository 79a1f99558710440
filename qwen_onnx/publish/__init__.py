"""Packages leave this machine and come back: folders, OCI layouts and registries, Hugging Face Hub, ModelScope."""
