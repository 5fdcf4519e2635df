"""Experiments: several trainings on one run, compared on the same held-out rows and probes."""
