"""``Linear`` and ``RMSNorm`` are what torch's own are, and keep less."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.model.linear import Linear
from hourglass_dist.model.norms import EPS, RMSNorm


@pytest.mark.parametrize(("wide_in", "wide_out"), [(16, 40), (40, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_is_that_of_torch(wide_in: int, wide_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    ours, plain = Linear(wide_in, wide_out, bias), nn.Linear(wide_in, wide_out, bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(wide_in, 7, 3).permute(2, 1, 0)
    gradients = []
    for layer in (ours, plain):
        given = x.clone().requires_grad_()
        out = layer(given)
        assert out.shape == (3, 7, wide_out)
        out.square().sum().backward()
        gradients.append([out, given.grad, *(p.grad for p in layer.parameters())])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_linear_layer_does_not_hold_a_weight_that_is_taken_away(dtype: torch.dtype) -> None:
    """As ZeRO-3 does between the forward and the backward pass."""
    layer = Linear(64, 64, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    weight, gathered = layer.weight.detach().clone(), weakref.ref(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=dtype)
    gc.collect()
    assert gathered() is None
    layer.weight.data = weight
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=0.02, atol=0.05)


def test_the_linear_layer_keeps_frozen_weights_and_follows_autocast() -> None:
    layer = Linear(8, 8).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def backward(norm: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """What a backward pass gives, and the bytes kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = norm(given)
    (out * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)).sum().backward()
    gradients = [p.grad for p in norm.parameters()]
    assert given.grad is not None
    return [out, given.grad, *[g for g in gradients if g is not None]], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rms_norm_is_torchs_and_keeps_less(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 64, dtype=dtype) * 5
    mine, theirs = RMSNorm(64).to(dtype), nn.RMSNorm(64, eps=EPS, dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(64))
        mine.weight.copy_(theirs.weight)
    (found, kept), (wanted, kept_there) = backward(mine, x), backward(theirs, x)
    for one, other in zip(found, wanted, strict=True):
        wide = dtype == torch.bfloat16
        torch.testing.assert_close(one, other, atol=0.05 if wide else 1e-5, rtol=0.02)
    assert kept < 0.6 * kept_there
    assert torch.equal(mine(x[:, :0]), F.rms_norm(x[:, :0], (64,), theirs.weight, EPS))
