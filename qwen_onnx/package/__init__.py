"""Packages: a verified artifact as one flat folder that Foundry Local registers, with everything that proves it."""
