"""What an endpoint allows per minute: requests and tokens, declared in the recipe or learnt from its headers.

    x-ratelimit-limit-requests: 500          x-ratelimit-limit-tokens: 30000
    x-ratelimit-remaining-requests: 499      x-ratelimit-remaining-tokens: 29900
    x-ratelimit-reset-requests: 120ms        x-ratelimit-reset-tokens: 200ms

(OpenAI, "Rate limits", and those who took its headers over.) A limit that resets after more than a minute is none per
minute. A request's tokens are estimated before it goes out and settled by the answer's `usage`. Without declaration and
headers there is no limit at all. Pure: the time is passed in.
"""

import re
from collections.abc import Mapping

WINDOW_S = 60.0
LEAST, MOST = 1.0, 1e12  # per minute: a header that says less or more means something else
LONG_S = 30.0  # a pause that the user should know of
BURST_S = 1.0  # what may go out at once is one second's worth: providers meter by the second, too


class TokenBucket:
    """At most `per_minute` units in any minute (one unit or a second's worth may go at once).

    The level rises by 1/61 of `per_minute` a second up to that very amount, so that no window of 60 s sees more than
    `per_minute`: what was saved up before it counts too. One take may be larger than the bucket; it leaves a debt.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._level = self._size = float("inf")
        self._rate, self._at = 0.0, now
        self.change(per_minute, now)

    def change(self, per_minute: float, now: float) -> None:
        """The rate is another from now on; what was taken stays taken, however often it moves."""
        self._refill(now)
        self.per_minute = per_minute
        self._rate = per_minute / (WINDOW_S + BURST_S)
        self._size = max(self._rate * BURST_S, 1.0)

    def delay(self, units: float, now: float) -> float:
        """Seconds until `units` may be taken; 0 for now."""
        self._refill(now)
        return max(0.0, (min(units, self._size) - self._level) / self._rate)

    def take(self, units: float, now: float) -> None:
        """Takes, whether or not there is enough; a negative number gives back."""
        self._refill(now)
        self._level -= units

    def binds(self, now: float) -> bool:
        """Whether as much has been taken as the rate allows: less than half of what may go at once is left."""
        self._refill(now)
        return self._level < max(self._size / 2, 1.0)

    def _refill(self, now: float) -> None:
        """Every call begins with it, so that it alone keeps the level within what may go at once."""
        self._level = min(self._level + (now - self._at) * self._rate, self._size)
        self._at = now


class Limits:
    """The limits of one endpoint; `fraction` of them is this process's."""

    def __init__(
        self, requests_per_minute: float | None, tokens_per_minute: float | None, now: float, fraction: float = 1.0
    ) -> None:
        self._fraction = fraction
        self._declared = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._buckets = {name: TokenBucket(rate * fraction, now) for name, rate in self._declared.items() if rate}
        self._told: set[tuple[str, float | None]] = set(self._declared.items())
        self._paused_until = 0.0
        self._told_at: float | None = None  # when headers first told a limit

    def share(self, fraction: float, now: float) -> None:
        """So much of the limits is this process's from now on."""
        for bucket in self._buckets.values():
            bucket.change(bucket.per_minute * fraction / self._fraction, now)
        self._fraction = fraction

    def delay(self, tokens: int, now: float) -> float:
        """Seconds until a request of so many tokens may go out; 0 for now."""
        wait = self._paused_until - now
        for name, bucket in self._buckets.items():
            wait = max(wait, bucket.delay(tokens if name == "tokens" else 1, now))
        return max(wait, 0.0)

    def take(self, tokens: int, now: float) -> None:
        """A request of so many tokens goes out."""
        for name, bucket in self._buckets.items():
            bucket.take(tokens if name == "tokens" else 1, now)

    def paced(self, sent: float, now: float) -> bool:
        """Whether a request that was sent then went out before the limits were told, or at the very rate they allow.

        If it was refused, fewer in flight would not help: the client keeps to the rate already. The limit of tokens
        does not count here, as nobody knows how many tokens the server reserves for a request.
        """
        requests = self._buckets.get("requests")
        return (self._told_at is not None and sent < self._told_at) or (requests is not None and requests.binds(now))

    def settle(self, estimated: int, used: int, now: float) -> None:
        """A request was estimated at so many tokens, and took so many."""
        if bucket := self._buckets.get("tokens"):
            bucket.take(used - estimated, now)

    def pause(self, seconds: float, now: float) -> bool:
        """Nothing goes out for so many seconds. True if the user should know: it is long, and longer than before."""
        news = seconds > max(LONG_S, self.paused_s(now) + 1)
        self._paused_until = max(self._paused_until, now + seconds)
        return news

    def paused_s(self, now: float) -> float:
        return max(self._paused_until - now, 0.0)

    def learn(self, headers: Mapping[str, str], now: float) -> str | None:
        """Takes over the limits in the headers; returns what is new, in words.

        A lower limit of the recipe's own stands. Headers that say nothing change nothing.
        """
        if "x-ratelimit-limit-requests" not in headers and "x-ratelimit-limit-tokens" not in headers:
            return None
        self._told_at = self._told_at or now
        news = []
        for name in ("requests", "tokens"):
            said = _number(headers.get(f"x-ratelimit-limit-{name}", ""))
            limit = min(said, self._declared[name] or said)
            reset_s = seconds_of(headers.get(f"x-ratelimit-reset-{name}", ""))
            if reset_s > WINDOW_S:  # Groq's requests are those of a day
                if self._unlearn(name, now):
                    news.append(f"allows {said:,.0f} {name} in more than a minute")
            elif said and self._change(name, limit, now):
                news.append(f"allows {limit:,.0f} {name} per minute")
            if headers.get(f"x-ratelimit-remaining-{name}") == "0" and self.pause(reset_s, now):
                news.append(f"has no {name} left for {reset_s:.0f} s")
        return "; ".join(news) or None

    def _unlearn(self, name: str, now: float) -> bool:
        """What headers said of it was no limit per minute; True if it was in force. What the recipe says stands."""
        if declared := self._declared[name]:
            return self._change(name, declared, now)
        return self._buckets.pop(name, None) is not None

    def _change(self, name: str, limit: float, now: float) -> bool:
        """The limit is in force from now on; True if it is one that never was."""
        rate = limit * self._fraction
        self._buckets.setdefault(name, TokenBucket(rate, now)).change(rate, now)
        new = (name, limit) not in self._told
        self._told.add((name, limit))
        return new


def seconds_of(duration: str) -> float:
    """Seconds of a duration as `6m0s`, `1.5s`, `120ms` or a plain number of seconds; 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", duration):
        seconds = float(duration)
        return seconds if seconds < 86_400 else 0.0  # more is a date, not a duration
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)", duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        return 0.0
    scale = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
    return sum(float(number) * scale[unit] for number, unit in parts)


def _number(said: str) -> float:
    """A limit in a header; 0 for anything else."""
    try:
        value = float(said)
    except ValueError:
        return 0.0
    return value if LEAST <= value <= MOST else 0.0
