"""Compute the reference lines of a study: the best pair's student as drawn, and with all labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktray.images import Splits
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.pair_graph import Graph, Identity
from ktray.pipeline.references import reference_pairs
from ktray.search.trial import Trial
from ktray.stores import Store

FILE = "references.json"


def reference_graphs(best: Trial, data: Splits, identity: Identity) -> dict[str, Graph]:
    """Name -> stages of the reference pairs of a trial."""
    return {name: pair_graph.build(pair, identity) for name, pair in reference_pairs(best.pair, data).items()}


def settle(wanted: Mapping[str, Graph], store: Store, folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read the reference lines from the store and keep them with the study; None if a stage is missing."""
    found: dict[str, dict[str, Any]] = {}
    for name, graph in wanted.items():
        artifacts = pair_metrics.finished(graph, store)
        if artifacts is None:
            return None
        found[name] = {"metrics": pair_metrics.metrics(graph, artifacts), "keys": dict(graph.keys)}
    (folder / FILE).write_text(json.dumps(found, indent=1, sort_keys=True))
    return found


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The reference lines of a study, empty before its first search ended."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found
