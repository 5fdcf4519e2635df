"""The recipe: one YAML a run, one frozen model a section, unknown keys refused.

Flags (`--teacher.base_url URL`) override the environment (`DISTILL_TEACHER__BASE_URL`), which overrides the YAML.
Defaults live here and nowhere else. Secrets are never part of a recipe: `teacher.api_key_env` names the variable
that holds the key, and the key is read from there as a SecretStr.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from pipeline.errors import RecipeError
from pipeline.partition import part_of
from pipeline.recipe_errors import explain
from pipeline.records import Message, Part, folded
from pipeline.train_config import TrainConfig

ENV_PREFIX = "DISTILL_"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PriceConfig(Section):
    """What the teacher costs, in USD a million tokens, when the table in `generate` does not know or is wrong."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class TeacherConfig(Section):
    """The model that answers, and where it answers."""

    model: str = Field(min_length=1)  # a Hub id, a local folder, or embedded:<name>; the name the endpoint knows it by
    base_url: str | list[str] = "http://127.0.0.1:8000/v1"  # or several that serve the same model; `a,b` is two
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; a local server needs none
    api_key_header: str = "Authorization"  # which carries `Bearer <key>`; any other, like `api-key`, carries the key
    headers: dict[str, str] = {}  # sent with every request; `${NAME}` in a value is that environment variable
    query: dict[str, str] = {}  # added to every URL, like {api-version: …}
    price: PriceConfig | None = None

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, given: str | list[str]) -> str | list[str]:
        urls = given.split(",") if isinstance(given, str) else given
        urls = list(dict.fromkeys(url.strip().rstrip("/") for url in urls))
        if not urls:
            raise ValueError("needs at least one URL")
        for url in urls:
            TypeAdapter(AnyHttpUrl).validate_python(url)
        return urls[0] if len(urls) == 1 else urls

    @property
    def urls(self) -> list[str]:
        """Where the teacher answers."""
        return [self.base_url] if isinstance(self.base_url, str) else self.base_url

    @property
    def url(self) -> str:
        """The first of them: the one that `serve` starts, and the one in a request's identity."""
        return self.urls[0]

    def api_key(self) -> SecretStr | None:
        """The key, from the environment only; None where the variable is unset or empty.

        Spaces and line breaks around it are what `$(cat file)` and .env files leave, never part of a key.
        """
        value = os.environ.get(self.api_key_env, "").strip()
        return SecretStr(value) if value else None


class ServeConfig(Section):
    """How `make serve` runs the teacher on this machine; none of it changes an answer."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_gib: float | None = Field(None, gt=0)  # CPU only; None: chosen from the memory that is free
    ready_timeout_s: float = Field(1800, gt=0)
    args: list[str] = []  # any further vLLM flags, as they are


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(min_length=1)  # a Hub id, a folder, embedded:<name>, or prune:<k>: k layers of the teacher


class ChooseSlot(Section):
    """A slot filled with k different values, in any order: the orders count as one prompt."""

    choose: int = Field(ge=1)
    from_: list[str] = Field(alias="from", min_length=1)
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

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

    count: int | None = Field(None, ge=1)  # None: all of the file
    seed: int = 0
    system: str | None = None
    template: str | None = None  # `{slot}` is replaced; `{{` and `}}` are braces
    slots: dict[str, list[str] | ChooseSlot] = {}
    file: Path | None = None  # JSONL of {"messages": […]} or {"prompt": "…"}, or a folder saved by `datasets`
    validation: float = Field(0.05, gt=0, lt=1)  # share of the distinct prompts that choose the best checkpoint
    test: float = Field(0.1, gt=0, lt=1)  # share of the distinct prompts that only the evaluation sees

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if (self.template is None) == (self.file is None):
            raise ValueError("give either `template` (with `slots` and `count`) or `file`")
        if self.template is not None and self.count is None:
            raise ValueError("a template needs `count`: how many prompts to draw")
        for name, slot in self.slots.items():
            if isinstance(slot, list) and not slot:
                raise ValueError(f"slot `{name}` is empty; give it at least one value")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave no prompt to train on")
        return self

    def part_of(self, messages: Sequence[Message]) -> Part:
        """What a prompt is for: training, validation or test."""
        return part_of(messages, seed=self.seed, validation=self.validation, test=self.test)


class SamplingConfig(Section):
    """How the teacher samples. All of it is sent with every request, always."""

    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(500, ge=1)
    seed: int = 0  # each request's own seed is derived from this and its id
    extra: dict[str, Any] = {}  # further fields of the request, as they are: top_k, chat_template_kwargs, …

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = {"temperature", "top_p", "max_tokens", "seed", "model", "messages", "stream", "n"} & extra.keys()
        if taken:
            raise ValueError(
                f"cannot hold {', '.join(sorted(taken))}: the recipe sets that elsewhere, or the client does"
            )
        return extra

    def fields(self) -> dict[str, Any]:
        """What a request carries of it."""
        return {**self.model_dump(exclude={"extra"}), **self.extra}


class GenerateConfig(Section):
    """How hard the client works the endpoint, and for how long it bears with it."""

    mode: Literal["online", "batch"] = "online"  # batch: the endpoint's Batch API, at half the price, within a day
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # requests in flight, an endpoint
    processes: int = Field(1, ge=1)  # on this machine; more than one when a single core cannot keep the server full
    requests_per_minute: float | None = Field(None, gt=0)  # None: as the endpoint's headers say, if they do
    tokens_per_minute: float | None = Field(None, gt=0)
    # Of one attempt. None: 300, or 3600 at a server that shows what it is working on, as vLLM does.
    request_timeout_s: float | None = Field(None, gt=0)
    deadline_s: float | None = Field(None, gt=0)  # in flight, over all attempts of a request; None: three such times
    max_attempts: int = Field(6, ge=1)
    give_up_s: float = Field(600, gt=0)  # how long an endpoint may be down before the run ends
    batch_poll_s: float = Field(60, gt=0)  # between two looks at a batch, at most


class BudgetConfig(Section):
    """What a run may spend at most, over all calls; requests in flight count as what they can cost at most."""

    usd: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)  # prompt and completion together


class RuleConfig(BaseModel):
    """One filter rule: its name and its own settings, which `filters` checks."""

    model_config = ConfigDict(frozen=True, extra="allow")
    rule: str


class DedupConfig(Section):
    """Which answers say the same as another; looked for among those that the rules let pass."""

    exact: bool = True  # drop answers that differ only in case, spaces, punctuation and symbols
    near: float | None = Field(0.8, ge=0.5, le=1)  # drop answers whose n-grams are as similar (Jaccard); None: none
    ngram: int = Field(3, ge=1, le=20)  # characters of an n-gram
    prompts: float | None = Field(None, ge=0.5, le=1)  # drop answers to prompts as similar; 1: to the same prompt
    against: list[Path] = []  # other runs; answers like those they kept are dropped
    contamination: list[Path] = []  # runs (their validation and test rows) or JSONL files of prompts

    @model_validator(mode="after")
    def _exact_with_near(self) -> "DedupConfig":
        if self.near is not None and not self.exact:
            raise ValueError("`exact: false` needs `near: null`: what is the same is also nearly the same")
        return self


RUBRIC = {
    "fluency": "the language is the request's own, natural and without errors",
    "request": "it does what the request asks, all of it, and nothing else",
    "audience": "it fits those it is for, in words, length and content",
    "coherence": "one thing follows from another, and it comes to an end",
    "facts": "nothing in it is false or invented where the truth matters",
}


class JudgeConfig(Section):
    """A model that scores each answer from 1 to 5 against a rubric; answers under `min_score` are dropped."""

    model: str | None = Field(None, min_length=1)  # None: the teacher itself, which is told
    base_url: str | None = None  # None: the teacher's
    api_key_env: str = "OPENAI_API_KEY"
    price: PriceConfig | None = None
    budget: BudgetConfig = BudgetConfig()  # its own
    rubric: dict[str, str] = Field(RUBRIC, min_length=1)  # what is scored, and what it means
    min_score: int = Field(3, ge=1, le=5)
    max_tokens: int = Field(200, ge=16)
    seed: int = 0
    attempts: int = Field(3, ge=1)  # how often an answer is judged whose verdict cannot be read
    schema_: bool = Field(True, alias="schema")  # ask for JSON by schema; false for an endpoint that knows none
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @field_validator("rubric")
    @classmethod
    def _plain_names(cls, rubric: dict[str, str]) -> dict[str, str]:
        for name in rubric:
            if not name.isidentifier() or name in ("score", "reason"):
                raise ValueError(f"name {name!r} must be a plain word other than score and reason")
        return rubric


class FiltersConfig(Section):
    """Which answers are worth learning from."""

    rules: list[RuleConfig] = []
    dedup: DedupConfig | None = None  # None: duplicates stay
    judge: JudgeConfig | None = None  # None: the rules alone decide
    warn_keep_rate: float = Field(0.5, ge=0, le=1)  # the chapter: 50% or more is safe
    min_keep_rate: float | None = Field(None, ge=0, le=1)  # under it the stage ends with 1; None: no floor


class EvaluateConfig(Section):
    """What the report measures, of the teacher, the student before and after, and of every other model named."""

    models: list[str] = []  # more to compare: a folder, a Hub id, embedded:<name>, or another run's folder
    max_rows: int = Field(200, ge=1)  # test rows scored for perplexity
    probes: int = Field(64, ge=0)  # prompts that nobody was asked yet; 0: none
    probes_file: Path | None = None  # such prompts, as prompts.file has them; None: new combinations of the slots
    unseen: dict[str, list[str]] = {}  # values that the slots do not have: how the student does beyond them
    unseen_probes: int = Field(32, ge=1)  # prompts with them
    adherence: list[str] | None = None  # slots whose values an answer names; None: the rule's `adherence`, else all
    judge: JudgeConfig | None = None  # scores and compares the answers; None: the judge of `filters`
    ask_teacher: bool = False  # have a teacher whose weights are elsewhere answer the probes at its endpoint: may cost
    seed: int = 0  # of the choice of probes
    speed_requests: int = Field(64, ge=1)
    speed_concurrency: int = Field(32, ge=1)
    speed_max_tokens: int = Field(64, ge=1)
    speed_repeats: int = Field(3, ge=1)  # how often all of these requests are timed; the median counts
    speed_alone: int = Field(8, ge=1)  # requests timed one after the other


class Recipe(BaseSettings):
    """One run, as declared."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        cli_parse_none_str="null",
        cli_avoid_json=True,
    )

    name: str = Field(pattern=r"^[\w.-]+$")
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
    def _unseen_is_unseen(self) -> "Recipe":
        slots = self.prompts.slots
        for key, names in (("unseen", list(self.evaluate.unseen)), ("adherence", self.evaluate.adherence or [])):
            if self.prompts.template is not None and (unknown := [name for name in names if name not in slots]):
                raise ValueError(f"evaluate.{key}: prompts.slots has no {unknown[0]!r}; there are {', '.join(slots)}")
        if self.evaluate.unseen and self.prompts.template is None:
            raise ValueError("evaluate.unseen is for a template: put such prompts into evaluate.probes_file")
        for name, values in self.evaluate.unseen.items():
            known = {folded(value) for value in slot_values(slots[name])}
            if not values or (seen := [value for value in values if folded(value) in known]):
                why = f"holds {seen[0]!r}, which prompts.slots.{name} has too" if values else "is empty"
                raise ValueError(f"evaluate.unseen.{name} {why}; give values that no prompt of the run has")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first by themselves; then the environment; the YAML is passed to the constructor."""
        return env_settings, init_settings


def load_recipe(path: Path, flags: list[str] | None = None) -> Recipe:
    """Reads a recipe, lets the environment and then the flags override it, and checks the whole.

    Raises RecipeError naming the file (or flag, or variable), the key and the value.
    """
    flags = flags or []
    data = _read_yaml(path)
    try:
        return Recipe(_cli_parse_args=flags, _cli_exit_on_error=False, **data)
    except SettingsError as error:
        raise RecipeError(str(error.__cause__ or error).replace("error parsing CLI: ", "")) from None
    except ValidationError as error:
        problems = [explain(problem, Recipe, path, flags, ENV_PREFIX) for problem in error.errors()]
        raise RecipeError("\n".join(problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder, not a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(data).__name__}")
    return data
