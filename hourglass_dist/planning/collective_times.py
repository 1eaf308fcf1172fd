"""How long a collective of many GPUs takes: bytes over bandwidth, and a latency for every step.

What is sent by a ring does not depend on the number of ranks N, but it goes round in N - 1 steps,
and each has a latency. The constants are those with which NCCL itself chooses between its protocols
(``src/graph/tuning.cc``): microseconds to begin, of a step inside a node (NVLink), of one between
nodes, and the share of the bandwidth that the protocol reaches. Rings pass every node once.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Protocol(NamedTuple):
    """One of NCCL's ways to move data, in microseconds."""

    begin: float
    inside: float
    between: float
    bandwidth: float
    """The share of it."""


RING = (
    Protocol(6.6, 0.6 * 1.8, 2.7, 0.25),  # LL; inside it waits longer when there are several nodes
    Protocol(14.0, 1.9, 4.0, 0.92),  # LL128
    Protocol(8.4, 3.4, 14.0, 1.0),  # Simple
)
TREE = (
    Protocol(6.8, 0.6 * 1.8, 5.0, 0.9 / 3.8),
    Protocol(14.0, 1.25, 8.5, 0.9 * 0.915),
    Protocol(8.4, 4.0, 14.0, 0.9),
)


def ring_s(sent: float, gpus: int, nodes: int, bandwidth: float) -> float:
    """Seconds of an all-gather or reduce-scatter in which each rank sends so many bytes."""
    inside, between = gpus - nodes, nodes - 1
    return min(
        (p.begin + inside * p.inside + between * p.between) * 1e-6
        + sent / (bandwidth * p.bandwidth)
        for p in RING
    )


def all_reduce_s(sent: float, gpus: int, nodes: int, bandwidth: float) -> float:
    """Seconds of an all-reduce in which each rank sends so many bytes: twice round the ring, or up
    and down a tree."""
    inside, between = gpus // nodes - 1, math.log2(nodes)
    tree = min(
        (p.begin + 2 * (inside * p.inside + between * p.between)) * 1e-6
        + sent / (bandwidth * p.bandwidth)
        for p in TREE
    )
    return min(tree, 2 * ring_s(sent / 2, gpus, nodes, bandwidth))
