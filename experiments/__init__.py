"""Experiments: several trainings on one run, compared on the same test rows and probes."""
