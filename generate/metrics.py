"""What a run does, for Prometheus: served over HTTP while requests go out, if `generate.metrics_port` asks for it.

Reads the run's counters when it is asked; costs nothing in between. docs/grafana.json is a dashboard of these metrics.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from generate.progress import Counters
from pipeline.errors import DistillError, RecipeError
from pipeline.generate_config import GenerateConfig

if TYPE_CHECKING:
    from prometheus_client.core import Metric

NO_PACKAGE = "generate.metrics_port needs a package that is not installed; run `pip install prometheus-client`"


@contextmanager
def served(config: GenerateConfig, counters: Counters, cost: Callable[[], float | None]) -> Iterator[None]:
    """Serves the metrics until the block ends. `cost`: USD of all calls of the run; None: no price is known.

    Raises RecipeError if prometheus-client is not installed, DistillError if the port cannot be taken.
    """
    if config.metrics_port is None:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise RecipeError(NO_PACKAGE) from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(counters, cost))
    try:
        server, thread = start_http_server(config.metrics_port, config.metrics_host, registry)
    except OSError as error:
        where = f"{config.metrics_host}:{config.metrics_port}"
        raise DistillError(f"generate.metrics_port: {where}: {error.strerror}; choose another") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Makes the metrics of the counters as they are."""

    def __init__(self, counters: Counters, cost: Callable[[], float | None]) -> None:
        self._counters, self._cost = counters, cost

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        metrics = {
            name: (CounterMetricFamily if counts else GaugeMetricFamily)(f"distillate_{name}", about, labels=labels)
            for name, counts, about, labels in METRICS
        }

        def add(name: str, labels: list[str], value: float) -> None:
            metrics[name].add_metric(labels, value)

        for endpoint, counts in self._counters.by_endpoint().items():
            for outcome, number in {"answered": counts.answered, **counts.faults}.items():
                add("requests", [endpoint, outcome], number)
            for reason, number in counts.retries.copy().items():
                add("retries", [endpoint, reason], number)
            add("tokens", [endpoint, "prompt"], counts.prompt_tokens)
            add("tokens", [endpoint, "completion"], counts.completion_tokens)
            add("in_flight", [endpoint], counts.in_flight)
            add("in_flight_limit", [endpoint], counts.limit)
            add("up", [endpoint], counts.up)
        counters = self._counters
        answered = counters.resumed + counters.answered
        done = {"answered": answered, "failed": counters.done - answered}  # failed, and not to be asked again
        for state, value in {**done, "waiting": counters.waiting, "left": counters.left}.items():
            add("run_requests", [state], value)
        if (usd := self._cost()) is not None:
            add("cost_usd", [], usd)
        yield from metrics.values()


# Name, whether it only rises (Prometheus then adds `_total`), what it says, and its labels.
METRICS: tuple[tuple[str, bool, str, list[str]], ...] = (
    ("requests", True, "Attempts by what came of them: an answer, or a kind of fault", ["endpoint", "outcome"]),
    ("retries", True, "Attempts that were sent again later, by the fault that made it so", ["endpoint", "reason"]),
    ("tokens", True, "Tokens of answers, as the server counted them", ["endpoint", "kind"]),
    ("in_flight", False, "Requests in flight", ["endpoint"]),
    ("in_flight_limit", False, "Requests that may be in flight", ["endpoint"]),
    ("up", False, "Whether the endpoint takes requests (1) or is probed, or gone (0)", ["endpoint"]),
    ("run_requests", False, "Requests of the run; waiting: for a retry, and among those left", ["state"]),
    ("cost_usd", False, "USD spent by all calls of the run, with what requests in flight may cost", []),
)
