"""``OpenVINOConversion``: a checkpoint as OpenVINO's IR."""
