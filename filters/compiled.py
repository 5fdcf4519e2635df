"""Loops over the bytes of many rows, compiled by numba. Reads and writes nothing.

A compiled function checks no bounds: its docstring says what its arguments must hold. It may call only what is in its
own file: numba keeps what it compiled beside that file (or in NUMBA_CACHE_DIR), and compiles anew when that changes.
Counters of a byte, places that are unsigned, and `&` and `|` of conditions in place of `and` and `or` let the compiler
make vector instructions of an inner loop, which are ten times as fast.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]

BYTES = types.Array(types.uint8, 1, "C", readonly=True)
PLACES = types.Array(types.int64, 1, "C", readonly=True)
FLAGS = types.Array(types.bool_, 1, "C", readonly=True)
NUMBERS = types.int64[::1]  # to be written
byte = types.uint8
place = types.uint64


def compiled(signature: Any) -> Callable[[Function], Function]:
    """Compiles a function for the types of `signature`, when its file is imported."""

    def compile_it(function: Function) -> Function:
        try:
            made: Function = njit(signature, cache=True)(function)
        except RuntimeError:  # there is no folder to keep it in
            made = njit(signature)(function)
        return made

    return compile_it
