"""Real local servers that misbehave on purpose, and fakes of what cannot be had."""
