"""Past one machine: runs in object storage; servers, generation, filters and training on a Ray cluster."""
