"""Past one machine: runs in object storage, generation and filters on a Ray cluster."""
