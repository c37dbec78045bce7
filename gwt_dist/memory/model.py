"""A model as names and shapes: from a configuration by arithmetic, or from a module."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from gwt_dist.groups import Grouped
from gwt_dist.memory.state import GroupSpec
from gwt_dist.targets import Matrix, Targets, levels_by_pattern, unmatched

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# Configurations whose shapes are written down in `of_config`; a key "model_type" that is missing is a LLaMA's.
KNOWN = ("llama", "mistral", "qwen2")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    matrix: Matrix | None = None  # what a target can match
    unit: str = ""  # the block that is wrapped by itself under FSDP; "" for the rest of the model
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The parameters of a model in the order of `named_parameters`, a shared one once."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def trained(self) -> tuple[TensorSpec, ...]:
        """Those that an optimizer has."""
        return tuple(tensor for tensor in self.tensors if tensor.trained)


def groups_of(
    model: ModelSpec,
    level: int,
    targets: Targets,
    *,
    rest: Mapping[str, Any] | None = None,
    **group_options: Any,
) -> list[GroupSpec]:
    """The groups that `param_groups` makes of the model itself, with the same arguments.

    Raises `ValueError` as that does and as `GWTAdamW` does for `group_options`.
    """
    patterns = levels_by_pattern(targets, level)
    by_keys: Grouped[tuple[str, tuple[int, ...]]] = Grouped(group_options, rest or {})
    matched = [by_keys.choose((tensor.name, tensor.shape), tensor.matrix, patterns) for tensor in model.trained]
    told = unmatched(patterns, matched, [tensor.matrix for tensor in model.trained if tensor.matrix])
    if told:
        logger.warning(told)
    return [
        GroupSpec.of(keys, tuple(tensors), f"parameter group {number}")
        for number, (keys, tensors) in enumerate(by_keys.groups())
    ]


def of_config(config: Mapping[str, Any], where: str) -> ModelSpec | None:
    """The parameters of transformers' ``...ForCausalLM`` for a ``config.json``; None for a type that is not `KNOWN`.

    Raises `ValueError` for a number that is missing or none.
    """
    kind = config.get("model_type", "llama")
    if kind not in KNOWN:
        return None
    numbers = {}
    for key in NEEDED:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} in {where} is {value!r} and must be a whole number above 0, to know the shapes")
        numbers[key] = value
    if numbers["num_hidden_layers"] > 100_000:
        raise ValueError(f"num_hidden_layers={numbers['num_hidden_layers']} in {where} is more than 100,000")
    return ModelSpec(where, tuple(_decoder(kind, config, numbers)))


def _decoder(kind: str, config: Mapping[str, Any], numbers: Mapping[str, int]) -> Iterator[TensorSpec]:
    width, inner, heads = numbers["hidden_size"], numbers["intermediate_size"], numbers["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, shared = heads * head, (config.get("num_key_value_heads") or heads) * head
    bias = kind == "qwen2" or (kind == "llama" and bool(config.get("attention_bias")))
    output_bias = kind == "llama" and bias
    mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))
    linears = (
        ("self_attn.q_proj", (queries, width), bias),
        ("self_attn.k_proj", (shared, width), bias),
        ("self_attn.v_proj", (shared, width), bias),
        ("self_attn.o_proj", (width, queries), output_bias),
        ("mlp.gate_proj", (inner, width), mlp_bias),
        ("mlp.up_proj", (inner, width), mlp_bias),
        ("mlp.down_proj", (width, inner), mlp_bias),
    )
    tied = bool(config.get("tie_word_embeddings", False))
    # A weight that a Linear module shares is that module's to `param_groups` too.
    shared_head = Matrix("lm_head", is_tied=True) if tied else None
    yield TensorSpec("model.embed_tokens.weight", (numbers["vocab_size"], width), shared_head)
    for layer in range(numbers["num_hidden_layers"]):
        unit = f"model.layers.{layer}"
        for name, shape, has_bias in linears:
            yield TensorSpec(f"{unit}.{name}.weight", shape, Matrix(f"{unit}.{name}", in_blocks=True), unit)
            if has_bias:
                yield TensorSpec(f"{unit}.{name}.bias", shape[:1], None, unit)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{unit}.{name}.weight", (width,), None, unit)
    yield TensorSpec("model.norm.weight", (width,))
    if not tied:
        yield TensorSpec("lm_head.weight", (numbers["vocab_size"], width), Matrix("lm_head"))


def of_module(module: nn.Module, name: str) -> ModelSpec:
    """The parameters of a module, which may be on the meta device. Blocks are the members of its `ModuleList`s."""
    from torch import nn

    from gwt_dist.blocks import matrices_of, shape_of

    matrices = matrices_of(module)
    lists = [path for path, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    tensors = []
    for full, parameter in module.named_parameters():
        within = [path for path in lists if full.startswith(f"{path}.")]
        # The outermost list: a list within a block (experts, heads) is a part of it.
        depth = len(within[0].split(".")) + 1 if within else 0
        unit = ".".join(full.split(".")[:depth])
        matrix = matrices.get(id(parameter))
        tensors.append(TensorSpec(full, shape_of(parameter), matrix, unit, parameter.requires_grad))
    return ModelSpec(name, tuple(tensors))
