"""`python -m benchmarks.simulator`: a continuous-batching engine, simulated, behind a real local HTTP server.

There are `replicas` engines of `slots` slots each, with a queue before each, as behind vLLM's data-parallel load
balancer: a request goes to the replica with the fewest. In a step of `step_ms` every running request gets one token. A
request that ends frees its slot, and the next in the queue begins with the following step. The length of an answer
depends on the request's bytes alone and is drawn from the lengths of a real run (`lengths.json`). So a run's least time
can be computed: `ideal_ends` is the same simulation with queues that are never empty while requests are left.

No work is done per token: a request's last step is known when it begins. `/metrics` is as vLLM's;
`--no-metrics` hides it.
"""

import asyncio
import heapq
import json
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.http_server import Reply, chat_reply, serve
from benchmarks.measure import flags

LENGTHS: list[int] = json.loads(Path(__file__).with_name("lengths.json").read_text())["lengths"]
ENGINE: dict[str, Any] = {"replicas": 8, "slots": 256, "step_ms": 30.0, "no_metrics": False}  # the flags' defaults
ANSWER = chat_reply(40, 100)


def answer_tokens(body: bytes) -> int:
    """How many tokens the answer to a request has."""
    return LENGTHS[int.from_bytes(blake2b(body, digest_size=8).digest()) % len(LENGTHS)]


def ideal_ends(tokens: Sequence[int], replicas: int, slots: int, step_s: float) -> list[float]:
    """When each answer ends, in seconds, if it has this many `tokens` and begins in the first slot that falls free."""
    free = [0] * min(replicas * slots, len(tokens))  # the step in which each slot falls free: all zeros are a heap
    ends = []
    for count in tokens:
        ends.append(free[0] + count)
        heapq.heapreplace(free, ends[-1])
    return [step * step_s for step in ends]


class Replica:
    """One engine: its running requests by the step of their end, and its queue."""

    def __init__(self, slots: int, step_s: float) -> None:
        self._slots, self._step_s = slots, step_s
        self.running = 0
        self._queue: deque[tuple[int, Reply]] = deque()
        self._ends: dict[int, list[Reply]] = {}  # step → the replies due
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, tokens: int, reply: Reply) -> None:
        """Begins the request with the next step if a slot is free, else puts it into the queue."""
        if self.running < self._slots:
            self._begin(ceil(self._loop.time() / self._step_s) + 1, tokens, reply)
        else:
            self._queue.append((tokens, reply))

    def _begin(self, step: int, tokens: int, reply: Reply) -> None:
        self.running += 1
        end = step + tokens
        if end not in self._ends:
            self._ends[end] = []
            self._loop.call_at(end * self._step_s, self._end, end)
        self._ends[end].append(reply)

    def _end(self, step: int) -> None:
        """Answers the requests whose last token this step made; requests that waited begin in their slots."""
        ended = self._ends.pop(step)
        self.running -= len(ended)
        while self._queue and self.running < self._slots:
            tokens, reply = self._queue.popleft()
            self._begin(step, tokens, reply)
        for reply in ended:
            reply(ANSWER)


def main() -> None:
    options = flags(__doc__, **ENGINE)
    replicas: list[Replica] = []

    def engines() -> list[Replica]:
        if not replicas:  # made with the first request of any kind: they need the running event loop
            replicas.extend(Replica(options.slots, options.step_ms / 1000) for _ in range(options.replicas))
        return replicas

    def chat(request: bytes, reply: Reply) -> None:
        min(engines(), key=lambda replica: replica.running + replica.waiting).add(answer_tokens(request), reply)

    routes = {"/v1/chat/completions": chat, "/metrics": lambda _, reply: reply(metrics(engines()))}
    if options.no_metrics:
        del routes["/metrics"]
    serve(routes)


def metrics(replicas: Sequence[Replica]) -> bytes:
    """The gauges that a client may read, as vLLM writes them."""
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
