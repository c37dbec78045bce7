"""`compress_activations`: the forward pass is exact, gradients are near, and nothing depends on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activation_cases import WIDTH, Decoder, batch, engine_case, exact_case, saved, trained
from gwt_dist import compress_activations
from gwt_dist.activations.codes import GROUP, decode, decode_eager, encode, encode_eager
from gwt_dist.engines.initialize import _follow

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, Gradients]:
    model.zero_grad()
    loss = model(ids)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def off(found: Gradients, exact: Gradients) -> float:
    """Of all weights together, relative."""
    wrong = sum(float((found[n] - exact[n]).double().square().sum()) for n in exact)
    return float(wrong / sum(float(g.double().square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("recompute", [False, True])
def test_the_forward_pass_is_exact_and_gradients_are_near(recompute: bool) -> None:
    model, ids = Decoder(recompute), batch(0)
    loss, exact = gradients(model, ids)
    found = compress_activations(model)
    its_loss, near = gradients(model, ids)
    if recompute:  # the inputs of two blocks, and nothing within them
        assert found.before == 2 * ids.numel() * WIDTH * 4
    assert torch.equal(its_loss, loss)
    assert 0 < off(near, exact) < 1e-2
    found.remove()
    assert all(torch.equal(g, exact[n]) for n, g in gradients(model, ids)[1].items())


def test_rounded_by_chance_the_mean_of_gradients_is_exact() -> None:
    """Of 200 draws the mean is as near as 200 independent ones can be, and torch's own random state is untouched."""
    model, ids = Decoder(blocks=1), batch(0, 1)
    _, exact = gradients(model, ids)
    compress_activations(model, stochastic_rounding=True, seed=3)
    before = torch.get_rng_state()
    draws = [gradients(model, ids)[1] for _ in range(200)]
    assert torch.equal(torch.get_rng_state(), before)
    mean = {n: torch.stack([draw[n] for draw in draws]).mean(0) for n in exact}
    one = off(draws[0], exact)
    assert 1e-3 < one < 2e-2
    assert off(mean, exact) < 1.3 * one / 200**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [GROUP, 160, 33, 4096])
def test_a_number_is_off_by_half_a_scale_whatever_stands_beside(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(48, columns, generator=generator) * 10.0 ** torch.arange(-24, 24)[:, None] / 3).to(dtype)
    x[5], x[6], x[7] = 0.0, 1.0, -3.0  # exact, as bf16 has them
    codes = encode(x)
    # The kernel has the bits of torch's operations, both ways.
    reference = encode_eager(x)
    assert all(torch.equal(getattr(codes, name), getattr(reference, name)) for name in ("code_TC", "lo_TG", "scale_TG"))
    assert torch.equal(decode(codes, dtype), decode_eager(codes, dtype))
    its = decode(codes, torch.float32)
    scale = codes.scale_TG.float().repeat_interleave(GROUP, 1)[:, :columns]
    assert bool(((its - x.float()).abs() <= 0.51 * scale).all())
    assert torch.equal(its[5:8], x[5:8].float())
    wide = x.float()
    pieces = wide.split(GROUP, 1)
    ranges = torch.cat([(p.amax(1) - p.amin(1))[:, None] for p in pieces], 1)
    assert bool(
        (codes.scale_TG.float() <= 1.02 * ranges / 255 + 0.008 * wide.abs().amax(1, keepdim=True) / 255 + 1e-38).all()
    )
    # Tokens know nothing of each other, so ranks that have some of them have the same codes.
    parts = [encode(part) for part in x.split([1, 30, 17])]
    assert torch.equal(torch.cat([part.code_TC for part in parts]), codes.code_TC)
    assert torch.equal(torch.cat([part.lo_TG for part in parts]), codes.lo_TG)


def test_numbers_that_are_none_stay_visible() -> None:
    x = torch.randn(3, 256)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    assert (~decode(encode(x), torch.float32).isfinite()).sum(1).tolist() == [GROUP, GROUP, 0]
    assert bool(decode(encode(torch.tensor([[1.6e38, -1.6e38] * 64])), torch.float32).isfinite().all())


def test_few_tokens_are_compressed_too() -> None:
    """Whoever has a part of a batch has the codes of the whole."""
    model = nn.Sequential()
    model.add_module("mlp", nn.Linear(128, 8, bias=False))
    found = compress_activations(model, "mlp")
    model(torch.randn(1, 128)).sum().backward()
    assert (found.before, found.after) == (128 * 4, 128 + 4)


class Twice(nn.Module):
    """What two layers save is stored once, as long as nobody changes it."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.mlp_a, self.mlp_b = (nn.Linear(128, 64, bias=False) for _ in range(2))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        a = self.mlp_a(x)
        return a + self.mlp_b(x.mul_(2) if self.change else x.view(-1, 128)).view_as(a)


def test_what_is_saved_twice_is_stored_once() -> None:
    for change in (False, True):
        model = Twice(change)
        found = compress_activations(model, "mlp")
        x = torch.randn(4, 32, 128)
        model(x.clone()).sum().backward()
        assert found.before == (2 if change else 1) * 4 * 32 * 128 * 4
        exact = x.sum((0, 1)).expand(64, 128)  # what each layer had, and not what became of it
        assert off({"a": model.mlp_a.weight.grad}, {"a": exact}) < 0.02
        assert off({"b": model.mlp_b.weight.grad}, {"b": (1 + change) * exact}) < 0.02


def test_what_is_not_compressed_may_not_change() -> None:
    """Where hooks are, torch does not see it, and gradients would be wrong in silence."""

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp(x)
            z = self.head(y)
            y.add_(1)
            return z

    model = Changes()
    compress_activations(model, "mlp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation: it is at version 1 and was saved at 0"):
        model(torch.randn(4, 8)).sum().backward()


def test_memory_that_is_used_again_is_no_other_tensor() -> None:
    """Whoever has the memory of a tensor that is gone has other numbers."""
    model = nn.Sequential()
    model.add_module("mlp", nn.Linear(128, 8, bias=False))
    compress_activations(model, "mlp")
    kept = []
    for number in range(50):
        x = torch.full((64, 128), float(number))
        kept.append((number, model(x)))
        del x
    for number, y in kept:
        (gradient,) = torch.autograd.grad(y.sum(), model.mlp.weight)
        assert torch.equal(gradient, torch.full((8, 128), 64.0 * number))


def test_weights_are_left_as_they_are() -> None:
    """Under autocast too, which makes others of them: the gradient of an input is exact, as it needs weights alone."""
    model = nn.Sequential()
    model.add_module("mlp", nn.Linear(128, 256, bias=False))
    x = torch.randn(64, 128, requires_grad=True)
    for autocast in (False, True):
        found = []
        for compressed in (False, True):
            its = compress_activations(model, "mlp") if compressed else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(x)
            found.append(torch.autograd.grad(y.float().square().sum(), x)[0])
            if its is not None:
                assert its.before == x.numel() * (2 if autocast else 4)
                its.remove()
        assert torch.equal(*found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_activations_of_the_shape_of_a_weight_are_none(frozen: bool, autocast: bool) -> None:
    """A batch has as many tokens as a weight has rows, as powers of two do."""
    model = nn.Sequential()
    model.add_module("mlp", nn.Sequential(nn.Linear(128, 128, bias=False), nn.GELU(), nn.Linear(128, 128, bias=False)))
    model[0].requires_grad_(not frozen)
    its = compress_activations(model, "mlp")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.randn(2, 64, 128, requires_grad=True)).sum().backward()
    inputs = 1 if frozen else 3  # of GELU alone, or of all three
    assert its.before == inputs * 128 * 128 * (2 if autocast else 4)


def test_bytes_of_a_block() -> None:
    """Of a LLaMA's in bf16, with attention and all: at most 0.6 of what it saves without."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(torch.bfloat16)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.rotary = block, LlamaRotaryEmbedding(config)

        def forward(self, x: Tensor) -> Any:
            return self.block(x, position_embeddings=self.rotary(x, torch.arange(256)[None]))

    model, x = Alone(), torch.randn(2, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    before = saved(model, lambda its: its(x))
    found = compress_activations(model)
    model(x)
    assert (before - found.before + found.after) / before < 0.6


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, 2) for kind in ("ddp", "fsdp2", "zero1", "zero2", "zero3")), ("ddp", 3), ("fsdp2", 3)]
)
@pytest.mark.usefixtures("torch_extensions_dir")
def test_under_engines_it_is_one_process(ranks, kind: str, size: int) -> None:
    """Bit for bit; ZeRO-3 has another Linear, off by 1e-5."""
    for result in ranks(size, engine_case, kind, 2):
        assert result["off"] <= (2e-3 if kind == "zero3" else 0.0)
        assert result["bytes"][0] == result["bytes"][1] > 0


@pytest.mark.parametrize(
    ("kind", "count"), [("ddp", 3), ("fsdp2", 3), pytest.param("hsdp", 4, marks=pytest.mark.matrix)]
)
def test_ranks_that_share_a_batch_have_the_gradient_of_one_process(ranks, kind: str, count: int) -> None:
    """Bit for bit where sums are exact, accumulated before they are reduced; and it is that of codes, no other."""
    for result in ranks(count, exact_case, kind):
        assert result["same"]
        assert 1e-3 < result["off"] < 1e-2


def test_recomputed_and_with_autocast_a_run_ends_near() -> None:
    expected, _ = trained("one", 3)
    for kind, autocast in (("recomputed", False), ("one", True)):
        weights, compressed = trained(kind, 3, autocast)
        assert compressed > 0
        assert off(weights, expected) < 2e-2


def test_the_section_of_a_deepspeed_json() -> None:
    model = Decoder()
    _follow({"compress_activations": {"targets": "mlp", "stochastic_rounding": True}}, model)
    assert len(model.blocks[0].mlp._forward_pre_hooks) == 1 and not model.blocks[0].norm_1._forward_pre_hooks
    _follow({"compress_activations": False}, model)
    _follow(None, None)
    for ours, message in (
        ({"compress": True}, "section 'gwt' of the DeepSpeed JSON is .* it may have compress_activations alone"),
        ({"compress_activations": 8}, "gwt.compress_activations=8 in the DeepSpeed JSON must be true, false or"),
        ({"compress_activations": {"bit": 8}}, "unexpected keyword argument 'bit'"),
    ):
        with pytest.raises(ValueError, match=message):
            _follow(ours, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4}, "bits=4 must be 8"),
        ({"targets": "attention"}, "target 'attention' matches no module, so its activations would stay"),
        ({"targets": ["mlp", "nrom"]}, "target 'nrom' matches no module"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_activations(Decoder(), **arguments)


def test_norms_are_known_by_class_where_nobody_names_modules() -> None:
    class PreLayerNormBlock(nn.Linear):  # of a name that some models have, with modules within
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.inner = nn.Linear(64, 64)

    assert compress_activations(nn.ModuleDict({"n": PreLayerNormBlock(), "mlp": nn.GELU()})).modules == ("mlp",)
    block = nn.ModuleDict({"n1": nn.RMSNorm(64), "act": nn.GELU(), "mlp": nn.Linear(64, 64), "n2": nn.LayerNorm(64)})
    assert compress_activations(block).modules == ("n1", "mlp", "n2")
    assert compress_activations(block, ["mlp"]).modules == ("mlp",)


def test_compiled_modules_are_refused() -> None:
    model = Decoder()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.0 is compiled, and what a compiled module saves"):
        compress_activations(model)
    model = Decoder()
    compress_activations(model)
    with pytest.raises(ValueError, match="is compiled and its activations are to be compressed"):
        torch.compile(model, backend="eager")(batch(0))
