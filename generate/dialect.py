"""How this teacher wants to be asked: what it refuses of a usual chat request, learnt from its first 400.

Paid models differ: some want `max_completion_tokens` instead of `max_tokens`, some refuse `temperature`, `top_p` or
`seed`, some know the role `developer` and no `system`, or neither. Nothing has to be declared: the error says which,
the request is sent again without it, and all later requests are sent that way. Each record's `sampling` is what was
sent with that request. A limit on the answer's length is never left out. Pure: reads and writes nothing.

The error's `param` decides where there is one (OpenAI, Azure, FastAPI's `loc`). Else only words that call that very
parameter unknown count (Anthropic, gateways), and not where the prompt itself talks like that: errors quote prompts.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from generate.jobs import Job
from generate.reply import Fault
from pipeline.instructions import INSTRUCTIONS
from pipeline.records import Message
from pipeline.sampling_config import TOKEN_IDS

MAY_BE_LEFT_OUT = dict.fromkeys(("temperature", "top_p", "seed"), "answers are sampled with the model's own") | {
    TOKEN_IDS: "stored tokens are named by their bytes"
}
ROLES = ("system", "developer", "user")  # where the instructions go: the next one when one is refused

REFUSING = re.compile(  # of an error whose `param` names the setting
    r"unsupported|unrecogni[sz]ed|unknown|unexpected|deprecated|forbidden|cannot both|only the default|"
    r"extra (inputs|fields)|not (currently )?(supported?|permit(ted)?|allow(ed)?|accept(ed)?)\b",
    re.IGNORECASE,
)
_NAME = (
    r"[`'\"]?(?P<name>max_tokens|temperature|top_p|seed|return_tokens_as_token_ids|(?:messages\[\d+\]\.)?role)[`'\"]?"
)
_UNSUPPORTED_LIST = r"does not support parameters: [\[{][^\]}]{0,300}?\b"  # LiteLLM: ['seed'], or {'seed': 7}
UNKNOWN = tuple(  # wordings that call a parameter unknown, with its name in them
    re.compile(wording.replace("NAME", _NAME), re.IGNORECASE)
    for wording in (
        r"(?:unsupported|unrecogni[sz]ed|unknown|unexpected) (?:request )?(?:parameter|argument|field|value)s?"
        r"(?: supplied| provided)?:? NAME(?=$|[.,;:]| (?:is|was|does)\b)",
        r"NAME (?:is|was) (?:not (?:currently )?(?:supported|permitted|allowed|accepted)|deprecated|unsupported)",
        r"NAME does not (?:support|accept)\b",
        r"does not (?:support|accept|allow)(?: the)?(?: parameter| field)? NAME(?=$|[.,;])",
        r"\w[`'\"]? and NAME cannot both\b",
        r"NAME [`'\"]?(?:system|developer)[`'\"]? is not supported",
        r"(?:system|developer) NAME (?:is )?not supported",
        r"unknown name NAME:",  # Gemini
        r"extra_forbidden['\"],\s*['\"]loc['\"]:\s*[\[(]['\"]body['\"],\s*NAME",  # Mistral, servers on FastAPI
        r"not permitted, field: NAME",  # Fireworks
        r"(?:do|does) ?n[o']t support NAME ?=",  # LiteLLM, as the next
        rf"{_UNSUPPORTED_LIST}NAME",
    )
)

ONE_CHOICE = re.compile(  # wordings that refuse an `n` above 1: llama.cpp, Gemini, DeepSeek, Groq, gateways
    r"\bonly one (?:completion )?choice|\bmultiple (?:candidates|choices|completions)\b|\bonly n ?= ?1\b|"
    r"\bn\b[`'\"]? ?(?:[:=>]+ ?\d* ?)?(?:number )?(?:must|should|value|is not|does not|cannot)\b|"
    r"(?:unsupported|unrecogni[sz]ed|unknown) (?:request )?(?:parameter|argument|field)[^.,;]{0,12}\bn\b|"
    rf"{_UNSUPPORTED_LIST}n\b",
    re.IGNORECASE,
)

_encoder = msgspec.json.Encoder()


class Manner(NamedTuple):
    left_out: frozenset[str] = frozenset()
    limit: str = "max_tokens"
    role: str | None = None  # for the instructions; None: as they come


class Dialect:
    """What the teacher has been found to refuse so far. One per run: all its endpoints serve the same model."""

    def __init__(self) -> None:
        self.version, self._manner = 0, Manner()

    def ask_as(self, sent: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Sends requests the way one with an answer was sent: with the settings `sent`, of those `wanted`."""
        limit = "max_tokens" if "max_tokens" in sent else "max_completion_tokens"
        self._manner = Manner(frozenset(MAY_BE_LEFT_OUT.keys() & wanted.keys() - sent.keys()), limit)

    def body(self, job: Job) -> bytes:
        """What is sent for a job: encoded once, and again only after something was learnt."""
        if job.dialect != self.version or not job.body:
            job.dialect = self.version
            request = job.request
            messages, tools = self._addressed(job.told), {"tools": request.tools} if request.tools else {}
            sampling = self.sent(request.sampling, job.choices)
            job.body = _encoder.encode({"model": job.model, "messages": messages, **sampling, **tools})
        return job.body

    def sent(self, sampling: dict[str, Any], choices: int = 1) -> dict[str, Any]:
        """The sampling values as they are sent now, to be answered so many times."""
        if choices > 1:
            sampling = {**sampling, "n": choices}
        return {
            self._manner.limit if name == "max_tokens" else name: value
            for name, value in sampling.items()
            if name not in self._manner.left_out
        }

    def separated(self, job: Job) -> list[Job]:
        """The jobs that are sent for this one: itself, or one per request where the teacher takes no `n`."""
        return [job.part([request]) for request in job.requests] if "n" in self._manner.left_out else [job]

    def teaches(self, fault: Fault, job: Job) -> bool:
        """Whether the refused job, sent another way, may be answered."""
        refused = fault.error == "bad_request" and fault.status in (400, 422)
        if not refused and not _refuses_choices(fault, job):
            return False
        return job.dialect != self.version or self._lesson(fault, job) is not None

    def learn(self, fault: Fault, job: Job, say: Callable[[str], None]) -> None:
        """Learns from a refusal that `teaches`, and says so. One that was sent before the last lesson is no news."""
        if job.dialect == self.version and (lesson := self._lesson(fault, job)):
            said, self._manner = lesson
            self.version += 1
            say(f"the teacher refuses a setting ({fault.message}): from here on this run {said}")

    def _lesson(self, fault: Fault, job: Job) -> tuple[str, Manner] | None:
        """What a refusal of this job teaches, in words too; None if nothing, or nothing new."""
        name, now = _refused(fault, job.told), self._manner
        if _refuses_choices(fault, job):
            return "sends a request for each sample", now._replace(left_out=now.left_out | {"n"})
        if name == "max_tokens" and "max_completion_tokens" in fault.message and now.limit == "max_tokens":
            limit = "max_completion_tokens"
            return f"sends {limit} instead of max_tokens", now._replace(limit=limit)
        if name in MAY_BE_LEFT_OUT and name not in now.left_out:
            said = f"leaves out {name}: {MAY_BE_LEFT_OUT[name]}"
            return said, now._replace(left_out=now.left_out | {name})
        refused = re.search(r"\b(system|developer)\b", fault.message, re.IGNORECASE) if name == "role" else None
        role = self._next_role(refused[1].lower()) if refused else None
        return (f"gives instructions in the role {role}", now._replace(role=role)) if role else None

    def _next_role(self, refused: str) -> str | None:
        """`system`, `developer` and `user` in turn; a recipe's own `developer` is tried as `system` first."""
        if self._manner.role is None:
            return "developer" if refused == "system" else "system"
        return {"system": "developer", "developer": "user"}.get(self._manner.role)

    def _addressed(self, messages: list[Message]) -> list[Message]:
        """The messages, with instructions in the role that the model takes; as a `user`, before the user's words."""
        if self._manner.role is None or messages[0].role not in INSTRUCTIONS:
            return messages
        first, *rest = messages
        if self._manner.role != "user":
            return [Message(role=self._manner.role, content=first.content), *rest]
        if rest and rest[0].role == "user":
            return [Message(role="user", content=f"{first.content}\n\n{rest[0].content}"), *rest[1:]]
        return [Message(role="user", content=first.content), *rest]


def _refuses_choices(fault: Fault, job: Job) -> bool:
    """Whether the teacher refuses several choices (llama.cpp with a 500), or gave one where several were asked for."""
    if not job.others or fault.error not in ("bad_request", "server_error", "missing_choice"):
        return False
    return fault.parameter == "n" or _own_words(ONE_CHOICE, fault, job.told) is not None


def _refused(fault: Fault, messages: list[Message]) -> str | None:
    """The parameter that a refusal calls unknown."""
    if fault.parameter is not None:
        return fault.parameter.rsplit(".", 1)[-1] if REFUSING.search(fault.message) else None
    for wording in UNKNOWN:
        if match := _own_words(wording, fault, messages):
            return match["name"].lower().rsplit(".", 1)[-1]
    return None


def _own_words(wording: re.Pattern[str], fault: Fault, messages: list[Message]) -> re.Match[str] | None:
    """Where an error says it in words of its own: it may quote the prompt, which is long, and so looked at last."""
    match = wording.search(fault.message)
    return None if match and any(wording.search(message.content) for message in messages) else match
