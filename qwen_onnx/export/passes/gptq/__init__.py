"""``CalibratedGptq``: GPTQ from calibration text, matrix by matrix."""
