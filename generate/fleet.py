"""The endpoints of one process, and which of them the next request goes to.

Of a few endpoints that may have room, the one that is least full; of many, the less full of two drawn at random, which
is nearly as even and costs the same however many there are (Mitzenmacher 2001, "The Power of Two Choices in Randomized
Load Balancing"). An endpoint is as full as the share of its limit that is in flight. With a weight of 4 that limit is
four times as high, and the endpoint is drawn four times as often, so it gets four times the requests. One that is found
without room is not looked at again until a reply, its queue or the time may have made some. Opens and closes nothing.
"""

import asyncio
import random
from collections.abc import Iterable
from math import inf

from generate.endpoint import Endpoint

FEW = 8  # so many are compared, all of them; of more, two


class Fleet:
    """Endpoints come and go while requests go out."""

    def __init__(self, endpoints: Iterable[Endpoint] = (), most: int | None = None) -> None:
        """`most` connections are open in all; None: each endpoint keeps the limit it has."""
        self._most = most
        self.endpoints: list[Endpoint] = []
        self._open: dict[float, list[Endpoint]] = {}  # may have room, by weight
        self._due: dict[Endpoint, float] = {}  # left aside without room until then; infinite: until a reply
        self._first_due = inf  # or earlier
        self.changed = asyncio.Event()  # an endpoint has come, or has more room
        for endpoint in endpoints:
            self.add(endpoint)

    def add(self, endpoint: Endpoint) -> None:
        """Requests may go there from now on."""
        self.endpoints.append(endpoint)
        self._due[endpoint] = inf
        self._divide()
        self.has_more(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Nothing new goes there; what is in flight may end."""
        self.endpoints.remove(endpoint)
        if self._due.pop(endpoint, None) is None:
            self._open[endpoint.weight].remove(endpoint)
        self._divide()

    def pick(self, tokens: int, now: float, choices: int = 1) -> tuple[Endpoint | None, float]:
        """An endpoint with room for a request of so many tokens and choices, or none and the seconds until one may.

        Infinite seconds: only a reply makes room.
        """
        if now >= self._first_due:
            for endpoint in [one for one, due in self._due.items() if due <= now]:
                self.reopen(endpoint)
            self._first_due = min(self._due.values(), default=inf)
        while seen := self._drawn():
            ready = [endpoint for endpoint in seen if self._has_room(endpoint, tokens, choices, now)]
            if ready:
                return min(ready, key=lambda one: one.in_flight / one.limit), 0.0
        return None, self._first_due - now

    def _drawn(self) -> list[Endpoint]:
        """Which of those that may have room are compared: all of a few, else two. A heavy one is drawn more often."""
        groups = [group for group in self._open.values() if group]
        if sum(map(len, groups)) <= FEW:
            return [endpoint for group in groups for endpoint in group]
        if len(groups) == 1:
            return random.sample(groups[0], 2)
        drawn = random.choices(groups, [len(group) * group[0].weight for group in groups], k=2)
        return [random.choice(group) for group in drawn]

    def _has_room(self, endpoint: Endpoint, tokens: int, choices: int, now: float) -> bool:
        """Without room it is left aside."""
        wait_s = endpoint.ready_in(tokens, choices, now)
        if wait_s == 0:
            return True
        if endpoint not in self._due:  # else it was drawn twice
            self._open[endpoint.weight].remove(endpoint)
        self._due[endpoint] = now + wait_s
        self._first_due = min(self._first_due, now + wait_s)
        return False

    def reopen(self, endpoint: Endpoint) -> None:
        """The endpoint may have room: a reply has come, its limit has risen, or its time has."""
        if self._due.pop(endpoint, None) is not None:
            self._open.setdefault(endpoint.weight, []).append(endpoint)

    def has_more(self, endpoint: Endpoint) -> None:
        """The endpoint may have room, without a reply: whoever waits for room is to look again."""
        self.reopen(endpoint)
        self.changed.set()

    def count(self) -> None:
        for endpoint in self.endpoints:
            endpoint.count()

    def all_down_s(self, now: float) -> float:
        """Seconds since the last of them went down; 0 if one is up."""
        since = [endpoint.down_since for endpoint in self.endpoints]
        downs = [down for down in since if down is not None]
        return now - max(downs) if downs and len(downs) == len(since) else 0.0

    def others_up(self, endpoint: Endpoint) -> bool:
        """Whether one of them beside this one is not down."""
        return any(other.down_since is None for other in self.endpoints if other is not endpoint)

    def paused_s(self, now: float) -> float:
        """Seconds until the first of them takes requests again, by its own word."""
        return min((endpoint.limits.paused_s(now) for endpoint in self.endpoints), default=0.0)

    def _divide(self) -> None:
        if self._most:
            weights = sum(endpoint.weight for endpoint in self.endpoints)
            for endpoint in self.endpoints:
                endpoint.most = max(int(self._most * endpoint.weight / weights), 1)
