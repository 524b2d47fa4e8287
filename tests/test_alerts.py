"""Example alerts and board: each metric and label in them is one that the exporter emits."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.core import Metric

from ckptfuse.metrics import prometheus_registry
from tests.unit.test_metrics import service  # noqa: F401 - a fixture: a workspace with all there is

INFRA = Path(__file__).parent.parent / "infra"
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
BOARD = json.loads((INFRA / "grafana" / "boards" / "ckptfuse.json").read_text())
#: Emitted by Prometheus itself, of whatever it scrapes.
ITS_OWN = {"up"}


def rules() -> Iterator[dict[str, object]]:
    for group in ALERTS["groups"]:
        yield from group["rules"]


def expressions() -> list[str]:
    found = [str(rule["expr"]) for rule in rules()]
    found += [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    found += [v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
    return found


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Metric and labels of every selector in a PromQL expression."""
    for name, braces in re.findall(r"\b([a-z_]+_[a-z_]+|up)\b(\{[^}]*\})?", expression):
        if name.startswith("ckptfuse_") or name in ITS_OWN:
            yield name, dict(re.findall(r'(\w+)="([^"]*)"', braces))


@pytest.fixture
def emitted(service) -> dict[str, list[dict[str, str]]]:  # type: ignore[no-untyped-def] # noqa: F811
    """Sample name -> the labels it comes with."""
    found: dict[str, list[dict[str, str]]] = {}
    families: list[Metric] = list(prometheus_registry(service).collect())
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_every_expression_is_promql() -> None:
    for expression in expressions():
        if not expression.startswith("label_values("):  # Grafana's own, of a variable
            promql_parser.parse(expression.replace("$trajectory", "x"))


def test_every_metric_and_label_is_emitted(emitted: dict[str, list[dict[str, str]]]) -> None:
    used = [pair for expression in expressions() for pair in selectors(expression)]
    assert len({name for name, _ in used}) > 15
    for name, labels in used:
        if name in ITS_OWN:
            continue
        assert name in emitted, name
        for label, value in labels.items():
            if label != "trajectory":
                assert value in {sample.get(label) for sample in emitted[name]}, (
                    name,
                    label,
                    value,
                )


def test_every_metric_that_is_emitted_is_on_the_board_or_in_the_alerts_and_documented(
    emitted: dict[str, list[dict[str, str]]],
) -> None:
    shown = {name for expression in expressions() for name, _ in selectors(expression)}
    assert set(emitted) <= shown
    told = (INFRA.parent / "docs" / "monitoring.md").read_text()
    short = {name.removeprefix("ckptfuse") for name in emitted}
    missing = [name for name in short if not re.search(rf"{name}\b|{name.split('_')[-1]}`", told)]
    assert not missing


def test_a_dead_man_alert_rests_on_what_is_told_when_prefect_is_down() -> None:
    by_name = {rule["alert"]: str(rule["expr"]) for rule in rules()}
    assert "ckptfuse_look_begun_timestamp_seconds" in by_name["CkptfuseNobodyLooks"]
    assert by_name["CkptfuseMetricsAreGone"].startswith("absent(")
    assert by_name["Watchdog"] == "vector(1)"
    for rule in rules():
        assert {"summary", "action"} == set(rule["annotations"]), rule["alert"]  # type: ignore[call-overload]


def test_legends_and_texts_name_labels_that_there_are() -> None:
    texts = [target["legendFormat"] for panel in BOARD["panels"] for target in panel["targets"]]
    named = {name for text in texts for name in re.findall(r"\{\{(\w+)\}\}", text)}
    assert named == {"model", "stage", "outcome", "direction"}
    labels = re.findall(r"\$labels\.(\w+)", json.dumps(ALERTS))
    assert set(labels) == {"trajectory"}


def test_the_board_has_panels_side_by_side_that_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_what_prometheus_and_grafana_are_given_is_there() -> None:
    told = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    assert [(INFRA / "prometheus" / name).is_file() for name in told["rule_files"]] == [True]
    (job,) = told["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())
    host, port = target.split(":")
    assert port in compose["services"][host]["command"]
    assert 'up{job="ckptfuse"}' in str(list(rules()))
    assert job["job_name"] == "ckptfuse"
    provider = yaml.safe_load(
        (INFRA / "grafana" / "provisioning" / "dashboards" / "ckptfuse.yaml").read_text()
    )
    boards = provider["providers"][0]["options"]["path"]
    assert any(boards in mount for mount in compose["services"]["grafana"]["volumes"])
