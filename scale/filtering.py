"""Filters on a Ray cluster: `python -m filters RECIPE --cluster ADDRESS`. The files are those of one machine.

The command's own machine reads completions.jsonl and sends blocks of whole lines to tasks, which run the rules and the
verifiers; it writes what comes back, in order. So the nodes need to see neither the run nor the project. Bands and
glimpses stay in the cluster, in buckets: a task for each bucket finds the pairs in it (scale.near), and other tasks
compare their texts. The command's machine keeps some 40 bytes per answer, and applies the rule of filters.duplicates.
Ray repeats a task whose node was lost; if what a task had made is lost with its node, the command ends and changes
nothing.
"""

import copyreg
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, lru_cache
from io import BytesIO
from pathlib import Path
from pickle import PicklingError
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from filters.blocks import Block
from filters.duplicates import Search, Searcher
from filters.minhash import GLIMPSE, Array, least_agreement
from filters.run import Machine
from filters.sketches import Sketches, Source, sketch_file, thresholds
from filters.stream import SLOW_BLOCK, SMALLEST_BLOCK, Work, read_lines
from pipeline.errors import DistillError, UsageError, first_line
from pipeline.filters_config import DedupConfig
from pipeline.records import LONGEST_LINE
from pipeline.user_code import USER_CODE
from scale.cluster import Cluster
from scale.near import PairSearch, candidates, entries_of, first_rows, merged, similarities

BLOCK, LARGEST_BLOCK, BLOCKS = 1 << 23, 1 << 26, 1024  # bytes of a block; larger ones for more than so many
BUCKET = 1 << 28  # bytes of completions.jsonl per bucket of bands: such a bucket has about 50 MB of them
LEAST_BUCKETS = 4
AHEAD = 2  # tasks per core whose results are waited for
PAIRS = 2048  # whose texts one task compares

Result = TypeVar("Result")


class Shuffled(NamedTuple):
    """What stays in the cluster of some rows: object references."""

    rows: int
    glimpses: Any  # by what is compared
    buckets: list[Any]  # for each bucket: the bands in it, by what is compared


@contextmanager
def cluster_machine(address: str) -> Iterator[Machine]:
    """The cluster at a Ray address. Raises UsageError if ray is not installed, DistillError if nothing answers."""
    cluster = Cluster(address, "filters")
    try:
        work = Filtering()
        yield Machine(work.in_blocks, work.sketch_file, work.search)
    finally:
        cluster.close()


class Filtering:
    """The work of one run of the filters on the cluster that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._ahead = AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._buckets = LEAST_BUCKETS
        self._own: list[Shuffled] = []
        self._others: list[Shuffled] = []

    def in_blocks(self, path: Path, work: Work[Block], *, slow: bool) -> Generator[Block, None, None]:
        """As filters.stream.in_blocks. The sketches that it yields are without bands and glimpses."""
        for name, module in list(sys.modules.items()):
            if name.startswith(USER_CODE):  # the user's own: loaded by now, and no node has the file
                self._ray.cloudpickle.register_pickle_by_value(module)
        copyreg.pickle(_lru_cache_wrapper, _reduced)
        size = path.stat().st_size
        self._buckets = max(LEAST_BUCKETS, size // BUCKET)
        block = min(max(BLOCK, size // BLOCKS), LARGEST_BLOCK)
        if slow:
            block = min(max(size // (8 * self._ahead), SMALLEST_BLOCK), SLOW_BLOCK)
        check = self._task(_check, returns=2 + self._buckets)
        try:
            work_ref = self._ray.put(work)
        except (TypeError, PicklingError) as error:
            raise UsageError(
                f"a function of yours cannot go to the nodes ({first_line(error.__cause__ or error)}): make inside it "
                "what it opens or locks, or filter on one machine"
            ) from None
        with path.open("rb") as file:
            tasks = (check(lines, work_ref, self._buckets) for lines in _pieces(file, block))
            for (_, glimpses, *buckets), result in self._in_order(tasks, lambda refs: refs[0]):
                self._own.append(Shuffled(0 if result.sketch is None else len(result.sketch), glimpses, buckets))
                yield result

    def sketch_file(self, source: Source, config: DedupConfig) -> list[Array]:
        """As filters.sketches.sketch_file, without bands and glimpses."""
        slim = []
        for rows in sketch_file(source, config):
            digests, glimpses, *buckets = _split(rows, self._buckets)
            self._others.append(Shuffled(len(rows), self._ray.put(glimpses), [self._ray.put(one) for one in buckets]))
            slim.append(digests)
        return slim

    def search(self, sketches: Sketches, what: str, alive: Array, compared: int) -> Searcher:
        """As filters.duplicates.Search."""
        threshold = thresholds(sketches.config)[what]
        if threshold is None:
            return Search(sketches, what, alive, compared)
        firsts, parts = first_rows(sketches.rows[what]["digest"], alive), [*self._others, *self._own]
        starts = np.cumsum([0, *(part.rows for part in parts)]).tolist()
        glimpses, firsts_ref = [part.glimpses for part in parts], self._ray.put(firsts)
        find = self._task(_find)
        tasks = (
            find(what, starts, [part.buckets[bucket] for part in parts], glimpses, firsts_ref, threshold)
            for bucket in range(self._buckets)
        )
        pairs = merged([found for _, found in self._in_order(tasks)])
        return PairSearch(what, firsts, compared, threshold, pairs, self._similarities(pairs, what, sketches))

    def _similarities(self, pairs: Array, what: str, sketches: Sketches) -> Array:
        """The true similarity of each pair. Their texts are read here, and compared in the cluster."""
        compare = self._task(similarities)

        def tasks() -> Iterator[Any]:
            for start in range(0, len(pairs), PAIRS):
                batch = pairs[start : start + PAIRS]
                rows, numbers = np.unique(np.concatenate((batch["first"], batch["other"])), return_inverse=True)
                texts = [sketches.compared(row, what) for row in rows.tolist()]
                yield compare(texts, numbers[: len(batch)], numbers[len(batch) :], sketches.config.ngram)

        return np.concatenate([np.empty(0), *(found for _, found in self._in_order(tasks()))])

    def _task(self, function: Callable[..., Any], returns: int = 1) -> Callable[..., Any]:
        task: Callable[..., Any] = self._ray.remote(function).options(num_returns=returns).remote
        return task

    def _in_order(
        self, tasks: Iterable[Any], result_of: Callable[[Any], Any] = lambda ref: ref
    ) -> Iterator[tuple[Any, Any]]:
        """Begins tasks as results are taken, and yields each with its result, in order."""
        waiting: deque[Any] = deque()
        coming = iter(tasks)
        try:
            while True:
                while len(waiting) < self._ahead and (task := next(coming, None)) is not None:
                    waiting.append(task)
                if not waiting:
                    return
                task = waiting.popleft()
                yield task, self._get(result_of(task))
        finally:
            for task in waiting:
                self._ray.cancel(result_of(task))

    def _get(self, ref: Any) -> Any:
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # what the task raised
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise DistillError(
                f"the cluster lost work of the filters ({first_line(error)}); nothing was replaced, run again"
            ) from None


def _reduced(cached: Any) -> Any:
    """What pickle takes for a function with @lru_cache: its name, or of a user's file the function and its settings."""
    if not cached.__module__.startswith(USER_CODE):
        return cached.__qualname__
    return _with_cache, (cached.__wrapped__, cached.cache_parameters())


def _with_cache(function: Callable[..., Any], settings: dict[str, Any]) -> Any:
    return lru_cache(**settings)(function)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Pieces of about so many bytes, of whole lines; only LONGEST_LINE bytes of a longer line, which is no answer."""
    while piece := file.read(size):
        if not piece.endswith(b"\n"):
            piece += (rest := file.readline(LONGEST_LINE + 1))
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE + 1)
        yield piece


def _check(lines: bytes, work: Work[Block], buckets: int) -> list[Any]:
    """A task: runs the rules on some lines. Returns the block, without bands and glimpses, and these apart."""
    block = work(read_lines(BytesIO(lines), 0, len(lines)))
    if block.sketch is None:
        return [block, {}, *[{}] * buckets]
    slim, *rest = _split(block.sketch, buckets)
    return [block._replace(sketch=slim), *rest]


def _split(rows: Array, buckets: int) -> tuple[Any, ...]:
    """Sketches without bands and glimpses; the glimpses by what is compared; the bands of each bucket so too."""
    names = rows.dtype.names or ()
    near = [name for name in names if "bands" in (rows.dtype[name].names or ())]
    digest = [("digest", np.uint64)]
    slim = np.empty(len(rows), [(name, digest if name in near else rows.dtype[name]) for name in names])
    for name in names:
        slim[name] = rows[name][["digest"]] if name in near else rows[name]
    bands = {name: entries_of(rows[name]["bands"], buckets) for name in near}
    glimpses = {name: np.ascontiguousarray(rows[name]["glimpse"]) for name in near}
    return slim, glimpses, *({name: bands[name][bucket] for name in near} for bucket in range(buckets))


def _find(
    what: str, starts: list[int], bands: list[Any], glimpses: list[Any], firsts: Array, threshold: float
) -> Array:
    """A task: the pairs of one bucket, from references to its bands and to all glimpses."""
    import ray

    def glimpses_of(rows: Array) -> Array:
        found = np.empty((len(rows), GLIMPSE), np.uint8)
        ends = np.searchsorted(rows, starts)
        for part, ref in enumerate(glimpses):
            if ends[part] < ends[part + 1]:
                mine = slice(ends[part], ends[part + 1])
                found[mine] = ray.get(ref)[what][rows[mine] - starts[part]]
        return found

    parts = ((starts[at], ray.get(ref)[what]) for at, ref in enumerate(bands) if starts[at] < starts[at + 1])
    return candidates(parts, firsts, glimpses_of, least_agreement(threshold))
