"""Muon: the update of a matrix is its orthogonalized momentum (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), for any way that ZeRO partitions the matrix.

    gradients of my fragments -> momentum of my fragments       like AdamW, element by element
    fragments -> owner of the matrix -> orthogonal -> back      two all-to-alls a group
    weights -= lr * (0.2 * sqrt(longer side) * update + weight_decay * weights)

The factor makes the update about as large as AdamW's, so that both use one learning rate (Liu et
al. 2025, arXiv 2502.16982). The owner of a matrix is the rank that holds the largest part of it; of
equal holders (ZeRO-3), the one with the least work so far. At stage 0 each rank owns everything.

Legend: M, N the sides of a matrix, M <= N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from hourglass_dist.engine.sharded_state import Fragment

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that Jordan et al. iterate five times."""
SCALE = 0.2
"""Typical root mean square of an AdamW update (Liu et al. 2025)."""


class Exchange:
    """Owner of each matrix of one flat tensor, and the ranges of it that each rank holds."""

    def __init__(
        self,
        matrices: Sequence[tuple[str, tuple[int, int]]],
        fragments: Sequence[Fragment],
        everywhere: bool,
        device: torch.device,
    ) -> None:
        """Exchange the ranges; all ranks call it, with all ``matrices`` (name, (rows, columns)) and
        this rank's ``fragments`` of them. ``everywhere``: each rank holds every matrix whole."""
        self._matrices = list(matrices)
        self._mine = {fragment.name: fragment for fragment in fragments}
        self._alone = everywhere or td.get_world_size() == 1
        self._rank = 0 if self._alone else td.get_rank()
        table = torch.zeros(len(self._matrices), 2, dtype=torch.int64, device=device)
        for index, (name, _) in enumerate(self._matrices):
            if name in self._mine:
                fragment = self._mine[name]
                table[index, 0], table[index, 1] = fragment.start, fragment.numel
        tables = [table]
        if not self._alone:
            tables = [torch.empty_like(table) for _ in range(td.get_world_size())]
            td.all_gather(tables, table)
        # start and numel, by rank and matrix
        self._ranges = [[(int(a), int(b)) for a, b in each.tolist()] for each in tables]
        self._owners = self._choose_owners()

    def _choose_owners(self) -> list[int]:
        ranks = range(len(self._ranges))
        work = [0.0 for _ in ranks]
        owners = []
        for index, (_, (rows, columns)) in enumerate(self._matrices):
            most = max(self._ranges[rank][index][1] for rank in ranks)
            holders = [r for r in ranks if self._ranges[r][index][1] == most]
            owner = min(holders, key=lambda rank: work[rank])
            work[owner] += rows * columns * min(rows, columns)
            owners.append(owner)
        return owners

    def orthogonalize(self, tensor: Tensor) -> Tensor:
        """Return this rank's fragments of the orthogonal matrices, zeros elsewhere; ``tensor`` and
        the result have the layout of the flat tensor."""
        flat = tensor.reshape(-1)
        received = self._swap(self._outgoing(flat), self._counts(out=True), self._counts(out=False))
        whole = self._assemble(received)
        returned = self._swap(
            self._cut(whole, flat), self._counts(out=False), self._counts(out=True)
        )
        result, position = torch.zeros_like(flat), 0
        for owner in range(len(self._ranges)):
            for index in self._owned(owner):
                fragment = self._mine.get(self._matrices[index][0])
                if fragment:
                    result[fragment.offset : fragment.offset + fragment.numel] = returned[
                        position : position + fragment.numel
                    ]
                    position += fragment.numel
        return result.view_as(tensor)

    def _owned(self, owner: int) -> list[int]:
        return [index for index, other in enumerate(self._owners) if other == owner]

    def _counts(self, out: bool) -> list[int]:
        """Return the elements sent to each rank (``out``), or received from each."""
        ranks, me = range(len(self._ranges)), self._rank
        if out:
            return [sum(self._ranges[me][i][1] for i in self._owned(rank)) for rank in ranks]
        return [sum(self._ranges[rank][i][1] for i in self._owned(me)) for rank in ranks]

    def _swap(self, data: Tensor, sent: list[int], expected: list[int]) -> Tensor:
        if self._alone:
            return data
        received = data.new_empty(sum(expected))
        td.all_to_all_single(received, data, expected, sent)
        return received

    def _outgoing(self, flat: Tensor) -> Tensor:
        parts = [flat.new_empty(0)]
        for owner in range(len(self._ranges)):
            for index in self._owned(owner):
                fragment = self._mine.get(self._matrices[index][0])
                if fragment:
                    parts.append(flat[fragment.offset : fragment.offset + fragment.numel])
        return torch.cat(parts)

    def _assemble(self, received: Tensor) -> dict[int, Tensor]:
        owned = self._owned(self._rank)
        whole = {i: received.new_zeros(self._numel(i)) for i in owned}
        position = 0
        for ranges in self._ranges:
            for index in owned:
                start, numel = ranges[index]
                whole[index][start : start + numel] = received[position : position + numel]
                position += numel
        return {i: orthogonal(m.view(self._matrices[i][1])).view(-1) for i, m in whole.items()}

    def _cut(self, whole: dict[int, Tensor], like: Tensor) -> Tensor:
        parts = [like.new_empty(0)]
        for ranges in self._ranges:
            for index, matrix in whole.items():
                start, numel = ranges[index]
                parts.append(matrix[start : start + numel])
        return torch.cat(parts)

    def _numel(self, index: int) -> int:
        rows, columns = self._matrices[index][1]
        return rows * columns


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest (semi-)orthogonal matrix: singular values between 0.7 and 1.2,
    times the factor that makes it as large as an AdamW update.

    It is computed in bf16 on a GPU, as published, and in fp32 on the CPU.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x_MN = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix.float()
    x_MN = x_MN.t() if tall else x_MN
    x_MN = x_MN / (x_MN.norm() + 1e-7)
    for _ in range(5):
        gram_MM = x_MN @ x_MN.t()
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    x_MN = x_MN.t() if tall else x_MN
    factor: float = SCALE * max(matrix.shape) ** 0.5
    update: Tensor = x_MN.to(matrix.dtype).contiguous() * factor
    return update


class MuonAdamW(torch.optim.AdamW):
    """Optimizer: Muon for groups with ``muon: True``, torch's AdamW for the others."""

    exchanges: dict[int, Exchange]
    """Exchange of each flat tensor (by ``id``) with Muon's matrices; set by ``Engine``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step with every parameter that has a gradient."""
        assert closure is None
        hidden = []
        for group in self.param_groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._step_muon(flat, flat.grad, group)
                    hidden.append((flat, flat.grad))
                    flat.grad = None
        super().step()
        for flat, grad in hidden:
            flat.grad = grad

    def _step_muon(self, flat: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["momentum_buffer"] = torch.zeros_like(flat)
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(grad, 1.0 - MOMENTUM)
        looked_ahead = grad.lerp(momentum, MOMENTUM)  # Nesterov
        update = self.exchanges[id(flat)].orthogonalize(looked_ahead)
        flat.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
