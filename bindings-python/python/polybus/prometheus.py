"""Hand a bus's numbers to `prometheus_client`.

`register(bus)` once, and whatever serves the registry serves them too. Without that package, serve `bus.metrics()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from polybus.bus import Bus

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

__all__ = ["register"]


class _Collector:
    """The buses of one registry: metrics of one name stand together, whichever bus they are from."""

    def __init__(self) -> None:
        self.buses: weakref.WeakSet[Bus] = weakref.WeakSet()

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.parser import text_string_to_metric_families

        families: dict[str, Metric] = {}
        for bus in list(self.buses):
            for family in text_string_to_metric_families(bus.metrics()):
                if family.name in families:
                    families[family.name].samples.extend(family.samples)
                else:
                    families[family.name] = family
        yield from families.values()


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()


def register(bus: Bus, registry: CollectorRegistry | None = None) -> None:
    """Show `bus` in `registry`, by default `prometheus_client.REGISTRY`, for as long as somebody holds the bus.

    Collecting waits for nothing; a bus that is not started shows what it has. Several buses are told apart by the
    labels `service` and `bus`. A second call for one bus changes nothing.

    `ImportError` without `prometheus_client`: `pip install prometheus-client`.
    """
    if not isinstance(bus, Bus):
        raise TypeError(f"register() takes a Bus, not {type(bus).__name__}")
    try:
        from prometheus_client import REGISTRY
    except ImportError as cause:
        raise ImportError("polybus.prometheus needs prometheus_client: pip install prometheus-client") from cause
    registry = REGISTRY if registry is None else registry
    collector = _collectors.get(registry)
    if collector is None:
        collector = _collectors[registry] = _Collector()
        registry.register(collector)
    collector.buses.add(bus)
