"""Names and shapes of the models of transformers by arithmetic, from a ``config.json`` alone: no torch, milliseconds.

A configuration names the numbers of a *kind* (its ``model_type``), which has a function that lists the parameters in
the order of `named_parameters`. The tests hold each to the model that transformers builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gwt_dist.memory.model import ModelSpec, TensorSpec
from gwt_dist.targets import Matrix

Tensors = Iterator[TensorSpec]
MOST_LAYERS = 100_000


@dataclass(frozen=True, slots=True)
class Kind:
    """What a ``model_type`` is: the class that is meant, the numbers that it needs, and its tensors.

    `needed` are keys with their other names; `defaults` is what transformers takes for a key that is absent.
    """

    causal: str
    needed: tuple[tuple[str, ...], ...]
    tensors: Callable[[Mapping[str, Any]], Tensors]
    defaults: Mapping[str, Any]


def of_config(config: Mapping[str, Any], where: str) -> ModelSpec | None:
    """The parameters of transformers' causal language model for a ``config.json``.

    None where they are not written down here: a type that is not `KNOWN`, another class under ``architectures``, or a
    GPT-2 that attends to an encoder. Raises `ValueError` for a number that is missing or none.
    """
    kind = _KINDS.get(str(config.get("model_type", "llama")))
    if kind is None or config.get("add_cross_attention") or config.get("architectures") not in (None, [kind.causal]):
        return None
    numbers = {**kind.defaults, **config}
    for names in kind.needed:
        key = next((name for name in names if name in numbers), names[0])
        value = numbers.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} in {where} is {value!r} and must be a whole number above 0, to know the shapes")
        if names[0] in ("num_hidden_layers", "n_layer") and value > MOST_LAYERS:
            raise ValueError(f"{key}={value} in {where} is more than {MOST_LAYERS:,}")
        numbers[names[0]] = value
    return ModelSpec(where, tuple(kind.tensors(numbers)))


def _weight(module: str, shape: tuple[int, ...], unit: str) -> TensorSpec:
    """The weight of a module of a block."""
    return TensorSpec(f"{module}.weight", shape, Matrix(module, in_blocks=True), unit)


def _embedding(name: str, shape: tuple[int, ...], tied: bool) -> TensorSpec:
    """That of tokens; a weight that the head shares is the head's to `param_groups`."""
    return TensorSpec(name, shape, Matrix("lm_head", is_tied=True) if tied else None)


def _head(shape: tuple[int, ...], tied: bool) -> Tensors:
    if not tied:
        yield TensorSpec("lm_head.weight", shape, Matrix("lm_head"))


def _decoder(
    *, bias: str = "", output_bias: str = "", mlp_bias: str = "", head_norms: bool = False, experts: bool = False
) -> Callable[[Mapping[str, Any]], Tensors]:
    """LLaMA and its kin. The biases are keys of the configuration that say whether there are any, or "always"."""

    def tensors(c: Mapping[str, Any]) -> Tensors:
        def has(key: str) -> bool:
            return key == "always" or bool(key and c.get(key))

        width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        head = c.get("head_dim") or width // heads
        queries, shared = heads * head, (c.get("num_key_value_heads") or heads) * head
        attention = (
            ("q_proj", (queries, width), has(bias)),
            ("k_proj", (shared, width), has(bias)),
            ("v_proj", (shared, width), has(bias)),
            ("o_proj", (width, queries), has(output_bias)),
        )
        mlp = (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner)))
        tied, vocabulary = bool(c.get("tie_word_embeddings")), (c["vocab_size"], width)
        yield _embedding("model.embed_tokens.weight", vocabulary, tied)
        for layer in range(c["num_hidden_layers"]):
            unit = f"model.layers.{layer}"
            for name, shape, has_bias in attention:
                yield _weight(f"{unit}.self_attn.{name}", shape, unit)
                if has_bias:
                    yield TensorSpec(f"{unit}.self_attn.{name}.bias", shape[:1], None, unit)
            for name in ("q_norm", "k_norm") if head_norms else ():
                yield TensorSpec(f"{unit}.self_attn.{name}.weight", (head,), None, unit)
            if experts:
                yield from _experts(f"{unit}.mlp", c["num_local_experts"], width, inner, unit)
            for name, shape in () if experts else mlp:
                yield _weight(f"{unit}.mlp.{name}", shape, unit)
                if has(mlp_bias):
                    yield TensorSpec(f"{unit}.mlp.{name}.bias", shape[:1], None, unit)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield TensorSpec(f"{unit}.{name}.weight", (width,), None, unit)
        yield TensorSpec("model.norm.weight", (width,))
        yield from _head(vocabulary, tied)

    return tensors


def _experts(module: str, number: int, width: int, inner: int, unit: str) -> Tensors:
    """A router, and all experts in two stacks."""
    yield _weight(f"{module}.gate", (number, width), unit)
    for name, shape in (("gate_up_proj", (number, 2 * inner, width)), ("down_proj", (number, width, inner))):
        stack = f"{module}.experts.{name}"
        yield TensorSpec(stack, shape, Matrix(stack, in_blocks=True, is_stacked=True), unit)


def _gpt2(c: Mapping[str, Any]) -> Tensors:
    """Weights are [inputs, outputs], and each has a bias."""
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    tied, vocabulary = bool(c.get("tie_word_embeddings")), (c["vocab_size"], width)
    parts = (
        ("ln_1", None),
        ("attn.c_attn", (width, 3 * width)),
        ("attn.c_proj", (width, width)),
        ("ln_2", None),
        ("mlp.c_fc", (width, inner)),
        ("mlp.c_proj", (inner, width)),
    )

    def norm(module: str, unit: str = "") -> Tensors:
        for name in ("weight", "bias"):
            yield TensorSpec(f"{module}.{name}", (width,), None, unit)

    yield _embedding("transformer.wte.weight", vocabulary, tied)
    yield TensorSpec("transformer.wpe.weight", (c["n_positions"], width))
    for layer in range(c["n_layer"]):
        unit = f"transformer.h.{layer}"
        for name, shape in parts:
            if shape is None:
                yield from norm(f"{unit}.{name}", unit)
            else:
                yield _weight(f"{unit}.{name}", shape, unit)
                yield TensorSpec(f"{unit}.{name}.bias", shape[1:], None, unit)
    yield from norm("transformer.ln_f")
    yield from _head(vocabulary, tied)


_NEEDED = tuple(
    (name,) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
)
_OF_GPT2 = (
    ("n_embd", "hidden_size"),
    ("n_layer", "num_hidden_layers"),
    ("n_positions", "max_position_embeddings"),
    ("vocab_size",),
)
_KINDS = {
    "llama": Kind(
        "LlamaForCausalLM",
        _NEEDED,
        _decoder(bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
        {},
    ),
    "mistral": Kind("MistralForCausalLM", _NEEDED, _decoder(), {"num_key_value_heads": 8}),
    "qwen2": Kind("Qwen2ForCausalLM", _NEEDED, _decoder(bias="always"), {"num_key_value_heads": 32}),
    "qwen3": Kind(
        "Qwen3ForCausalLM",
        _NEEDED,
        _decoder(bias="attention_bias", output_bias="attention_bias", head_norms=True),
        {"num_key_value_heads": 32, "head_dim": 128},
    ),
    "mixtral": Kind(
        "MixtralForCausalLM",
        (*_NEEDED, ("num_local_experts", "num_experts")),
        _decoder(experts=True),
        {"num_key_value_heads": 8},
    ),
    "gpt2": Kind("GPT2LMHeadModel", _OF_GPT2, _gpt2, {"tie_word_embeddings": True}),
}
KNOWN = tuple(_KINDS)  # a configuration without "model_type" is a LLaMA's
