"""Near-duplicates in pieces against the one-machine code, on made-up texts."""

import random
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from filters.duplicates import Search, Searcher, find_duplicates
from filters.minhash import Array, least_agreement
from filters.sketches import Kind, Sketches, Source, joined, sketch_file, thresholds
from pipeline.filters_config import DedupConfig
from pipeline.records import Completion, Message, encode_line
from scale.near import PAIR, PairSearch, candidates, entries_of, first_rows, merged, similarities
from tests.completion_fields import completion_fields

WORDS = "river lamp quiet stone window garden paper winter copper bridge violet market".split()  # noqa: SIM905
BUCKETS = 3


def texts(count: int, seed: int) -> list[str]:
    """A third are copies of an earlier one: whole, or with a few words changed; some share half of their words."""
    rng, made = random.Random(seed), list[str]()
    for number in range(count):
        words = [rng.choice(WORDS) + rng.choice("abcdefgh") for _ in range(40)]
        if made and number % 3 == 0:
            words = rng.choice(made).split()
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        made.append(" ".join(words))
    return made


def opened(path: Path, rows: list[str]) -> BinaryIO:
    with path.open("wb") as file:
        for number, text in enumerate(rows):
            words = random.Random(f"{path.stem} {number % 300}").choices(WORDS, k=12)  # no file asks what another asks
            prompt = [Message(role="user", content=" ".join(words))]
            row = Completion(**completion_fields(f"{number * 7919 % 1_000_003:032x}", text, messages=prompt))
            file.write(encode_line(row))
    return path.open("rb")


def search_in_pieces(sketches: Sketches, what: str, alive: Array, compared: int) -> Searcher:
    """A search whose bands went through buckets, in parts of 100 rows."""
    threshold, rows = thresholds(sketches.config)[what], sketches.rows[what]
    if threshold is None:
        return Search(sketches, what, alive, compared)
    firsts = first_rows(rows["digest"], alive)
    parts = [(start, entries_of(rows["bands"][start : start + 100], BUCKETS)) for start in range(0, len(rows), 100)]
    found = [
        candidates(
            [(start, buckets[bucket]) for start, buckets in parts],
            firsts,
            lambda wanted: rows["glimpse"][wanted],
            least_agreement(threshold),
        )
        for bucket in range(BUCKETS)
    ]
    pairs = merged(found)
    assert pairs.dtype == PAIR
    assert (pairs["first"] < pairs["other"]).all()
    texts = [sketches.compared(row, what) for row in range(len(rows))]
    similar = similarities(texts, pairs["first"], pairs["other"], sketches.config.ngram)
    return PairSearch(what, firsts, compared, threshold, pairs, similar)


@pytest.mark.parametrize(("near", "prompts", "of"), [(0.8, None, "answer"), (0.65, 0.9, "row"), (0.8, 1.0, "answer")])
def test_the_same_rows_are_dropped_for_the_same_reasons(
    tmp_path: Path, near: float, prompts: float | None, of: str
) -> None:
    config = DedupConfig(near=near, prompts=prompts, of=of, ngram=3)
    made = texts(400, seed=1)
    held_out = Source(opened(tmp_path / "held_out.jsonl", made[5:60] + texts(40, seed=2)), Kind.EVALUATION, "held out")
    other = Source(opened(tmp_path / "other.jsonl", texts(100, seed=3) + made[100:130]), Kind.OTHER_RUN, "other")
    own = Source(opened(tmp_path / "own.jsonl", made), Kind.OWN, "this run")
    parts = [(source, sketch_file(source, config)) for source in (held_out, other, own)]
    sketches = joined(parts, config)
    rng = random.Random(4)
    scores = {row: rng.randint(1, 5) for row in range(0, 400, 2)}
    gone = set(range(3, 400, 17))
    expected = find_duplicates(sketches, gone, scores, Search)
    assert expected == find_duplicates(sketches, gone, scores, search_in_pieces)
    rules = Counter(reason.rule for reason in expected.values())
    assert min(rules["near_duplicate"], rules["contamination"]) > 5
    assert rules["similar_prompt" if prompts else "exact_duplicate"] > 5


def test_a_bucket_of_many_copies_has_few_pairs() -> None:
    """They are one row: no pair is compared for each two of them."""
    digests = np.array([7] * 5000 + [8, 9], np.uint64)
    bands = np.zeros((5002, 4), np.uint32)
    bands[5001] = [0, 5, 6, 7]
    firsts = first_rows(digests, np.ones(5002, bool))
    assert firsts[4999] == 0
    (bucket,) = entries_of(bands, 1)
    pairs = candidates([(0, bucket)], firsts, lambda rows: np.zeros((len(rows), 64), np.uint8), 60)
    assert pairs[["first", "other"]].tolist() == [(0, 5000), (0, 5001), (5000, 5001)]
    assert pairs["other_column"].tolist() == [0, 0, 0]
    dead = first_rows(digests, np.arange(5002) < 5000)
    assert len(candidates([(0, bucket)], dead, lambda rows: np.zeros((len(rows), 64), np.uint8), 60)) == 0
