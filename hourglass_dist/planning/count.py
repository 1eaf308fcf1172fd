"""Activation memory of a model: the bytes that a forward pass saves for the backward pass.

The real model runs once on the ``meta`` device, where nothing is computed. Hooks see every tensor
that autograd saves. A stub replaces the attention kernel and saves the same tensors as the kernel
on the device of the run. What each checkpointing policy keeps follows from that one pass:

    none        what each module saves
    full        the inputs of each module
    every K     the inputs of each K-th module, and what the other modules save
    selective   the inputs, and the results of matrix products and attention
    offload     nothing on a GPU: what each module saves is copied to the host's memory

Tensors that share memory count once. Weights and input tokens are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hourglass_dist.model.attention import Stub, stubbed
from hourglass_dist.model.checkpointing import KEPT, recomputes
from hourglass_dist.model.head import CHUNK_LOGITS
from hourglass_dist.model.hourglass import Hourglass, HourglassLM
from hourglass_dist.model.settings import ModelConfig


@dataclass(frozen=True)
class Pass:
    """Properties of a forward pass that decide how much it saves."""

    rows: int
    length: int
    """Tokens in a row."""
    dtype: torch.dtype
    """Data type of weights and activations."""
    packed: bool
    """Whether a row holds several documents that do not attend to each other."""
    device: str
    """Type of the device of the run: ``cuda`` or ``cpu``."""
    autocast: bool = False
    """Whether only matrix products are in ``dtype``, and all other operations in fp32."""


@dataclass(frozen=True)
class Held:
    """Activation bytes of one level, or of the modules outside all levels."""

    kept: int
    """Bytes on the device from the forward to the backward pass."""
    offloaded: int
    """Bytes in the host's memory from the forward to the backward pass."""
    transient: int
    """Largest temporary bytes on top: of a recomputed module, or of the logits in the loss."""


@dataclass(frozen=True)
class Activations:
    """Activation bytes of a micro batch under one checkpointing policy for each level."""

    levels: tuple[Held, ...]
    """Bytes of each level, outermost first."""
    ends: Held
    """Bytes of embeddings, output layer and loss."""

    @property
    def parts(self) -> tuple[Held, ...]:
        """Bytes of each level, then of the ends."""
        return (*self.levels, self.ends)

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return sum(part.kept for part in self.parts) + max(part.transient for part in self.parts)

    @property
    def offloaded(self) -> int:
        """Bytes in the host's memory."""
        return sum(part.offloaded for part in self.parts)


Storages = dict[int, int]
"""Sizes of tensor storages in bytes, by the identity of the storage."""


@dataclass(frozen=True)
class ModuleRecord:
    """One call of a module that a policy treats as a whole."""

    level: int
    number: int
    """Number of the module in its level; ``every K`` recomputes each K-th one."""
    inputs: Storages
    saved: Storages
    products: Storages
    """Results that ``selective`` keeps."""
    copies: int
    """Bytes of all saved tensors, shared memory counted each time, as ``offload`` copies them."""


@dataclass(frozen=True)
class Record:
    """Tensors saved by one forward pass."""

    how: Pass
    modules: tuple[ModuleRecord, ...]
    around: tuple[Storages, ...]
    """Tensors saved outside these modules: in each level, then outside all levels."""
    transient: int
    """Bytes of one chunk of logits in the loss and of their log-probabilities."""

    def under(self, policies: Sequence[str]) -> Activations:
        """Return the activation bytes when the levels have these checkpointing policies."""
        counted: set[int] = set()
        levels = [self._level(level, policy, counted) for level, policy in enumerate(policies)]
        return Activations(tuple(levels), Held(_add(counted, self.around[-1]), 0, self.transient))

    def _level(self, level: int, policy: str, counted: set[int]) -> Held:
        kept, offloaded, transient = _add(counted, self.around[level]), 0, 0
        for module in self.modules:
            if module.level != level:
                continue
            if policy == "offload" and self.how.device == "cuda":
                offloaded += module.copies
            elif not recomputes(policy, module.number):
                kept += _add(counted, module.saved)
            else:
                anyway = module.inputs | (module.products if policy == "selective" else {})
                again = {key: size for key, size in module.saved.items() if key not in anyway}
                transient = max(transient, sum(again.values()))
                kept += _add(counted, anyway)
        return Held(kept, offloaded, transient)


def _add(counted: set[int], storages: Storages) -> int:
    new = storages.keys() - counted
    counted |= new
    return sum(storages[key] for key in new)


def count(config: ModelConfig, how: Pass) -> Record:
    """Return the record of one forward pass; the policies of ``config`` do not change it."""
    return _count(config.with_checkpointing("none"), how)


@lru_cache(maxsize=32)
def _count(config: ModelConfig, how: Pass) -> Record:
    with torch.device("meta"):
        model = HourglassLM(config)
        tokens_BL = torch.empty(how.rows, how.length, dtype=torch.int64)
        documents_BL = torch.empty_like(tokens_BL) if how.packed else None
    given = [tokens_BL, *([] if documents_BL is None else [documents_BL])]
    if how.autocast:
        _cast_products(model, how.dtype)  # the copies of weights in dtype are counted
        given += [p for p in model.parameters() if p.dtype != how.dtype]
    else:
        given += [*model.to(how.dtype).parameters()]
    ledger = _Ledger(model, given, how)
    with stubbed(Stub(how.device, ledger.attend)), _Dropout(how.device), ledger.watching():
        model(tokens_BL, documents_BL=documents_BL, targets_BL=tokens_BL)
    positions = min(tokens_BL.numel(), max(1, CHUNK_LOGITS // config.vocab_size))
    transient = 2 * 4 * positions * config.vocab_size  # in fp32
    return Record(how, tuple(ledger.modules), tuple(ledger.around), transient)


def _cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights and inputs of matrix products to ``dtype``, as autocast does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
            module.register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))


class _Ledger:
    """Recorder of the tensors that a model saves in a forward pass."""

    def __init__(self, model: HourglassLM, given: Sequence[Tensor], how: Pass) -> None:
        """Install the hooks; tensors in ``given`` (inputs and weights) are not counted."""
        self.modules: list[ModuleRecord] = []
        self._dtype = how.dtype
        self._given = {_key(tensor) for tensor in given}
        self._alive: list[Any] = []  # so that no two storages have one identity
        self._products: Storages = {}
        self._inside: list[int] = [-1]
        levels = [module for module in model.modules() if isinstance(module, Hourglass)]
        self.around: list[Storages] = [{} for _ in [*levels, "ends"]]
        for level in levels:
            untyped: Any = level
            untyped.run = self._run(level.index)
            level.register_forward_pre_hook(lambda module, _: self._inside.append(module.index))
            level.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._inside.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what is saved outside the modules inside this context."""
        with saved_tensors_hooks(self._keep_around, lambda tensor: tensor):
            yield

    def _keep_around(self, tensor: Tensor) -> Tensor:
        self._note(tensor, self.around[self._inside[-1]])
        return tensor

    def _note(self, tensor: Tensor, storages: Storages) -> None:
        storage = tensor.untyped_storage()
        if _key(tensor) not in self._given:
            self._alive.append(storage)
            storages[_key(tensor)] = storage.nbytes()

    def _run(self, level: int) -> Callable[..., Any]:
        """Return a function that replaces a level's ``Recompute`` and records each module."""

        def run(number: int, module: nn.Module, *inputs: Any) -> Any:
            saved: Storages = {}
            held: Storages = {}
            self._products = {}
            copies = 0

            def keep(tensor: Tensor) -> Tensor:
                nonlocal copies
                if not isinstance(tensor, nn.Parameter):
                    copies += tensor.numel() * tensor.element_size()
                self._note(tensor, saved)
                return tensor

            for tensor in _tensors(inputs):
                self._note(tensor, held)
            with saved_tensors_hooks(keep, lambda tensor: tensor), _Products(self.product):
                out = module(*inputs)
            self.modules.append(ModuleRecord(level, number, held, saved, self._products, copies))
            return out

        return run

    def product(self, tensor: Tensor) -> None:
        """Record a result that ``selective`` keeps."""
        self._note(tensor, self._products)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """Stand in for a fused attention kernel: return an empty result of its shape."""
        q, k, v = q.to(self._dtype), k.to(self._dtype), v.to(self._dtype)
        out, normaliser = _attention(q, k, v, *_tensors(mask))
        self.product(out)
        self.product(normaliser)
        return out


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield all tensors of nested tuples and block masks."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, BlockMask):
        yield from _tensors(part.as_tuple())
    elif isinstance(part, tuple):
        for each in part:
            yield from _tensors(each)


class _Attention(torch.autograd.Function):
    """Function that saves what fused attention saves: q, k, v, mask, result, log-sum-exp (fp32)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)  # with the strides of q
        normaliser = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, *mask, out, normaliser)
        ctx.mark_non_differentiable(normaliser)
        return out, normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("a count has no backward pass")


_attention: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that passes the results of matrix products to a function."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in KEPT:
            for tensor in out if isinstance(out, tuple) else (out,):
                self._tell(tensor)
        return out


class _Dropout(TorchFunctionMode):
    """Mode that makes dropout save a mask of bytes, as on a GPU; CPU and meta save floats."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._fused = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._fused and func is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **(kwargs or {}))
