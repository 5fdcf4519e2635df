"""Asks a teacher the prompts of a recipe. Light: no torch, no transformers, no vllm.

    from generate import generate, agenerate

    summary = generate("recipes/mine.yaml")
    summary = await agenerate(recipe, run="runs/mine")   # in a notebook, or any running event loop

Importing this package imports nothing else: the two functions come from generate.run when they are first named.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generate.run import agenerate, generate

__all__ = ["agenerate", "generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from generate import run

    return getattr(run, name)
