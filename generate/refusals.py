"""What the endpoints have refused since the last answer: are these prompts at fault, or would any be refused?

Failures for good are held back here until that is known: refusals that are all alike, with nothing else between, and
requests that used up their attempts on 429s. What comes next tells. If it is an answer, they have failed and are
recorded; if the run ends first, they count as not asked, and the next call asks them again.
"""

from generate.context import Run
from generate.jobs import Job
from generate.reply import Fault
from generate.verdict import REFUSED_LATER, refused_by_all
from pipeline.errors import AllRefused
from pipeline.records import Failure


class Refusals:
    """Of one process's requests. All times are as time.monotonic has them."""

    def __init__(self, run: Run, now: float) -> None:
        self._run = run
        self._answered_at = now  # the last answer, or the start
        self._first_429 = dict[str, float]()  # of each request since then; oldest first
        self._alike: list[list[Failure]] = []  # held back: the last refusals, all of one kind
        self._limited: list[list[Failure]] = []  # held back: by 429
        self._nothing_else = True  # the call has had no other reply
        self._ended = False

    @property
    def limited(self) -> int:
        """Different requests that had a 429 since the last answer."""
        return len(self._first_429)

    def limited_s(self, now: float) -> float:
        """Seconds since the first of them."""
        return now - next(iter(self._first_429.values()), now)

    def quiet_s(self, now: float) -> float:
        """Seconds since the last answer, or the start."""
        return now - self._answered_at

    def saw_429(self, request_id: str, now: float) -> None:
        self._first_429.setdefault(request_id, now)

    def alike(self, job: Job, fault: Fault) -> int:
        """How many requests in a row were refused as this one was, this one included; 0: it is this prompt's fault."""
        if not self._nothing_else and fault.error != REFUSED_LATER:
            return 0
        first = self._alike[0][0] if self._alike else fault
        if (first.error, first.status) != (fault.error, fault.status):
            return 0
        if fault.error != "thought_cut_off":
            return len(self._alike) + 1
        # Where some thoughts had room, others may need more. A stage that measures its models wants their silence, too.
        if self._run.had_answers or (self._run.dir.internal and not self._run.dir.first):
            return 0
        # The samples of one prompt that is too hard are one.
        return len({held[0].prompt_id for held in self._alike} | {job.request.prompt_id})

    def hold_back(self, failures: list[Failure]) -> None:
        """The failures of one reply, until it is known whose fault they are."""
        if not self._ended:
            (self._limited if failures[0].error == "rate_limited" else self._alike).append(failures)

    def answered(self, now: float) -> None:
        """There was an answer: the limit was for those requests alone, or is over."""
        self._answered_at = now
        self._first_429.clear()
        self.release()
        self._record(self._limited)

    def release(self) -> None:
        """There was something other than one kind of refusal: the refused requests were at fault themselves."""
        self._nothing_else = False
        self._record(self._alike)

    def end(self) -> None:
        """The run ends: what is held back, now or later, is asked again by the next call."""
        self._ended = True
        self._alike.clear()
        self._limited.clear()

    def all_sent(self) -> AllRefused | None:
        """The end of a run that has sent everything; with nothing but 403 in answer, ever, it is not finished."""
        if self._nothing_else and not self._run.had_answers and self._alike:
            first = self._alike[0][0]
            if first.error == "forbidden":
                return AllRefused(refused_by_all(first, first.endpoint, len(self._alike)))
        self.release()
        self._record(self._limited)
        return None

    def _record(self, held_back: list[list[Failure]]) -> None:
        while held_back:
            self._run.record_failures(*held_back.pop(0))
