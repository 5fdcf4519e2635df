"""Figures of the report: computed from measurements, no I/O."""
