"""Files that a rule's settings name: they lie beside the recipe."""

from pathlib import Path

from pydantic import ValidationInfo


def beside_recipe(name: str | Path, info: ValidationInfo) -> Path:
    """The path of a file that the recipe names. Raises ValueError if there is none.

    The recipe's folder is `folder` in the context of validation; without one it is the current folder.
    """
    path = Path((info.context or {}).get("folder", "."), name)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it is looked for beside the recipe")
    return path
