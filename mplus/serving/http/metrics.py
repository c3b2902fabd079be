"""Metrics of a server for Prometheus; no label has an id, a key or a name in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import define, field
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

FIRST = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
GAPS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


@define(eq=False)
class Metrics:
    """Counts of the front, and beside them what the engine counts."""

    registry: CollectorRegistry = field(factory=CollectorRegistry)
    requests: Counter = field(init=False)
    waiting: Gauge = field(init=False)
    running: Gauge = field(init=False)
    first_token: Histogram = field(init=False)
    gap: Histogram = field(init=False)
    prompt_tokens: Counter = field(init=False)
    tokens: Counter = field(init=False)
    engine: EngineMetrics = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.requests = Counter(
            "mplus_requests", "Requests answered.", ["route", "status", "reason"], registry=self.registry
        )
        self.waiting = Gauge("mplus_requests_waiting", "Prompts that wait to be read.", registry=self.registry)
        self.running = Gauge("mplus_requests_running", "Prompts being answered.", registry=self.registry)
        self.first_token = Histogram(
            "mplus_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=FIRST,
            registry=self.registry,
        )
        self.gap = Histogram(
            "mplus_inter_token_gap_seconds", "Between steps of an answer.", buckets=GAPS, registry=self.registry
        )
        self.prompt_tokens = Counter("mplus_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.tokens = Counter("mplus_generated_tokens", "Tokens of answers.", registry=self.registry)
        self.engine = EngineMetrics(self.registry)

    def text(self, engine: Mapping[str, float]) -> bytes:
        """Return all metrics in Prometheus' text format, with those of the engine as they are now."""
        self.engine.values = engine
        return generate_latest(self.registry)


@define(eq=False)
class EngineMetrics(Collector):
    """Counts of the engine, one gauge for each name; those that the front counts itself are left out.

    Attributes:
        registry: they are shown in.
        values: by name, with or without ``mplus_`` in front.
    """

    registry: CollectorRegistry
    values: Mapping[str, float] = field(factory=dict)
    _own: set[str] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        # Of a histogram "_count" and "_sum" as well: Prometheus refuses a page that says one name twice.
        ends = ("", "_total", "_count", "_sum", "_bucket", "_created")
        self._own |= {metric.name + end for metric in self.registry.collect() for end in ends}
        self.registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self.values.items():
            full = name if name.startswith("mplus_") else f"mplus_{name}"
            if full not in self._own:
                yield GaugeMetricFamily(full, "Counted by the engine.", value=value)
