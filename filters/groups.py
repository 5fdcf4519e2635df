"""The answers to one prompt side by side: what they agree on, which of them stay, and how often one of them is right.

Works on one array with a row for each answer of the run, some 50 bytes, in the order of the file: texts and results are
hashes. Reads and writes nothing.
"""

from datetime import datetime
from math import comb
from typing import NamedTuple

import msgspec
import numpy as np
from pydantic import Field

from filters.answer import UNVERIFIED, Answer, Checked, RuleSettings
from filters.minhash import Array, digest
from pipeline.filters_config import Selection
from pipeline.records import Completion, Message, Reason, folded, said

AGREES, SELECT = "agrees", "select"
_encode = msgspec.json.Encoder().encode
SAMPLE = np.dtype(
    [
        ("prompt", np.uint64),  # hash_of_prompt
        ("sample", np.int32),  # the answer's number among those to the prompt
        ("passed", bool),  # every rule
        ("wrong", bool),  # a rule drops it; not only because it could not be checked
        ("start", np.int64),  # of its line, in the file it is written to first
        ("created", np.float64),  # seconds since 1970
        ("result", np.uint64),  # a hash of what the verifier made of it, or of its text
        ("score", np.float32),  # the mean of the verifiers'; -inf: none gives one
        ("chars", np.int32),
    ]
)


class AgreesSettings(RuleSettings):
    min_share: float = Field(0.5, gt=0, le=1)  # of a prompt's answers, the dropped ones too


def agrees(answer: Answer, settings: AgreesSettings) -> None:
    """Says nothing of one answer by itself: `outvoted` compares those that the other rules let pass."""


def sample_of(row: Completion, checked: Checked, start: int, *, results: bool) -> tuple[int | float, ...]:
    """A row of SAMPLE. `results`: they are compared; else all are 0."""
    scores, result = checked.scores.values(), 0
    if results:
        result = hash_of(folded(said(row)) if checked.result is None else checked.result)
    return (
        hash_of_prompt(row.prompt_id, row.messages),
        row.sample,
        not checked.reasons,
        any(reason.rule != UNVERIFIED for reason in checked.reasons),
        start,
        _seconds(row.created),
        result,
        sum(scores) / len(scores) if scores else -np.inf,
        len(said(row)),
    )


def _seconds(created: str) -> float:
    """0 for what is no time: rows may be of another program."""
    try:
        return datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def hash_of(text: str) -> int:
    """What stands for a text in SAMPLE."""
    return int.from_bytes(digest(text), "little")


def hash_of_prompt(prompt_id: str, messages: list[Message]) -> int:
    """What stands for a prompt in SAMPLE: its id, and its messages up to the first of the user.

    An id of the user's may have named another prompt before. What follows in a conversation differs by sample.
    """
    end = next((number for number, message in enumerate(messages, start=1) if message.role == "user"), None)
    return hash_of(prompt_id + _encode(messages[:end]).decode())


class Votes(NamedTuple):
    """A majority vote: for each answer that passed the rules, how many of its prompt's answers say the same."""

    same: Array  # answers with the same result, this one included
    total: Array  # answers to the prompt, the dropped ones too
    most: Array  # answers with the result that most of them agree on
    chosen: Array  # whether this answer has that result; of results as frequent, that of the lowest sample number


def count_votes(samples: Array) -> Votes:
    """The votes on every prompt's result, in the order of the answers that passed."""
    prompts, totals = np.unique(samples["prompt"], return_counts=True)
    rows = samples[samples["passed"]]
    keys = rows["prompt"] * np.uint64(0x9E3779B97F4A7C15) ^ rows["result"]
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    count = counts[group]
    order = np.lexsort((-rows["created"], rows["sample"], -count, rows["prompt"]))
    _, first, of_prompt = np.unique(rows["prompt"][order], return_index=True, return_inverse=True)
    best = np.empty(len(rows), np.int64)  # for each row, the first row of the result that is chosen
    best[order] = order[first][of_prompt]
    total = totals[np.searchsorted(prompts, rows["prompt"])]
    return Votes(count, total, count[best], group == group[best])


def outvoted(votes: Votes, settings: AgreesSettings) -> dict[int, Reason]:
    """The answers that passed, numbered from 0, that `agrees` drops after all, and why."""
    share = votes.most / votes.total
    gone: dict[int, Reason] = {}
    for row in np.flatnonzero(~votes.chosen | (share < settings.min_share)).tolist():
        count, total, most = int(votes.same[row]), int(votes.total[row]), int(votes.most[row])
        value, least = (most / total, settings.min_share) if votes.chosen[row] else (count / total, None)
        gone[row] = Reason(rule=AGREES, value=value, at_least=least, count=count, total=total, n=most)
    return gone


def not_selected(samples: Array, alive: Array, how: Selection, scores: Array, votes: Votes) -> dict[int, Reason]:
    """All but one answer to each prompt, of those that are `alive`, and why. All arrays are of answers that passed.

    `scores`: higher is better. Of equals the lowest sample number stays; of two with one number, the newest: the recipe
    asks otherwise now.
    """
    if how == "all":
        return {}
    ranks = {"first": samples["sample"], "best": -scores, "shortest": samples["chars"], "agreed": -votes.same}
    order = np.lexsort((-samples["created"], samples["sample"], ranks[how], samples["prompt"]))
    order = order[alive[order]]
    _, first, of_prompt = np.unique(samples["prompt"][order], return_index=True, return_inverse=True)
    stays = samples["sample"][order[first][of_prompt]]
    dropped = np.delete(np.arange(len(order)), first)
    return {int(order[at]): Reason(rule=SELECT, what=how, n=int(stays[at])) for at in dropped.tolist()}


def pass_at(answers: int, right: int, k: int) -> float:
    """The chance that one of k answers drawn from `answers` is among the `right` ones: the unbiased estimator of
    Chen et al. 2021 (arXiv:2107.03374), for k up to `answers`.
    """
    return 1 - comb(answers - right, k) / comb(answers, k)


def solved(samples: Array) -> tuple[Array, dict[int, float]]:
    """The hashes of the prompts none of whose answers passed, and pass@k for k = 1, 2, 4, … and the most answers.

    pass@k is the mean over the prompts that have k answers or more.
    """
    prompts, of_prompt, answers = np.unique(samples["prompt"], return_inverse=True, return_counts=True)
    right = np.bincount(of_prompt[samples["passed"]], minlength=len(prompts))
    pairs, weights = np.unique(np.stack((answers, right)), axis=1, return_counts=True)
    most = int(answers.max())
    passes = {}
    for k in [*(2**power for power in range(most.bit_length()) if 2**power < most), most]:
        enough = pairs[0] >= k
        each = [pass_at(int(n), int(c), k) for n, c in pairs[:, enough].T]
        passes[k] = float(np.average(each, weights=weights[enough]))
    return prompts[right == 0], passes
