"""Talk to a run's models: teacher, student before and student after side by side on a local page, or one in a terminal.

Reads the recipe and the run; writes nothing but the logs of the servers that it starts.
"""
