"""Serves a model with vLLM: the command for this machine, and a server that leaves no process behind.

Reads the recipe's `teacher` and `serve` and the run's student, and writes vLLM's log. Sends no chat request.
"""
