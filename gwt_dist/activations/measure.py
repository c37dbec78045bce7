"""Bytes that a forward and a backward pass hold beside weights, counted on tensors that have shapes and no memory.

    kept    at the end of the forward pass: what is saved for the backward pass
    most    at any moment of both, with what is being computed

Torch's `FakeTensorMode` runs the model; a storage counts from the operation that makes it until nobody has it. So what
is recomputed or in codes counts as in a run: nothing here knows what either saves. Gradients of weights are let go as
soon as they are there, as they have a row of their own in a plan.

Not counted: what a kernel needs while it runs, weights that an engine gathers, and what an allocator leaves unused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from gwt_dist.activations.compress import compress_activations
from gwt_dist.blocks import outermost

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Held(NamedTuple):
    """Bytes of one forward and one backward pass."""

    kept: int
    most: int


# What may be done about activations: (blocks are computed again, what chosen modules save is in 8 bits).
MEASURES: Mapping[str, tuple[bool, bool]] = {
    "as they are": (False, False),
    "in 8 bits": (False, True),
    "recomputed": (True, False),
    "recomputed, in 8 bits": (True, True),
}


class _Attention(torch.autograd.Function):
    """What the fused kernels of attention save: queries, keys, values, the output, and a sum in fp32 for each query."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor) -> Tensor:
        B, H, T, _ = q_BHTK.shape
        out_BHTV = q_BHTK.new_empty(B, T, H, v_BGTV.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTV, out_BHTV, q_BHTK.new_empty(B, H, T, dtype=torch.float32))
        return out_BHTV

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_rest = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attention(
    _: nn.Module, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, *__: Any, **___: Any
) -> tuple[Tensor, None]:
    """What transformers calls by a name; returns the output, (B, T, H, V), and no weights of attention."""
    return _Attention.apply(q_BHTK, k_BGTK, v_BGTV).transpose(1, 2), None  # type: ignore[no-untyped-call]


class _Fused(TorchFunctionMode):
    """Attention is that of the fused kernels, whichever device this is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that somebody still has."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary(dict.fromkeys((tensor.untyped_storage() for tensor in known), 0))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return found

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


@contextmanager
def shapes(dtype: torch.dtype) -> Iterator[None]:
    """Within it tensors have no memory; modules are built of `dtype`, and attention is that of the fused kernels."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Fused())
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        yield


def held(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], *, recomputed: bool = False, in_8_bits: bool = False
) -> Held:
    """Bytes of a forward and a backward pass.

    Args:
        model: In training mode; tensors of it may have memory or none.
        loss_of: What is run; returns a loss, (), that needs gradients.
        recomputed: Each block is computed again in the backward pass (`torch.utils.checkpoint`, not reentrant).
        in_8_bits: With `compress_activations`, of its own choice of modules.

    Raises:
        ValueError: If there are no blocks to be recomputed, or no modules that `compress_activations` chooses.
    """
    with ExitStack() as stack:
        stack.enter_context(changed(model, recomputed=recomputed, in_8_bits=in_8_bits))
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(_let_go).remove)
        live = Live(iter([*model.parameters(), *model.buffers()]))
        stack.enter_context(live)
        loss = loss_of(model)
        kept = live.now
        loss.backward()
    return Held(kept, live.most)


@contextmanager
def changed(model: nn.Module, *, recomputed: bool, in_8_bits: bool) -> Iterator[None]:
    """Within it a model has these measures; arguments and errors are those of `held`."""
    with ExitStack() as stack:
        if recomputed:
            stack.enter_context(_checkpointed(model))
        if in_8_bits:
            stack.callback(compress_activations(model).remove)
        yield


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def chosen_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that `compress_activations` chooses by itself; none if there are none."""
    try:
        found = compress_activations(model)
    except ValueError:
        return ()
    found.remove()
    return found.modules


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of a forward pass and of its repetition: in a backward pass torch has no mode for functions."""
    return nullcontext(), _get_current_function_mode() or nullcontext()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    blocks = outermost(model).values()
    if not blocks:
        raise ValueError("the model has no blocks (members of a ModuleList, or alike in a Sequential) to be recomputed")
    for block in blocks:
        # Random numbers take no memory that is worth a word, and their states are no tensors of shapes alone.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _contexts}
        block.forward = partial(checkpoint, block.forward, **options)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
