"""How far rules and judge agree with the person who reviewed a sample. Reads the run's files; writes nothing.

The sample takes as many dropped answers as kept ones, so an answer counts for as many of the run as its stratum has
for each one reviewed: precision and recall are those of the whole run. Their intervals are 95% of the posterior under
Jeffreys' prior (Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial Proportion"), which holds for few
answers and for shares of 0 and 1. There is one prior for all kept answers and one for all dropped ones, divided among
their strata by size: with one for each of eight rules that drop nothing good, the recall would be sure to be under 1.
Scores are compared by Cohen's kappa with quadratic weights (Cohen 1968). What is compared is what the filters say now:
change a rule, filter again, and ask again.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from filters.duplicates import DEDUP_RULES
from filters.groups import SELECT
from filters.judgements import JUDGE, SCORES, read_judgements
from filters.review.session import SAMPLE_FILES, load_sample, read_reviews
from filters.rows import filtered_rows
from pipeline.recipe import Recipe
from pipeline.records import Dropped
from pipeline.rundir import RunDir

DRAWS = 20_000
PASSED = ("", JUDGE, SELECT, *DEDUP_RULES)  # the answer was kept, or what follows the rules dropped it


class Case(NamedTuple):
    """A reviewed answer, as one decider and the person see it."""

    stratum: str
    kept: bool
    accepted: bool


class Share(NamedTuple):
    """A share with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


class Agreement(NamedTuple):
    """Of one decider: precision is the share of what it keeps that the person accepts, recall the share kept of what
    the person accepts; None if there is nothing to divide by.
    """

    decider: str
    cases: int
    precision: Share | None
    recall: Share | None


class Result(NamedTuple):
    """What a review has shown."""

    reviewed: int
    skipped: int
    gone: int  # reviewed, and no longer among the run's answers
    agreements: list[Agreement]
    scores: Counter[tuple[int, int]]  # (person's, judge's)
    unseen: dict[str, int]  # strata of which no answer is reviewed yet, and their answers: the figures leave them out
    later: int = 0  # answers that came after the sample was drawn: the figures leave them out


def agreement(recipe: Recipe, run: RunDir) -> Result | None:
    """What the review has shown so far; None before the first verdict. Raises DataError at a file that is wrong."""
    sample, reviews = load_sample(run), read_reviews(run)
    verdicts = {id_: review for id_, review in reviews.items() if review.verdict != "skip"}
    if sample is None or not verdicts:
        return None
    rules, answers = dict[str, str](), 0
    for row in filtered_rows(run):
        answers += 1
        if row.id in verdicts:
            rules[row.id] = row.rule if isinstance(row, Dropped) else ""
    judged = {id_: verdict.score for id_, verdict in read_judgements(run).items() if verdict.score and id_ in rules}
    strata = {item.id: item.stratum for item in sample.items if item.id in rules}
    deciders = {"filters": {id_: not rule for id_, rule in rules.items()}}
    if judged and recipe.filters.judge:
        deciders["rules alone"] = {id_: rule in PASSED for id_, rule in rules.items()}
        least = recipe.filters.judge.min_score
        deciders["judge alone"] = {id_: score >= least for id_, score in judged.items()}
    found = []
    for name, kept in deciders.items():
        cases = [Case(strata[id_], kept[id_], verdicts[id_].verdict == "accept") for id_ in strata if id_ in kept]
        found.append(Agreement(name, len(cases), *precision_and_recall(cases, sample.population)))
    pairs = Counter((score, judged[id_]) for id_ in strata if id_ in judged and (score := verdicts[id_].score))
    unseen = {stratum: answers for stratum, answers in sample.population.items() if stratum not in strata.values()}
    skipped, gone, later = len(reviews) - len(verdicts), len(verdicts) - len(rules), answers - sample.drawn_from
    return Result(len(verdicts), skipped, gone, found, pairs, unseen, max(later, 0))


def precision_and_recall(cases: Sequence[Case], population: dict[str, int]) -> tuple[Share | None, Share | None]:
    """Of the run that the cases were drawn from, with `population` answers in each stratum."""
    rng = np.random.default_rng(0)
    exact, drawn = np.zeros((2, 2)), np.zeros((2, 2, DRAWS))  # [kept, accepted]: answers of the run
    tables = {stratum: np.zeros((2, 2)) for stratum in sorted({case.stratum for case in cases})}
    for case in cases:
        tables[case.stratum][int(case.kept), int(case.accepted)] += 1
    sizes = np.array([0, 0])  # answers of the strata, dropped and kept
    for stratum, counts in tables.items():
        sizes += population[stratum] * counts.any(axis=1)
    for stratum, counts in tables.items():
        sides = counts.any(axis=1)  # one side, unless the filters have changed since
        prior = 0.5 * population[stratum] / sizes[sides, None]
        shares = rng.dirichlet((counts[sides] + prior).ravel(), DRAWS).T.reshape(-1, 2, DRAWS)
        exact += population[stratum] * counts / counts.sum()
        drawn[sides] += population[stratum] * shares

    def share(*other: int) -> Share | None:
        """Of kept and accepted answers, among those and the others."""
        if not exact[1, 1] + exact[other]:
            return None
        low, high = np.quantile(drawn[1, 1] / np.maximum(drawn[1, 1] + drawn[other], 1e-12), (0.025, 0.975))
        return Share(float(exact[1, 1] / (exact[1, 1] + exact[other])), float(low), float(high))

    return share(1, 0), share(0, 1)


def weighted_kappa(pairs: Counter[tuple[int, int]]) -> float | None:
    """Cohen's kappa with quadratic weights; None if neither side ever changes its score."""
    table = np.array([[pairs[one, other] for other in SCORES] for one in SCORES])
    squares = np.subtract.outer(SCORES, SCORES) ** 2
    chance = (squares * np.outer(table.sum(axis=1), table.sum(axis=0))).sum() / max(table.sum(), 1)
    return 1 - float((squares * table).sum() / chance) if chance else None


def print_agreement(result: Result | None, console: Console) -> None:
    """Tables on the terminal."""
    if result is None:
        console.print("no verdict yet: nothing to compare", highlight=False)
        return
    table = Table("decider", "answers", "precision (95%)", "recall (95%)", title="agreement with the person")
    for row in result.agreements:
        table.add_row(row.decider, str(row.cases), str(row.precision or "-"), str(row.recall or "-"))
    console.print(table)
    notes = f"{result.reviewed} reviewed, {result.skipped} skipped"
    console.print(notes + (f", {result.gone} no longer in the run" if result.gone else ""), highlight=False)
    if result.unseen:
        named = ", ".join(f"{stratum} ({answers:,})" for stratum, answers in result.unseen.items())
        console.print(f"the figures leave out what no answer is reviewed of yet: {named}", highlight=False)
    if result.later:
        came = f"the figures leave out {result.later:,} answers that came after the sample was drawn; for another one"
        console.print(f"{came} move {SAMPLE_FILES} away", highlight=False)
    if result.scores:
        table = Table("person \\ judge", *map(str, SCORES), title="scores")
        for one in SCORES:
            table.add_row(str(one), *(str(result.scores[one, other] or "") for other in SCORES))
        console.print(table)
        kappa = weighted_kappa(result.scores)
        said = "undefined: neither changes its score" if kappa is None else f"{kappa:.2f}"
        console.print(f"weighted kappa (quadratic) {said}, of {result.scores.total()} scores", highlight=False)
