"""From scores and answers to figures: of each model, and of one model against another. Pure arithmetic.

Every figure is over the rows or prompts that all models have, and on the same resamples for all models.

Words are runs of letters and digits with their marks (the vowel signs of Hindi, Tamil, …), in Unicode's form NFC and
without case. A Korean word is what stands between spaces, particles included, so distinct-n compares models in one
language, not languages. Chinese, Japanese, Thai, Lao, Khmer and Burmese, which have no spaces, count by character.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from evaluate.document import MEASURES, Better, Difference, Scope, WinRate
from evaluate.figures.statistics import Figure, Figures, Resamples, distinct, draw, ratio, share
from evaluate.measure.pairwise import OPPONENTS
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import Answers, JudgeResult, PairVerdict, PerplexityResult, ProbeResult, RowScore
from filters.answer import Answer, as_answer, nfc
from filters.reasons import describe
from filters.repetition import RepetitionSettings, repetition
from filters.rules import AdherenceSettings, adherence
from filters.ruleset import RuleSet
from filters.run import recipe_rules
from filters.scripts import UNSPACED
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt
from pipeline.students import AFTER, BEFORE, TEACHER

# Over fewer prompts no difference is named. Of pairs of equal models 7% seem to differ over 20 prompts, 10% over 10 and
# 20% over 4 (simulated).
PROMPTS_TO_DIFFER = 20
FEW = f"fewer than {PROMPTS_TO_DIFFER} prompts (or groups of them)"
YES_OR_NO = ("passing", "adherence", "loops", "stopped")  # what is true or false of an answer

_MARKS = "".join(char for char in map(chr, range(0x300, 0x10000)) if unicodedata.category(char) in ("Mn", "Mc"))
_LETTERS = rf"(?:(?![{UNSPACED}])[^\W_][{_MARKS}\u200c\u200d]*)+"  # joiners stand within words of Persian and Sinhala
_WORD = re.compile(rf"[{UNSPACED}]|{_LETTERS}(?:['’]{_LETTERS})*")


def common_rows(scored: Mapping[str, PerplexityResult]) -> dict[str, list[RowScore]]:
    """The scores of the rows that every model could take: models are compared on the same rows only."""
    ids = [{score.id for score in result.scores} for result in scored.values()]
    shared = set.intersection(*ids) if ids else set()
    return {key: [s for s in result.scores if s.id in shared] for key, result in scored.items() if shared}


def probe_rules(recipe: Recipe, recipe_path: Path) -> RuleSet:
    """The filters' rules, without those about thoughts if the student did not learn to think."""
    found = recipe_rules(recipe, recipe_path)
    if recipe.train.reasoning == "keep":
        return found
    return RuleSet(tuple(rule for rule in found.rules if rule.reads != "reasoning"))


def groups_of(rows: Iterable[Prompt | Kept], config: PromptsConfig) -> dict[str, Hashable]:
    """What each prompt belongs to, by its id: its group, or else its question. Of rows, the prompts that they answer.

    Conversations that `prompts.user` has made of one question belong together.
    """
    return {row.id if isinstance(row, Prompt) else row.prompt_id: config.position_of(row) for row in rows}


def perplexity_figures(
    scores: Mapping[str, Sequence[RowScore]], groups: Mapping[str, Hashable] = {}
) -> dict[str, dict[str, Figure]]:
    """Every model's perplexity and bits per character. All models must have scored the same rows.

    `groups`: what prompts belong to, by their ids, if not to themselves.

    Perplexity is exp(sum of NLL / sum of tokens): every token weighs the same, not every row. Models with different
    tokenizers cut an answer into different numbers of tokens; bits per character compares them fairly: NLL in bits over
    the answers' characters (the end of a turn costs bits, and is no character).
    """
    prompts = sorted({score.prompt_id for rows in scores.values() for score in rows})
    if not prompts:
        return {}
    index = {prompt: number for number, prompt in enumerate(prompts)}
    drawn = draw([groups.get(prompt, prompt) for prompt in prompts])
    figures = {}
    for key, rows in scores.items():
        sums = np.zeros((len(prompts), 3))  # NLL, tokens, characters of each prompt
        for score in rows:
            sums[index[score.prompt_id]] += (score.nll_nats, score.tokens, score.characters)
        nll, tokens, characters = np.vstack([sums.sum(axis=0), drawn.counts @ sums]).T  # first all, then each resample
        perplexity = np.exp(nll / tokens)
        bits = nll / math.log(2) / np.maximum(characters, 1)
        figures[key] = {
            "perplexity": Figure(float(perplexity[0]), perplexity[1:], prompts=drawn.count_groups()),
            "bits_per_character": Figure(float(bits[0]), bits[1:], prompts=drawn.count_groups()),
        }
    return figures


class Assessment(NamedTuple):
    """What is counted of one answer."""

    values: dict[str, float | None]  # by the names in PROBES; None: no rules, no slots, no verdict of the judge
    words: list[str]
    dropped_by: dict[str, str]  # reasons, by rule


def split_words(text: str) -> list[str]:
    return _WORD.findall(nfc(text).casefold())


def named_slots(recipe: Recipe, rules: RuleSet) -> AdherenceSettings:
    """What adherence asks: `evaluate.adherence`, else the slots of the recipe's rule of that name, else all slots."""
    every = AdherenceSettings.model_construct(slots=list(recipe.prompts.slots))
    rule = next((rule.settings for rule in rules.rules if isinstance(rule.settings, AdherenceSettings)), every)
    return rule.model_copy(update={"slots": recipe.evaluate.adherence or rule.slots, "max_missing": 0})


def assess(row: Kept, rules: RuleSet, wanted: AdherenceSettings, score: int | None) -> Assessment:
    """Everything that is counted of one answer, by the recipe's own rules; `score` is the judge's."""
    answer = as_answer(row)
    reasons = rules.reasons(answer)
    loop = next((rule.settings for rule in rules.rules if isinstance(rule.settings, RepetitionSettings)), None)
    named = _named(answer, wanted)
    values = {
        "passing": not reasons if rules.rules else None,
        "adherence": None if named is None else named == 1,
        "named": named,
        "loops": repetition(answer, loop or RepetitionSettings()) is not None,
        "stopped": row.finish_reason == "stop",
        "characters": len(row.text),
        "judge": score,
    }
    return Assessment(values, split_words(row.text), {reason.rule: describe(reason) for reason in reasons})


def _named(answer: Answer, wanted: AdherenceSettings) -> float | None:
    """The share of the values asked for that the answer names. If no slots are wanted, all of its prompt's count."""
    slots = [slot for slot in wanted.slots or answer.slots if slot in answer.slots]
    values = [1 if isinstance(answer.slots[slot], str) else len(answer.slots[slot]) for slot in slots]
    if not sum(values):
        return None
    reason = adherence(answer, wanted.model_copy(update={"slots": slots}))
    return 1 - sum(map(len, reason.missing.values())) / sum(values) if reason else 1.0


def answer_figures(answers: Sequence[Assessment], drawn: Resamples) -> dict[str, Figure]:
    """Every figure of one model's answers that exists."""
    words = [answer.words for answer in answers]
    figures = {"distinct_1": distinct(words, 1, drawn), "distinct_2": distinct(words, 2, drawn)}
    for name in answers[0].values:
        values = [answer.values[name] for answer in answers]
        kind = share if name in YES_OR_NO else ratio
        figures[name] = kind([value or 0.0 for value in values], [value is not None for value in values], drawn)
    return {name: figure for name, figure in figures.items() if figure is not None}


@dataclass(frozen=True)
class Quality:
    """What the probes say. A part without prompts is left out; without answers there are no parts."""

    answers: dict[str, dict[str, Assessment]]  # model → prompt id → its answer
    prompts: dict[Scope, list[str]]  # ids that every model has answered, in order
    figures: dict[Scope, Figures]
    judged: int  # prompts that every model has a score of the judge for
    groups: dict[str, Hashable]  # what each prompt belongs to, by its id


def probe_answers(prompts: ProbePrompts, probed: Mapping[str, ProbeResult]) -> Answers:
    """Every model's answers to the prompts that all have answered, with the references that these have now."""
    found = {key: {row.prompt_id: row for row in result.answers} for key, result in probed.items()}
    common = [prompt for prompt in prompts.all if all(prompt.id in rows for rows in found.values())]
    return {
        key: {p.id: msgspec.structs.replace(rows[p.id], reference=p.reference, columns=p.columns) for p in common}
        for key, rows in found.items()
    }


def measure_quality(
    recipe: Recipe, rules: RuleSet, prompts: ProbePrompts, answers: Answers, scores: Mapping[str, Mapping[str, int]]
) -> Quality:
    """Assesses every answer and computes the figures of each part. `scores`: the judge's, by model and prompt.

    A prompt's scores count only if every model has one; a model without any score is left out of this.
    """
    wanted = named_slots(recipe, rules)
    read = [own.keys() for own in scores.values() if own]
    judged = set.intersection(*map(set, read)) if read else set()
    assessed = {
        key: {
            id_: assess(row, rules, wanted, scores.get(key, {}).get(id_) if id_ in judged else None)
            for id_, row in rows.items()
        }
        for key, rows in answers.items()
    }
    common = next(iter(answers.values()), {})
    parts: dict[Scope, list[Prompt]] = {"all": prompts.all, "seen": prompts.seen, "unseen": prompts.unseen}
    groups = groups_of(prompts.all, recipe.prompts)
    answered, figures = dict[Scope, list[str]](), dict[Scope, Figures]()
    for part, asked in parts.items():
        if ids := [prompt.id for prompt in asked if prompt.id in common]:
            drawn = draw([groups[id_] for id_ in ids])
            answered[part] = ids
            figures[part] = {key: answer_figures([own[id_] for id_ in ids], drawn) for key, own in assessed.items()}
    return Quality(assessed, answered, figures, sum(id_ in judged for id_ in common), groups)


def failed_rules(answers: Collection[Assessment]) -> dict[str, float]:
    """The share of the answers that each rule would drop."""
    labels = Counter(label for answer in answers for label in answer.dropped_by)
    return {label: labels[label] / len(answers) for label in sorted(labels)}


def differences(figures: Mapping[Scope, Figures]) -> list[Difference]:
    """The trained student against itself before training, and against its teacher, in every figure that both have."""
    found = []
    for against in (BEFORE, TEACHER):
        for part, models in figures.items():
            ours, theirs = models.get(AFTER, {}), models.get(against, {})
            for name in (name for name in ours if name in theirs):
                better = MEASURES[name].better
                found.append(difference(name, AFTER, against, ours[name], theirs[name], better, part))
    return found


def difference(
    figure: str, model: str, against: str, ours: Figure, theirs: Figure, better: Better | None, part: Scope
) -> Difference:
    """A change, and whether it is an improvement: None if its interval holds zero, or there are too few prompts."""
    change = ours.minus(theirs)
    enough = min(ours.prompts, theirs.prompts) >= PROMPTS_TO_DIFFER
    sure = better is not None and enough and not change.low <= 0 <= change.high
    improved = (change.low > 0) == (better == "higher") if sure else None
    return Difference(
        figure=figure, part=part, model=model, against=against, change=change, better=better, improved=improved
    )


def win_rates(judged: JudgeResult | None, quality: Quality) -> list[WinRate]:
    """How often the judge prefers the trained student, by opponent and part."""
    found = []
    for against in OPPONENTS:
        pairs = {pair.prompt_id: pair for pair in (judged.pairs if judged else ()) if pair.against == against}
        if pairs:
            for part, ids in quality.prompts.items():
                found.append(_win_rate(against, part, [pairs[id_] for id_ in ids if id_ in pairs], quality.groups))
    return found


def _win_rate(against: str, part: Scope, pairs: Sequence[PairVerdict], groups: Mapping[str, Hashable]) -> WinRate:
    judged = [pair for pair in pairs if pair.student_first and pair.student_second]
    both = [(pair.student_first, pair.student_second) for pair in judged]
    points = [1.0 if pair == ("A", "B") else 0.0 if pair == ("B", "A") else 0.5 for pair in both]
    wins, losses = points.count(1.0), points.count(0.0)
    rate = ratio(points, [1.0] * len(points), draw([groups[pair.prompt_id] for pair in judged])) if points else None
    chosen = [choice for pair in both for choice in pair if choice != "tie"]
    return WinRate(
        model=AFTER,
        against=against,
        part=part,
        pairs=len(both),
        unjudged=len(pairs) - len(both),
        wins=wins,
        losses=losses,
        ties=len(both) - wins - losses,
        rate=rate.estimate() if rate else None,
        first_chosen=chosen.count("A") / len(chosen) if chosen else None,
        flipped=sum(first == second != "tie" for first, second in both),
    )
