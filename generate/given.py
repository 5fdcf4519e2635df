"""Answers that the rows of `prompts.file` bring (`prompts.answers`): taken in as the teacher's, and nothing is asked.

Writes the journals of its run: a row without an answer has failed, until it has one.
"""

from typing import Any

import msgspec

from generate.context import Run
from generate.jobs import completed, failed
from generate.reply import Answer, Fault, read_answer
from pipeline.progress import reporting
from pipeline.records import as_text

_encoder = msgspec.json.Encoder()


def take_in(run: Run) -> None:
    """Records what each row that has no answer in the run brings.

    Text is the answer, with its thoughts before it in `<think>…</think>`, if there are any; an object with a `role` is
    a message, which may call tools; another value is its JSON.
    """
    column = run.recipe.prompts.answers
    assert column is not None
    for job in reporting(run.jobs(), "{:,} answers taken in so far".format, run.say):
        outcome = _read(job.request.columns.get(column), column)
        if isinstance(outcome, Answer):
            answer = completed(job, outcome, latency_s=0.0, endpoint="", sampling={})
            run.record_answers((answer, None))
        else:
            run.record_failures(*failed(job, outcome, endpoint="", sampling={}))


def _read(given: Any, column: str) -> Answer | Fault:
    if given is None or given == "":
        return Fault("empty_answer", f"the row has no answer in its column {column!r}")
    message = given if isinstance(given, dict) and "role" in given else {"content": as_text(given)}
    return read_answer(_encoder.encode({"choices": [{"message": message, "finish_reason": "stop"}]}))
