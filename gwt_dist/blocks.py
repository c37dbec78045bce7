"""The weight matrices of a model, whatever its modules are called: which are of its blocks, and which are tied.

A matrix is a parameter ``weight``, ``..._weight``, ``..._proj``, ``w1`` or ``experts`` of two dimensions, as of
`nn.Linear`, of transformers' ``Conv1D``, of `nn.MultiheadAttention` and of routers; or of three, as experts are
stacked. So is the kernel of a convolution whose output channels each see several input channels: a row for each output
channel. Weights of embeddings are none, nor are biases, tables, tokens, the logarithms of a state space and other
kernels.

Blocks are the members of an `nn.ModuleList` that have modules of their own, and those of an `nn.Sequential` or
`nn.ModuleDict` whose class, not a container of torch's, is there twice. What is in a block is of the blocks, but for
the output embedding that a model of transformers tells of, and for what shares its weight with an embedding. Where no
block has a matrix (a perceptron, a convolutional or recurrent network) all matrices are of the blocks but the last,
which is the output layer.

Kernels are matrices because a small network of four convolutions ended at a third of AdamW's loss with the default
recipe so, at the best rate of each and with three seeds (0.013 against 0.050); with ``"energy"`` it ended at 0.065. See
benchmarks/convolutions.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gwt_dist.targets import Matrix

# What a parameter of a matrix is called. Others of two dimensions are tables, biases of experts, and such.
_NAMES = re.compile(r"weights?|.+_weight|weight_[ih]h_.+|(?:.+_)?proj|[wv]\d|experts")
_CONTAINERS = (nn.Sequential, nn.ModuleDict, nn.ModuleList)


def matrices_of(model: nn.Module) -> dict[int, Matrix]:
    """What a target can match, by the `id` of the parameter, in the order of modules.

    Of modules that share a weight the first has it. Under `deepspeed.zero.Init`, FSDP1 (with ``use_orig_params=True``)
    and FSDP2 shapes are those of whole tensors.
    """
    modules = dict(model.named_modules())
    embeddings, outputs = _embeddings(modules), _outputs(modules)
    shapes, blocks = _shapes_of_fsdp(modules), tuple(_blocks(modules))
    found: dict[int, Matrix] = {}
    for path, module in modules.items():
        if _is_embedding(module):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            key, shape = id(parameter), shapes.get(id(parameter), shape_of(parameter))
            if key in found or not _is_matrix(module, own, shape):
                continue
            name = path if own == "weight" else ".".join(filter(None, (path, own)))
            in_blocks = f"{path}.".startswith(blocks) and key not in embeddings and key not in outputs
            kernel = isinstance(module, _ConvNd)
            found[key] = Matrix(name, in_blocks, key in embeddings, len(shape) == 3 and not kernel, kernel)
    return found if any(matrix.in_blocks for matrix in found.values()) else _without_blocks(found, outputs)


def outermost(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks that are in no other block, by name, in order: what FSDP wraps one by one, and what is recomputed."""
    found: dict[str, nn.Module] = {}
    for start in _blocks(dict(model.named_modules())):
        if not start.startswith(tuple(f"{name}." for name in found)):
            found[start.rstrip(".")] = model.get_submodule(start.rstrip("."))
    return found


def _is_matrix(module: nn.Module, own: str, shape: Sequence[int]) -> bool:
    if isinstance(module, nn.Linear) and own == "weight":
        return True  # FSDP1 may show a part of it, which has no shape
    if isinstance(module, _ConvNd):
        return own == "weight" and len(shape) > 2 and shape[1] > 1
    # A row or a column alone is what another parametrization keeps of a vector.
    return _NAMES.fullmatch(own) is not None and len(shape) in (2, 3) and 1 not in shape


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor; `deepspeed.zero.Init` leaves an empty one behind."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _without_blocks(found: Mapping[int, Matrix], outputs: set[int]) -> dict[int, Matrix]:
    """All are of the blocks but what is tied, and the output layer: what the model says it is, or the last."""
    # A model that tells of its output embedding has no other output layer, nor has one whose last is tied.
    last = outputs or set(list(found)[-1:])
    inner = {key for key, matrix in found.items() if not matrix.is_tied and key not in last}
    return {key: replace(matrix, in_blocks=key in inner) for key, matrix in found.items()}


def _blocks(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Beginnings of the names of what is in blocks."""
    for path, module in modules.items():
        if not isinstance(module, _CONTAINERS):
            continue
        kinds = Counter(type(member) for member in module.children())
        for name, member in module.named_children():
            repeated = kinds[type(member)] > 1 and type(member) not in _CONTAINERS
            if any(True for _ in member.children()) and (repeated or isinstance(module, nn.ModuleList)):
                yield f"{path}.{name}." if path else f"{name}."


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Embedding" in type(module).__name__


def _embeddings(modules: Mapping[str, nn.Module]) -> set[int]:
    """The weights of embeddings, by `id`."""
    return {id(p) for module in modules.values() if _is_embedding(module) for p in module.parameters(recurse=False)}


def _outputs(modules: Mapping[str, nn.Module]) -> set[int]:
    """The weights of what models of transformers call their output embeddings, by `id`."""
    found = set()
    for module in modules.values():
        told: Any = getattr(module, "get_output_embeddings", None)
        if callable(told):
            with suppress(NotImplementedError):  # which some say that have none
                found |= {id(p) for p in [getattr(told(), "weight", None)] if p is not None}
    return found


def _shapes_of_fsdp(modules: Mapping[str, nn.Module]) -> dict[int, tuple[int, ...]]:
    """Shapes of the tensors that FSDP1 has made flat and shows as parts of them, by `id`."""
    found: dict[int, tuple[int, ...]] = {}
    for module in modules.values():
        flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)
        if getattr(flat, "_params", None) is not None:  # with use_orig_params=True
            found |= {id(p): tuple(shape) for p, shape in zip(flat._params, flat._shapes, strict=True)}
    return found
