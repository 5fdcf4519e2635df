"""The answers to the probes as figures: of each model, between models, and by the judge. Pure arithmetic.

Every figure is over the prompts that all models have answered, and on the same resamples for all models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.document import Difference, Estimate, Part, ProbeFigures, Probes, WinRate
from evaluate.figures.differences import BETTER, Judged, compute, look_at, naming
from evaluate.measure.pairwise import OPPONENTS, Answers
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import AFTER, BEFORE, TEACHER, JudgeResult, PairVerdict, ProbeResult, probe_row
from evaluate.statistics import Figures, draw, ratio
from filters.ruleset import RuleSet
from pipeline.recipe import Recipe

PERPLEXITIES = ("perplexity", "bits_per_character")


@dataclass(frozen=True)
class PartQuality:
    """One part of the probes."""

    prompts: list[str]  # ids, in order
    counts: Any  # how often each is in each resample
    figures: Figures


@dataclass(frozen=True)
class Quality:
    """What the probes say. Parts that have no prompts are not there; without any answers none is."""

    answers: dict[str, dict[str, Judged]]  # model → prompt id → its answer, looked at
    parts: dict[Part, PartQuality]


def probe_answers(prompts: ProbePrompts, probed: Mapping[str, ProbeResult]) -> Answers:
    """Every model's answers to the prompts that all models have answered, as rows."""
    by_id = {prompt.id: prompt for prompt in prompts.all}
    found = {key: {answer.prompt_id: answer for answer in result.answers} for key, result in probed.items()}
    common = set(by_id).intersection(*found.values()) if found else set()
    return {
        key: {id_: probe_row(key, by_id[id_], answers[id_]) for id_ in by_id if id_ in common}
        for key, answers in found.items()
    }


def measure_quality(
    recipe: Recipe, rules: RuleSet, prompts: ProbePrompts, answers: Answers, judged: JudgeResult | None
) -> Quality:
    """Looks at every answer and computes the figures of each part."""
    wanted = naming(recipe, rules)
    scores = judged.scores if judged else {}
    seen = {
        key: {id_: look_at(row, rules, wanted, scores.get(key, {}).get(id_)) for id_, row in rows.items()}
        for key, rows in answers.items()
    }
    common = next(iter(answers.values()), {})
    parts: dict[Part, PartQuality] = {}
    members: tuple[tuple[Part, Sequence[str]], ...] = (
        ("all", [prompt.id for prompt in prompts.all]),
        ("seen", [prompt.id for prompt in prompts.seen]),
        ("unseen", [prompt.id for prompt in prompts.unseen]),
    )
    for part, ids in members:
        if own := [id_ for id_ in ids if id_ in common]:
            counts = draw(len(own))
            figures = {key: compute([of[id_] for id_ in own], counts) for key, of in seen.items()}
            parts[part] = PartQuality(own, counts, figures)
    return Quality(seen, parts)


def probes_of(quality: Quality, key: str) -> Probes | None:
    """A model's figures by part; None where it has answered nothing."""
    if key not in quality.answers or not quality.parts:
        return None
    parts = {part: _figures(quality, part, key) for part in quality.parts}
    return Probes(all=parts["all"], seen=parts.get("seen"), unseen=parts.get("unseen"))


def _figures(quality: Quality, part: Part, key: str) -> ProbeFigures:
    own = quality.parts[part]
    answers = [quality.answers[key][id_] for id_ in own.prompts]
    labels = sorted({label for answer in answers for label in answer.dropped_by})
    failed = {label: sum(label in answer.dropped_by for answer in answers) / len(answers) for label in labels}
    estimates: dict[str, Any] = {name: figure.estimate() for name, figure in own.figures[key].items()}
    return ProbeFigures(prompts=len(answers), failed_rules=failed, **estimates)


def differences(held_out: Figures, unseen: Figures, quality: Quality) -> list[Difference]:
    """The trained student against itself before training, and against its teacher, in every figure that both have."""
    found = []
    for against in (BEFORE, TEACHER):
        for part, figures in (
            ("held_out", held_out),
            ("unseen", unseen),
            *((part, own.figures) for part, own in quality.parts.items()),
        ):
            ours, theirs = figures.get(AFTER, {}), figures.get(against, {})
            for name in ours:
                if name not in theirs:
                    continue
                better = "lower" if name in PERPLEXITIES else BETTER[name]
                change = ours[name].minus(theirs[name])
                found.append(
                    Difference(
                        figure=name,
                        part=part,  # type: ignore[arg-type]
                        model=AFTER,
                        against=against,
                        change=change,
                        better=better,
                        improved=_improved(change, better),
                    )
                )
    return found


def _improved(change: Estimate, better: str | None) -> bool | None:
    if better is None or change.low <= 0 <= change.high:
        return None
    return (change.low > 0) == (better == "higher")


def win_rates(judged: JudgeResult | None, quality: Quality) -> list[WinRate]:
    """How often the judge prefers the trained student, by opponent and part."""
    found = []
    for against in OPPONENTS:
        pairs = {pair.prompt_id: pair for pair in (judged.pairs if judged else ()) if pair.against == against}
        for part, own in quality.parts.items() if pairs else ():
            found.append(_win_rate(against, part, [pairs[id_] for id_ in own.prompts if id_ in pairs]))
    return found


def _win_rate(against: str, part: Part, pairs: Sequence[PairVerdict]) -> WinRate:
    verdicts = [(pair.student_first, pair.student_second) for pair in pairs]
    both = [(first, second) for first, second in verdicts if first and second]
    wins = [first == "A" and second == "B" for first, second in both]
    losses = [first == "B" and second == "A" for first, second in both]
    points = [0.5 + (win - loss) / 2 for win, loss in zip(wins, losses, strict=True)]
    rate = ratio(points, [1.0] * len(points), draw(len(points))) if points else None
    chosen = [choice for pair in both for choice in pair if choice != "tie"]
    return WinRate(
        model=AFTER,
        against=against,
        part=part,
        pairs=len(both),
        unjudged=len(verdicts) - len(both),
        wins=sum(wins),
        losses=sum(losses),
        ties=len(both) - sum(wins) - sum(losses),
        rate=rate.estimate() if rate else None,
        first_chosen=chosen.count("A") / len(chosen) if chosen else None,
        flipped=sum(first == second != "tie" for first, second in both),
    )
