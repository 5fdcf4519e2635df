"""The recipe: one YAML per run, one frozen model per section, unknown keys refused.

`load_recipe` reads the YAML, which the environment (`DISTILL_TEACHER__BASE_URL`) overrides, which flags
(`--teacher.base_url URL`) override. Files of data that the YAML names (`FILES`) are relative to the recipe; runs and
models are relative to the working directory, as --run is. Defaults live in the sections and nowhere else, and the text
under each key is the only description of it: `--help` and docs/settings.md show it. Secrets are never part of a recipe:
`teacher.api_key_env` names the variable that holds the key, and the key is read from there as a SecretStr.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from pipeline.errors import RecipeError
from pipeline.evaluate_config import EvaluateConfig
from pipeline.filters_config import FiltersConfig
from pipeline.generate_config import GenerateConfig
from pipeline.prompts_config import HUB, PromptsConfig, slot_values
from pipeline.recipe_errors import explain_all, explain_flag
from pipeline.recipe_sources import ENV_PREFIX, Variables, Yaml, check_variables, expanded, read_yaml
from pipeline.records import folded
from pipeline.sampling_config import SamplingConfig
from pipeline.section import BudgetConfig, Section
from pipeline.serve_config import ServeConfig
from pipeline.student_config import StudentConfig, is_file_name
from pipeline.teacher_config import TeacherConfig
from pipeline.train_config import TrainConfig

# Relative to the recipe, as the files that a rule names are.
FILES = (
    ("teacher", "examples"),
    ("student", "chat_template"),
    ("teacher", "urls_file"),
    ("prompts", "file"),
    ("prompts", "tools"),
    ("train", "test_rows"),
    ("evaluate", "probes_file"),
)


class Recipe(Section):
    """One run, as declared. Built in Python it is what it is given: only `load_recipe` reads variables and flags."""

    name: str
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

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        letters = "".join(char for char in name if unicodedata.category(char) not in ("Mn", "Mc"))  # नि without its ि
        if not re.fullmatch(r"[\w.-]+", letters) or not name.strip("."):
            raise ValueError("names a folder: letters, digits, -, _, and dots between them, as in my_tickets")
        return name

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
        if self.student is None or self.train.weights == "full" or afterwards:
            return self
        why = None
        if self.student.new:
            why = "has random weights, which adapters would leave as they are"
        elif self.student.pruned and self.train.soft:
            why = "has lost layers, which adapters cannot make up for"
        if why:
            key = "train.kd.weights" if self.train.soft else "train.method"
            raise ValueError(f"student.model {self.student.model} {why}; set {key}: full, got {self.train.weights!r}")
        return self

    @model_validator(mode="after")
    def _given_answers_have_no_logprobs(self) -> "Recipe":
        if self.prompts.answers is not None and self.sampling.logprobs is not None:
            raise ValueError(
                f"sampling.logprobs is {self.sampling.logprobs}, but the answers of prompts.answers have none: leave "
                "it out, and train with train.kd.teacher: local or served"
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
        return Variables(cls), Yaml(cls, sources["init_settings"].init_kwargs)


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
        raise RecipeError(explain_flag(error, flags)) from None
    except ValidationError as error:
        raise RecipeError("\n".join(explain_all(error.errors(), Recipe, path, flags))) from None


def _place_files(data: dict[str, Any], folder: Path) -> None:
    """Makes the paths of FILES absolute. What is not a path is left for the check of the whole."""
    for section, key in FILES:
        values = data.get(section)
        if not isinstance(values, dict):
            continue
        given = values.get(key)
        if isinstance(given, str) and is_file_name(given) and not given.startswith(HUB):
            values[key] = str((folder / expanded(given)).absolute())
