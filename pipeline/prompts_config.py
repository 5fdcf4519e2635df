"""The recipe's `prompts` section, and which part (training, validation or test) a prompt is for.

A hash decides the part: of `prompts.seed` and the normalised conversation, or what the prompt shares with others of its
group (`prompts.group`). The other prompts, their order and the filters have no part in it. So the part is known when
prompts are made and stays when a run grows. Every stage, and every run with the same seed and shares, agrees on it. The
same question in other spacing or case is in the same part.
"""

from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.records import BOM, Asked, Json, Part, Prompt, as_text, question_text
from pipeline.section import AnyValue, OtherModelConfig, Section, as_given, json_value
from pipeline.turns_and_tools import read_tools

HUB = "hub:"  # begins a `prompts.file` that is a data set of the Hub
RowPart = Literal["prompt", "messages", "reference", "id", "slots", "tools"]


class ChooseSlot(Section):
    """A slot filled with k different values. Their order does not make another prompt."""

    choose: int = Field(ge=1)
    """How many values are chosen."""
    from_: list[str] = Field(alias="from", min_length=1)
    """The values to choose from."""

    @model_validator(mode="after")
    def _enough(self) -> "ChooseSlot":
        if self.choose > len(set(self.from_)):
            raise ValueError(f"choose is {self.choose}, but `from` has only {len(set(self.from_))} different values")
        return self


def _kind_of_slot(given: Any) -> str | None:
    return "<list>" if isinstance(given, list | tuple) else "<choice>" if isinstance(given, dict | ChooseSlot) else None


Slot = Annotated[
    Annotated[list[str], Tag("<list>")] | Annotated[ChooseSlot, Tag("<choice>")],
    Discriminator(
        _kind_of_slot,
        custom_error_type="slot",
        custom_error_message="takes a list of values, or `{choose: k, from: […]}`",
    ),
]


def slot_values(slot: list[str] | ChooseSlot) -> list[str]:
    """What a slot may be filled with."""
    return slot.from_ if isinstance(slot, ChooseSlot) else slot


class UserConfig(OtherModelConfig):
    """A second model plays the user: it writes the next message, the teacher answers, and one budget pays both."""

    turns: int = Field(1, ge=1)
    """Messages that it writes; the record has the whole conversation, and the last answer as its text."""
    system: str | None = None
    """What it is told: who the user is, and what they want; null: to react to the answer, and to ask on."""
    max_tokens: int = Field(200, ge=1)
    """Tokens of a message, at most."""


class PromptsConfig(Section):
    """What is asked: a template and the values of its slots, or prompts from a file."""

    count: int | None = Field(None, ge=1)
    """How many prompts are asked, of a file the first ones; null: all of the file. A template needs a number."""
    samples: int = Field(1, ge=1)
    """How many answers are wanted of each prompt, each with its own seed."""
    seed: int = 0
    """Seed of the order in which a template's prompts are drawn, and of the parts: train, validation and test."""
    system: str | None = None
    """A system prompt for every prompt that has none of its own: for the teacher and the student."""
    template: str | None = None
    """The prompt's text: `{slot}` is replaced, `{{` and `}}` are braces."""
    slots: dict[str, Slot] = Field({})
    """The values of each slot: a list, or `{choose: k, from: […]}`. Numbers (007) and `yes` are texts, as written."""
    reference: AnyValue = None
    """What a template's answers are held against, any value: `{slot}` in its texts is replaced, `{{` is a brace.
    That of a flag or a variable is a text, also if it looks like JSON."""
    tools: list[dict[str, Any]] = Field([])
    """The functions that an answer may call, in the OpenAI format: a list, or a JSON file; a row may have its own."""
    file: Path | None = None
    """JSONL, `.csv`, `.tsv`, `.parquet`, a folder saved by `datasets`, `hub:<owner>/<name>`, or `.py` with `rows()`."""
    split: str | None = None
    """The split of a `datasets` folder or of the Hub; null: its only one."""
    columns: dict[RowPart, str | None] = Field({})
    """Where a row has its `prompt` or `messages`, `reference`, `id`, `slots` and `tools`, if under other names."""
    json_columns: list[str] = Field([])
    """Columns whose text is JSON to be read, as in CSV; the text of all others stays as it is."""
    answers: str | None = None
    """A column that holds the teacher's answers already: they are taken in, and nothing is asked."""
    group: str | None = None
    """A column or slot: prompts with one value there are in one part (train, validation or test); null: none."""

    user: UserConfig | None = None
    """null: one question, one answer."""

    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the distinct prompts whose answers choose the best checkpoint."""
    test: float = Field(0.1, gt=0, lt=1)
    """Share of the distinct prompts whose answers only the evaluation sees."""

    @field_validator("tools", mode="before")
    @classmethod
    def _read_tools(cls, given: Any) -> list[Json]:
        given = as_given(given)
        try:
            given = Path(given).read_bytes().removeprefix(BOM) if isinstance(given, str | Path) else json_value(given)
            return read_tools(given)
        except OSError as error:
            raise ValueError(f"{error.strerror}: give a list, or a JSON file of one") from None

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if (self.template is None) == (self.file is None):
            raise ValueError("give either `template` (with `slots` and `count`) or `file`")
        if self.file is None and (self.split or self.columns or self.json_columns or self.answers):
            raise ValueError("`split`, `columns`, `json_columns` and `answers` are for `file`; a template has no rows")
        if self.answers and (self.samples > 1 or self.user):
            key = "samples" if self.samples > 1 else "user"
            raise ValueError(f"answers: a row holds one answer, to its own question; leave out {key}")
        if self.template is not None and self.group not in (None, *self.slots):
            raise ValueError(
                f"group: the template has no slot {self.group!r}; there are {', '.join(self.slots) or 'none'}"
            )
        if self.reference is not None and self.template is None:
            raise ValueError("reference is for a template; the rows of `file` have their own `reference`")
        if self.template is not None and self.count is None:
            raise ValueError("a template needs `count`: how many prompts to draw")
        for name, slot in self.slots.items():
            if isinstance(slot, list) and not slot:
                raise ValueError(f"slot `{name}` is empty; give it at least one value")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave no prompt to train on")
        return self

    def part_of(self, row: Asked) -> Part:
        """What a prompt, and every answer to it, is for: training, validation or test."""
        where = self.position_of(row)
        return "test" if where < self.test else "validation" if where < self.test + self.validation else "train"

    def position_of(self, row: Asked) -> float:
        """Where a prompt stands among all, in [0, 1): with its group, or as it began if `user` has continued it."""
        if (group := self.group_of(row)) is not None:
            return position(f"group\0{as_text(group)}", self.seed)
        began = row.messages[: -2 * self.user.turns] if self.user else row.messages
        continued = any(message.role == "user" for message in began)  # not so: a probe, or a row that people wrote
        return position(question_text(began if continued else row.messages), self.seed)

    def category_of(self, prompt: Prompt, name: str) -> Any:
        """A prompt's reference if it is called so, else the value of its column or slot; None if there is none."""
        reference = self.columns.get("reference") or "reference"
        return prompt.reference if name == reference and prompt.reference is not None else value_of(prompt, name)

    def group_of(self, row: Asked) -> Any:
        """The value that makes a prompt's group, any JSON; None: it belongs to none."""
        return None if self.group is None else value_of(row, self.group)

    @property
    def parted_by(self) -> Json:
        """All that decides which part a prompt is in, as a student's lineage holds it."""
        return self.model_dump(mode="json", include={"seed", "validation", "test", "group"}, exclude_none=True)


def position(text: str, seed: int) -> float:
    """A number in [0, 1), as good as random, that is the same for the same text and seed."""
    return int.from_bytes(blake2b(f"{seed}\0{text}".encode(), digest_size=6).digest()) / (1 << 48)


def value_of(row: Asked, name: str) -> Any:
    """The value of a column or a slot, None if there is neither. The order of a slot's chosen values says nothing."""
    if name in row.columns:
        return row.columns[name]
    value = row.slots.get(name)
    return sorted(value) if isinstance(value, list) else value
