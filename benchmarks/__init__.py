"""Measurements of this project against its limits and its peers: both sides in one call, medians, a ratio printed."""
