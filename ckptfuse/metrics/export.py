"""The numbers in Prometheus's form, each with the label ``trajectory``."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ckptfuse.metrics.seen import Seen
from ckptfuse.metrics.told import Told, everything
from ckptfuse.service import Service

PREFIX = "ckptfuse"


class Exporter:
    """Reads the workspace afresh whenever it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        for told in everything(Seen(self._service)):
            yield _family(told, self._service.params.trajectory)


def prometheus_registry(service: Service) -> CollectorRegistry:
    """A registry with this trajectory and nothing else."""
    registry = CollectorRegistry()
    registry.register(Exporter(service))
    return registry


def _family(told: Told, trajectory: str) -> Metric:
    kind = CounterMetricFamily if told.is_counter else GaugeMetricFamily
    labels = ["trajectory", told.label] if told.label else ["trajectory"]
    family = kind(f"{PREFIX}_{told.name}", told.about, labels=labels)
    for key, value in told.values.items():
        if value is not None:
            family.add_metric([trajectory, key] if told.label else [trajectory], float(value))
    return family
