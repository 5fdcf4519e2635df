"""Prompts, and the client that puts them to a teacher. Light: no torch, no transformers, no vllm."""
