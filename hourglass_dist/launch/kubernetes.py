"""Fills a manifest of ``launch/k8s/`` with a run and the facts of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hourglass_dist.config import Config
from hourglass_dist.launch.cluster import ClusterConfig


def manifest(
    folder: Path,
    cluster: ClusterConfig,
    config: Config,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> str:
    """The manifest, as YAML. Raises ValueError when the template lacks a place to fill."""
    raise ValueError("kubernetes: not there yet")
