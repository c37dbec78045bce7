"""What targets choose in models of many families: by default the matrices of blocks, whatever they are called."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gwt_dist import memory, param_groups
from gwt_dist.cli.models import read_model
from gwt_dist.memory.model import groups_of, of_module

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {**BASE, "num_key_value_heads": 2, "moe_intermediate_size": 32, "head_dim": 16}
# model_type, class, configuration; and the share of all weights that has a level, in %, and of the matrices that are
# no embedding, no head and not tied. In these small models embeddings weigh more than in those that are trained.
FAMILIES: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "gpt2": ("GPT2LMHeadModel", GPT, 71.8, 100.0),
    "llama": ("LlamaForCausalLM", BASE, 55.4, 100.0),
    "qwen3": ("Qwen3ForCausalLM", {**BASE, "num_key_value_heads": 2, "head_dim": 16}, 52.8, 100.0),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": 4}, 53.0, 100.0),
    "mixtral": ("MixtralForCausalLM", {**BASE, "num_key_value_heads": 2, "num_local_experts": 4}, 77.1, 100.0),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{**MOE, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
            **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        },
        60.5,
        100.0,
    ),
    "phi3": ("Phi3ForCausalLM", {**BASE, "num_key_value_heads": 2, "pad_token_id": 0}, 52.8, 100.0),
    "gemma": ("GemmaForCausalLM", {**BASE, "num_key_value_heads": 1, "head_dim": 16}, 67.8, 100.0),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, 59.4, 100.0),
    "gpt_neox": ("GPTNeoXForCausalLM", BASE, 49.4, 100.0),
    "opt": (
        "OPTForCausalLM",
        {**BASE, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
        63.0,
        100.0,
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}, 73.9, 100.0),
    "bert": ("BertForMaskedLM", {**BASE, "max_position_embeddings": 64}, 60.2, 94.1),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        82.9,
        100.0,
    ),
    "mamba": ("MambaForCausalLM", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}, 60.5, 93.5),
    "vit": ("ViTForImageClassification", {**BASE, "image_size": 32, "patch_size": 4, "num_labels": 10}, 87.3, 95.5),
}


def built(family: str) -> nn.Module:
    import transformers

    kind, settings, *_ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind)(config)
    return model


def chosen(model: nn.Module, **options: Any) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, 2, **options)
    return {names[id(p)] for group in groups if group["level"] for p in group["params"]}


def numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def embeddings_of(model: nn.Module) -> set[int]:
    """Weights of embeddings and of heads, by `id`."""
    heads = [model.get_output_embeddings(), getattr(model, "classifier", None)]  # type: ignore[operator]
    found = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [head for head in heads if head is not None]
    return {id(module.weight) for module in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers(family: str) -> None:
    model, (_, _, of_all, of_matrices) = built(family), FAMILIES[family]
    own, embeddings = dict(model.named_parameters()), embeddings_of(model)
    found = chosen(model)
    leveled = numel(own[name] for name in found)
    assert not [name for name in found if id(own[name]) in embeddings or own[name].dim() < 2]
    matrices = [p for p in own.values() if p.dim() > 1 and min(p.shape) > 1 and id(p) not in embeddings]
    share = 100 * leveled / numel(matrices), 100 * leveled / numel(own.values())
    assert share[0] > 85
    assert (round(share[1], 1), round(share[0], 1)) == (of_all, of_matrices)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(1, width))
        self.attention = Attention(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class VisionTransformer(nn.Module):
    """As timm has it: blocks in a Sequential, positions and a token as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 10)


class Layered(nn.Module):
    """An encoder of torch's, with an embedding and a head that may share a weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        self.lstm, self.lm_head = nn.LSTM(8, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


class Stacked(nn.Module):
    """A block whose experts are stacked, and what is nearly as large and no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))
        self.experts.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 16))
        self.token_weight = nn.Parameter(torch.zeros(1, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))


def layers(*parts: str) -> set[str]:
    return {f"layers.{i}.{part}" for i in range(2) for part in parts}


def mixture() -> nn.Module:
    model = nn.Module()
    model.layers, model.head = nn.ModuleList([Stacked(), Stacked()]), nn.Linear(8, 8)
    return model


class Residual(nn.Module):
    """A block of convolutions, of which one has a kernel for each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.wide = nn.Conv2d(8, 8, 1)


def convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *layers, nn.Flatten(), nn.Linear(8, 4))


def tied() -> nn.Module:
    """Without blocks; the head, which is the last, has the weight of the embedding."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 9)})
    model["head"].weight = model["embed"].weight
    return model


class Told(nn.Module):
    """A language model without blocks that tells of its head, which is not its last module."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embed, self.body = nn.Linear(8, 9), nn.Embedding(9, 8), nn.LSTM(8, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def one_layer() -> nn.Module:
    """Of which a part shares the weight of an embedding that is in the block too."""
    model, block = nn.Module(), Block(8)
    block.attention = nn.ModuleDict({"embed": nn.Embedding(9, 8), "logits": nn.Linear(8, 9, bias=False)})
    block.attention["logits"].weight = block.attention["embed"].weight
    model.stem, model.layers, model.head = nn.Linear(8, 8), nn.ModuleList([block]), nn.Linear(8, 9)
    return model


ENCODER = "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
VIT = "attention.qkv.weight", "attention.proj.weight", "ffn.0.weight", "ffn.2.weight"
HAND_WRITTEN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "vision transformer": (VisionTransformer, {name.replace("layers", "blocks") for name in layers(*VIT)}),
    "encoder": (lambda: Layered(False), {f"encoder.{name}" for name in layers(*ENCODER)}),
    "encoder, tied": (lambda: Layered(True), {f"encoder.{name}" for name in layers(*ENCODER)}),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        {"0.weight", "2.weight"},
    ),
    "perceptron in parts": (
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))),
        {"0.0.weight", "1.0.weight"},
    ),
    "convolutions": (lambda: convolutions(nn.Conv2d(8, 8, 3)), {"0.weight", "2.weight"}),
    "blocks of convolutions": (lambda: convolutions(Residual(), Residual()), {"2.wide.weight", "3.wide.weight"}),
    "one layer": (one_layer, {"layers.0.ffn.0.weight", "layers.0.ffn.2.weight"}),
    "a head that is told": (Told, {"body.weight_ih_l0", "body.weight_hh_l0"}),
    "tied": (tied, {"body.weight"}),
    "recurrent": (
        lambda: nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 8), nn.Linear(8, 9)),
        {"1.weight_ih_l0", "1.weight_hh_l0"},
    ),
    "mixture": (mixture, layers("gate.weight", "experts.gate_up_proj")),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_models_of_other_kinds(name: str) -> None:
    build, expected = HAND_WRITTEN[name]
    model = build()
    assert chosen(model) == expected
    spec = of_module(model, name)
    assert {n for g in groups_of(spec, 2, "blocks") if g.level for n, _ in g.tensors} == expected


def test_experts_are_stacked_in_a_group_of_their_own() -> None:
    model = mixture()
    groups = param_groups(model, targets=["experts", "gate"], level=2)
    assert [(g["level"], g.get("stacked"), [p.dim() for p in g["params"]]) for g in groups[:2]] == [
        (2, None, [2, 2]),
        (2, True, [3, 3]),
    ]
    assert chosen(model, targets=r".*experts\.gate_up_proj") == layers("experts.gate_up_proj")


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "vit", "llama"])
def test_a_plan_makes_the_same_choice(family: str, tmp_path: Path) -> None:
    """LLaMA's by arithmetic, the others of modules that transformers builds."""
    kind, settings, *_ = FAMILIES[family]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": family, "architectures": [kind], **settings}))
    model = built(family)
    for options in ({"targets": "blocks"}, {"targets": "all-linear"}):
        expected = memory.specs(model.named_parameters(), param_groups(model, 2, **options))
        assert groups_of(read_model(str(file)), 2, **options) == expected


def test_explicit_targets_reach_every_matrix_by_name() -> None:
    gpt2 = built("gpt2")
    assert chosen(gpt2, targets="c_attn") == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    assert chosen(gpt2, targets=["attn", "mlp"]) == chosen(gpt2) == chosen(gpt2, targets="all-linear")
    assert chosen(gpt2, targets="lm_head") == {"transformer.wte.weight"}, "by its own name, as who asks for it means"
    llama = built("llama")
    assert chosen(llama, targets=["attn", "mlp"]) == chosen(llama)
    assert chosen(llama, targets="all-linear") == chosen(llama) | {"lm_head.weight"}
    assert chosen(convolutions(), targets="all-linear") == {"3.weight"}, "a kernel is matched by its own name"
    assert chosen(convolutions(), targets="0") == {"0.weight"}
    assert chosen(Layered(False), targets={"blocks": 1, "lm_head": 2}) > {"lm_head.weight"}
    assert chosen(llama, targets=r".*\.1\.mlp\.up_proj\.weight") == {"model.layers.1.mlp.up_proj.weight"}
    assert chosen(llama, targets={"attn": 1, "mlp": 2, "blocks": 1}) == chosen(llama), "what is left may be nothing"


def test_a_pattern_that_leaves_out_leaves_out() -> None:
    """The name with ``.weight`` is for patterns that end so."""
    llama = built("llama")
    assert chosen(llama, targets=r"(?!lm_head$).*") == chosen(llama)
    with pytest.raises(ValueError, match="target 'weight' matches no weight matrix"):
        chosen(llama, targets="weight")
    with pytest.raises(ValueError, match=r"target 'blocks' comes too late: .* is taken by 'all-linear'"):
        chosen(llama, targets={"all-linear": 1, "blocks": 2})


def test_the_first_target_that_matches_decides() -> None:
    mixtral = built("mixtral")
    routers = {name for name in chosen(mixtral) if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    assert chosen(mixtral, targets={r".*mlp\.gate": 0, "blocks": 1}) == chosen(mixtral) - routers
    for choose in (lambda t: chosen(mixtral, targets=t), lambda t: groups_of(of_module(mixtral, ""), 2, t)):
        with pytest.raises(
            ValueError, match=r"'gate' comes too late: .*'model.layers.1.mlp.experts.gate_up_proj' is taken by 'mlp'"
        ):
            choose({"mlp": 2, "attn": 1, "gate": 0})


def test_a_default_that_matches_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    for choose in (lambda: chosen(model), lambda: groups_of(of_module(model, ""), 2, "blocks")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gwt_dist"):
            choose()
        (record,) = caplog.records
        assert "no weight has a level by the target 'blocks'" in record.getMessage()
