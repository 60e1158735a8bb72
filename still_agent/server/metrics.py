"""Figures for Prometheus, in a registry of their own; none names a session or a tenant."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One object a server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "still_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.tokens = Counter(
            "still_tokens", "Tokens of turns: prefilled, reused, generated.", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.compactions = Counter("still_compactions", "Compactions.", registry=registry)
        self.in_progress = Gauge("still_turns_in_progress", "Turns running.", registry=registry)
        self.open_sessions = Gauge(
            "still_open_sessions", "Sessions with a live cache.", registry=registry
        )
        self.first_token = Histogram(
            "still_first_token_seconds", "From a turn's request to its first text.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.turn = Histogram(
            "still_turn_seconds", "From a turn's request to its commit.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip

    def watch_open_sessions(self, count: Callable[[], int]) -> None:
        self.open_sessions.set_function(count)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
