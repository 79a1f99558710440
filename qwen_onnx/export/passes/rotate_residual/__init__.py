"""``RotateResidual``: a random rotation of the residual stream."""
