"""A function out of a user's Python file, which is trusted as the recipe is. Reads that file only."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError

USER_CODE = "user_code_"  # begins the names of the modules


def load_function(path: Path, name: str, where: str) -> Callable[..., Any]:
    """Imports the file and returns its function. Raises RecipeError that begins with `where`."""
    if not path.is_file():
        raise RecipeError(f"{where}: {path}: no such file; it is looked for beside the recipe")
    spec = importlib.util.spec_from_file_location(f"{USER_CODE}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{where}: {path}: not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise RecipeError(
            f"{where}: {path}: it ends the program when it is imported (SystemExit: {error}); put what only a "
            'script does below `if __name__ == "__main__":`'
        ) from error
    except Exception as error:  # whatever a user's file may raise, it is the file that is wrong
        raise RecipeError(f"{where}: {path}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{where}: {path} has no function `{name}`")
    loaded: Callable[..., Any] = function
    return loaded
