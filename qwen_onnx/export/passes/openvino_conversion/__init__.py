"""OpenVINO's IR and its package."""
