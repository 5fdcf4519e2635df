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

from generate.endpoint import Endpoint

FEW = 8  # so many are compared, all of them; of more, two


class Fleet:
    """Endpoints come and go while requests go out."""

    def __init__(self, endpoints: Iterable[Endpoint] = (), most: int | None = None) -> None:
        """`most` connections are open in all; None: each endpoint keeps the limit it has."""
        self._most = most
        self._open: dict[float, list[Endpoint]] = {}  # may have room, by weight
        self._place: dict[Endpoint, int | None] = {}  # of each endpoint in its list of `_open`; None: left aside
        self._due: dict[Endpoint, float] = {}  # of those without room, when they have some, if the time brings it
        self._first_due = float("inf")  # or earlier
        self.changed = asyncio.Event()  # an endpoint has come, or has more room
        for endpoint in endpoints:
            self.add(endpoint)

    @property
    def endpoints(self) -> list[Endpoint]:
        """All of them, in the order in which they came."""
        return [*self._place]

    def add(self, endpoint: Endpoint) -> None:
        """Requests may go there from now on."""
        self._place[endpoint] = None
        self._divide()
        self.has_more(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Nothing new goes there; what is in flight may end."""
        self._leave_aside(endpoint)
        self._due.pop(endpoint, None)
        del self._place[endpoint]
        self._divide()

    def pick(self, tokens: int, now: float, choices: int = 1) -> tuple[Endpoint | None, float | None]:
        """An endpoint with room for a request of so many tokens and choices; else the seconds until one may have it.

        None in place of the seconds: only a reply makes room.
        """
        if now >= self._first_due:
            for endpoint in [one for one, due in self._due.items() if due <= now]:
                self.reopen(endpoint)
            self._first_due = min(self._due.values(), default=float("inf"))
        while seen := self._drawn():
            ready = [endpoint for endpoint in seen if self._has_room(endpoint, tokens, choices, now)]
            if ready:
                return min(ready, key=lambda one: one.in_flight / one.limit), None
        return None, self._first_due - now if self._due else None

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
        self._leave_aside(endpoint)
        if wait_s is not None:
            self._due[endpoint] = now + wait_s
            self._first_due = min(self._first_due, now + wait_s)
        return False

    def reopen(self, endpoint: Endpoint) -> None:
        """The endpoint may have room: a reply has come, its limit has risen, or its time has."""
        self._due.pop(endpoint, None)
        if self._place.get(endpoint, 0) is None:
            group = self._open.setdefault(endpoint.weight, [])
            self._place[endpoint] = len(group)
            group.append(endpoint)

    def has_more(self, endpoint: Endpoint) -> None:
        """The endpoint may have room, without a reply: whoever waits for room is to look again."""
        self.reopen(endpoint)
        self.changed.set()

    def _leave_aside(self, endpoint: Endpoint) -> None:
        place = self._place[endpoint]
        if place is not None:
            group = self._open[endpoint.weight]
            last = group.pop()
            if last is not endpoint:
                group[place], self._place[last] = last, place
            self._place[endpoint] = None

    def count(self) -> None:
        for endpoint in self._place:
            endpoint.count()

    def all_down_s(self, now: float) -> float:
        """Seconds since the last of them went down; 0 if one is up."""
        since = [endpoint.down_since for endpoint in self._place]
        downs = [down for down in since if down is not None]
        return now - max(downs) if downs and len(downs) == len(since) else 0.0

    def others_up(self, endpoint: Endpoint) -> bool:
        """Whether one of them beside this one is not down."""
        return any(other.down_since is None for other in self._place if other is not endpoint)

    def paused_s(self, now: float) -> float:
        """Seconds until the first of them takes requests again, by its own word."""
        return min((endpoint.limits.paused_s(now) for endpoint in self._place), default=0.0)

    def _divide(self) -> None:
        if self._most:
            weights = sum(endpoint.weight for endpoint in self._place)
            for endpoint in self._place:
                endpoint.most = max(int(self._most * endpoint.weight / weights), 1)
