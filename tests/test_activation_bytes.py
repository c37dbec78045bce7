"""Activations that `plan` counts on shapes alone, beside hooks and the allocator of models that run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from activation_cases import TOKENS, Decoder, saved
from gwt_dist.activations.measure import MEASURES, held
from gwt_dist.cli.activations import count
from gwt_dist.cli.app import main
from gwt_dist.memory.model import of_module

SEQUENCES = 2
SMALL = {"vocab_size": 1000, "max_position_embeddings": 256}
FAMILIES = {
    "llama": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 3},
    # Keys and values of two heads are shared by four.
    "qwen3": {
        **{"hidden_size": 256, "intermediate_size": 500, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_hidden_layers": 2, "head_dim": 48},
    },
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {
        **{"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_hidden_layers": 2, "num_local_experts": 4, "pad_token_id": 0},
    },
}


def real(folder: Path, kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model of transformers in bf16 with numbers, and its loss; its configuration is written to the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SMALL, **FAMILIES[kind]}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16).train()
    ids = torch.randint(1, 1000, (SEQUENCES, 128))
    return model, lambda its: its(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("kind", FAMILIES)
def test_of_transformers_it_is_what_a_model_holds(tmp_path: Path, kind: str) -> None:
    """Four ways; hooks on the real model say what it saves, 5 % is what is promised, and 0.1 % is found."""
    model, loss = real(tmp_path, kind)
    counted = count(str(tmp_path), "bf16", SEQUENCES, 128)
    assert list(counted) == list(MEASURES)
    assert counted["as they are"].kept == pytest.approx(saved(model, loss), rel=1e-3)
    for name, (recomputed, in_8_bits) in MEASURES.items():
        run = held(model, loss, recomputed=recomputed, in_8_bits=in_8_bits)
        assert counted[name].kept == pytest.approx(run.kept, rel=1e-3), name
        assert counted[name].most == pytest.approx(run.most, rel=0.05), name
    of = {name: its.kept for name, its in counted.items()}
    assert of["recomputed, in 8 bits"] < of["recomputed"] < of["in 8 bits"] < of["as they are"]


def allocated(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """The most that torch's allocator had at a moment of a forward and a backward pass, above what it had before."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda its: setattr(its, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss(model).backward()
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_most_is_what_the_allocator_saw(recomputed: bool) -> None:
    ids = torch.randint(64, (4, TOKENS))
    counted = held(Decoder(), lambda its: its(ids), recomputed=recomputed).most
    assert counted == pytest.approx(allocated(Decoder(recompute=recomputed), lambda its: its(ids)), rel=0.05)


class Returns(Decoder):
    """Logits, or what nobody can make a loss of."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.change = change

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.change(self.head(x))


def asks() -> nn.Module:
    return Returns(lambda logits: logits if logits.sum() > 0 else -logits)


def pairs() -> nn.Module:
    return Returns(lambda logits: (logits, logits))


class Flat(nn.Module):
    """It has no blocks and nothing that is chosen by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, 96), nn.Linear(96, 96), nn.Linear(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)).relu())


def test_of_a_function_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    """What returns a loss, what returns logits, and what has no blocks."""
    here = [f"{__name__}:Decoder", "--target", "attn", "--target", "mlp", "--micro-batch", "3", "--sequence", "64"]
    assert main(["plan", *here, "--activations", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measures = {one["name"]: one for one in found["activations"]["measures"]}
    ids = torch.randint(64, (3, 64))
    assert measures["as they are"]["kept"] == held(Decoder(), lambda its: its(ids)).kept
    assert measures["as they are"]["device"] == found["device"]["worst_rank"] + measures["as they are"]["most"]
    assert "activations" not in found["not_counted"]
    logits, flat = (count(f"{__name__}:{name}", "fp32", 3, 64) for name in ("Returns", "Flat"))
    assert logits["as they are"].kept == measures["as they are"]["kept"]
    assert list(flat) == ["as they are"]
    # Ids, two inputs and what the loss keeps, and two numbers of the loss.
    assert flat["as they are"].kept == 3 * 64 * (8 + 4 * (96 + 96 + 64)) + 8


def chain() -> nn.Module:
    model = Decoder()
    model.blocks = nn.Sequential(*model.blocks)
    return model


def test_blocks_of_a_sequential_are_blocks() -> None:
    """What FSDP would wrap, and what is recomputed."""
    assert of_module(chain(), "it") == of_module(Decoder(), "it")
    assert {tensor.unit for tensor in of_module(chain(), "it").tensors} == {"", "blocks.0", "blocks.1"}
    found = count(f"{__name__}:chain", "fp32", 3, 64)
    assert found == count(f"{__name__}:Decoder", "fp32", 3, 64) and list(found) == list(MEASURES)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (f"{__name__}:asks", [], "its forward or backward pass raised DataDependentOutputException"),
        (f"{__name__}:pairs", [], "it returned tuple, and must return a loss, or logits"),
        ("60m", ["--fit", "24GB"], "--fit does not count --activations"),
        ("60m", ["--activations", "int8"], "--activations 'int8' must be one of fp32, bf16, fp16"),
    ],
    ids=["asks", "pairs", "fit", "dtype"],
)
def test_what_cannot_be_counted(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, "--target", "mlp", "--activations", "bf16", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
