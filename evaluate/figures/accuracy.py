"""How often the models are right, by `evaluate.verify`: on the test prompts, on unseen ones, and by category.

Checks answers by rules, and counts. An answer is right if no rule has a reason against it. What cannot be verified (the
verifier failed, or there is nothing to hold the answer against) counts as wrong, with its reason.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluate.document import Estimate, Sample, Scope, ShownAnswer
from evaluate.figures.quality import groups_of, probe_answers
from evaluate.figures.statistics import Figure, Figures, draw, share
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import Answers, ProbeResult
from filters.answer import as_answer
from filters.reasons import describe
from filters.ruleset import RuleSet, load_rules
from pipeline.errors import RecipeError
from pipeline.filters_config import FiltersConfig
from pipeline.instructions import conversation_text
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Prompt, Reason, as_text, said

SAMPLES = 20  # prompts whose answers are shown side by side


@dataclass(frozen=True)
class VerifiedAnswers:
    """Every model's answers, and why those that are wrong are wrong. A model that was asked twice has two keys."""

    answers: Answers
    reasons: dict[str, dict[str, list[Reason]]]  # the same of the reasons; none: the answer is right
    prompts: dict[Scope, list[Prompt]]  # that every model has answered
    groups: dict[str, Hashable]  # what each prompt belongs to, by its id

    def shares(self, prompts: Sequence[Prompt]) -> dict[str, Figure]:
        """Each model's share of right answers to some of the prompts."""
        drawn = draw([self.groups[prompt.id] for prompt in prompts])
        found = {}
        for key, reasons in self.reasons.items():
            right = share([float(not reasons[prompt.id]) for prompt in prompts], [1.0] * len(prompts), drawn)
            assert right is not None
            found[key] = right
        return found

    def wrong(self) -> dict[str, dict[str, float]]:
        """Each model's share of wrong answers by reason, unseen ones apart.

        The reason is the first one's rule, and what that rule looked at.
        """
        found: dict[str, dict[str, float]] = {key: {} for key in self.reasons}
        for part, prompts in self.prompts.items():
            mark = ", unseen" if part == "verified_unseen" else ""
            for key, reasons in self.reasons.items():
                wrong = [reasons[prompt.id][0] for prompt in prompts if reasons[prompt.id]]
                first = Counter(": ".join(filter(None, [one.rule, one.what])) + mark for one in wrong)
                found[key] |= {name: count / len(prompts) for name, count in first.most_common()}
        return found


def verify_rules(recipe: Recipe, recipe_path: Path) -> RuleSet:
    """The rules of `evaluate.verify`, checked as those of the filters. Raises RecipeError."""
    try:
        return load_rules(FiltersConfig(rules=recipe.evaluate.verify), recipe_path)
    except RecipeError as error:
        raise RecipeError(str(error).replace("filters.rules[", "evaluate.verify[")) from None


def verify(
    rules: RuleSet, questions: ProbePrompts, answered: Mapping[str, ProbeResult], config: PromptsConfig
) -> VerifiedAnswers:
    """Checks the answers to what every model has answered, against the references that the prompts have now.

    `config` says which prompts belong together.
    """
    answers = probe_answers(questions, answered)
    reasons = {key: {id_: rules.reasons(as_answer(row)) for id_, row in rows.items()} for key, rows in answers.items()}
    common = next(iter(answers.values()), {})
    parts: dict[Scope, list[Prompt]] = {"verified": questions.seen, "verified_unseen": questions.unseen}
    asked = {part: [prompt for prompt in prompts if prompt.id in common] for part, prompts in parts.items()}
    groups = groups_of(questions.all, config)
    return VerifiedAnswers(answers, reasons, {part: prompts for part, prompts in asked.items() if prompts}, groups)


def accuracy_figures(verified: VerifiedAnswers) -> dict[Scope, Figures]:
    """The figure `accuracy` of every part and model."""
    return {
        part: {key: {"accuracy": share} for key, share in verified.shares(prompts).items()}
        for part, prompts in verified.prompts.items()
    }


def by_category(verified: VerifiedAnswers, config: PromptsConfig, name: str) -> dict[str, dict[str, Estimate]]:
    """Each model's share of right answers, by what the prompts have under this name; unseen ones apart."""
    groups: dict[str, list[Prompt]] = {}
    for part, prompts in verified.prompts.items():
        mark = ", unseen" if part == "verified_unseen" else ""
        for prompt in prompts:
            value = config.category_of(prompt, name)
            groups.setdefault(("none" if value is None else as_text(value)) + mark, []).append(prompt)
    shares = {category: verified.shares(groups[category]) for category in sorted(groups)}
    return {category: {key: share.estimate() for key, share in own.items()} for category, own in shares.items()}


def verified_samples(verified: VerifiedAnswers, labels: Mapping[str, str]) -> list[Sample]:
    """Some prompts of each part, with their references and what every model answered."""
    test, unseen = verified.prompts.get("verified", []), verified.prompts.get("verified_unseen", [])
    new = unseen[: SAMPLES // 3]
    samples = []
    for prompt in [*test[: SAMPLES - len(new)], *new]:
        shown = [ShownAnswer("reference", as_text(prompt.reference))] if prompt.reference is not None else []
        for key, label in labels.items():
            if key in verified.answers:
                row, reasons = verified.answers[key][prompt.id], verified.reasons[key][prompt.id]
                wrong = {reason.rule: describe(reason) or reason.what for reason in reasons}
                shown.append(ShownAnswer(label, said(row), key, row.finish_reason, wrong, right=not reasons))
        text = conversation_text(prompt.messages)
        samples.append(Sample(text, shown, "verified_unseen" if prompt in new else "verified"))
    return samples
