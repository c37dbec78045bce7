"""Optimizers of a study that come as no package: each against its formula in float64, what it holds, and its entry."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gwt_dist.study.bare import class_in
from gwt_dist.study.entries import _adamw
from gwt_dist.study.held import bytes_held
from gwt_dist.study.optimizers import build, options_of
from gwt_dist.study.peers.foam import FOAM
from gwt_dist.study.peers.matrices import RMNP, Muon, NorMuon
from gwt_dist.study.peers.momentum import BLOCK, dequantized, quantized, refresh
from gwt_dist.study.peers.scale import SCALE, parts

SHAPES = (7, 12), (33, 10)  # wide and tall, no multiples of anything
LR, STEPS = 0.02, 4
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def drawn(shape: tuple[int, ...], seed: int, steps: int = STEPS) -> tuple[Tensor, list[Tensor]]:
    """A weight and gradients whose rows and columns are of several sizes. Sums of halves of them are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([2.0 ** (i % 3) for i in range(shape[0])])[:, None]
    numbers = (torch.randint(-512, 512, (steps, *shape), generator=generator) + 0.5) / 256
    return torch.randn(shape, generator=generator), list(numbers * sizes)


def trained(make: Make, weight: Tensor, gradients: list[Tensor]) -> tuple[np.ndarray, torch.optim.Optimizer]:
    """The weight after all steps, and the optimizer."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().numpy(), optimizer


def polar(u: np.ndarray) -> np.ndarray:
    """What torch.optim.Muon makes of a matrix: the change of zeros in a step at rate 1 without momentum."""
    parameter = nn.Parameter(torch.zeros(u.shape))
    parameter.grad = torch.from_numpy(u).float()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    factor = math.sqrt(max(1.0, u.shape[0] / u.shape[1]))
    return -parameter.detach().double().numpy() / factor


def momenta(gradients: list[Tensor], beta: float, nesterov: bool) -> list[np.ndarray]:
    """The momentum that each step takes, in float64."""
    m, found = np.zeros(gradients[0].shape), []
    for g in (gradient.double().numpy() for gradient in gradients):
        m = beta * m + (1 - beta) * g
        found.append((1 - beta) * g + beta * m if nesterov else m)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_fp32_has_the_bits_of_torch(shape: tuple[int, int], adjust: str, nesterov: bool) -> None:
    weight, gradients = drawn(shape, 0)
    options: Any = {"lr": LR, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, "adjust_lr_fn": adjust}
    ours, _ = trained(lambda those: Muon(those, **options), weight, gradients)
    theirs, _ = trained(lambda those: torch.optim.Muon(those, **options), weight, gradients)
    assert np.array_equal(ours, theirs) and not np.array_equal(ours, weight.numpy())


@pytest.mark.parametrize("shape", [(7, 12), (33, 70)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_muon_takes_the_momentum_before_it_is_rounded(shape: tuple[int, int], dtype: str) -> None:
    weight, gradients = drawn(shape, 1)
    m, w, wanted = np.zeros(shape), weight.double().numpy(), []
    for g in (gradient.double().numpy() for gradient in gradients):
        m = 0.75 * m + 0.25 * g
        wanted.append(m)
        u = 0.25 * g + 0.75 * m
        w = w * (1 - LR * 0.1) - LR * 0.2 * math.sqrt(max(shape)) * polar(u)
        if dtype == "bf16":
            m = torch.from_numpy(m).to(torch.bfloat16).double().numpy()
        else:
            blocks = [m.reshape(-1)[i : i + 2048] for i in range(0, m.size, 2048)]
            scales = [np.abs(block).max() for block in blocks]
            codes = [np.rint(127 * block / scale) for block, scale in zip(blocks, scales, strict=True)]
            kept = [scale * code / 127 for scale, code in zip(scales, codes, strict=True)]
            m = np.concatenate(kept).reshape(shape)
    state: dict[str, Any] = {}
    for gradient, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(refresh(state, gradient, 0.75, dtype), expected, rtol=1e-5, atol=1e-6)
    kept_now = state["momentum"].float() if dtype == "bf16" else dequantized(state["codes"], state["scales"])
    np.testing.assert_allclose(kept_now, m, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted[-1] - m).max() > 1e-3  # rounding is seen
    ours, _ = trained(
        lambda those: Muon(those, LR, weight_decay=0.1, momentum=0.75, momentum_dtype=dtype), weight, gradients
    )
    # An element of u that is rounded to bf16 the other way moves those of its row and column by a hundredth.
    np.testing.assert_allclose(ours, w, atol=0.01 * LR * 0.2 * math.sqrt(max(shape)))


def test_codes_of_a_block() -> None:
    x = torch.zeros(3 * BLOCK + 5)
    x[:BLOCK] = torch.linspace(-1, 1, BLOCK)
    x[2 * BLOCK] = -300.0
    x[-1] = 0.25
    codes, scales = quantized(x)
    assert scales.tolist() == [1.0, 0.0, 300.0, 0.25] and codes.shape == x.shape
    assert codes.untyped_storage().nbytes() == x.numel()  # padding is not kept alive
    assert (codes[0], codes[BLOCK - 1], codes[2 * BLOCK], codes[-1]) == (-127, 127, -127, 127)
    back = dequantized(codes, scales)
    assert (back - x)[:BLOCK].abs().max() <= 0.5 / 127 + 1e-6 and torch.equal(back[BLOCK:], x[BLOCK:])
    x[BLOCK] = math.nan  # a run that diverges is not mended
    assert dequantized(*quantized(x)).isnan().sum() == BLOCK


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_normuon(shape: tuple[int, int], adjust: str) -> None:
    weight, gradients = drawn(shape, 2)
    w, rows = weight.double().numpy(), np.zeros((shape[0], 1))
    for u in momenta(gradients, 0.5, nesterov=True):
        o = polar(u)
        rows = 0.9 * rows + 0.1 * (o**2).mean(1, keepdims=True)
        p = o / (np.sqrt(rows) + 1e-8)
        size = math.sqrt(max(1, shape[0] / shape[1])) * np.linalg.norm(o)
        size = size if adjust == "original" else 0.2 * math.sqrt(o.size)
        w = w * (1 - LR * 0.1) - LR * size * p / np.linalg.norm(p)
    options: Any = {"weight_decay": 0.1, "momentum": 0.5, "beta2": 0.9, "adjust_lr_fn": adjust}
    ours, _ = trained(lambda those: NorMuon(those, LR, **options), weight, gradients)
    np.testing.assert_allclose(ours, w, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_rmnp(shape: tuple[int, int], nesterov: bool) -> None:
    weight, gradients = drawn(shape, 3)
    gradients[0][2] = 0.0  # a row without a momentum stays
    w = weight.double().numpy()
    for u in momenta(gradients, 0.95, nesterov):
        lengths = np.linalg.norm(u, axis=1, keepdims=True)
        step = math.sqrt(max(1, shape[0] / shape[1])) * u / np.where(lengths, lengths, 1)
        w = w * (1 - LR * 0.1) - LR * step
    ours, _ = trained(lambda those: RMNP(those, LR, weight_decay=0.1, nesterov=nesterov), weight, gradients)
    np.testing.assert_allclose(ours, w, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("part", "axis", "mu"), [(0, 1, 0.0), (1, 0, 0.0), (2, 1, 0.9)])
def test_scale(shape: tuple[int, int], part: int, axis: int, mu: float) -> None:
    """Of a matrix and of the head rows are of one size, of an embedding columns; the head alone has a momentum."""
    weight, gradients = drawn(shape, 4)
    w = weight.double().numpy()
    for m in momenta(gradients, mu, nesterov=False):
        w = w * (1 - LR * 0.1) - LR * m / np.sqrt((m**2).mean(axis, keepdims=True))
    given: list[list[nn.Parameter]] = [[], [], []]

    def make(those: list[nn.Parameter]) -> torch.optim.Optimizer:
        given[part] = those
        return SCALE(*given, LR, momentum=0.9, weight_decay=0.1)

    ours, optimizer = trained(make, weight, gradients)
    np.testing.assert_allclose(ours, w, atol=2e-6)
    assert bytes_held([vars(optimizer)], given[part]) == (weight.numel() * 4 if mu else 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("second", "correct"), [("energy", True), ("approximation", False)])
def test_foam(shape: tuple[int, int], second: str, correct: bool) -> None:
    weight, gradients = drawn(shape, 5)
    w, wide = weight.double().numpy(), -(-shape[1] // 4) * 4
    m, v = np.zeros((shape[0], wide // 4)), np.zeros((shape[0], wide // 4))
    for t, gradient in enumerate(gradients, start=1):
        g = np.zeros((shape[0], wide))
        g[:, : shape[1]] = gradient.double().numpy()
        units = g.reshape(shape[0], -1, 4)
        mean = units.mean(-1)
        m = 0.8 * m + 0.2 * mean
        v = 0.9 * v + 0.1 * ((units**2).mean(-1) if second == "energy" else mean**2)
        r = g - mean.repeat(4, axis=1)
        u = (m.repeat(4, axis=1) + r) / (np.sqrt(v.repeat(4, axis=1) + r**2) + 1e-3)
        c = math.sqrt(1 - 0.9**t) / (1 - 0.8**t) if correct else 1.0
        w = (w - LR * 0.25 * c * u[:, : shape[1]]) * (1 - LR * 0.1)
    options: Any = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    options |= {"second_moment": second, "correct_bias": correct}
    ours, optimizer = trained(lambda those: FOAM(those, LR, **options), weight, gradients)
    np.testing.assert_allclose(ours, w, atol=2e-6)
    assert bytes_held([vars(optimizer)], []) == 8 * m.size


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("muon", 4 * 2310),
        ("muon-bf16", 2 * 2310),
        ("muon-8bit", 2310 + 4 * 2),
        ("normuon", 4 * 2310 + 4 * 33),
        ("rmnp", 4 * 2310),
        ("scale", 0),
        ("foam", 8 * 33 * 18),
    ],
)
def test_entries(name: str, held: int) -> None:
    """Bytes of a matrix 33 x 70, all parameters with their rates, and the options of AdamW for the rest."""
    torch.manual_seed(0)
    layers = {"embed_tokens": nn.Embedding(9, 70), "attn": nn.Linear(70, 33, bias=False), "norm": nn.LayerNorm(33)}
    model = nn.ModuleDict({**layers, "lm_head": nn.Linear(33, 9, bias=False)})
    given = {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.1}
    optimizers = build(name, model, 0.01, 0.03, options_of(name, given, "a row"))
    rates = {id(p): (g["lr"], g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]}
    like_matrices = ("attn", "embed", "lm_head") if name == "scale" else ("attn",)
    for key, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.01 if key.startswith(like_matrices) else 0.03, 0.1), key
        parameter.grad = torch.randn_like(parameter)
    adam = optimizers[1].param_groups[0]
    assert isinstance(optimizers[1], torch.optim.AdamW) and (adam["betas"], adam["eps"]) == ((0.8, 0.9), 1e-5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    of_matrix = [o.state[model["attn"].weight] for o in optimizers if model["attn"].weight in o.state]
    assert bytes_held(of_matrix, model.parameters()) == held


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("muon-8bit", {"momentum_dtype": "fp8"}, "momentum_dtype='fp8' must be one of fp32, bf16, int8"),
        ("normuon", {"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms' must be one of original, match_rms_adamw"),
        ("muon-bf16", {"ns_steps": 0}, "ns_steps=0 must be at least 1"),
        ("foam", {"level": 0}, "level=0 must be a whole number, at least 1"),
        ("foam", {"second_moment": "none"}, "second_moment='none' must be one of energy, approximation"),
        ("rmnp", {"beta2": 0.9}, "beta2"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_of(name, options, "a row")


def test_what_a_formula_is_not_for() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"RMNP got a parameter of shape \(3,\)"):
        RMNP([matrix, vector], 0.1)
    with pytest.raises(ValueError, match=r"proj of shape .* has neither of the names"):
        parts({"proj": matrix, "lm_head": matrix}, "embed", "lm_head")
    with pytest.raises(ValueError, match=r"no name has 'lm_head' in it.* untie the head"):
        parts({"embed": matrix, "norm": vector}, "embed", "lm_head")


def test_adamw_is_fused_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: asked.append(options["fused"]))
    for where in ((True, True), (False, False), (True, False)):
        _adamw([{"params": [SimpleNamespace(is_cuda=its)]} for its in where], 0.1)
    assert asked == [True, None, None]


def test_a_class_without_what_its_package_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with_heavy_init"
    folder.mkdir()
    (folder / "__init__.py").write_text("import bitsandbytes\n")
    (folder / "shared.py").write_text("NUMBER = 7\n")
    (folder / "light.py").write_text("from .shared import NUMBER\nclass Light:\n    number = NUMBER\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # is not there
    with pytest.raises(ImportError):
        importlib.import_module("with_heavy_init")
    assert class_in("with_heavy_init", "light", "Light").number == 7
    assert "with_heavy_init" not in sys.modules  # who imports all of it later gets all of it
    with pytest.raises(ImportError, match="light has no 'Heavy': another version"):
        class_in("with_heavy_init", "light", "Heavy")
    with pytest.raises(ModuleNotFoundError, match="No package named 'no_such_package_at_all'"):
        class_in("no_such_package_at_all", "light", "Light")


@pytest.mark.parametrize(
    ("name", "package"),
    [("galore", "galore_torch"), ("apollo", "apollo_torch"), ("fira", "pytorch_optimizer")],
)
def test_packages_that_know_bitsandbytes(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(33, 40)})
    (optimizer,) = build(name, model, 0.01, 0.02, options_of(name, {"weight_decay": 0.1}, "a row"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
