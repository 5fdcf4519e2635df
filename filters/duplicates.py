"""Duplicates among the answers that rules and judge let pass, and in them what other runs kept or an evaluation asks.

Reads the survivors, the files that `filters.dedup` names, and the judge's verdicts. Writes the rows
that stay, and adds the others to the dropped ones with the rule that dropped them and the row they are like. The better
row of two stays (Sketches.order); every dropped row is like one that stayed, never only like another dropped one.
"""

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec

from filters.answer import as_answer
from filters.judge import read_judgements
from filters.minhash import agreement, jaccard, least_agreement
from filters.rows import completion_part, dropped_tail
from filters.sketches import Kind, Reader, Sketches, Source, sketch
from filters.tally import Tally
from pipeline.errors import RecipeError
from pipeline.recipe import DedupConfig
from pipeline.records import Kept
from pipeline.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from filters.minhash import Hashes

EXACT, NEAR, PROMPT, CONTAMINATED = "exact_duplicate", "near_duplicate", "similar_prompt", "contamination"
DEDUP_RULES = (EXACT, NEAR, PROMPT, CONTAMINATED)

_NONE = array("i")
_decoder = msgspec.json.Decoder(Kept)


class Match(NamedTuple):
    """Why a row is dropped: the row it is like, and how much (None: the same, once folded)."""

    rule: str
    of: int
    similarity: float | None
    what: str  # "answer" or "prompt"


class Shared(NamedTuple):
    """Which rows share a bucket, that is a digest or a band's key, with another: the only ones worth a look.

    `rows` and `buckets` go together, in the order in which rows are to be kept. Buckets are numbered column after
    column: answers' digests, answers' bands, prompts' digests, prompts' bands; `ends` says where each sort ends.
    """

    rows: "NDArray[np.int32]"
    buckets: "NDArray[np.int32]"
    ends: tuple[int, int, int, int]


def dedup_rules(config: DedupConfig | None) -> list[dict[str, Any]]:
    """The rules that are at work, with their settings, for the report."""
    if config is None:
        return []
    found: list[dict[str, Any]] = []
    if config.exact:
        found.append({"rule": EXACT})
    if config.near is not None:
        found.append({"rule": NEAR, "near": config.near, "ngram": config.ngram})
    if config.prompts is not None:
        found.append({"rule": PROMPT, "prompts": config.prompts, "ngram": config.ngram})
    if config.contamination:
        found.append({"rule": CONTAMINATED, "contamination": [str(path) for path in config.contamination]})
    return found


def dedup_sources(config: DedupConfig, run: RunDir, recipe_path: Path) -> list[Source]:
    """The files that answers are compared with. Raises RecipeError where one is not there, or is this run's own."""
    sources = []
    for kind, key, paths in (
        (Kind.EVALUATION, "contamination", config.contamination),
        (Kind.OTHER_RUN, "against", config.against),
    ):
        for index, path in enumerate(paths):
            where = f"{recipe_path}: filters.dedup.{key}[{index}]"
            if run.path.resolve() in (path.resolve(), path.resolve().parent):
                raise RecipeError(f"{where}: {path} is this run itself; name another one")
            files = [path]
            if kind is Kind.OTHER_RUN or path.is_dir():
                files = [RunDir(path).kept] if kind is Kind.OTHER_RUN else [RunDir(path).validation, RunDir(path).test]
            for file in files:
                if not file.is_file():
                    stage = "filters" if kind is Kind.OTHER_RUN else "train"
                    fix = (
                        f"name a run's folder, and run `{stage}` there first"
                        if file != path
                        else "name a file or a run"
                    )
                    raise RecipeError(f"{where}: {file}: no such file; {fix}")
                sources.append(Source(file, kind, str(path)))
    return sources


def deduplicate(
    survivors: Path,
    sources: list[Source],
    config: DedupConfig,
    run: RunDir,
    outputs: tuple[BinaryIO, BinaryIO],
    tally: Tally,
) -> None:
    """Writes the survivors that stay to the first output, adds the others to the second, and moves their counts.

    `survivors` holds rows of kept.jsonl. Raises DataError `path:line: reason` at a bad line of another file.
    """
    kept, dropped = outputs
    verdicts = {row.id: row.score for row in read_judgements(run).values() if row.score is not None}
    sketches = sketch([*sources, Source(survivors, Kind.OWN, "this run")], config, verdicts)
    own = sketches.first[-2]
    dropped.seek(0, 2)
    with ExitStack() as stack:
        reader = Reader(sketches, config.ngram, stack)
        matches = {row: match for row, match in find_duplicates(sketches, reader, config) if row >= own}
        with survivors.open("rb") as lines:
            for number, line in enumerate(lines, start=own):
                match = matches.get(number)
                if match is None:
                    kept.write(line)
                else:
                    row, reasons = _decoder.decode(line), {match.rule: _reason(match, sketches, reader)}
                    tally.move_to_dropped(row.id, as_answer(row), reasons)
                    dropped.write(completion_part(line) + dropped_tail(reasons))


def find_duplicates(sketches: Sketches, reader: Reader, config: DedupConfig) -> Iterator[tuple[int, Match]]:
    """Yields the rows to drop, and why, best row first.

    A row that is like none kept before it is kept. Rows of other runs and of evaluations are never dropped.
    """
    shared = _shared(sketches)
    first_own = sketches.first[-2]
    kept = _KeptSoFar(sketches, reader, config, shared.ends)
    for row, buckets in _by_row(shared):
        match = kept.match(row, buckets) if row >= first_own else None
        if match is not None:
            yield row, match
        else:
            kept.add(row, buckets)


class _KeptSoFar:
    """The rows kept so far, by the buckets they are in."""

    def __init__(
        self, sketches: Sketches, reader: Reader, config: DedupConfig, ends: tuple[int, int, int, int]
    ) -> None:
        self._sketches = sketches
        self._reader = reader
        self._config = config
        self._ends = ends
        evaluations = sum(source.kind is Kind.EVALUATION for source in sketches.sources)
        self._first_trained = sketches.first[evaluations]  # rows to evaluate on have lower numbers
        self._members: defaultdict[int, array[int]] = defaultdict(partial(array, "i"))

    def add(self, row: int, buckets: list[int]) -> None:
        for bucket in buckets:
            self._members[bucket].append(row)

    def match(self, row: int, buckets: list[int]) -> Match | None:
        """The row that this one is like; one to evaluate on before any other."""
        import numpy as np

        by_sort: list[list[array[int]]] = [[], [], [], []]
        for bucket in buckets:
            if bucket in self._members:
                by_sort[bisect_right(self._ends, bucket)].append(self._members[bucket])
        same, near, same_prompt, near_prompt = (np.concatenate([_NONE, *others]) for others in by_sort)
        config, reader = self._config, self._reader
        if not config.exact:
            same = same[same < self._first_trained]
        if config.prompts is None:
            same_prompt = same_prompt[same_prompt < self._first_trained]
        found = []
        if len(same):
            found.append(Match(EXACT, int(same[0]), None, "answer"))
        elif config.near is not None:
            likely = _likely(row, near, self._sketches.glimpse, config.near)
            found.extend(_most_like(row, likely, config.near, reader.text_ngrams, NEAR, "answer"))
        if len(same_prompt):
            found.append(Match(PROMPT, int(same_prompt[0]), None, "prompt"))
        elif config.prompts is not None:
            likely = _likely(row, near_prompt, self._sketches.prompt_glimpse, config.prompts)
            found.extend(_most_like(row, likely, config.prompts, reader.prompt_ngrams, PROMPT, "prompt"))
        for match in found:
            if match.of < self._first_trained:
                return match._replace(rule=CONTAMINATED)
        return found[0] if found else None


def _likely(row: int, others: "NDArray[np.int32]", glimpse: "NDArray[np.uint8]", threshold: float) -> list[int]:
    """Those of the others, each once, whose signature agrees with the row's well enough to read them."""
    if not len(others):
        return []
    likely = others[agreement(glimpse[others], glimpse[row]) >= least_agreement(threshold)]
    return list(dict.fromkeys(likely.tolist()))


def _most_like(
    row: int, others: list[int], threshold: float, ngrams_of: "Callable[[int], Hashes]", rule: str, what: str
) -> list[Match]:
    """The most similar of the rows that may be like this one, the better one of equals; none under the threshold."""
    if not others:
        return []
    mine = ngrams_of(row)
    similarity, _, other = max((jaccard(mine, ngrams_of(other)), -place, other) for place, other in enumerate(others))
    return [Match(rule, other, similarity, what)] if similarity >= threshold else []


def _shared(sketches: Sketches) -> Shared:
    import numpy as np

    order = sketches.order()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    rows = [np.empty(0, dtype=np.int32)]
    buckets = [np.empty(0, dtype=np.int32)]
    ends: list[int] = []
    taken = 0
    for columns in (sketches.exact[:, None], sketches.bands, sketches.prompt[:, None], sketches.prompt_bands):
        for index in range(columns.shape[1] if len(columns) else 0):
            members, numbers = _groups(columns[:, index])
            rows.append(members)
            buckets.append(numbers + np.int32(taken))
            taken += int(numbers[-1]) + 1 if len(numbers) else 0
        ends.append(taken)
    all_rows, all_buckets = np.concatenate(rows), np.concatenate(buckets)
    sequence = np.argsort(rank[all_rows], kind="stable")
    return Shared(all_rows[sequence], all_buckets[sequence], (ends[0], ends[1], ends[2], ends[3]))


def _groups(column: "NDArray[Any]") -> tuple["NDArray[np.int32]", "NDArray[np.int32]"]:
    """The rows whose key another row has too, and the number of their group."""
    import numpy as np

    order = np.argsort(column, kind="stable")
    keys = column[order]
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[1:] = keys[1:] == keys[:-1]
    member = repeated.copy()
    member[:-1] |= repeated[1:]
    numbers = np.cumsum(~repeated[member], dtype=np.int32) - np.int32(1)
    return order[member].astype(np.int32), numbers


def _by_row(shared: Shared) -> Iterator[tuple[int, list[int]]]:
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(shared.rows)) + 1).tolist(), len(shared.rows)]
    for start, stop in pairwise(edges):
        if start < stop:
            yield int(shared.rows[start]), shared.buckets[start:stop].tolist()


def _reason(match: Match, sketches: Sketches, reader: Reader) -> str:
    index = sketches.source(match.of)
    source = sketches.sources[index]
    other = reader.row(match.of).id or f"row {match.of - sketches.first[index] + 1}"
    where = "" if source.kind is Kind.OWN else f" in {source.name}"
    if match.similarity is None:
        return f"the same {match.what} as {other}{where}"
    return f"{match.what} {match.similarity:.2f} similar to {other}{where}"
