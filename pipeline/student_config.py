"""The recipe's `student` section: the model that learns."""

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from pipeline.section import Section

PRUNE, NEW = "prune:", "new:"  # how a reference begins to a student that training makes first
CHATML = "chatml"
SIZES = {"m": 10**6, "b": 10**9}
BUILT = "built.json"  # in student-init: what the student was made from


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(min_length=1)
    """A Hub id, a folder, `embedded:<name>`, `prune:<k>` (k layers of the teacher), or `new:30m` (random weights)."""
    tokenizer: str | None = Field(None, min_length=1)
    """new: the model whose tokenizer it uses; null: one trained on the training rows."""
    chat_template: str | None = Field(None, min_length=1)
    """In place of the student's own: `chatml`, or a Jinja file; null: its own, and `chatml` for a new tokenizer."""
    system: str | None = None
    """The student's system prompt, in place of the prompt's own; null: the prompt's own; empty: none."""

    @property
    def new(self) -> int | None:
        """Of `new:<size>`, about how many parameters; None for any other student."""
        found = re.fullmatch(rf"{NEW}(\d+(?:\.\d+)?)([mb])", self.model)
        return round(float(found[1]) * SIZES[found[2]]) if found else None

    @property
    def pruned(self) -> int | None:
        """Of `prune:<k>`, the number of layers; None for any other student."""
        found = re.fullmatch(rf"{PRUNE}(\d+)", self.model)
        return int(found[1]) if found else None

    @property
    def made(self) -> bool:
        """Whether the student is cut out of the teacher, or new."""
        return self.model.startswith((PRUNE, NEW))

    @property
    def built(self) -> bool:
        """Whether training makes the student's folder first, the run's student-init."""
        return self.made or self.chat_template is not None

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, given: str | None) -> str | None:
        """The template itself: a recipe that was resolved holds its text, which has braces."""
        if given is None or not is_file_name(given):
            return given
        try:
            return Path(given).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"{error.strerror}: give {CHATML}, or a file with a Jinja template") from None

    @model_validator(mode="after")
    def _made_has_a_size(self) -> "StudentConfig":
        if self.model.startswith(PRUNE) and not self.pruned:
            raise ValueError(f"model {self.model}: give a number of layers, at least 1, as in prune:8")
        if self.model.startswith(NEW) and not SIZES["m"] <= (self.new or 0) <= 2 * SIZES["b"]:
            raise ValueError(f"model {self.model}: give a size from 1m to 2b, as in new:30m")
        if self.tokenizer is not None and self.new is None:
            raise ValueError(f"tokenizer is for a new student (model: new:30m); {self.model} has its own")
        return self


def is_file_name(template: str) -> bool:
    """Whether a `chat_template` names a file: neither `chatml` nor a template's text."""
    return template != CHATML and "{" not in template
