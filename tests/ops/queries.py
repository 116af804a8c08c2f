"""Prometheus queries against what the code exports."""

import re

from infra.prometheus.families import JobMetrics
from infra.scaler.metrics import ScalerMetrics


def exported() -> dict[str, set[str]]:
    """Every series name that the code exports, with its labels."""
    from api.metrics import Metrics

    found: dict[str, set[str]] = {"up": {"job", "instance"}}
    for registry in (Metrics().registry, ScalerMetrics().registry, JobMetrics().registry):
        for collector in list(registry._collector_to_names):
            labels = set(getattr(collector, "_labelnames", ()))
            for name in registry._collector_to_names[collector]:
                found[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    return found


def check_query(query: str, known: dict[str, set[str]]) -> None:
    """Only series that exist, only labels that they have."""
    names = set(re.findall(r"\b(?:reel_\w+|up(?=\{))", query))
    assert names, f"no series in {query}"
    assert names <= known.keys(), f"unknown series {names - known.keys()}"
    labels = {
        label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!]", group)
    }
    labels |= {
        word.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for word in group.split(",")
    }
    have = set().union(*(known[name] for name in names))
    assert labels - {""} <= have, f"unknown labels {labels - have} in {query}"
