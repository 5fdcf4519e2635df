"""The teacher's likeliest tokens at each token of the kept answers, for kd without the teacher beside the student.

    stored   logprobs.jsonl, as `sampling.logprobs` left it: what the teacher said when it answered
    served   the teacher's endpoint, asked once before training; it must be vLLM's (`prompt_logprobs`, `/tokenize`)

Returns arrays by row. What an endpoint says is written to teacher_logprobs.jsonl as it comes. So a training that goes
on, or another one on the same answers, asks about no answer again. Tokens are compared by what they are: rows whose
tokens are not the student's are found, and refused if they are many.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from generate.client import headers_of
from generate.journal import Journal
from generate.targets import urls_now
from pipeline.address import Redactor, is_loopback
from pipeline.errors import DataError, DistillError, RecipeError, first_line
from pipeline.records import TokenLogprobs, read_jsonl
from pipeline.teacher_config import TeacherConfig
from train.setting import Setting
from train.tokens import MASKED, TokenRow, key_of, prompt_of, shared_start
from train.told import Told

# By a row's tokens: ids (completion tokens, k) and their logprobs in nats; an id of -1: nothing is known.
TopK = dict[bytes, tuple[NDArray[np.int32], NDArray[np.float16]]]
LEAST = 0.5  # share of the tokens that must be the student's
COMPARED_ROWS = 20  # that the endpoint must split as the student does
AT_ONCE = 8  # rows per request
OTHERS = "use train.method: gold with the teacher beside the student, or lora or full"


def answer_of(row: TokenRow) -> list[int]:
    """The tokens of a row that carry loss."""
    return [label for label in row["labels"] if label != MASKED]


def read_stored(
    path: Path, shown: Sequence[dict[str, Any]], rows: Sequence[TokenRow], tokenizer: Any, console: Console
) -> TopK:
    """What was stored of the answers; `shown` has their ids, and whether their reasoning is `stripped`.

    `rows` are their tokens, in the same order. Says how many of the tokens it is. Raises DataError if an answer has
    none stored, RecipeError if the stored tokens are another tokenizer's, or those of the reasoning.
    """
    ids = [row["id"] for row in shown]
    wanted = set(ids)
    lines = read_jsonl(path, TokenLogprobs) if path.exists() else ()
    stored = {line.id: line for line in lines if line.id in wanted}
    if missing := [id_ for id_ in ids if id_ not in stored]:
        raise DataError(
            f"{path}: nothing is stored of {len(missing)} of {len(ids)} answers (the first: {missing[0]}); use "
            "train.kd.teacher: local or served, or ask for them anew with sampling.logprobs"
        )
    names = {} if not any(line.names for line in stored.values()) else token_names(tokenizer)
    known: TopK = {}
    covered = total = 0
    answers = [answer_of(row) for row in rows]
    begin = _begin([stored[id_] for id_ in ids[:COMPARED_ROWS]], answers, names)
    for id_, row, answer in zip(ids, rows, answers, strict=True):
        likeliest, logprobs, told = _aligned(stored[id_], answer, names, begin)
        known[key_of(row["input_ids"])] = likeliest, logprobs
        covered, total = covered + told, total + len(answer)
    if covered < LEAST * total:
        why = f"its tokenizer is not the student's; {OTHERS}"
        if any(row["stripped"] for row in shown):
            why = "they begin with its reasoning; use train.reasoning: keep, or train.method: lora or full"
        raise RecipeError(
            f"{path}: the teacher's tokens are those of {covered / total:.0%} of the answers' tokens: {why}"
        )
    console.print(f"{path}: the teacher's word on {covered / total:.1%} of the answers' tokens; text alone on the rest")
    return known


def _begin(lines: Sequence[TokenLogprobs], answers: Sequence[Sequence[int]], names: dict[bytes, int]) -> int:
    """How many tokens of each answer come before the teacher's own; `lines`: what is stored of the first few answers.

    The student's template writes them, as Qwen3's an empty thought, so they are the same in all answers. Of all
    possible numbers the right one is that after which most tokens are those that the teacher chose.
    """
    pairs = [(_of_student(line, names)[0].tolist(), answer) for line, answer in zip(lines, answers, strict=False)]
    places = range(len(shared_start(answers)) + 1)
    return max(places, key=lambda place: sum(len(shared_start([chosen, answer[place:]])) for chosen, answer in pairs))


def _of_student(line: TokenLogprobs, names: dict[bytes, int]) -> tuple[NDArray[Any], ...]:
    """What was chosen, the likeliest and their logprobs, by the student's ids; -1: no token of the student's."""
    chosen, (likeliest, logprobs) = np.frombuffer(line.chosen, "<i4"), _arrays(line)
    if line.names:
        ids = np.array([*(names.get(name, -1) for name in line.names), -1], np.int32)  # the last one is for -1
        chosen, likeliest = ids[chosen], ids[likeliest]
    return chosen, likeliest, logprobs


def _aligned(
    line: TokenLogprobs, answer: Sequence[int], names: dict[bytes, int], begin: int
) -> tuple[NDArray[np.int32], NDArray[np.float16], int]:
    """A line's arrays by the student's ids and tokens, and how many tokens they tell of.

    What the teacher says of a token holds if all tokens before it are the same, from `begin` on.
    """
    chosen, likeliest, logprobs = _of_student(line, names)
    same = len(shared_start([chosen.tolist(), answer[begin:]]))
    told = min(same + 1, len(chosen), len(answer) - begin) if same else 0
    own = np.full((len(answer), line.top), -1, np.int32), np.zeros((len(answer), line.top), np.float16)
    own[0][begin : begin + told], own[1][begin : begin + told] = likeliest[:told], logprobs[:told]
    return *own, told


def _arrays(line: TokenLogprobs) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """A line's ids and their logprobs: (tokens, top) each."""
    likeliest, logprobs = np.frombuffer(line.likeliest, "<i4"), np.frombuffer(line.logprobs, "<f2")
    return likeliest.reshape(-1, line.top), logprobs.reshape(-1, line.top)


def token_names(tokenizer: Any) -> dict[bytes, int]:
    """The ids of a byte-level tokenizer's tokens by their bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    names: dict[bytes, int] = {}
    for token, id_ in tokenizer.get_vocab().items():
        special = id_ in tokenizer.added_tokens_decoder
        name = token.encode() if special else bytes(byte_of.get(sign, 0) for sign in token)
        names.setdefault(name, id_)
    return names


def ask_endpoint(setting: Setting, rows: Sequence[TokenRow], tokenizer: Any, told: Told) -> TopK:
    """What the teacher's endpoint says of the rows' answers, after the prompts that it is told.

    Each of several processes asks about its share of the rows, and has what all were told. Raises RecipeError if
    its tokenizer is not the student's, DistillError if it cannot be asked: what it has said by then is kept.
    """
    teacher, file, processes, top = setting.teacher, setting.logprobs, setting.processes, setting.config.kd.top_k
    assert teacher is not None and file is not None
    client = endpoint_client(teacher, told)
    check_tokens(client, rows[:COMPARED_ROWS], tokenizer)
    rows = rows[processes.rank :: processes.count]
    ids = [_asked_id(row, teacher, top, told) for row in rows]
    with Journal(file, TokenLogprobs) as journal:
        left = [(id_, row) for id_, row in zip(ids, rows, strict=True) if id_ not in journal.found.ids]
        earlier = f"; {len(rows) - len(left)} earlier" if len(left) < len(rows) else ""
        setting.console.print(f"{client.base_url}: {teacher.model} is asked about {len(left)} answers{earlier}")
        for first in track(range(0, len(left), AT_ONCE), "asking the teacher", console=setting.console):
            journal.append(*_said(client, left[first : first + AT_ONCE], top))
    wanted = set(ids)
    said = {line.id: _arrays(line) for line in read_jsonl(file, TokenLogprobs) if line.id in wanted}
    return processes.joined({key_of(row["input_ids"]): said[id_] for id_, row in zip(ids, rows, strict=True)})


def _asked_id(row: TokenRow, teacher: TeacherConfig, top: int, told: Told) -> str:
    """The id of a question to the endpoint: a hash of the teacher, `top`, its prompt's tokens and the row's."""
    prompt = prompt_of(row)
    before = f"{teacher.model}\0{top}\0".encode() + key_of(told.get(key_of(prompt), prompt))
    return sha256(before + b"\0" + key_of(row["input_ids"])).hexdigest()[:16]


def _said(client: Any, rows: Sequence[tuple[str, TokenRow]], top: int) -> list[TokenLogprobs]:
    """What the endpoint says of the answers of a few rows, each with its id."""
    sequences, starts = [list(row["input_ids"]) for _, row in rows], [len(prompt_of(row)) for _, row in rows]
    said = client.get_sequence_logprobs(sequences, starts, top_logprobs=top, chunk_size=AT_ONCE)
    lines = []
    for (id_, row), start, ids, logprobs in zip(rows, starts, said["logprob_token_ids"], said["logprobs"], strict=True):
        learned = [place - start for place, label in enumerate(row["labels"]) if label != MASKED]
        likeliest, values = np.array(ids, "<i4")[learned], np.array(logprobs, np.float32)[learned]
        likeliest[np.isneginf(values)] = -1
        line = TokenLogprobs(
            id=id_,
            top=likeliest.shape[1],
            chosen=np.array(answer_of(row), "<i4").tobytes(),
            likeliest=likeliest.tobytes(),
            logprobs=values.clip(-65504, 0).astype("<f2").tobytes(),
        )
        lines.append(line)
    return lines


def endpoint_client(teacher: TeacherConfig, told: Told) -> Any:
    """TRL's client of the first of the teacher's endpoints, which may want a key, with the teacher's own prompts.

    As TRL makes it, it sends no key, and wants vLLM installed on this machine. Raises RecipeError as `urls_now`.
    """
    import requests
    from trl.generation.vllm_client import VLLMClient

    url, words = next(iter(urls_now(teacher))), Redactor.of(teacher)

    class Client(VLLMClient):
        def __init__(self) -> None:
            self.base_url, self.model = url.removesuffix("/v1"), teacher.model
            self.session = requests.Session()
            self.session.trust_env = not is_loopback(url)
            self.session.auth = lambda request: request  # without it a .netrc would take the place of the key
            self.session.headers.update(headers_of(teacher))
            self.session.params = teacher.query

        def get_sequence_logprobs(self, sequences: Any, prompt_lengths: Any, **more: Any) -> Any:
            own = [list(ids[:length]) for ids, length in zip(sequences, prompt_lengths, strict=True)]
            prompts = [told.get(key_of(prompt), prompt) for prompt in own]
            whole = [new + list(ids[len(old) :]) for new, old, ids in zip(prompts, own, sequences, strict=True)]
            with _explained(words):
                return super().get_sequence_logprobs(whole, [len(prompt) for prompt in prompts], **more)

        def tokens_of(self, text: str) -> list[int]:
            request = {"model": self.model, "prompt": text, "add_special_tokens": False}
            with _explained(words):
                ids: list[int] = self._post(f"{self.base_url}/tokenize", json=request)["tokens"]
                return ids

    return Client()


def check_tokens(client: Any, rows: Sequence[TokenRow], tokenizer: Any) -> None:
    """Raises RecipeError if the endpoint makes other tokens of the rows' text than the student does."""
    for row in rows:
        text = tokenizer.decode(row["input_ids"])
        if client.tokens_of(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise RecipeError(
                f"teacher.model {client.model}: its endpoint splits text into other tokens than the student: "
                f"{text[:40]!r}; {OTHERS}"
            )


@contextmanager
def _explained(words: Redactor) -> Iterator[None]:
    """Raises DistillError, without secrets, in place of what TRL's client raises."""
    import requests

    try:
        yield
    except requests.RequestException as error:
        why = words(first_line(error))
        raise DistillError(f"train.kd.teacher: served: the endpoint cannot be reached: {why}") from None
    except Exception as error:  # TRL's client raises nothing more exact
        if type(error) is not Exception and not isinstance(error, KeyError | TypeError | ValueError):
            raise
        why = words(first_line(error))
        raise DistillError(
            f"train.kd.teacher: served: the endpoint refuses ({why}); it must be vLLM's, and allow train.kd.top_k "
            "logprobs (--max-logprobs)"
        ) from None
