"""Measurements: each asks or runs the models, and returns its results."""
