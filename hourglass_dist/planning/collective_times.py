"""Times of collectives over many GPUs: bytes over bandwidth, plus a latency for every step.

The bytes that a rank sends in a ring hardly depend on the number of ranks N, but a ring takes
N - 1 steps, each with a latency. The constants are those by which NCCL itself chooses a protocol
(``src/graph/tuning.cc``): microseconds to begin, of a step inside a node (NVLink), of a step
between nodes, and the share of the bandwidth that the protocol reaches.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Protocol(NamedTuple):
    """Latencies of one of NCCL's protocols, microseconds, and its bandwidth."""

    begin: float
    inside: float
    between: float
    bandwidth: float
    """Share of the link's bandwidth that the protocol reaches."""


RING = (
    Protocol(6.6, 0.6 * 1.8, 2.7, 0.25),  # LL; steps inside a node take longer with several nodes
    Protocol(14.0, 1.9, 4.0, 0.92),  # LL128
    Protocol(8.4, 3.4, 14.0, 1.0),  # Simple
)
TREE = (
    Protocol(6.8, 0.6 * 1.8, 5.0, 0.9 / 3.8),
    Protocol(14.0, 1.25, 8.5, 0.9 * 0.915),
    Protocol(8.4, 4.0, 14.0, 0.9),
)


def ring_s(sent: float, gpus: int, nodes: int, bandwidth: float) -> float:
    """Return the seconds of an all-gather or reduce-scatter; each rank sends ``sent`` bytes."""
    inside, between = gpus - nodes, nodes - 1
    return min(
        (p.begin + inside * p.inside + between * p.between) * 1e-6
        + sent / (bandwidth * p.bandwidth)
        for p in RING
    )


def all_reduce_s(sent: float, gpus: int, nodes: int, bandwidth: float) -> float:
    """Return the seconds of an all-reduce, by two passes of a ring or by a tree, whichever is
    faster; each rank sends ``sent`` bytes."""
    inside, between = gpus // nodes - 1, math.log2(nodes)
    tree = min(
        (p.begin + 2 * (inside * p.inside + between * p.between)) * 1e-6
        + sent / (bandwidth * p.bandwidth)
        for p in TREE
    )
    return min(tree, 2 * ring_s(sent / 2, gpus, nodes, bandwidth))
