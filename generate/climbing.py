"""`auto` on a server that shows no queue: raises the number in flight until throughput stops rising.

A server that refuses allows so many requests in flight, or so many per minute, and does not tell how many. From its
first refusal on requests go out evenly (as TCP's pacing; Aggarwal, Savage and Anderson 2000): it refuses a burst, as
after a pause, though over a second it takes many more. The number falls to a share of itself, goes back by halves to
what was refused (as BIC TCP; Xu, Harfoush and Rhee 2004), and on.
"""

from math import ceil

from generate.concurrency import BACK_OFF, MOST, Concurrency

RISES = 1.2  # twice the requests must bring this factor, or the limit is found
STEP = 0.1  # of the limit found: probes go so far up and down
STEP_RISES, STEP_KEEPS = 1.05, 0.975  # what a step up must bring, and what a step down may cost at most
CALM_ANSWERS = 1024  # to judge a small step by
FILLED = 0.8  # of the limit must have been in flight for a round to say anything about it
LEAST_ROUND = 16  # replies, before the limit moves

PACE = 1.25  # of the rate that keeps the limit in flight: so fast requests go out where some were refused
SLACK_S = 0.01  # what this time allows may go at once, as a timer wakes late
LATENCY_SHARE = 0.05  # of the newest answer, in the running mean
HALF = 0.5  # the cut where nothing was answered
EASE_OFF = 0.85  # the cut where few are refused: the limit is near
FEW = 0.1  # refusals per answer
BEYOND = 0.05  # of the limit, up from the number that was refused, round by round
LEAST_ROUND_S = 1.0  # of such a round: an API that meters by the second has room or not after one
HOLD_S = 60.0  # how long the limit stands after a rise that won nothing
SAME = 0.95  # of the number refused before: from here on the same number was refused again
CUT_SHOWS = 0.75  # of it: from here down it shows what the cuts have cost
CUT_KEEPS = 0.85  # of its answers per second a server must keep after cuts; else the cuts were wrong


class Climb:
    """Doubles the number in flight while that raises throughput, then stays near the number with the best throughput.

    Throughput is the speed of one request times the requests in flight (Little's law), over requests that were sent
    after the limit last moved: answers come in bursts, and counting them over a moment would measure the burst.
    """

    def __init__(self, limit: int, now: float) -> None:
        self.limit = self._base = limit  # `_base`: the number that brought the best throughput
        self._best = 0.0  # throughput: tokens per second
        # "double"; "doubt": measures once more, as a pause of a machine looks like the limit; then "settle": probes a
        # little around.
        self._phase = "double"
        self._step = 0  # 0: at the limit found; 1 and -1: probing above and below it
        self._next_step = 1
        self._begin_round(now)

    def _begin_round(self, now: float) -> None:
        """Answers to requests that are sent later count: their number, tokens and seconds, and the most in flight."""
        self._round_at, self._count, self._tokens, self._seconds, self._in_flight = now, 0, 0, 0.0, 0

    @property
    def doubles(self) -> bool:
        return self._phase == "double"

    def answered(self, tokens: int, latency_s: float, in_flight: int, now: float) -> None:
        """After a round of answers, judges the limit that they were sent under."""
        if now - latency_s < self._round_at:
            return
        self._count += 1
        self._tokens += max(tokens, 1)
        self._seconds += latency_s
        self._in_flight = max(self._in_flight, min(in_flight, self.limit))
        size = max(2 * self.limit, CALM_ANSWERS) if self._phase == "settle" else self.limit // 2
        if self._count >= max(size, LEAST_ROUND) and self._seconds > 0:
            if self._in_flight > FILLED * self.limit:  # else something else keeps requests back, as a rate that is told
                self._move(self._in_flight * self._tokens / self._seconds)
            self._begin_round(now)

    def _move(self, throughput: float) -> None:
        if self._phase in ("double", "doubt"):
            if throughput > RISES * self._best:
                self._best, self._base, self._phase = throughput, self.limit, "double"
                self.limit = min(2 * self.limit, MOST)
            elif self._phase == "double":
                self._phase = "doubt"
            else:
                gain = max(throughput / self._best, 1.0)  # what doubling brought; the other requests only wait
                self.limit = self._base = max(1, int(self._base * gain * 1.1))
                self._best, self._phase = max(self._best, throughput), "settle"
        elif self._step:
            if throughput > (STEP_RISES if self._step > 0 else STEP_KEEPS) * self._best:
                self._base = self.limit
            self._step, self._next_step = 0, -self._step
            self.limit = self._base
        else:
            self._best, self._step = throughput, self._next_step
            size = max(1, round(STEP * self._base))
            self.limit = min(max(1, self._base + self._step * size), MOST)


class ByClimbing(Concurrency):
    """Climbs. Once the server refuses, it goes back to the number that was refused, and on; then climbs anew."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._climb: Climb | None = Climb(limit, float("-inf"))  # None: it avoids what was refused
        self._latency_s = 0.0  # a running mean; 0: nothing was answered yet
        self._paced, self._next_at = False, 0.0  # if so, the next request may go out then
        # Since the first request after the last episode of refusals: when that was, and the replies.
        self._since, self._answers, self._refused = 0.0, 0, 0
        self._episode = self._overloaded = False  # one is open; its cause
        self._ceiling = float(limit)  # the limit under which the last episode began
        self._before: tuple[float, float] | None = None  # that of an earlier one, and its answers per second
        self._doubled = False  # to see whether that brings more answers, though it is refused
        self._hold_until = float("-inf")
        # The last cut (or rise) after an episode, the last step since, and the answers since that.
        self._cut_at, self._moved_at, self._count = float("-inf"), float("-inf"), 0

    @property
    def limit(self) -> int:
        """`_level` rounded up: between one and two, two may be in flight, at the pace of the fraction."""
        return ceil(self._level)

    @limit.setter
    def limit(self, limit: int) -> None:
        self._level = float(limit)

    def delay(self, now: float) -> float:
        return max(self._next_at - now, 0.0) if self._paced else 0.0

    def sending(self, choices: int, now: float) -> None:
        """The first request after an episode of refusals ends it: the pauses that it brought are a part of it."""
        if self._paced:
            gap_s = choices * self._latency_s / (PACE * self._level)
            self._next_at = max(self._next_at, now - SLACK_S) + gap_s
        if not self._since or (self._episode and self._end_episode(now)):
            self._since, self._answers, self._refused = now, 0, 0
        self._episode = self._overloaded = False

    def answered(self, tokens: int, latency_s: float, in_flight: int, now: float) -> None:
        self._answers += 1
        self._latency_s += (LATENCY_SHARE if self._latency_s else 1.0) * (latency_s - self._latency_s)
        if self._climb is None:
            self._regrow(now - latency_s, now)
            return
        self._climb.answered(tokens, latency_s, in_flight, now)
        if self._climb.limit != self.limit:
            self.limit = self._climb.limit

    def congested(self, sent: float, now: float, *, overloaded: bool) -> None:
        self._refused += 1
        if sent >= self._since:  # else it belongs to the episode before
            self._episode, self._overloaded = True, self._overloaded or overloaded

    def _regrow(self, sent: float, now: float) -> None:
        """After each round of answers: half of the way back to the number that was refused, then a little beyond it.

        Well beyond it nothing says that it is too much any more (the server has more room now): it climbs anew.
        """
        if sent < self._cut_at:
            return
        self._count += 1
        if self._count < max(self.limit, LEAST_ROUND) or now < self._moved_at + LEAST_ROUND_S:
            return
        self._count, self._moved_at = 0, now
        if now < self._hold_until:
            return
        if self._level > RISES * self._ceiling:
            self._climb = Climb(self.limit, now)
        else:
            self._level = min(self._level + max((self._ceiling - self._level) / 2, BEYOND * self._level), MOST)

    def _end_episode(self, now: float) -> bool:
        """Moves the limit after refusals; False if it has seen too little since the last episode to do so."""
        level, took_s, refused = self._level, now - self._since, self._refused
        if not self._overloaded:
            if not self._latency_s or (self._before is None and not self._paced):  # too many at once: no ceiling
                self._move(BACK_OFF * level, now, paced=True)
                self._climb = Climb(self.limit, now)
                return True
            mostly_refused = refused > self._answers + self.limit  # as no more than `limit` can be in flight
            if not mostly_refused and (took_s < self._latency_s or self._answers + refused < LEAST_ROUND):
                return False  # the last cut has not shown yet
            if self._climb and self._climb.doubles and refused <= FEW * self._answers:
                return True  # it climbs on, as long as that brings more
        self._ceiling, rate = level, self._answers / max(took_s, 1e-9)
        if self._overloaded or refused > self._answers:
            self._before, self._doubled, self._hold_until = (level, rate), False, now
            self._move((BACK_OFF if self._answers else HALF) * level, now, paced=True)
        elif now >= self._hold_until:
            self._judge(level, rate, now)
        return True

    def _judge(self, level: float, rate: float, now: float) -> None:
        """An episode that began under `level` has ended, with so many answers per second; most requests are answered.

        Where cuts have cost answers, the refusals have another cause than the number in flight (each third request is
        refused, say): the limit rises as long as that brings more answers per second.
        """
        if self._before is None:
            self._before = level, rate
            return self._move(BACK_OFF * level, now, paced=True)
        number, brought = self._before
        gain = rate / max(brought, 1e-9)
        if self._doubled and gain <= RISES:
            self._doubled, self._hold_until = False, now + HOLD_S
            return self._move(number, now, paced=False)
        low = level <= CUT_SHOWS * number
        if self._doubled or (low and gain < CUT_KEEPS):
            self._before, self._doubled = (level, rate), True
            return self._move(2 * max(level, number), now, paced=False)
        if low or level >= SAME * number:
            self._before = level, rate
        near = not low and self._refused <= FEW * self._answers
        return self._move((EASE_OFF if near else BACK_OFF) * level, now, paced=True)

    def _move(self, level: float, now: float, *, paced: bool) -> None:
        self._level, self._paced, self._climb = min(max(level, 1.0), MOST), paced, None
        self._cut_at, self._moved_at, self._count = now, now, 0
