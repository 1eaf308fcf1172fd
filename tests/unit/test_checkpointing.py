"""Activation checkpointing changes no number; it changes what is kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from slow_cases import every
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import make_model, random_text, with_policy

from hourglass_dist.model.checkpointing import Recompute
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.layers import Layer

POLICIES = ["full", "every 2", "selective", "offload"]


def backward_and_count(model: HourglassLM, tokens_BL: Tensor) -> int:
    """A backward pass; returns the bytes kept for it since the forward pass, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nats, _ = model(tokens_BL, targets_BL=tokens_BL)
    nats.backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["lucidrains, linear", "paper", "modern, words"])
@pytest.mark.parametrize("levels", ["flat", "by 2, 4", "by 3, 2, 2"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dropout", every(2, [0.3, 0.0]))
def test_no_gradient_changes(kind: str, levels: str, policy: str, dropout: float) -> None:
    plain = make_model(kind, levels, dropout=dropout)
    saving = with_policy(plain, policy)
    kept = [backward_and_count(model, random_text(2, 23)) for model in (plain, saving)]
    if policy == "full":
        assert kept[1] < kept[0] / 2, "nothing was saved by recomputing"
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad), name


def calls_of(model: HourglassLM, kind: type[nn.Module]) -> int:
    calls = [0]
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    nats, _ = model(random_text(1, 23), targets_BL=random_text(1, 23))
    before = calls[0]
    nats.backward()
    return calls[0] - before


def test_every_second_layer_is_done_again() -> None:
    model = make_model("modern", "by 2")
    layers = sum(isinstance(module, Layer) for module in model.modules())
    assert calls_of(with_policy(model, "full"), Layer) == layers == 4
    assert calls_of(with_policy(model, "every 2"), Layer) == 2
    assert calls_of(with_policy(model, "none"), Layer) == 0


class Executed(TorchDispatchMode):
    """Counts what is really run: what a policy has kept does not come this far."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_does_no_matrix_product_and_no_attention_again() -> None:
    calls = {}
    for policy in ("none", "selective", "full"):
        model = with_policy(make_model("lucidrains", "by 2"), policy)
        nats, _ = model(random_text(1, 23), targets_BL=random_text(1, 23))
        with Executed() as executed:
            nats.backward()
        calls[policy] = executed.calls
    for name in ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert calls["selective"][name] == calls["none"][name] < calls["full"][name], name
    for name in ("aten::gelu", "aten::native_layer_norm"):
        assert calls["none"][name] == 0 < calls["selective"][name], f"{name} is cheap to do again"


def test_auto_must_be_settled_before() -> None:
    with pytest.raises(ValueError, match="auto is settled before the model is built"):
        Recompute("auto", draws=False)
