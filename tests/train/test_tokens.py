"""Checks of tokenised rows: what would teach something else than the answer is refused."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from train.tokens import differing_prompts, label_fault, label_faults, row_lengths, without_header

STOP = 2
TEXT = {2: "<end>", 3: "\n", 10: "a", 11: "b", 12: "c"}


def decode(ids: list[int]) -> str:
    return "".join(TEXT.get(i, "?") for i in ids)


def row(ids: list[int], masked: int) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


@pytest.mark.parametrize("ids", [[10, 11, 12, 2], [10, 11, 12, 2, 3], [10, 2, 11, 12, 2]])
def test_an_answer_that_ends_with_the_stop_token_passes(ids: list[int]) -> None:
    assert label_fault(row(ids, 2), stops={STOP}, decode=decode, known=13) is None


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        (row([10, 11, 13, 2], 1), "vocabulary", "token '?' has the id 13, the model knows 13 tokens"),
        (row([10, 11, 2], 3), "masked", "no token carries loss"),
        (row([10, 11, 2], 0), "labels", "loss falls on the prompt too"),
        (row([10, 11, 12], 1), "eos", "does not end with a stop token ('<end>'); its end is"),
        (row([10, 11, 2, 12], 1), "eos", "does not end with a stop token"),
        ({"input_ids": [10, 11, 2], "labels": [-100, 11, -100]}, "labels", "part of the answer carries no loss"),
        ({"input_ids": [10, 11, 12, 2], "labels": [-100, 11, -100, 2]}, "labels", "part of the answer carries no loss"),
    ],
)
def test_a_row_that_teaches_something_else_is_named(bad: dict[str, list[int]], kind: str, reason: str) -> None:
    good = row([10, 11, 2], 1)
    faults = label_faults([good, bad, good, bad, bad], stops={STOP}, decode=decode, known=13)
    assert [kind, *(fault.partition(": ")[0] for fault in faults[kind])] == [*faults, "row 2", "row 4", "row 5"]
    assert all(reason in fault for fault in faults[kind])


def test_loss_on_a_question_is_named() -> None:
    rows = [row([10, 11, 12, 2], 2), row([10, 12, 11, 2], 1)]  # the second is asked with 10 11
    faults = label_faults(rows, stops={STOP}, decode=decode, known=13, questions=[2, 2])
    assert [*faults] == ["labels"] and len(faults["labels"]) == 1
    assert faults["labels"][0].startswith(
        "row 2: loss falls on the prompt too: on 'cb<end>'; the chat template renders"
    )


def test_loss_on_every_turn_spares_the_header_of_an_answer() -> None:
    """Turns of a user (10), headers (11 12) and an answer: loss falls on its text and its stop token alone."""
    ids, header = [10, 11, 12, 3, 2, 10, 11, 12, 11, 2], [11, 12]
    marked = {"input_ids": ids, "labels": [-100, -100, 12, 3, 2, -100, 11, 12, 11, 2]}
    good = {"input_ids": ids, **without_header(marked, header)}
    assert good["labels"] == [-100, -100, -100, 3, 2, -100, -100, -100, 11, 2]
    faults = label_faults([good, marked], stops={STOP}, decode=decode, known=13, prompts=[ids[:8]] * 2)
    assert faults == {"labels": ["row 2: loss falls on the prompt too: on its end, 'c'"]}
    said = {"input_ids": [10, 11, 12, 3, 11, 12, 2, 10, 2], "labels": [-100, 11, 12, 3, 11, 12, 2, -100, 2]}
    assert without_header(said, header)["labels"] == [-100, -100, -100, 3, 11, 12, 2, -100, 2]  # an answer may say it


def test_a_row_that_does_not_begin_with_its_prompt_is_not_judged_by_it() -> None:
    """As of a template that renders an answered prompt otherwise, which `differing_prompts` counts."""
    rows = [row([10, 11, 12, 2], 2)] * 2
    assert label_faults(rows, stops={STOP}, decode=decode, known=13, prompts=[[10, 12, 12], [10] * 9]) == {}


def test_a_pair_is_as_long_as_its_prompt_with_the_longer_answer() -> None:
    pairs = {"prompt_ids": [[1, 2], [1]], "chosen_ids": [[1], [1, 2, 3]], "rejected_ids": [[1, 2, 3, 4], [1]]}
    assert row_lengths(Dataset.from_dict(pairs)) == [6, 4]


def test_a_context_unlike_the_one_at_inference_is_counted() -> None:
    rows = [row([10, 11, 12, 2], 2), row([10, 12, 12, 2], 2)]
    examples = [{"prompt": "same"}, {"prompt": "same"}]
    tokenizer = SimpleNamespace(apply_chat_template=lambda prompt, **_: {"input_ids": [10, 11]})
    assert differing_prompts(rows, examples, tokenizer) == 1
