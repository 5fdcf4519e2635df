"""Cards: the README.md of a student and of its data set, filled from the lineage.

Takes the recipe and the lineage, returns Markdown with huggingface_hub's metadata; writes no file. The text is in the
templates beside this module. A folder of this machine is named by its last part only, and where a model answered is
left out.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.instructions import system_of_student, with_system_of_rows
from pipeline.lineage import answered_by, taught_by
from pipeline.models import is_path
from pipeline.prompts_config import slot_values
from pipeline.recipe import Recipe
from pipeline.students import AFTER
from train.checks.licences import LicenceChain, Terms, licence_table, model_name, on_the_hub, strictest, terms_of
from train.checks.pair import OUR_TAG, teachers_terms, told_only
from train.teacher import known_files, read_card

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import CardData

CARD = "README.md"
TAGS = [OUR_TAG, "distillation"]
TESTED_ON = "prompts of the run that no training saw"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
TEXT = {"dtype": "string"}  # as `datasets` writes a column's type into a card
COLUMN_TYPES = {"prompt": {"list": "json"}, "completion": {"list": "json"}}
# Keys of the lineage. Where a model answered, by what key, and how a program is started:
NOT_PUBLIC = {"endpoints", "by_endpoint", "nodes", "base_url", "api_key_env", "command"}
MODELS = {"student", "teacher", "earlier_teachers", "initialised_from", "asked", "earlier", "served", "model"}
FILES = {"test_rows", "start", "against", "contamination", "file", "files", "database", "schema"}
FINDINGS = {"finding", "fix", "wanted"}  # words that may name a model or a file
AS_THEY_ARE = {"schema", "rubric", "sampling"}  # mappings whose keys are the user's own
ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")
LONG_PATH = re.compile(r"(~|[A-Za-z]:)?[/\\][^\s/\\]+[/\\]\S+")
LANGUAGES = {"hangul": "ko", "kana": "ja", "thai": "th", "greek": "el", "hebrew": "he"}  # scripts of one language


def model_card(
    recipe: Recipe,
    lineage: Mapping[str, Any],
    *,
    repo: str = ".",
    adapter: bool | None = None,
    gguf: str | None = None,
    data: str | None = None,
) -> str:
    """A student's card. `adapter`: False for one that was merged; `gguf`: the file's name, if it is one.

    `data`: the data set's repository, if it has one.
    """
    from huggingface_hub import EvalResult, ModelCardData

    recipe = with_system_of_rows(recipe, lineage["train"])
    origin, teachers = lineage["train"]["initialised_from"], _terms(recipe, taught_by(recipe, lineage))
    names = lineage["train"].get("earlier_teachers", [])
    earlier = {name: _terms_by_card(name) for name in names if name not in teachers}
    lineage = without_places(lineage, recipe)
    train = lineage["train"]
    adapter = train["weights"] != "full" if adapter is None else adapter
    chain, base = _chain(teachers | earlier, origin), published(origin) if origin else None
    scores = _scores(lineage)
    tags = [*TAGS, *(["lora"] if adapter else []), *(["gguf"] if gguf else [])]
    metadata = ModelCardData(
        model_name=lineage["name"],
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        library_name="gguf" if gguf else "peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        **on_the_hub(chain.student),
        language=languages(recipe),
        datasets=[data] if data else None,
        tags=tags,
        eval_results=[
            EvalResult("text-generation", "distillate", TESTED_ON, metric, value[AFTER])
            for metric, value in scores.items()
            if AFTER in value
        ]
        or None,
    )
    values = {"repo": repo, "train": train, "adapter": adapter, "gguf": gguf, "base": base}
    values |= {"messages": json.dumps(_example(recipe), ensure_ascii=False), "scores": scores}
    licences = {"chain": chain, "teachers": teachers, "earlier": earlier}
    return _card("model.md.j2", metadata, recipe, lineage, {**licences, **values})


def _scores(lineage: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What was measured of this very student and its teacher: by metric and model."""
    evaluation = lineage.get("evaluate", {})
    if evaluation.get("created", "") < lineage["train"]["created"]:
        return {}
    found = {"accuracy": evaluation.get("right"), "perplexity": evaluation.get("perplexity")}
    return {metric: values for metric, values in found.items() if values}


def _example(recipe: Recipe) -> list[dict[str, str]]:
    """A conversation that the student can go on with; a template's slots have their first values."""
    question = recipe.prompts.template or "Write here what the student is to answer."
    for name, slot in recipe.prompts.slots.items():
        values = slot_values(slot)
        chosen = values[:1] if isinstance(slot, list) else values[: slot.choose]
        question = question.replace(f"{{{name}}}", ", ".join(chosen))
    if recipe.prompts.template:
        question = question.replace("{{", "{").replace("}}", "}")
    system = system_of_student(recipe)
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, {"role": "user", "content": question}]


def dataset_card(
    recipe: Recipe,
    lineage: Mapping[str, Any],
    rows: Mapping[str, int],
    *,
    repo: str = ".",
    columns: Collection[str] = (),
) -> str:
    """The card of a data set. `rows`: how many there are in each part.

    `columns`: those to declare, because what tools are called with has no shape that all parts share.
    """
    from huggingface_hub import DatasetCardData

    teachers = _terms(recipe, answered_by(recipe.teacher.model, lineage))
    chain = _chain(teachers, None)
    files = [{"split": part, "path": f"data/{part}.jsonl"} for part in rows]
    features = [{"name": name, **COLUMN_TYPES.get(name, TEXT)} for name in columns]
    metadata = DatasetCardData(
        **on_the_hub(chain.answers),
        language=languages(recipe),
        task_categories=["text-generation"],
        size_categories=[next((name for below, name in SIZES if sum(rows.values()) < below), "n>1M")],
        tags=[*TAGS, *(["synthetic"] if recipe.prompts.answers is None else [])],  # else people may have answered
        configs=[{"config_name": "default", "data_files": files}],
        dataset_info={"features": features} if features else None,
    )
    values = {"chain": chain, "teachers": teachers, "earlier": {}, "repo": repo, "rows": rows, "base": None}
    return _card("dataset.md.j2", metadata, recipe, without_places(lineage, recipe), values)


def published(reference: str) -> str:
    """The name a model is known by elsewhere: a Hub id, or the last part of a folder."""
    return _last_part(reference) if _is_folder(reference) else model_name(reference)


def languages(recipe: Recipe) -> list[str] | None:
    """The languages that the filters let pass, as far as the rules name them."""
    for rule in (rule.model_dump() for rule in recipe.filters.rules):
        if rule["rule"] == "language":
            return list(rule["allowed"])
        if rule["rule"] == "script_ratio":
            named = rule.get("script", [])
            scripts = [named] if isinstance(named, str) else named
            if found := [LANGUAGES[script] for script in scripts if script in LANGUAGES]:
                return found
    return None


def without_places(lineage: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The lineage as it is passed on: models by their published names, files by their last part, no endpoints.

    What is a place is known by its key, so that a text of the user's that begins with a slash stays as it is.
    """
    models = (recipe.teacher.model, recipe.student.model if recipe.student else "")
    named = {place: _last_part(place) for place in _places(lineage)}
    named |= {model: published(model) for model in models if _is_folder(model)}
    found: dict[str, Any] = _passed_on(lineage, named)
    return found


def _places(value: Any, key: str = "", *, own: bool = False) -> Iterator[str]:
    """The files and folders that the lineage names. `own`: in a user's own rule, where any key may hold one."""
    if isinstance(value, Mapping) and key not in AS_THEY_ARE:
        for name, part in value.items():
            yield from _places(part, name, own=own or _is_own_rule(value))
    elif isinstance(value, list):
        for part in value:
            yield from _places(part, key, own=own)
    elif isinstance(value, str):
        by_key = key == "file" if own else key in FILES or (key in MODELS and _is_folder(value))
        if by_key or (own and LONG_PATH.fullmatch(value)):
            yield value


def _passed_on(value: Any, named: Mapping[str, str], key: str = "") -> Any:
    """A value of the lineage with names in place of places, and without what is not public."""
    if isinstance(value, Mapping) and key not in AS_THEY_ARE:
        hidden = set() if _is_own_rule(value) else NOT_PUBLIC
        return {name: _passed_on(part, named, name) for name, part in value.items() if name not in hidden}
    if isinstance(value, list):
        return [_passed_on(part, named, key) for part in value]
    if isinstance(value, str):
        return _with_names(value, named) if key in FINDINGS else named.get(value, value)
    return value


def _is_own_rule(value: Mapping[str, Any]) -> bool:
    return str(value.get("rule", "")).startswith("function")


def _with_names(text: str, named: Mapping[str, str]) -> str:
    """Text in which the places that it names are passed on."""
    for place in sorted(named, key=len, reverse=True):
        if named[place] != place:
            name = named[place].replace("\\", r"\\")
            text = re.sub(rf"(?<![\w/.~-]){re.escape(place)}(?![\w/-])", name, text)
    return text


def _is_folder(reference: str) -> bool:
    """Whether a model reference is a folder, of this machine or of the one that the run was made on."""
    return is_path(reference) or ABSOLUTE.match(reference) is not None


def _last_part(path: str) -> str:
    """The name of a file or folder, there or not."""
    name = (PureWindowsPath if "\\" in path else PurePath)(path).name
    return name if name not in ("", "..") else Path(path).resolve().name or path


def _terms(recipe: Recipe, teachers: Collection[str]) -> dict[str, Terms | None]:
    return teachers_terms(recipe, {name: known_files(name) for name in teachers})


def _chain(teachers: Mapping[str, Terms | None], origin: str | None) -> LicenceChain:
    """`origin`: the model that the student was before training; None for a data set, and a new one."""
    return LicenceChain(teachers[strictest(teachers)], _terms_by_card(origin) if origin else None, not origin)


def _terms_by_card(model: str) -> Terms | None:
    """The terms of a model by its name and its own card."""
    return terms_of(model, read_card(known_files(model)).licence)


def _card(
    template: str, metadata: "CardData", recipe: Recipe, lineage: Mapping[str, Any], values: Mapping[str, Any]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    environment.filters["published"] = published
    environment.filters["quoted"] = shlex.quote  # for a shell
    environment.filters["ollama"] = lambda name: re.sub(r"[^A-Za-z0-9._-]", "", name).strip("-.") or "student"
    environment.filters["python"] = partial(json.dumps, ensure_ascii=False)
    environment.filters["number"] = "{:,}".format
    sections = [section for section in lineage.values() if isinstance(section, dict)]
    versions = {name: version for section in sections for name, version in section.get("versions", {}).items()}
    text = environment.get_template(template).render(
        recipe=recipe,
        lineage=lineage,
        teacher=" and ".join(map(published, values["teachers"])),
        read=licence_table().read,
        told=told_only(recipe),
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        **values,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"
