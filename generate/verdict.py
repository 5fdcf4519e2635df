"""What follows from an attempt without an answer: one pure function, `decide`.

docs/generation.md has the same table in words; a test holds each of its rows against `decide`.

    Retry      the request is sent again
    Fail       the request has failed for good
    Pause      the endpoint takes nothing for a while (or one probe at a time); the request is sent again, or has failed
    Relearn    the teacher refuses a setting: the request is sent again another way
    EndRun     no request of this run can be answered now
"""

from dataclasses import dataclass
from math import inf
from typing import NamedTuple
from urllib.parse import urlsplit

from tenacity import wait_exponential

from generate.jobs import Job
from generate.reply import EMPTY, Fault
from generate.schedule import wait_s
from pipeline.generate_config import GenerateConfig
from pipeline.records import Failure

FAILURES_IN_ROW = 8  # of different requests, and no answer between: then the endpoint is down
REFUSED_ALIKE = 20  # different requests in a row, all refused alike: then the fault is not theirs
PROBE_WAIT = wait_exponential(multiplier=0.5, max=30)  # seconds between probes of an endpoint that is down
QUIET_S = 120.0  # without any answer, after which a 429, 503 or 529 counts against its request
REFUSED_WAIT = wait_exponential(multiplier=0.25, max=30)  # seconds of pause after a 429 without Retry-After

OF_ONE_ENDPOINT = frozenset({"unauthorized", "not_found"})  # it may have been set up anew; another one still answers
ENDS_RUN = OF_ONE_ENDPOINT | {"insufficient_quota"}
FINAL = frozenset(  # sending the request again would bring the same, and may cost the same
    {"bad_request", "forbidden", "content_filter", "refusal", *EMPTY, "no_choices", "wrong_shape", "too_large"}
)
# Of all requests, if not of one.
REFUSALS = frozenset({"bad_request", "forbidden", "no_choices", "wrong_shape", "thought_cut_off"})
REFUSED_LATER = "forbidden"  # the one of them that may begin in the middle of a call: a key has reached its limit
OVERLOADED = (503, 529)  # statuses of a server whose queue is full, for one (529: Anthropic)


class State(NamedTuple):
    """What `decide` knows beside the reply: the attempt, its endpoint and the run, as they are when it comes."""

    url: str
    key: str = "no key is set"  # what there is to say of the key when it is refused
    down: bool = False  # the endpoint was down already
    failing: int = 1  # different requests in a row that failed at the endpoint, this one included
    step: int = 1  # of the endpoint's backoff; 0: the request was sent before the last step, and belongs to it
    all_down_s: float = 0.0  # how long all endpoints have been down
    others_up: bool = False  # another endpoint may still answer
    refused_alike: int = 0  # requests in a row that were refused as this one was, this one included
    quiet_s: float = inf  # since the call's last answer, or its start
    limited_s: float = 0.0  # since the first 429 after that
    limited: int = 1  # different requests with a 429 since then, this one included
    idle: bool = False  # nothing else is in flight
    has_time: bool = True  # another attempt fits before the request's deadline
    teaches: bool = False  # the refusal is about a setting that can be sent another way


@dataclass(frozen=True, slots=True)
class Retry:
    """Send the request again after `after_s` seconds and a step of the backoff; step 0 adds nothing."""

    after_s: float = 0.0
    step: int = 1
    counted: bool = True  # the attempt counts against max_attempts


@dataclass(frozen=True, slots=True)
class Fail:
    """The request has failed for good. `held_back`: it is recorded only if the run goes on."""

    held_back: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """The endpoint takes nothing for `pause_s` seconds; if `down`, then one request at a time until one is answered."""

    pause_s: float
    then: Retry | Fail
    down: bool = False


@dataclass(frozen=True, slots=True)
class Relearn:
    """Send the request again, the way the teacher wants it."""


@dataclass(frozen=True, slots=True)
class EndRun:
    """Nothing more is sent. The run can be resumed."""

    message: str
    name_models: bool = False  # the user should be told which models the endpoint lists


Verdict = Retry | Fail | Pause | Relearn | EndRun


def heals(fault: Fault) -> bool:
    """Whether another attempt may bring an answer."""
    return fault.error not in ENDS_RUN and fault.error not in FINAL


def speaks_of_endpoint(fault: Fault) -> bool:
    """Whether the fault is a sign that the endpoint is down."""
    return heals(fault) and fault.error not in ("rate_limited", "missing_choice")


def decide(fault: Fault, job: Job, state: State, config: GenerateConfig) -> Verdict:
    """What follows from the fault in answer to `job`, whose attempts and seconds include this attempt."""
    if state.others_up and fault.error in OF_ONE_ENDPOINT:
        return Pause(wait_s(PROBE_WAIT, state.step), Retry(step=0, counted=False), down=True)
    if fault.error in ENDS_RUN:
        return EndRun(_why_nobody(fault, state), name_models=fault.error == "not_found")
    if state.teaches:
        return Relearn()
    if fault.error in FINAL:
        return _refused(fault, state)
    if fault.error == "missing_choice":  # each such reply brings at least one of those that were asked for
        return Retry(step=0, counted=False)
    if state.all_down_s >= config.give_up_s:
        return EndRun(
            f"{state.url} has not answered for {state.all_down_s:.0f} s ({fault.message}); start it and run this "
            "again: what was answered is kept"
        )
    then = _again(fault, job, state, config)
    if fault.error == "rate_limited":
        if state.idle and state.limited > 1 and state.limited_s >= config.give_up_s:
            return EndRun(
                f"{state.url} has answered nothing but 429 for {state.limited_s:.0f} s ({fault.message}); run the same "
                "command again when its limit is over: what was answered is kept"
            )
        return Pause(fault.retry_after_s or wait_s(REFUSED_WAIT, state.step), then)
    if fault.error == "unreachable" or state.failing >= FAILURES_IN_ROW:
        return Pause(wait_s(PROBE_WAIT, state.step), then, down=True)
    return then


def _again(fault: Fault, job: Job, state: State, config: GenerateConfig) -> Retry | Fail:
    """Another attempt, unless the request has had all of them, or all of its time."""
    unreachable, limited = fault.error == "unreachable", fault.error == "rate_limited"
    its_turn_comes = (limited or fault.status in OVERLOADED) and state.quiet_s < QUIET_S  # as others are answered
    blameless = state.down or unreachable or its_turn_comes
    after_s = fault.retry_after_s
    if after_s > config.give_up_s:
        if not state.down and not limited:
            return Fail()
        after_s = 0.0  # it is the endpoint that waits
    if job.attempts - blameless >= config.max_attempts or not (state.has_time or unreachable):
        return Fail(held_back=limited)
    step = job.attempts
    if limited:  # the endpoint's own pause grows already
        # From the second refusal that counts, a request waits a random time more: not all come back at once.
        step = 0 if fault.retry_after_s and job.attempts == 1 else 1
    return Retry(after_s, step, counted=not blameless)


def _refused(fault: Fault, state: State) -> Fail | EndRun:
    alike = state.refused_alike if fault.error in REFUSALS else 0
    return EndRun(refused_by_all(fault, state.url, alike)) if alike >= REFUSED_ALIKE else Fail(held_back=alike > 0)


def refused_by_all(fault: Fault | Failure, url: str, requests: int) -> str:
    """Why a run ends that had so many requests in a row refused alike."""
    return (
        f"{url} gives no answers: {requests} requests in a row end with {fault.error} (status {fault.status}): "
        f"{fault.message}. Fix the recipe or the access and run the same command again: none of them counts as failed"
    )


def paused_too_long(url: str, pause_s: float, config: GenerateConfig) -> str:
    """Why a run ends whose endpoints all take nothing for longer than generate.give_up_s."""
    return (
        f"{url} takes no requests for another {pause_s:.0f} s, longer than generate.give_up_s ({config.give_up_s:g}); "
        "run the same command again then: what was answered is kept"
    )


def _why_nobody(fault: Fault, state: State) -> str:
    """Why no request can be answered, and how to fix it."""
    if fault.error == "insufficient_quota":
        then = "top it up, or wait until it is renewed, and run the same command again"
        return f"{state.url}: the quota is used up ({fault.message}); {then}"
    said = f"{state.url} answers {fault.status} ({fault.message})"
    path = urlsplit(state.url).path
    if fault.error == "not_found" and "/deployments/" in path:
        return f"{said}; does the deployment have this name, and teacher.query an api-version?"
    if fault.error == "not_found" and "/v" not in path:
        return f"{said}; should the URL end in /v1?"
    return f"{said}: {state.key}" if fault.error == "unauthorized" else said
