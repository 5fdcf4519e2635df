"""Which answers a student may learn from: reads completions.jsonl, writes kept.jsonl and dropped.jsonl with reasons."""
