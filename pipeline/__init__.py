"""What crosses a stage boundary: recipe, records, run directory, lineage, model references. Nothing else."""
