"""Teacher, student before and student after: perplexity, speed, memory, and the report."""
