"""What an evaluation measures on what: models, test rows, probes and prompts for the timing. Measures nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluate.measure.perplexity import choose_rows
from evaluate.measure.probes import ProbePrompts, choose_probes
from evaluate.measure.results import FOLDER, Entry, read_test
from evaluate.measure.serving import speed_prompts
from evaluate.models import TEACHER, Subject, choose_precision, digest, digest_subject, subjects
from filters.ruleset import RuleSet
from filters.run import recipe_rules
from pipeline.recipe import Recipe
from pipeline.records import Completion, Kept, Prompt
from pipeline.rundir import RunDir

SETTINGS: dict[str, dict[str, set[str] | bool]] = {  # of the recipe, that a served measurement depends on
    "speed": {
        "evaluate": {"speed_requests", "speed_concurrency", "speed_max_tokens", "speed_repeats", "speed_alone"},
        "sampling": True,
        "serve": True,
    },
    "probes": {"sampling": True, "serve": {"dtype", "device", "args"}},  # a change of the rules asks no model again
}


@dataclass(frozen=True)
class Plan:
    """All choices, made before anything is measured."""

    recipe: Recipe
    run: RunDir
    rules: RuleSet
    models: list[Subject]
    test_rows: int
    rows: list[Kept]  # of them, chosen for perplexity
    timing: list[Prompt]
    probes: ProbePrompts
    dtype: str
    device: str
    weights: dict[str, str]  # model: what identifies its weights
    force: bool  # measure again what is cached

    @property
    def here(self) -> list[Subject]:
        """The models whose weights are on this machine."""
        return [subject for subject in self.models if subject.folder is not None]

    def answers_probes(self, subject: Subject) -> bool:
        """Whether a model answers the probes: a teacher elsewhere does only if the recipe says so."""
        asked = subject.folder is not None or (subject.key == TEACHER and self.recipe.evaluate.ask_teacher)
        return asked and bool(self.probes.all)

    def entry(self, name: str, subject: Subject, inputs: Sequence[Completion | Prompt]) -> Entry:
        """Where the measurement `name` (perplexity, unseen, speed, probes) of a model on rows or prompts is cached."""
        what = (i.id if isinstance(i, Prompt) else f"{i.id} {i.finish_reason} {i.text}" for i in inputs)
        settings = self.recipe.model_dump_json(include=SETTINGS[name]) if name in SETTINGS else self.dtype
        fingerprint = digest(self.weights[subject.key], digest(*what), settings)
        return Entry(self.run.path / FOLDER / f"{name}-{subject.key}.json", fingerprint)


def make_plan(recipe: Recipe, run: RunDir, recipe_path: Path, *, force: bool = False) -> Plan:
    """Reads the run and chooses models, rows and prompts. Raises UsageError if there is no student or no test row."""
    models = subjects(recipe, run)
    test_rows = read_test(run)
    rows = choose_rows(test_rows, recipe.evaluate.max_rows)
    dtype, device = choose_precision(models)
    return Plan(
        recipe=recipe,
        run=run,
        rules=recipe_rules(recipe, recipe_path),
        models=models,
        test_rows=len(test_rows),
        rows=rows,
        timing=speed_prompts(recipe, run, rows),
        probes=choose_probes(recipe, run, test_rows),
        dtype=dtype,
        device=device,
        weights={subject.key: digest_subject(subject) for subject in models},
        force=force,
    )
