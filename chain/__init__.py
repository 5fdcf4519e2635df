"""The whole chain for one recipe, stage after stage: what `make chain` and `make demo` run."""
