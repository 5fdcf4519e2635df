"""How this teacher wants to be asked: what it refuses of a usual chat request, learnt from its first 400.

Paid models differ: some want `max_completion_tokens` in place of `max_tokens`, some refuse `temperature`, `top_p` or
`seed`, some know the role `developer` and no `system`, or neither. Nothing has to be declared: the error says which,
the request is sent again without it, and all that follow are sent that way. What was really sent stands in each
record's `sampling`. A limit on the answer's length is never left out. Pure: reads and writes nothing.

Read from the error's `param` where there is one (OpenAI, Azure), else from its words (Anthropic, Mistral, gateways).
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from generate.jobs import Job
from generate.verdict import Refused
from pipeline.records import Message

MAY_BE_LEFT_OUT = ("temperature", "top_p", "seed")
ROLES = ("system", "developer", "user")  # where the instructions go: the next when one is refused
REFUSING = re.compile(
    r"unsupported|not (currently )?(supported|permitted|allowed)|does not support|unrecogni[sz]ed|unknown|unexpected|"
    r"extra (inputs|fields)|extra_forbidden|forbidden|cannot both|only the default|deprecated|not accept",
    re.IGNORECASE,
)

_encoder = msgspec.json.Encoder()


class Dialect:
    """What the teacher has been found to refuse so far. One for a run: all its endpoints serve the same model."""

    def __init__(self) -> None:
        self.version = 0
        self._left_out: set[str] = set()
        self._limit = "max_tokens"
        self._role: str | None = None  # for the instructions; None: as they come

    def body(self, job: Job) -> bytes:
        """What is sent for a job: encoded once, and again only after something was learnt."""
        if job.dialect != self.version or not job.body:
            job.dialect = self.version
            request = job.request
            messages = self._addressed(request.messages)
            job.body = _encoder.encode({"model": job.model, "messages": messages, **self.sent(request.sampling)})
        return job.body

    def sent(self, sampling: dict[str, Any]) -> dict[str, Any]:
        """The sampling values as they are really sent."""
        if not self.version:
            return sampling
        return {
            self._limit if name == "max_tokens" else name: value
            for name, value in sampling.items()
            if name not in self._left_out
        }

    def learns_from(self, error: Refused, version: int, say: Callable[[str], None]) -> bool:
        """Whether a request that was refused, sent another way, may be answered; `version` is what it was sent in."""
        if error.status not in (400, 422):
            return False
        if version != self.version:  # it went out before the last lesson
            return True
        learnt = self.learn(error.message, error.parameter)
        if learnt:
            say(f"the teacher refuses a setting ({error.message}): from here on this run {learnt}")
        return learnt is not None

    def learn(self, message: str, parameter: str | None) -> str | None:
        """What an error of the class 400 teaches, in words for the user; None if it is about something else."""
        learnt = self._learn(message, parameter or "")
        self.version += learnt is not None
        return learnt

    def _learn(self, message: str, parameter: str) -> str | None:
        if self._limit == "max_tokens" and "max_completion_tokens" in message:
            self._limit = "max_completion_tokens"
            return "sends max_completion_tokens in place of max_tokens"
        if not REFUSING.search(message):
            return None
        if "role" in parameter or re.search(r"\brole\b", message):
            return self._learn_role(message)
        words = [parameter.rsplit(".", 1)[-1], *re.findall(r"\w+", message)[::-1]]
        named = [word for word in words if word in MAY_BE_LEFT_OUT]  # "`temperature` and `top_p` cannot both": top_p
        if not named or self._left_out & set(named):
            return None
        self._left_out.add(named[0])
        return f"leaves out {named[0]}: answers are sampled with the model's own"

    def _learn_role(self, message: str) -> str | None:
        refused = [role for role in ROLES[:2] if re.search(rf"\b{role}\b", message)]
        if not refused:
            return None
        now = ROLES.index(self._role) if self._role else ROLES.index(refused[0])
        if now + 1 == len(ROLES):
            return None
        self._role = ROLES[now + 1] if refused[0] == "system" or self._role else "system"
        return f"gives instructions in the role {self._role}"

    def _addressed(self, messages: list[Message]) -> list[Message]:
        """The messages, with instructions in the role that the model takes; as a `user`, before the user's words."""
        if self._role is None or messages[0].role not in ROLES[:2]:
            return messages
        first, *rest = messages
        if self._role != "user":
            return [Message(role=self._role, content=first.content), *rest]
        if rest and rest[0].role == "user":
            return [Message(role="user", content=f"{first.content}\n\n{rest[0].content}"), *rest[1:]]
        return [Message(role="user", content=first.content), *rest]
