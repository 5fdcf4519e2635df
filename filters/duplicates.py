"""Duplicates among the answers that the rules let pass, and answers that other runs kept or an evaluation asks for.

Of two that are alike, rows of evaluations and other runs always stay; among this run's the better-scored one, then the
one with the smaller id. Every dropped row is like one that stays, never only like another dropped one. Reads rows that
look alike again; writes nothing.
"""

from array import array
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from filters.minhash import Array, jaccard, may_be_similar
from filters.sketches import Kind, Sketches, Source, thresholds
from pipeline.errors import RecipeError
from pipeline.filters_config import DedupConfig
from pipeline.progress import reporting
from pipeline.records import Reason
from pipeline.rundir import RunDir

EXACT, NEAR, PROMPT, CONTAMINATED = "exact_duplicate", "near_duplicate", "similar_prompt", "contamination"
DEDUP_RULES = (EXACT, NEAR, PROMPT, CONTAMINATED)


class Match(NamedTuple):
    """A row that another is like, and how much (None: the same, once folded)."""

    what: str  # "answer" or "prompt"
    of: int
    similarity: float | None


class Searcher(Protocol):
    """Finds the most similar to a row among the rows that stay."""

    def add(self, row: int) -> None: ...

    def match(self, row: int) -> Match | None: ...


Searching = Callable[[Sketches, str, Array, int], Searcher]  # as Search is made


def dedup_rules(config: DedupConfig | None) -> list[dict[str, Any]]:
    """The rules that are at work, with their settings, for the report."""
    if config is None:
        return []
    ngram, files = {"ngram": config.ngram}, [str(path) for path in config.contamination]
    at_work = {
        EXACT: {} if config.exact else None,
        NEAR: None if config.near is None else {"near": config.near, **ngram},
        PROMPT: None if config.prompts is None else {"prompts": config.prompts, **ngram},
        CONTAMINATED: {"contamination": files} if files else None,
    }
    return [{"rule": rule, **settings} for rule, settings in at_work.items() if settings is not None]


def dedup_sources(config: DedupConfig, run: RunDir, recipe_path: Path, stack: ExitStack) -> list[Source]:
    """The files that answers are compared with, open until the stack ends.

    Raises RecipeError if one is not there, or is this run's own.
    """
    sources = []
    wanted = [(Kind.EVALUATION, "contamination", *one) for one in enumerate(config.contamination)]
    wanted += [(Kind.OTHER_RUN, "against", *one) for one in enumerate(config.against)]
    for kind, key, index, path in wanted:
        where = f"{recipe_path}: filters.dedup.{key}[{index}]"
        if run.path.resolve() in (path.resolve(), path.resolve().parent):
            raise RecipeError(f"{where}: {path} is this run itself; name another one")
        other, files = RunDir(path), [path]
        if kind is Kind.OTHER_RUN:
            files = [other.kept]
        elif path.is_dir():
            files = [other.validation, other.test]
        for file in files:
            if not file.is_file():
                stage = "filters" if kind is Kind.OTHER_RUN else "train"
                fix = f"name a run's folder, and run `{stage}` there first" if file != path else "name a file or a run"
                raise RecipeError(f"{where}: {file}: no such file; {fix}")
            sources.append(Source(stack.enter_context(file.open("rb")), kind, str(path)))
    return sources


def exact_copies(sketches: Sketches, gone: Collection[int]) -> dict[int, int | None]:
    """The rows of this run that say the same as another row, each with the row of this run that is judged in its place:
    no verdict is paid twice. None: the other row is an evaluation's or another run's.

    Rows are numbered from 0; those in `gone` are left out.
    """
    own, rows = sketches.own, sketches.rows
    copies: dict[int, int | None] = {}
    if sketches.config.exact:
        order = np.lexsort((rows["id"], sketches.kinds))
        order = order[~np.isin(order, [own + row for row in gone])]
        _, first, group = np.unique(rows["answer"]["digest"][order], return_index=True, return_inverse=True)
        for row, original in zip(order.tolist(), order[first[group]].tolist(), strict=True):
            if row >= own and row != original:
                copies[row - own] = original - own if original >= own else None
    return copies


def find_duplicates(
    sketches: Sketches, gone: Collection[int], scores: Mapping[int, float], search: Searching
) -> dict[int, Reason]:
    """This run's rows, numbered from 0, that are the same as one that stays, or nearly so, and why each is dropped.

    Rows in `gone` are left out. `scores` are the judge's by row, the higher the better; a row without one counts as 0.
    `search`: Search, or what finds the same rows.
    """
    config, own, rows, kinds = sketches.config, sketches.own, sketches.rows, sketches.kinds
    evaluated = int(np.count_nonzero(kinds == Kind.EVALUATION))
    better, alive = np.zeros(len(rows), np.float32), np.ones(len(rows), bool)
    better[[own + row for row in scores]] = list(scores.values())
    alive[[own + row for row in gone]] = False
    order = np.lexsort((rows["id"], -better, kinds))
    found: dict[int, Reason] = {}
    alone = {"answer": not config.exact, "prompt": config.prompts is None}  # whether only evaluations are looked at
    searches = [search(sketches, what, alive, evaluated if alone[what] else len(rows)) for what in thresholds(config)]

    def add(row: int) -> None:
        for one in searches:
            one.add(row)

    def drop(row: int) -> bool:
        """Drops a row that is like one that stays, and says whether it did."""
        match = next((match for one in searches if (match := one.match(row))), None)
        if match:
            found[row - own] = _reason(match, evaluated, sketches)
        return match is not None

    places = order[alive[order]]
    ours: list[int] = places[places >= own].tolist()
    for row in places[places < evaluated].tolist():
        add(row)
    if evaluated:  # before any other row is there: what is like both is contaminated
        ours = [row for row in ours if not drop(row)]
    for row in places[(places >= evaluated) & (places < own)].tolist():
        add(row)
    for row in reporting(ours, lambda count: f"{count:,} of {len(ours):,} answers compared, {len(found):,} duplicates"):
        if not drop(row):
            add(row)
    return found


class Search:
    """Finds the most similar to a row among the rows that stay, by their answers or their prompts (`what`).

    `alive` says whether a row may come at all; only rows under `compared` are found.
    """

    def __init__(self, sketches: Sketches, what: str, alive: Array, compared: int) -> None:
        self._what, self._compared, self._ngrams_of = what, compared, sketches.ngrams_of(what)
        self._threshold = threshold = thresholds(sketches.config)[what]
        self._texts = texts = sketches.rows[what]
        self._keys = texts["digest"][:, None] if threshold is None else texts["bands"]
        self._shared = np.zeros(self._keys.shape, bool)  # keys that several rows have: no other one needs a look
        for column in range(self._keys.shape[1]):
            _, group, counts = np.unique(self._keys[alive, column], return_inverse=True, return_counts=True)
            self._shared[alive, column] = counts[group] > 1
        self._members: dict[int, array[int]] = {}  # rows that stay, by key

    def _keys_of(self, row: int) -> list[int]:
        keys: list[int] = self._keys[row][self._shared[row]].tolist()
        return keys

    def add(self, row: int) -> None:
        """Notes a row that stays."""
        if row < self._compared:
            for key in self._keys_of(row):
                self._members.setdefault(key, array("i")).append(row)

    def match(self, row: int) -> Match | None:
        """The row that stays and is most similar, the better one of equals; None if it is under the threshold."""
        members = [self._members[key] for key in self._keys_of(row) if key in self._members]
        if not members:
            return None
        others = np.concatenate(members)
        texts = self._texts
        same = others[texts["digest"][others] == texts["digest"][row]]
        if len(same) or self._threshold is None:
            return Match(self._what, int(same[0]), None) if len(same) else None
        may_be = may_be_similar(texts["glimpse"][others], texts["glimpse"][row], self._threshold)
        likely = dict.fromkeys(others[may_be].tolist())
        if not likely:
            return None
        mine = self._ngrams_of(row)
        found = [(jaccard(mine, self._ngrams_of(other)), other) for other in likely]
        similarity, other = max(found, key=itemgetter(0))  # the first of equals
        return Match(self._what, other, similarity) if similarity >= self._threshold else None


def _reason(match: Match, evaluated: int, sketches: Sketches) -> Reason:
    index = sketches.source(match.of)
    source, row_id = sketches.sources[index], sketches.text(match.of).id
    rule = PROMPT if match.what == "prompt" else EXACT if match.similarity is None else NEAR
    return Reason(
        rule=CONTAMINATED if match.of < evaluated else rule,
        what=match.what,
        of=row_id,
        n=None if row_id else match.of - sketches.first[index] + 1,
        source="" if source.kind is Kind.OWN else source.name,
        similarity=match.similarity,
    )
