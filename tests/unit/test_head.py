"""The chunked loss is the plain one: values and gradients, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo import make_model, random_text

from hourglass_dist.model import head
from hourglass_dist.model.head import Output


def losses_and_gradients(
    layer: Output, x_BLD: Tensor, targets_BL: Tensor, chunked: bool
) -> tuple[Tensor, list[Tensor]]:
    given = x_BLD.clone().requires_grad_()
    layer.zero_grad()
    if chunked:
        nats, count = layer(given, targets_BL)
        assert count == (targets_BL >= 0).sum()
    else:
        logits = layer(given).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nats = F.cross_entropy(logits, targets_BL.flatten(), reduction="sum")
        log_z_N = logits.logsumexp(dim=-1)[targets_BL.flatten() >= 0]
        penalty = layer.z_loss * log_z_N.square().sum()
        nats = nats + penalty - penalty.detach()
    (nats / 7).backward()
    return nats.detach(), [t.grad for t in (given, *layer.parameters()) if t.grad is not None]


@pytest.mark.parametrize(("bias", "z_loss"), [(True, 0.0), (False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_it_is_the_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    chunk: int,
    bias: bool,
    z_loss: float,
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk * 37)
    torch.manual_seed(0)
    layer = Output(16, 37, bias, z_loss).to(dtype)
    x_BLD = torch.randn(3, 7, 16, dtype=dtype)
    targets_BL = torch.randint(37, (3, 7))
    targets_BL[0, 2:4] = -100
    mine = losses_and_gradients(layer, x_BLD, targets_BL, True)
    plain = losses_and_gradients(layer, x_BLD, targets_BL, False)
    assert mine[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mine[0].to(plain[0].dtype), plain[0], rtol=tolerance, atol=0)
    assert len(mine[1]) == (3 if bias else 2)
    for one, other in zip(mine[1], plain[1], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_loss_of_every_target(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Each where it belongs, zero where there is none; together they are the loss."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk * 256)
    model = make_model("modern, words", "by 2, 4")
    tokens_BL, targets_BL = random_text(3, 40), random_text(3, 40, seed=1)
    targets_BL[1, 5:33] = -100
    nats_BL, count = model(tokens_BL, targets_BL=targets_BL, each_target=True)
    logits_BVL = model(tokens_BL).transpose(1, 2)
    expected_BL = F.cross_entropy(logits_BVL, targets_BL, reduction="none")
    torch.testing.assert_close(nats_BL, expected_BL.detach())
    summed, scored = model(tokens_BL, targets_BL=targets_BL)
    torch.testing.assert_close(nats_BL.sum(), summed.detach())
    assert count == scored == 3 * 40 - 28
    assert not nats_BL.requires_grad


def test_nothing_to_score_is_a_loss_of_zero() -> None:
    layer = Output(16, 37, True)
    nats, count = layer(torch.randn(2, 3, 16), torch.full((2, 3), -100))
    assert (nats.item(), int(count)) == (0.0, 0)


def test_the_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4 * 256)
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (256,):
                    largest[0] = max(largest[0], tensor.shape.numel())
            return out

    model = make_model("plain")
    with Watch():
        nats, _ = model(random_text(2, 40), targets_BL=random_text(2, 40))
        nats.backward()
    assert largest[0] <= 16 * 256, "the output weights are (256, 16); chunks have 4 rows"


def test_scoring_keeps_nothing() -> None:
    layer = Output(16, 37, True)
    with torch.no_grad():
        nats, _ = layer(torch.randn(2, 3, 16), torch.randint(37, (2, 3)))
    assert nats.grad_fn is None
