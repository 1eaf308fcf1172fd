"""``hourglass bench model``: a training step beside the reference, and each optimization's gain.

Both models have the same weights; a step is forward, mean cross entropy, backward. Before anything
is timed, loss and gradients are compared.

Legend: B rows, L positions, G buckets, S positions in a bucket, D width, H heads, K width of a
head, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hourglass_dist.bench.shared import (
    MIB,
    apart,
    headline,
    interleave,
    machine,
    peak_bytes,
    prepare,
    ratio,
    reference,
    seconds,
    show,
)
from hourglass_dist.config.model import lucidrains_config
from hourglass_dist.model import head, layers, linear, resample
from hourglass_dist.model.attention import AttentionMask
from hourglass_dist.model.checkpointing import Recompute
from hourglass_dist.model.hourglass import Hourglass, HourglassLM
from hourglass_dist.model.layers import LevelInputs
from hourglass_dist.model.lucidrains import from_lucidrains, lucidrains_kwargs, to_lucidrains
from hourglass_dist.model.settings import ModelConfig


class Shape(NamedTuple):
    """A model of the reference, and the measurements on it."""

    settings: dict[str, Any]
    rows: tuple[int, ...]
    """Batch sizes, rows."""
    changes: tuple[str, ...]
    """Keys of ``CHANGES`` that our model is measured with, one at a time, at one row a batch."""


README = {"depth": (4, 2, 4), "shorten_factor": 2, "max_seq_len": 1024}
NESTED = {"depth": (4, (2, 1, 2), 3), "shorten_factor": (2, 4), "max_seq_len": 2048}
RECOMPUTE = ("selective", "full")
USUAL = ("upsample", "attention", "loss", "queries", *RECOMPUTE)
SHAPES = {
    "readme": Shape(README, (1, 4), USUAL),
    "nested": Shape(NESTED, (1, 4), USUAL),
    "readme by 8": Shape({**README, "shorten_factor": 8}, (1,), ("upsample", "keys")),
    "readme, 32k vocabulary": Shape({**README, "num_tokens": 32768}, (1,), ("loss",)),
}
"""The two examples of the reference's README, and two shapes that show single optimizations."""
AGREES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest relative difference of the loss, and of the gradients in the norm of all together."""
POLICIES = ("full", "every 2", "selective")
WARM_UP = 64
"""Tokens of the warm-up's rows: enough for the reference's shorten factors."""


class Case(NamedTuple):
    """A model and a batch to measure."""

    shape: str
    rows: int
    dtype: torch.dtype
    quick: bool
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        """The model's settings, with the reference's defaults."""
        small = {"dim": 64, "heads": 2, "dim_head": 32, "max_seq_len": 64} if self.quick else {}
        settings: dict[str, Any] = {
            "num_tokens": 256,
            "dim": 512,
            **SHAPES[self.shape].settings,
            **small,
        }
        return lucidrains_config(**settings)

    @property
    def length(self) -> int:
        """Tokens in a row: the model's ``max_seq_len``."""
        assert self.config.max_seq_len is not None
        return self.config.max_seq_len

    def model(self) -> HourglassLM:
        """Return our model with new random weights."""
        return HourglassLM(self.config).to(self.device, self.dtype)

    def reference(self) -> nn.Module:
        """Return the reference's model with the weights of ours."""
        theirs: nn.Module = reference().HourglassTransformerLM(**lucidrains_kwargs(self.config))
        theirs.load_state_dict(to_lucidrains(HourglassLM(self.config)))
        return theirs.to(self.device, self.dtype)

    def batch(self, length: int) -> Tensor:
        """Return (2, B, L): random tokens and targets."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.rows, length)
        return torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.shape}: {self.rows} x {self.length} tokens, {kind}"


def step(model: nn.Module, batch: Tensor) -> float:
    """Run forward, mean cross entropy and backward with new gradients, and return the loss."""
    tokens_BL, targets_BL = batch
    for parameter in model.parameters():
        parameter.grad = None
    if isinstance(model, HourglassLM):
        nats, count = model(tokens_BL, targets_BL=targets_BL)
        loss = nats / count
    else:
        loss = F.cross_entropy(model(tokens_BL).flatten(0, 1), targets_BL.flatten())
    loss.backward()
    return float(loss.detach())


# --- ours with one change ----------------------------------------------------------------------


def _upsample_with_queries(
    self: resample.Upsample, inner_BGE: Tensor, x_BLD: Tensor, inputs: LevelInputs, _: Any
) -> Tensor:
    """Upsample with a query at each position, whose softmax over its only key has weight 1."""
    attention, rows, length = self.attention, inputs.rows, x_BLD.shape[1]
    assert isinstance(attention, resample.SingleKeyAttention)
    added_BGSD = inner_BGE[:, :, None].expand(-1, -1, rows.shorten, -1)
    if self.spread is not None:
        added_BGSD = self.spread(inner_BGE)
    added_BLD = added_BGSD.flatten(1, 2)[:, :length]
    missing = rows.size * rows.shorten - length
    stream_BLD = F.pad(x_BLD + added_BLD, (0, 0, 0, missing))
    split = rows.size, rows.shorten, attention.heads, -1
    q_BGSHK = attention.query(attention.norm(stream_BLD)).view(len(x_BLD), *split)
    k_BGHK = attention.key(inner_BGE).view(len(x_BLD), rows.size, attention.heads, -1)
    v_BGHK = attention.value(inner_BGE).view(k_BGHK.shape)
    scores_BGSHJ = torch.einsum("bgshk,bghk->bgsh", q_BGSHK, k_BGHK).unsqueeze(-1)
    weights_BGSHJ = (scores_BGSHJ * k_BGHK.shape[-1] ** -0.5).softmax(dim=-1)
    mixed_BLI = (weights_BGSHJ * v_BGHK.unsqueeze(2)).flatten(3).flatten(1, 2)[:, :length]
    return self.combine(x_BLD, added_BLD + attention.out(mixed_BLI))


def _attend_spelled_out(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend with separate tensors for scores, mask and weights."""
    assert mask.causal
    assert not dropout
    scores_BHLL = q @ k.transpose(-1, -2) * scale
    unseen_LL = torch.ones(scores_BHLL.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores_BHLL = scores_BHLL.masked_fill(unseen_LL, -torch.finfo(q.dtype).max)
    return scores_BHLL.softmax(dim=-1) @ v


def _loss_of_all_logits(self: head.Output, x_BLD: Tensor, targets_BL: Tensor, _: bool) -> Any:
    logits_BLV = linear.Linear.forward(self, x_BLD)
    nats = F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="sum")
    return nats, targets_BL.numel()


def _recomputed(policy: str) -> Callable[..., Tensor]:
    run, other = Recompute.__call__, Recompute(policy, draws=False)

    def call(_: Recompute, number: int, module: nn.Module, *inputs: Any) -> Tensor:
        out: Tensor = run(other, number, module, *inputs)
        return out

    return call


CHANGES: dict[str, tuple[str, Any, str, Any]] = {
    "upsample": (
        *("without single-key attention", resample.Upsample, "forward"),
        _upsample_with_queries,
    ),
    "attention": ("without fused attention", layers, "attend", _attend_spelled_out),
    "loss": ("without the chunked loss", head.Output, "forward", _loss_of_all_logits),
    "queries": ("bucket attention through queries", resample, "MANY_KEYS", 1),
    "keys": ("bucket attention through keys", resample, "MANY_KEYS", 10**9),
    "selective": (
        *("with selective checkpointing", Recompute, "__call__"),
        _recomputed("selective"),
    ),
    "full": ("with full checkpointing", Recompute, "__call__", _recomputed("full")),
}
"""Changes of our model: description, owner of an attribute, the attribute, its replacement."""


@contextmanager
def changed(name: str | None) -> Iterator[None]:
    """Apply one of ``CHANGES`` to our model within the block; None changes nothing."""
    if name is None:
        yield
        return
    _, owner, attribute, other = CHANGES[name]
    kept = getattr(owner, attribute)
    setattr(owner, attribute, other)
    try:
        yield
    finally:
        setattr(owner, attribute, kept)


# --- agreement -----------------------------------------------------------------------------------


def gradients(model: nn.Module, ours: HourglassLM) -> list[Tensor]:
    """Return the gradients of the last step, in the order of the trained weights of ``ours``."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, HourglassLM):
        return list(found.values())
    holder = copy.deepcopy(ours)
    from_lucidrains(found, holder)
    return [p.detach() for p in holder.parameters() if p.requires_grad]


def check_agreement(
    case: Case, ours: HourglassLM, theirs: nn.Module, names: Sequence[str]
) -> float:
    """Return the norm of the difference of our gradients and the reference's, relative to theirs.
    Raises AssertionError when loss or gradients differ by more than ``AGREES``, for the reference
    or for our model with any of the changes ``names``."""
    batch, limit = case.batch(case.length), AGREES[case.dtype]
    loss = step(ours, batch)
    mine = [grad.clone() for grad in gradients(ours, ours)]
    share = 0.0
    for name in (*names, None):
        model = theirs if name is None else ours
        with changed(name):
            other = step(model, batch)
        share = _difference(mine, gradients(model, ours))
        assert abs(loss - other) < limit * loss, f"{name or 'reference'}: loss {other}, not {loss}"
        assert share < limit, f"{name or 'reference'}: gradients differ by {share:.1e}"
    return share


def _difference(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = [(a.float(), b.float()) for a, b in zip(given, wanted, strict=True)]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


# --- against the reference -----------------------------------------------------------------------


def bench_model(
    repeats: int, threads: int | None, device_name: str, quick: bool, checkpointing: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure, print the tables and return (machine, rows of all tables). Raises ValueError when
    the reference or the device is missing."""
    device = prepare(device_name, threads)
    reference()
    facts = machine(device)
    print(headline(facts), flush=True)
    if checkpointing:
        return facts, bench_checkpointing(Case("nested", 1, torch.float32, quick, device), repeats)
    found = []
    for case in cases(quick, device):
        found += bench_case(case, repeats)
    return facts, found


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Return all cases, or with ``quick`` only the first."""
    found = [
        Case(name, rows, dtype, quick, device)
        for name, shape in SHAPES.items()
        for rows in shape.rows
        for dtype in AGREES
    ]
    return found[:1] if quick else found


def bench_case(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure and print the reference, our model, and ours with one change at a time."""
    names = SHAPES[case.shape].changes if case.rows == 1 else RECOMPUTE
    ours, theirs, batch = case.model(), case.reference(), case.batch(case.length)
    share = check_agreement(case, ours, theirs, names)

    def timed(model: nn.Module, name: str | None) -> Callable[[], float]:
        def run() -> float:
            with changed(name):
                taken = seconds(lambda: step(model, batch), case.device)
            model.zero_grad()
            return taken

        return run

    variants = {"reference": timed(theirs, None), "ours": timed(ours, None)}
    variants |= {name: timed(ours, name) for name in names}
    times = interleave(variants, repeats, str(case))
    del ours, theirs, variants
    peaks = {name: apart(step_peak, case, name, threads=torch.get_num_threads()) for name in times}
    found = [
        {
            "case": str(case),
            "variant": CHANGES[name][0] if name in CHANGES else name,
            "ms": 1e3 * statistics.median(taken),
            "speed": ratio(times["reference"], taken),
            "slower": ratio(taken, times["ours"]),
            "peak": peaks[name] / MIB,
            "share": peaks[name] / peaks["reference"],
            "rounds": taken,
        }
        for name, taken in times.items()
    ]
    columns = {
        "": "{variant}",
        "ms a step": "{ms:,.0f}",
        "speed / reference": "{speed:.2f}",
        "time / ours": "{slower:.2f}",
        "peak MiB": "{peak:,.0f}",
        "peak / reference": "{share:.2f}",
    }
    show(f"{case}; gradients differ by {share:.0e} of their length", found, columns)
    return found


def step_peak(case: Case, variant: str) -> int:
    """Return the peak bytes of a first step beyond the weights; needs a fresh process."""
    model = case.reference() if variant == "reference" else case.model()
    with changed(variant if variant in CHANGES else None):
        step(model, case.batch(WARM_UP))  # loads libraries and starts threads
        model.zero_grad()
        batch = case.batch(case.length)
        return peak_bytes(lambda: step(model, batch), case.device)


# --- checkpointing -------------------------------------------------------------------------------


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records the storages made while it is active."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.seen[storage._cdata] = weak, storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        """Total bytes of the recorded storages that still exist."""
        return sum(size for storage, size in self.seen.values() if not storage.expired())


def kept_bytes(model: HourglassLM, batch: Tensor) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    tokens_BL, targets_BL = batch
    living = Living(tokens_BL.device)
    with living:
        nats, _ = model(tokens_BL, targets_BL=targets_BL)
        gc.collect()
    kept = living.bytes
    nats.backward()
    model.zero_grad()
    return kept


def set_policies(model: HourglassLM, policies: Sequence[str]) -> None:
    """Set the checkpointing policy of each level, outermost first."""
    for module in model.modules():
        if isinstance(module, Hourglass):
            module.run = Recompute(policies[module.index], draws=False)


def bench_checkpointing(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure every policy at every level alone and at all levels, and print the table."""
    model, batch = case.model(), case.batch(case.length)
    levels = range(len(case.config.levels))
    kinds = [*POLICIES, "offload"] if case.device.type == "cuda" else POLICIES
    choices = {"none": ["none" for _ in levels]}
    for here in levels:
        for kind in kinds:
            policies = [kind if level == here else "none" for level in levels]
            choices[f"level {here}: {kind}"] = policies
    choices |= {f"all levels: {kind}": [kind for _ in levels] for kind in kinds}

    def timed(policies: Sequence[str]) -> Callable[[], float]:
        def run() -> float:
            set_policies(model, policies)
            return seconds(lambda: step(model, batch), case.device)

        return run

    kept = {}
    for choice, policies in choices.items():
        set_policies(model, policies)
        kept[choice] = kept_bytes(model, batch)
    times = interleave({c: timed(p) for c, p in choices.items()}, repeats, "checkpointing")
    found = [
        {
            "case": str(case),
            "policy": choice,
            "kept": kept[choice] / MIB,
            "share": kept[choice] / kept["none"],
            "ms": 1e3 * statistics.median(taken),
            "slower": ratio(taken, times["none"]),
            "rounds": taken,
        }
        for choice, taken in times.items()
    ]
    columns = {
        "": "{policy}",
        "kept MiB": "{kept:,.1f}",
        "kept / none": "{share:.2f}",
        "ms a step": "{ms:,.0f}",
        "time / none": "{slower:.2f}",
    }
    show(f"{case}, {case.config.hierarchy}: kept for the backward pass", found, columns)
    return found
