"""What the stages share: recipe, records, run directory, lineage, model references, errors and addresses."""
