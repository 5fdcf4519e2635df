"""The recipe: one YAML per run, one frozen model per section, unknown keys refused.

`load_recipe` reads the YAML, which the environment (`DISTILL_TEACHER__BASE_URL`) overrides, which flags
(`--teacher.base_url URL`) override. Files of data that the YAML names (`FILES`) are relative to the recipe; runs and
models are relative to the working directory, as --run is. Defaults live in the sections and nowhere else, and the text
under each key is the only description of it: `--help` and docs/settings.md show it. Secrets are never part of a recipe:
`teacher.api_key_env` names the variable that holds the key, and the key is read from there as a SecretStr.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from pipeline.address import weighted_urls
from pipeline.conversation import read_tools
from pipeline.errors import RecipeError
from pipeline.evaluate_config import EvaluateConfig
from pipeline.filters_config import DedupConfig, FiltersConfig, JudgeConfig, RuleConfig
from pipeline.generate_config import GenerateConfig
from pipeline.partition import position, value_of
from pipeline.recipe_errors import explain, explain_flag
from pipeline.recipe_sources import ENV_PREFIX, Variables, check_variables, read_yaml
from pipeline.records import Asked, Json, Part, Prompt, as_text, folded, question_text
from pipeline.sampling_config import SamplingConfig
from pipeline.section import BudgetConfig, PriceConfig, Section, VariableName, checked_urls
from pipeline.student_config import StudentConfig, is_file_name
from pipeline.train_config import TrainConfig
from pipeline.user_config import UserConfig

__all__ = [
    "BudgetConfig",
    "DedupConfig",
    "FiltersConfig",
    "GenerateConfig",
    "JudgeConfig",
    "RuleConfig",
    "SamplingConfig",
    "StudentConfig",
]  # defined elsewhere

# Relative to the recipe, as the `file` of a filter rule is.
FILES = (
    ("teacher", "examples"),
    ("student", "chat_template"),
    ("teacher", "urls_file"),
    ("prompts", "file"),
    ("prompts", "tools"),
    ("train", "test_rows"),
    ("evaluate", "probes_file"),
)
HUB = "hub:"  # begins a `prompts.file` that is a data set of the Hub
RowPart = Literal["prompt", "messages", "reference", "id", "slots", "tools"]


class Example(Section):
    """A question and its right answer, told as two turns."""

    prompt: str
    """What a user asks."""
    answer: str
    """What the teacher is to answer."""


class TeacherConfig(Section):
    """The model that answers, and where it answers."""

    model: str = Field(min_length=1)
    """A Hub id, a local folder, or `embedded:<name>`: the name by which the endpoint knows the model."""
    base_url: str | list[str] = "http://127.0.0.1:8000/v1"
    """Its endpoint, or several that serve the same model: a list, or `a,b`; each with its weight: `URL 4`."""
    urls_file: Path | None = None
    """Its endpoints, one `URL` or `URL WEIGHT` per line, read again and again; `base_url` only names them in ids."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """The environment variable that holds the key; a local server needs none."""
    api_key_header: str = "Authorization"
    """The header that carries the key: `Bearer <key>` in Authorization, the bare key in any other, like `api-key`."""
    headers: dict[str, str] = Field({})
    """Further headers of every request; `${NAME}` in a value is that environment variable."""
    query: dict[str, str] = Field({})
    """Parameters added to every URL, like `{api-version: …}`."""
    price: PriceConfig | None = None
    """The teacher's price, if the table in generate/prices.py does not know it or is wrong."""
    system: str | None = None
    """A system prompt for the teacher only; a prompt's own follows it. What every model is told: `prompts.system`."""
    examples: list[Example] = Field([])
    """For the teacher only, before the prompt: a list of `{prompt: …, answer: …}`, or a JSONL file of them."""
    _section: str = "teacher"

    @field_validator("examples", mode="before")
    @classmethod
    def _read_examples(cls, given: Any) -> Any:
        if not isinstance(given, str | Path):
            return given
        try:
            return msgspec.json.Decoder().decode_lines(Path(given).read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{reason}: give a list or a JSONL file of {{prompt, answer}}") from None

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, given: str | list[str]) -> str | list[str]:
        entries = checked_urls(given)
        return entries[0] if len(entries) == 1 else entries

    @property
    def section(self) -> str:
        """Where the recipe names this model, for messages."""
        return self._section

    @property
    def url_weights(self) -> dict[str, float]:
        """Where the teacher answers, and the weight of each endpoint: its share of the requests beside the others."""
        return weighted_urls([self.base_url] if isinstance(self.base_url, str) else self.base_url)

    @property
    def urls(self) -> list[str]:
        """Where the teacher answers."""
        return [*self.url_weights]

    @property
    def url(self) -> str:
        """The first of them: the one that `serve` starts, and the one in a request's identity."""
        first = self.base_url if isinstance(self.base_url, str) else self.base_url[0]
        return first.split()[0]

    def only_at(self, weights: Mapping[str, float]) -> "TeacherConfig":
        """The same teacher at these endpoints, with their weights, whatever `urls_file` says."""
        urls = [f"{url} {weight:g}" for url, weight in weights.items()]
        return self.model_copy(update={"base_url": urls, "urls_file": None})

    def told_nothing(self) -> "TeacherConfig":
        """The same teacher without `system` and `examples`, for prompts that hold all that it is told."""
        return self.model_copy(update={"system": None, "examples": []})

    def another(self, named: JudgeConfig | UserConfig, section: str) -> "TeacherConfig":
        """The model of that section, told nothing; at a URL of its own without this one's key and headers."""
        model, url = named.model or self.model, named.base_url or self.base_url
        other = self.told_nothing() if url == self.base_url else TeacherConfig(model=model, base_url=url)
        price = named.price or (other.price if model == self.model else None)
        key = named.api_key_env or other.api_key_env
        other = other.model_copy(update={"model": model, "api_key_env": key, "price": price})
        other._section = section
        return other

    def key_header(self) -> dict[str, str]:
        """The header with the key, as it is sent; none without a key."""
        key, bearer = self.api_key(), self.api_key_header.lower() == "authorization"
        return {self.api_key_header: f"{'Bearer ' * bearer}{key.get_secret_value()}"} if key else {}

    def api_key(self) -> SecretStr | None:
        """The key, from the environment only; None if the variable is unset or empty.

        Spaces and line breaks around it are what `$(cat file)` and .env files leave, never part of a key.
        """
        value = os.environ.get(self.api_key_env, "").strip()
        return SecretStr(value) if value else None


class ServeConfig(Section):
    """How `make serve` runs the teacher on this machine. None of it changes an answer."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where vLLM runs; auto: on a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto: vLLM's choice on a GPU, what the hardware multiplies fast on a CPU."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """GiB of KV cache on a CPU; null: chosen from the free memory."""
    ready_timeout_s: float = Field(1800, gt=0)
    """Seconds until the server must be ready."""
    args: list[str] = Field([])
    """Further vLLM flags, a list item for each word. A student gets those that do not describe the teacher."""


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


def slot_values(slot: list[str] | ChooseSlot) -> list[str]:
    """What a slot may be filled with."""
    return slot.from_ if isinstance(slot, ChooseSlot) else slot


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
    slots: dict[str, list[str] | ChooseSlot] = Field({})
    """The values of each slot: a list, or `{choose: k, from: […]}`."""
    reference: Any = None
    """What a template's answers are held against, any value: `{slot}` in its texts is replaced, `{{` is a brace."""
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
        try:
            return read_tools(Path(given).read_bytes() if isinstance(given, str | Path) else given)
        except OSError as error:
            raise ValueError(f"{error.strerror}: give a list, or a JSON file of one") from None

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if (self.template is None) == (self.file is None):
            raise ValueError("give either `template` (with `slots` and `count`) or `file`")
        if self.file is None and (self.split or self.columns or self.json_columns):
            raise ValueError("`split`, `columns` and `json_columns` are for `file`; a template has no rows")
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
        """Where a prompt stands (pipeline.partition): with its group, or as it began if `user` has continued it."""
        if (group := self.group_of(row)) is not None:
            return position(f"group\0{as_text(group)}", self.seed)
        return position(question_text(row.messages[: -2 * self.user.turns] if self.user else row.messages), self.seed)

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


class Recipe(Section):
    """One run, as declared. Built in Python it is what it is given: only `load_recipe` reads variables and flags."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Names the run: its directory is `runs/<name>` unless --run says another."""
    teacher: TeacherConfig
    student: StudentConfig | None = None
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    serve: ServeConfig = ServeConfig()
    generate: GenerateConfig = GenerateConfig()
    budget: BudgetConfig = BudgetConfig()
    filters: FiltersConfig = FiltersConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _one_system_prompt(self) -> "Recipe":
        if self.prompts.system is not None and self.teacher.system is not None:
            raise ValueError(
                "prompts.system and teacher.system are both set; keep prompts.system if the student is told the same, "
                "teacher.system if only the teacher is told"
            )
        return self

    @model_validator(mode="after")
    def _new_weights_are_trained(self) -> "Recipe":
        afterwards = self.train.method == "dpo" or self.train.start is not None  # it has learned then
        if self.student and self.student.new and self.train.weights != "full" and not afterwards:
            key = "train.kd.weights" if self.train.soft else "train.method"
            raise ValueError(
                f"student.model {self.student.model} has random weights, which adapters would leave as they are; "
                f"set {key}: full, got {self.train.weights!r}"
            )
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> "Recipe":
        if self.prompts.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"prompts.samples is {self.prompts.samples}, but with sampling.temperature 0 all of them are the same; "
                "raise the temperature, or set samples to 1"
            )
        return self

    @model_validator(mode="after")
    def _unseen_is_unseen(self) -> "Recipe":
        slots = self.prompts.slots
        for key, names in (("unseen", list(self.evaluate.unseen)), ("adherence", self.evaluate.adherence or [])):
            if self.prompts.template is not None and (unknown := [name for name in names if name not in slots]):
                raise ValueError(f"evaluate.{key}: prompts.slots has no {unknown[0]!r}; there are {', '.join(slots)}")
        if self.evaluate.unseen and self.prompts.template is None:
            raise ValueError("evaluate.unseen is for a template: put such prompts into evaluate.probes_file")
        for name, values in self.evaluate.unseen.items():
            known = {folded(value) for value in slot_values(slots[name])}
            seen = [value for value in values if folded(value) in known]
            if seen or not values:
                why = f"holds {seen[0]!r}, which prompts.slots.{name} has too" if seen else "is empty"
                raise ValueError(f"evaluate.unseen.{name} {why}; give values that no prompt of the run has")
        return self


class _Sources(Recipe, BaseSettings):
    """A recipe out of its YAML, the environment and the flags. `load_recipe` makes a plain Recipe of it."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        cli_parse_none_str="null",
        cli_avoid_json=True,
    )

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first by themselves; then the environment; the YAML is passed to the constructor."""
        return Variables(cls), sources["init_settings"]


def load_recipe(path: Path, flags: list[str] | None = None) -> Recipe:
    """Reads a recipe, lets the environment and then the flags override it, and checks the whole.

    Raises RecipeError naming the file (or flag, or variable), the key and the value.
    """
    flags = flags or []
    data = read_yaml(path)
    check_variables(Recipe)
    _place_files(data, path.parent)
    try:
        sources = _Sources(_cli_parse_args=flags, _cli_exit_on_error=False, **data)
        return Recipe(**dict(sources))
    except SettingsError as error:
        raise RecipeError(explain_flag(error)) from None
    except ValidationError as error:
        problems = [explain(problem, Recipe, path, flags, ENV_PREFIX) for problem in error.errors()]
        raise RecipeError("\n".join(problems)) from None


def _place_files(data: dict[str, Any], folder: Path) -> None:
    """Makes the paths of FILES absolute. What is not a path is left for the check of the whole."""
    for section, key in FILES:
        values = data.get(section)
        if not isinstance(values, dict):
            continue
        given = values.get(key)
        if isinstance(given, str) and is_file_name(given) and not given.startswith(HUB):
            values[key] = str((folder / Path(given).expanduser()).absolute())
