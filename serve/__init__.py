"""Serving a teacher with vLLM: the command for this machine, and a server that leaves nothing behind.

Reads the recipe's `teacher` and `serve`, writes vLLM's log. What is asked of the server is left to the other stages.
"""
