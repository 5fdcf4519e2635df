"""Cards: the README.md of a student and of its data set, filled from the lineage.

Takes the recipe and the lineage, returns Markdown with metadata as the Hub reads it; writes no file. A folder of this
machine is named by its last part only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.recipe import Recipe
from train.checks.chain import OUR_TAG
from train.checks.licences import LicenceChain, Terms, model_name, on_the_hub, table, terms_of
from train.student import PRUNE
from train.teacher import known_files, read_card

CARD = "README.md"
TAGS = [OUR_TAG, "distillation"]
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LANGUAGES = {"hangul": "ko", "kana": "ja", "thai": "th", "greek": "el", "hebrew": "he"}  # scripts of one language
NO_SCORES = {"rows"}  # numbers of lineage's evaluate section that are no score


def model_card(
    recipe: Recipe, lineage: Mapping[str, Any], *, repo: str = ".", adapter: bool | None = None, data: str | None = None
) -> str:
    """A student's card. `adapter`: False for one that was merged; `data`: its data set's repository, if it has one."""
    train = lineage["train"]
    adapter = train["weights"] != "full" if adapter is None else adapter
    origin = train["initialised_from"]
    chain = _chain(recipe, origin)
    metadata = {
        "base_model": published(origin),
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        **on_the_hub(chain.student),
        "language": languages(recipe),
        "datasets": [data] if data else None,
        "tags": [*TAGS, *(["lora"] if adapter else [])],
    }
    values = _common(recipe, lineage, chain, origin) | {
        "repo": repo,
        "base": published(origin),
        "pruned": train["student"].removeprefix(PRUNE) if train["student"].startswith(PRUNE) else "",
        "adapter": adapter,
        "rank": train["hyperparameters"].get("lora_rank"),
        "train": train,
        "hyperparameters": {name: train["hyperparameters"][name] for name in _shown(train)},
        "scores": _scores(lineage),
        "headline": lineage.get("evaluate", {}).get("headline", ""),
    }
    return _card("model.md.j2", metadata, values, recipe)


def dataset_card(recipe: Recipe, lineage: Mapping[str, Any], rows: Mapping[str, int], *, repo: str = ".") -> str:
    """The card of a data set. `rows`: how many there are in each part."""
    chain = _chain(recipe, None)
    terms = chain.teacher
    files = [{"split": part, "path": f"data/{part}.jsonl"} for part in rows]
    metadata = {
        **on_the_hub(terms.licence if terms and terms.verdict == "allowed" else "other"),
        "language": languages(recipe),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for below, name in SIZES if sum(rows.values()) < below), "n>1M")],
        "tags": [*TAGS, "synthetic"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    values = _common(recipe, lineage, chain, None) | {"repo": repo, "rows": rows}
    return _card("dataset.md.j2", metadata, values, recipe)


def published(reference: str) -> str:
    """The name a model is known by elsewhere: a Hub id, or the last part of a folder."""
    folder = Path(reference).expanduser()
    if reference.startswith(("/", "./", "../", "~")) or folder.is_dir():
        return folder.resolve().name
    return model_name(reference)


def languages(recipe: Recipe) -> list[str] | None:
    """The languages that the filters let pass, as far as the rules name them."""
    for rule in (rule.model_dump() for rule in recipe.filters.rules):
        if rule["rule"] == "language":
            return list(rule["allowed"])
        if rule["rule"] == "script_ratio" and (language := LANGUAGES.get(rule.get("script", ""))):
            return [language]
    return None


def without_paths(text: str, recipe: Recipe) -> str:
    """Text in which the recipe's models go by their published names."""
    for reference in (recipe.teacher.model, recipe.student.model if recipe.student else ""):
        if "/" in reference and published(reference) != reference:
            text = text.replace(reference, published(reference))
    return text


def _card(template: str, metadata: Mapping[str, Any], values: Mapping[str, Any], recipe: Recipe) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"cell": _cell, "number": "{:,}".format}
    given = {name: value for name, value in metadata.items() if value is not None}
    head = yaml.safe_dump(given, allow_unicode=True, sort_keys=False)
    return f"---\n{head}---\n\n" + without_paths(environment.get_template(template).render(values), recipe)


def _common(recipe: Recipe, lineage: Mapping[str, Any], chain: LicenceChain, origin: str | None) -> dict[str, Any]:
    generate, filters = lineage.get("generate", {}), lineage.get("filters", {})
    parts = [{"part": "teacher", "model": published(recipe.teacher.model), "terms": chain.teacher}]
    if origin is not None:
        parts.append({"part": "student before", "model": published(origin), "terms": chain.base})
    asked = generate.get("teacher", {}).get("asked")
    distinct = generate.get("prompts", {}).get("distinct")
    return {
        "name": lineage["name"],
        "teacher": published(recipe.teacher.model),
        "served": [name for name in generate.get("teacher", {}).get("served", []) if name != asked],
        "generate": generate,
        "prompts": recipe.prompts,
        "distinct": "" if distinct is None else f", {distinct:,} distinct",
        "sampling": generate.get("sampling") or recipe.sampling.model_dump(mode="json"),
        "filters": filters,
        "rules": _rules(filters),
        "chain": parts,
        "read": table().read,
        "versions": _versions(lineage),
    }


def _chain(recipe: Recipe, origin: str | None) -> LicenceChain:
    def terms(reference: str, stated: str | None = None) -> Terms | None:
        return terms_of(reference, read_card(known_files(reference)).licence, stated)

    teacher = terms(recipe.teacher.model, recipe.train.teacher_licence)
    return LicenceChain(teacher=teacher, base=terms(origin) if origin is not None else None)


def _rules(filters: Mapping[str, Any]) -> list[dict[str, Any]]:
    settings = {
        rule["rule"]: ", ".join(f"{key} {value}" for key, value in rule.items() if key != "rule")
        for rule in filters.get("rules", [])
    }
    dropped: dict[str, int] = filters.get("dropped_by_rule", {})
    return [{"name": name, "settings": settings.get(name, ""), "dropped": count} for name, count in dropped.items()]


def _scores(lineage: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the evaluation; none if it is older than the student."""
    section = lineage.get("evaluate", {})
    if section.get("created", "") < lineage["train"].get("created", ""):
        return {}
    numbers = {name: value for name, value in section.items() if type(value) in (int, float)}
    return {name.replace("_", " "): value for name, value in numbers.items() if name not in NO_SCORES}


def _shown(train: Mapping[str, Any]) -> Iterable[str]:
    yield from ("epochs", "learning_rate", "warmup", "batch_size", "max_length")
    if train["weights"] != "full":
        yield from ("lora_rank", "lora_alpha", "lora_dropout")
    if train["method"] in ("kd", "gkd"):
        yield "kd"


def _versions(lineage: Mapping[str, Any]) -> str:
    found: dict[str, str] = {}
    for section in lineage.values():
        found |= section.get("versions", {}) if isinstance(section, dict) else {}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _cell(text: object) -> str:
    """Text in a table's cell."""
    return " ".join(str(text).replace("|", "\\|").split())
