"""Releases: a matrix of jobs, each in processes of its own with bounds; one folder with everything that passed."""
