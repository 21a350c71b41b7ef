"""What /metrics tells, under the names that vLLM's dashboards chart.

Counting happens once an event of a request, which may carry many tokens, so histograms here take a
weight; Prometheus' own are updated one observation at a time.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

if TYPE_CHECKING:
    from .hub import Choice

__all__ = ["Metrics"]

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 25.0, 60.0, 120.0, 600.0),
)


class Histogram:
    """Observations in fixed buckets; upper bounds are inclusive, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value * weight

    def buckets(self) -> list[tuple[str, float]]:
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
        return buckets


class Metrics:
    """Counts of the server beside those of the engine; one event loop updates them."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.stats: Callable[[], Mapping[str, Any] | None] = lambda: None
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.finished: Counter[str] = Counter()
        self.first_token, self.inter_token = Histogram(), Histogram()
        self.queued, self.total = Histogram(), Histogram()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def took(self, choice: Choice, tokens: int) -> None:
        """Counts news of a choice; called before the choice's own count is brought up to date."""
        now = time.monotonic()
        if tokens and not choice.completion:
            self.first_token.add(choice.first_s)
        elif tokens:
            self.inter_token.add((now - choice.told) / tokens, tokens)
        choice.told = now
        if choice.finish:
            self.queued.add(choice.queued_s)
            self.total.add(choice.finished_s)
            self.finished[choice.finish] += 1

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # nothing is collected at registration

    def collect(self) -> Iterator[Metric]:
        labels, values = ["model_name"], [self.model]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, text, labels=labels)
            family.add_metric(values, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(name, text, labels=labels)
            family.add_metric(values, value)
            return family

        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "From submission to it", self.first_token),
            ("vllm:inter_token_latency_seconds", "Between tokens as sent", self.inter_token),
            ("vllm:request_queue_time_seconds", "From submission to the first step", self.queued),
            ("vllm:e2e_request_latency_seconds", "From submission to the end", self.total),
        ):
            family = HistogramMetricFamily(name, text, labels=labels)
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that ended", labels=[*labels, "finished_reason"]
        )
        for reason, count in self.finished.items():
            family.add_metric([*values, reason], count)
        yield family
        family = CounterMetricFamily(
            "llaisys:http_requests", "Answers sent", labels=["path", "status"]
        )
        for (path, status), count in self.requests.items():
            family.add_metric([path, str(status)], count)
        yield family

        stats = self.stats()
        if stats is None:
            return
        blocks = stats["kv_blocks"]
        yield gauge("vllm:num_requests_running", "Requests computed now", stats["running"])
        yield gauge("vllm:num_requests_waiting", "Requests in the queue", stats["waiting"])
        yield gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks that running requests hold, 0 to 1",
            stats["kv_active"] / blocks if blocks else 0,
        )
        for state in ("free", "cached", "active"):
            yield gauge(f"llaisys:kv_blocks_{state}", f"KV blocks: {state}", stats[f"kv_{state}"])
        for name, text, key in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", "prompt_tokens"),
            ("vllm:prefix_cache_hits", "Prompt tokens found", "cached_tokens"),
            ("vllm:prompt_tokens", "Prompt tokens, computed or found", "prompt_tokens"),
            ("vllm:generation_tokens", "Tokens generated", "generated_tokens"),
            ("vllm:num_preemptions", "Requests set back for want of KV blocks", "preemptions"),
            ("llaisys:requests_refused", "Requests refused by a full queue", "refused"),
            ("llaisys:steps", "Steps computed", "steps"),
            ("llaisys:step_rows", "Tokens computed in steps", "rows"),
            ("llaisys:step_seconds", "Time in steps", "step_s"),
            ("llaisys:host_seconds", "Time between steps while there was work", "host_s"),
            ("llaisys:device_seconds", "Time that a GPU spent in steps", "device_s"),
            ("llaisys:kv_evictions", "Cached KV blocks given up", "evictions"),
        ):
            yield counter(name, text, stats[key])
