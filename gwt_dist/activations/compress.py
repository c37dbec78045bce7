"""`compress_activations`: tensors that modules save for their backward pass, in 8 bits; the forward pass is exact.

    forward of a chosen module    codes of each floating tensor that is saved are kept, and not it
    backward                      a tensor is made of the codes again

Torch's `saved_tensors_hooks` do it, around the forward passes of the chosen modules. What several functions save is
stored once, known by its memory; weights are left as they are. Within `torch.utils.checkpoint`, which saves nothing but
the inputs of what it will compute again, these inputs are compressed, wherever in the model it is called.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gwt_dist.activations.codes import Codes, decode, encode
from gwt_dist.targets import matches

logger = logging.getLogger(__name__)

# Norms, MLPs, and the projections into attention. Attention itself is left alone: its backward pass makes the softmax
# again from queries, keys and what the forward pass summed, which must fit. So is the projection out of it, whose
# input attention keeps anyway.
TARGETS = "norm", "ln_", "mlp", "feed_forward", "q_proj", "k_proj", "v_proj", "qkv", "c_attn"
_NORMS = "layernorm", "rmsnorm"  # classes that go with `TARGETS`, whatever they are called in the model
NARROW = 32  # numbers of a token below which a scale would cost too much
_CHECKPOINT = "torch.utils.checkpoint"
# Operations after which a tensor has the numbers of another, as autograd names them; engines and autocast use them.
_SAME_NUMBERS = {
    *("Alias", "AsStrided", "Narrow", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "T"),
    *("ToCopy", "Transpose", "UnsafeView", "View"),
}


@dataclass(eq=False)
class _Packed:
    """A tensor in codes, for all that saved it."""

    codes: Codes
    dtype: torch.dtype


# Codes and the shape of the tensor, or the tensor and its version: where hooks are, torch asks nobody for versions.
_Saved = tuple[_Packed, torch.Size] | tuple[Tensor, int]


@dataclass(eq=False)
class Compression:
    """What `compress_activations` did, to be undone by `remove`; bytes are counted since `reset`.

    Attributes:
        modules: Names of those whose saved tensors are compressed.
        before: Bytes of the tensors that were packed, each memory once.
        after: Bytes of their codes.
    """

    modules: tuple[str, ...]
    before: int = 0
    after: int = 0
    _handles: list[Any] = field(default_factory=list, repr=False)

    def reset(self) -> None:
        """Count from 0."""
        self.before = self.after = 0

    def remove(self) -> None:
        """Save tensors as they are again. What was saved already stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def compress_activations(
    model: nn.Module,
    targets: str | Sequence[str] = TARGETS,
    bits: int = 8,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Compression:
    """Keep what chosen modules save for their backward pass in 8 bits, 1.03 bytes a number; see `activations.codes`.

    The forward pass is bit for bit the one without. Gradients are off by the rounding of saved tensors: each number by
    at most 1/510 of the range of its 128 neighbours. Nothing depends on the batch or on other ranks, so that ranks
    which share a batch have the gradients of one process. Works with DDP, FSDP, ZeRO, autocast, accumulation and
    `torch.utils.checkpoint` (not reentrant), before or after the model is wrapped.

    Args:
        model: The model, wrapped or not.
        targets: Pattern or patterns of names of modules, each a part of the name or a regular expression that matches
            all of it. A module within one that is chosen already goes with it. The default takes norms by class too.
        bits: 8.
        stochastic_rounding: Rounds up or down by chance, so that the mean of the gradients is exact. The chance is of
            each process; torch's own random states are left alone.
        seed: Of this chance.

    Returns:
        What was chosen; its `remove` undoes it.

    Raises:
        ValueError: If a pattern matches no module, `bits` is another number, or the model is compiled already.
    """
    if bits != 8:
        raise ValueError(f"bits={bits} must be 8: there is no other format of activations yet")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen = dict(_chosen(model, patterns, explicit=targets is not TARGETS))
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise ValueError(
            f"{compiled[0] or 'the model'} is compiled, and what a compiled module saves is not asked of hooks in "
            f"Python: its activations would stay as they are in silence. Compile none of the chosen modules, or leave "
            f"compress_activations out; torch.compile has its own choice of what to recompute"
        )
    found = Compression(tuple(chosen))
    saver = _Saver(found, seed if stochastic_rounding else None)
    found._handles += saver.hook("the model", model, saver.boundary)
    for name, module in chosen.items():
        found._handles += saver.hook(name, module, partial(saver.pack, module))
    logger.info("activations of %d modules in 8 bits: %s", len(chosen), ", ".join(chosen))
    return found


def _chosen(model: nn.Module, patterns: Sequence[str], explicit: bool) -> Iterator[tuple[str, nn.Module]]:
    """Modules that match, without those within another; raises `ValueError` for patterns of a user that match none."""
    found: dict[str, nn.Module] = {}
    used = set()
    for name, module in model.named_modules():
        its = {pattern for pattern in patterns if name and matches(pattern, _last(name, pattern))}
        used |= its
        is_norm = not explicit and name and not any(True for _ in module.children())
        is_norm = is_norm and any(kind in type(module).__name__.lower() for kind in _NORMS)
        if (its or is_norm) and not any(name.startswith(f"{other}.") for other in found):
            found[name] = module
    unused = [pattern for pattern in patterns if pattern not in used]
    if not found or (explicit and unused):
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"target {(unused or patterns)[0]!r} matches no module, so its activations would stay as they are. Names: "
            f"{', '.join(names[:6])} and {max(0, len(names) - 6)} more"
        )
    yield from found.items()


def _last(name: str, pattern: str) -> str:
    """What a pattern is compared with: the last part of a name, and all of it for a pattern that has a dot."""
    return name if "." in pattern else name.rsplit(".", 1)[-1]


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


class _Saver:
    """The hooks of all chosen modules of a model."""

    def __init__(self, found: Compression, seed: int | None) -> None:
        self._found, self._seed = found, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        # What is packed and still needed, by its memory, which is held weakly: no other gets its identity meanwhile.
        self._known: WeakValueDictionary[tuple[Any, ...], _Packed] = WeakValueDictionary()
        self._memory: dict[tuple[Any, ...], StorageWeakRef] = {}

    def hook(self, name: str, module: nn.Module, pack: Callable[[Tensor], _Saved]) -> list[Any]:
        """Put hooks around the forward pass of a module."""
        scopes: list[Any] = []

        def enter(_: nn.Module, __: Any) -> None:
            if torch.compiler.is_compiling():
                _refuse_compiled(name)
            # What is computed again keeps nothing, and its own hooks must see that.
            is_again = _is_of_checkpoint(_top())
            scope = nullcontext() if is_again else torch.autograd.graph.saved_tensors_hooks(pack, _unpack)
            scope.__enter__()
            scopes.append(scope)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            if scopes:  # not if the one before raised
                scopes.pop().__exit__(None, None, None)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def pack(self, module: nn.Module, tensor: Tensor) -> _Saved:
        """What is kept of a tensor that a chosen module saves."""
        if not _can(tensor) or _is_weight(tensor, module):
            return tensor, tensor._version
        return self._packed(tensor), tensor.shape

    def boundary(self, tensor: Tensor) -> _Saved:
        """And of one that is saved outside of the chosen modules: codes if it is an input of what is checkpointed."""
        caller = sys._getframe(1)  # the next frame of Python: autograd is none
        is_input = caller.f_globals.get("__name__") == _CHECKPOINT
        return (self._packed(tensor), tensor.shape) if is_input and _can(tensor) else (tensor, tensor._version)

    def _packed(self, tensor: Tensor) -> _Packed:
        storage = tensor.untyped_storage()
        # A view has the numbers of what it is of; a change in place makes another version.
        key = (
            *(storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.shape[-1], tensor.dtype, tensor._version),
            None if tensor.is_contiguous() else (tensor.shape, tensor.stride()),
        )
        packed = self._known.get(key)
        if packed is None:
            codes = encode(tensor.detach().reshape(-1, tensor.shape[-1]), self._generator(tensor.device))
            packed = self._known[key] = _Packed(codes, tensor.dtype)
            if len(self._memory) > 2 * len(self._known) + 64:  # seldom, as it walks over all of them
                self._memory = {its: memory for its, memory in self._memory.items() if its in self._known}
            self._memory[key] = StorageWeakRef(storage)
            self._found.before += tensor.nbytes
            self._found.after += codes.nbytes
        return packed

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self._seed is None:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@torch._disable_dynamo  # type: ignore[attr-defined]  # so Python runs it, and what it raises is raised
def _refuse_compiled(name: str) -> None:
    raise ValueError(
        f"{name} is compiled and its activations are to be compressed, which would happen to a part of them alone: "
        f"compile no chosen module, or leave compress_activations out"
    )


def _top() -> Any:
    """The pack hook that torch would call now; None if there is none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks else None


def _is_of_checkpoint(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == _CHECKPOINT


def _can(tensor: Tensor) -> bool:
    """Whether a tensor is one of activations, wide enough, and plain; how many tokens it has must not matter."""
    return (
        tensor.is_floating_point()
        and tensor.dtype != torch.float64  # who computes so wants it so
        and tensor.dim() > 1
        and tensor.shape[-1] >= NARROW
        and not isinstance(tensor, nn.Parameter)
        and not is_traceable_wrapper_subclass(tensor)  # as a DTensor is
        and tensor.layout == torch.strided
    )


def _is_weight(tensor: Tensor, module: nn.Module) -> bool:
    """Whether a saved tensor is a weight of the module: the memory of one, or what was made of one by views and a cast.

    A cast of a frozen weight, as autocast makes, has no history: it is known by its shape, and so is an activation of
    that shape, which stays as it is then.
    """
    memory, shape = tensor.untyped_storage()._cdata, tuple(tensor.shape)
    return isinstance(_origin(tensor.grad_fn), nn.Parameter) or any(
        memory == its.untyped_storage()._cdata
        or (not its.requires_grad and its.dtype != tensor.dtype and shape in (tuple(its.shape), tuple(its.shape)[::-1]))
        for its in module.parameters()
    )


def _origin(made_by: Any) -> Tensor | None:
    """The leaf that a tensor is a view or a cast of; None if there is none."""
    while made_by is not None and made_by.name().split("Backward")[0] in _SAME_NUMBERS:
        made_by = made_by.next_functions[0][0]
    return getattr(made_by, "variable", None)


def _unpack(saved: _Saved) -> Tensor:
    kept, about = saved
    if isinstance(kept, _Packed):
        return decode(kept.codes, kept.dtype).view(about)
    if kept._version != about:
        raise RuntimeError(
            f"a tensor of shape {tuple(kept.shape)} that the backward pass needs has been modified by an inplace "
            f"operation: it is at version {kept._version} and was saved at {about}. Its gradient would be wrong"
        )
    return kept
