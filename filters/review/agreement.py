"""How far rules and judge agree with the person who reviewed a sample. Reads the run's files; writes nothing.

The sample takes as many dropped answers as kept ones, so an answer counts for as many of the run as its stratum has
for each one reviewed: precision and recall are those of the whole run. Their intervals are 95% of the posterior under
Jeffreys' prior in each stratum (Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial Proportion"), which
holds for few answers and for shares of 0 and 1. Scores are compared by Cohen's kappa with quadratic weights (Cohen
1968). What is compared is what the filters say now: change a rule, filter again, and ask again.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from filters.judge import RULE as JUDGE
from filters.judge import SCORES, read_judgements
from filters.review.session import load_sample, read_reviews
from filters.rows import filtered_rows
from pipeline.recipe import Recipe
from pipeline.records import Dropped
from pipeline.rundir import RunDir

DRAWS = 20_000


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


def agreement(recipe: Recipe, run: RunDir) -> Result | None:
    """What the review has shown so far; None before the first verdict. Raises DataError at a file that is wrong."""
    sample, reviews = load_sample(run), read_reviews(run)
    verdicts = {id_: review for id_, review in reviews.items() if review.verdict != "skip"}
    if sample is None or not verdicts:
        return None
    ids = verdicts.keys()
    rules = {row.id: row.rule if isinstance(row, Dropped) else "" for row in filtered_rows(run) if row.id in ids}
    judged = {id_: verdict.score for id_, verdict in read_judgements(run).items() if verdict.score and id_ in ids}
    reviewed = [item for item in sample.items if item.id in rules]
    deciders = {"filters": {id_: not rule for id_, rule in rules.items()}}
    if judged and recipe.filters.judge:
        deciders["rules alone"] = {id_: rule in ("", JUDGE) for id_, rule in rules.items()}
        least = recipe.filters.judge.min_score
        deciders["judge alone"] = {id_: score >= least for id_, score in judged.items()}
    found = []
    for name, decided in deciders.items():
        cases = [
            Case(item.stratum, decided[item.id], verdicts[item.id].verdict == "accept")
            for item in reviewed
            if item.id in decided
        ]
        found.append(Agreement(name, len(cases), *precision_and_recall(cases, sample.population)))
    pairs = Counter(
        (score, judged[item.id])
        for item in reviewed
        if item.id in judged and (score := verdicts[item.id].score) is not None
    )
    seen = {item.stratum for item in reviewed}
    unseen = {stratum: answers for stratum, answers in sample.population.items() if stratum not in seen}
    return Result(len(verdicts), len(reviews) - len(verdicts), len(ids - rules.keys()), found, pairs, unseen)


def precision_and_recall(cases: Sequence[Case], population: dict[str, int]) -> tuple[Share | None, Share | None]:
    """Of the run that the cases were drawn from, with `population` answers in each stratum."""
    import numpy as np

    rng = np.random.default_rng(0)
    exact: defaultdict[tuple[bool, bool], float] = defaultdict(float)  # (kept, accepted): answers of the run
    drawn = {(kept, accepted): np.zeros(DRAWS) for kept in (True, False) for accepted in (True, False)}
    for stratum in sorted({case.stratum for case in cases}):
        counts = Counter((case.kept, case.accepted) for case in cases if case.stratum == stratum)
        answers = population[stratum]
        sides = sorted({kept for kept, _ in counts})  # one side, unless the filters have changed since
        cells = [(kept, accepted) for kept in sides for accepted in (True, False)]
        shares = rng.dirichlet([counts[cell] + 0.5 for cell in cells], DRAWS)
        for column, cell in enumerate(cells):
            exact[cell] += answers * counts[cell] / counts.total()
            drawn[cell] += answers * shares[:, column]

    def share(other: tuple[bool, bool]) -> Share | None:
        both = (True, True)
        if not exact[both] + exact[other]:
            return None
        posterior = drawn[both] / np.maximum(drawn[both] + drawn[other], 1e-12)
        low, high = np.quantile(posterior, (0.025, 0.975))
        return Share(exact[both] / (exact[both] + exact[other]), float(low), float(high))

    return share((True, False)), share((False, True))


def weighted_kappa(pairs: Counter[tuple[int, int]]) -> float | None:
    """Cohen's kappa with quadratic weights; None if neither side ever changes its score."""
    total = pairs.total()
    rows, columns = Counter[int](), Counter[int]()
    for (one, other), count in pairs.items():
        rows[one] += count
        columns[other] += count
    observed = sum(count * (one - other) ** 2 for (one, other), count in pairs.items()) / max(total, 1)
    chance = sum(rows[one] * columns[other] * (one - other) ** 2 for one in rows for other in columns) / max(
        total**2, 1
    )
    return 1 - observed / chance if chance else None


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
    if result.scores:
        table = Table("person \\ judge", *map(str, SCORES), title="scores")
        for one in SCORES:
            table.add_row(str(one), *(str(result.scores[one, other] or "") for other in SCORES))
        console.print(table)
        kappa = weighted_kappa(result.scores)
        said = "undefined: neither changes its score" if kappa is None else f"{kappa:.2f}"
        console.print(f"weighted kappa (quadratic) {said}, of {result.scores.total()} scores", highlight=False)
