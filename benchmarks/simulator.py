"""`python -m benchmarks.simulator`: a continuous-batching engine, simulated, behind a real local HTTP server.

`replicas` engines of `slots` slots each, and one queue before each, as behind vLLM's data-parallel load balancer: a
request goes to the replica with the fewest. In a step of `step_ms` every running request gets one token; a request
that ends frees its slot, and the next in the queue begins with the following step. How long an answer is depends on
the request's bytes alone, drawn from the lengths of a real run (`lengths.json`), so a run's least time can be computed:
`ideal_ends` is the same simulation with queues that are never empty while requests are left.

Nothing is done for each token: a request's last step is known when it begins. `/metrics` is as vLLM's.
"""

import argparse
import asyncio
import heapq
import json
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil
from pathlib import Path

from benchmarks.http_server import JSON, TEXT, Reply, serve
from benchmarks.stub import TEXT_CHARS, chat_reply

LENGTHS: list[int] = json.loads(Path(__file__).with_name("lengths.json").read_text())["lengths"]
TOO_MANY = b'{"error":{"message":"too many requests wait","type":"rate_limit_exceeded"}}'


def answer_tokens(body: bytes) -> int:
    """How many tokens the answer to a request has."""
    return LENGTHS[int.from_bytes(blake2b(body, digest_size=8).digest()) % len(LENGTHS)]


def ideal_ends(tokens: Sequence[int], replicas: int, slots: int, step_s: float) -> list[float]:
    """When each of the answers, of so many tokens, ends, in seconds; each begins in the first slot that falls free."""
    free = [0] * min(replicas * slots, len(tokens))  # the step in which each slot falls free: a heap, as it is
    ends = []
    for count in tokens:
        ends.append(free[0] + count)
        heapq.heapreplace(free, ends[-1])
    return [step * step_s for step in ends]


class Replica:
    """One engine: its running requests by the step of their end, and its queue."""

    def __init__(self, slots: int, step_s: float) -> None:
        self._slots, self._step_s = slots, step_s
        self.running, self.waiting = 0, 0
        self._queue: deque[tuple[int, Reply]] = deque()
        self._ends: dict[int, list[Reply]] = {}  # step → the replies due
        self._loop = asyncio.get_running_loop()

    @property
    def load(self) -> int:
        return self.running + self.waiting

    def add(self, tokens: int, reply: Reply) -> None:
        """A request comes in: it begins with the next step if a slot is free."""
        if self.running < self._slots:
            self._begin(self._now() + 1, tokens, reply)
        else:
            self.waiting += 1
            self._queue.append((tokens, reply))

    def _now(self) -> int:
        return ceil(self._loop.time() / self._step_s)

    def _begin(self, step: int, tokens: int, reply: Reply) -> None:
        self.running += 1
        end = step + tokens
        if end not in self._ends:
            self._ends[end] = []
            self._loop.call_at(end * self._step_s, self._end, end)
        self._ends[end].append(reply)

    def _end(self, step: int) -> None:
        """The requests whose last token this step made are answered, and those that waited begin in their slots."""
        ended = self._ends.pop(step)
        self.running -= len(ended)
        while self._queue and self.running < self._slots:
            tokens, reply = self._queue.popleft()
            self.waiting -= 1
            self._begin(step, tokens, reply)
        for reply in ended:
            reply(200, ANSWER, JSON)


ANSWER = chat_reply("x" * TEXT_CHARS, 40, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--no-metrics", action="store_true", help="an endpoint that does not show its queue")
    parser.add_argument("--max-waiting", type=int, help="429 when so many wait at every replica")
    options = parser.parse_args()
    replicas: list[Replica] = []

    def handle(path: str, request: bytes, reply: Reply) -> None:
        if not replicas:
            replicas.extend(Replica(options.slots, options.step_ms / 1000) for _ in range(options.replicas))
        if path == "/v1/chat/completions":
            replica = min(replicas, key=lambda replica: replica.load)
            if options.max_waiting is not None and replica.waiting >= options.max_waiting:
                reply(429, TOO_MANY, JSON)
            else:
                replica.add(answer_tokens(request), reply)
        elif path == "/metrics" and not options.no_metrics:
            reply(200, metrics(replicas), TEXT)
        elif path == "/v1/models":
            reply(200, b'{"object":"list","data":[{"id":"stub","object":"model"}]}', JSON)
        else:
            reply(404, b'{"error":{"message":"Not Found"}}', JSON)

    serve(handle)


def metrics(replicas: Sequence[Replica]) -> bytes:
    """The gauges that a client may look at, as vLLM writes them."""
    lines = []
    for name in ("running", "waiting"):
        lines.append(f"# TYPE vllm:num_requests_{name} gauge")
        for number, replica in enumerate(replicas):
            labels = f'{{engine="{number}",model_name="stub"}}'
            lines.append(f"vllm:num_requests_{name}{labels} {float(getattr(replica, name))}")
    lines.append('vllm:kv_cache_usage_perc{engine="0",model_name="stub"} 0.5')
    return "\n".join(lines).encode() + b"\n"


if __name__ == "__main__":
    main()
