"""The verifiers: rules that hold an answer against a reference, run it, or check its form (docs/verifiers.md)."""
