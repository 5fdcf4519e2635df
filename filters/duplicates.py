"""Duplicates among the answers that the rules let pass, and answers that other runs kept or an evaluation asks for.

Of two that are alike, rows of evaluations and other runs always stay; among this run's the better-scored one, then the
one with the smaller id. Every dropped row is like one that stays, never only like another dropped one. Reads rows that
look alike again; writes nothing.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from filters.minhash import Array, agreement, jaccard, least_agreement
from filters.sketches import Kind, Reader, Sketches, Source, View
from pipeline.errors import RecipeError
from pipeline.recipe import DedupConfig
from pipeline.records import Reason
from pipeline.rundir import RunDir

EXACT, NEAR, PROMPT, CONTAMINATED = "exact_duplicate", "near_duplicate", "similar_prompt", "contamination"
DEDUP_RULES = (EXACT, NEAR, PROMPT, CONTAMINATED)


class Match(NamedTuple):
    """A row that another is like, and how much (None: the same, once folded)."""

    what: str  # "answer" or "prompt"
    of: int
    similarity: float | None


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


def dedup_sources(config: DedupConfig, run: RunDir, recipe_path: Path) -> list[Source]:
    """The files that answers are compared with. Raises RecipeError if one is not there, or is this run's own."""
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
            sources.append(Source(file, kind, str(path)))
    return sources


def exact_copies(sketches: Sketches, config: DedupConfig) -> dict[int, int | None]:
    """This run's rows, numbered from 0, that the judge need not be paid for, as they are the same as another row; and
    the row of this run that is judged for them. None: the other row is an evaluation's or another run's.
    """
    own = sketches.first[-2]
    copies: dict[int, int | None] = {}
    if config.exact:
        order = np.lexsort((sketches.rows.ids, sketches.kinds))
        digests = sketches.rows.views[0].digests
        _, first, group = np.unique(digests[order], return_index=True, return_inverse=True)
        for row, original in zip(order.tolist(), order[first[group]].tolist(), strict=True):
            if row >= own and row != original:
                copies[row - own] = original - own if original >= own else None
    return copies


def find_duplicates(
    sketches: Sketches, config: DedupConfig, gone: Collection[int], scores: Mapping[int, float]
) -> dict[int, Reason]:
    """This run's rows, numbered from 0, that are the same as one that stays, or nearly so, and why each is dropped.

    Rows in `gone` are left out. `scores` are the judge's by row, the higher the better; a row without one counts as 0.
    """
    own, evaluated = sketches.first[-2], int(np.count_nonzero(sketches.kinds == Kind.EVALUATION))
    better, alive = np.zeros(sketches.first[-1], np.float32), np.ones(sketches.first[-1], bool)
    better[[own + row for row in scores]] = list(scores.values())
    alive[[own + row for row in gone]] = False
    order = np.lexsort((sketches.rows.ids, -better, sketches.kinds))
    order = order[alive[order]]
    found: dict[int, Reason] = {}
    with ExitStack() as stack:
        reader = Reader(sketches, config.ngram, stack)
        asked = (  # of answers, then of prompts: only rows under `compared` are found
            ("answer", None if config.exact else evaluated, config.near, reader.answer_ngrams),
            ("prompt", evaluated if config.prompts is None else None, config.prompts, reader.prompt_ngrams),
        )
        searches = [
            _Search(what, view, order, compared, threshold, ngrams_of)
            for view, (what, compared, threshold, ngrams_of) in zip(sketches.rows.views, asked, strict=False)
        ]
        for position, row in enumerate(order.tolist()):
            matches = [match for search in searches if row >= own and (match := search.match(position, row))]
            if matches:
                match = next((match for match in matches if match.of < evaluated), matches[0])
                found[row - own] = _reason(match, evaluated, sketches, reader)
            else:
                for search in searches:
                    search.add(position, row)
    return found


class _Search:
    """Finds the most similar to a row among the rows that stay, by their answers or their prompts."""

    def __init__(
        self,
        what: str,
        view: View,
        order: Array,
        compared: int | None,
        threshold: float | None,
        ngrams_of: Callable[[int], Array],
    ) -> None:
        """`order`: all rows, from the first that is to stay. Only rows under `compared` are found; None: all are."""
        self._what, self._view, self._compared = what, view, compared
        self._threshold, self._ngrams_of = threshold, ngrams_of
        self._members: defaultdict[int, array[int]] = defaultdict(partial(array, "i"))  # rows that stay, by bucket
        keys = view.bands[order] if view.bands.shape[1] else view.digests[order, None]
        positions, buckets, taken = [], [], 0
        for column in keys.T:  # rows with the same key share a bucket; a row alone in its bucket needs no look
            _, group, counts = np.unique(column, return_inverse=True, return_counts=True)
            shared = np.flatnonzero(counts[group] > 1)
            positions.append(shared.astype(np.int32))
            buckets.append((group[shared] + taken).astype(np.int32))
            taken += len(counts)
        joined = np.concatenate(positions)
        sequence = np.argsort(joined, kind="stable")
        self._buckets = np.concatenate(buckets)[sequence]
        self._starts = np.searchsorted(joined[sequence], np.arange(len(order) + 1))

    def _buckets_of(self, position: int) -> list[int]:
        buckets: list[int] = self._buckets[self._starts[position] : self._starts[position + 1]].tolist()
        return buckets

    def add(self, position: int, row: int) -> None:
        """Notes a row that stays."""
        if self._compared is None or row < self._compared:
            for bucket in self._buckets_of(position):
                self._members[bucket].append(row)

    def match(self, position: int, row: int) -> Match | None:
        """The row that stays and is most similar, the better one of equals; None if it is under the threshold."""
        members = [self._members[bucket] for bucket in self._buckets_of(position) if bucket in self._members]
        if not members:
            return None
        others = np.concatenate(members)
        same = others[self._view.digests[others] == self._view.digests[row]]
        if len(same):
            return Match(self._what, int(same[0]), None)
        if self._threshold is None or not self._view.bands.shape[1]:
            return None
        agreeing = agreement(self._view.glimpses[others], self._view.glimpses[row])
        likely = dict.fromkeys(others[agreeing >= least_agreement(self._threshold)].tolist())
        if not likely:
            return None
        mine = self._ngrams_of(row)
        similarity, _, other = max((jaccard(mine, self._ngrams_of(other)), -n, other) for n, other in enumerate(likely))
        return Match(self._what, other, similarity) if similarity >= self._threshold else None


def _reason(match: Match, evaluated: int, sketches: Sketches, reader: Reader) -> Reason:
    index = sketches.source(match.of)
    source, row_id = sketches.sources[index], reader.row(match.of).id
    rule = PROMPT if match.what == "prompt" else EXACT if match.similarity is None else NEAR
    return Reason(
        rule=CONTAMINATED if match.of < evaluated else rule,
        what=match.what,
        of=row_id,
        n=None if row_id else match.of - sketches.first[index] + 1,
        source="" if source.kind is Kind.OWN else source.name,
        similarity=match.similarity,
    )
