"""Which tensors are stored: every dtype and stride to the bit; sparse, quantized and others by name as errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import gwt_dist
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint import files, read_index
from gwt_dist.cli.app import main
from stored_tensors_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Holder,
    bits,
    columns_case,
    engines_case,
    everything,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def saved(folder: Path, model: nn.Module, **keywords: object) -> Path:
    trained = [p for p in model.parameters() if p.requires_grad]
    return gwt_dist.save(folder, model, GWTAdamW(trained, level=1, recipe="energy"), step=0, **keywords)


def load(folder: Path, model: nn.Module) -> None:
    gwt_dist.load(folder, model, GWTAdamW([p for p in model.parameters() if p.requires_grad], level=1, recipe="energy"))


def around(tensor: Tensor) -> Tensor:
    """The whole memory of which a tensor is a part."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


@pytest.mark.parametrize("chunk_bytes", [16 << 20, 48])
@pytest.mark.parametrize("here", LAYOUTS)
def test_every_dtype_in_every_layout(tmp_path, monkeypatch, here, chunk_bytes) -> None:
    """Saved in one and loaded in another; what lies between the elements here is not touched."""
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    layouts = list(LAYOUTS)
    by = layouts[(layouts.index(here) + (1 if chunk_bytes == 48 else 2)) % len(layouts)]
    first = Holder(everything(by, 1), buffers=chunk_bytes == 48)
    second = Holder(everything(here, 2), buffers=chunk_bytes == 48)
    stride = {name: tensor.stride() for name, tensor in second.state_dict().items()}
    memory = {name: around(tensor).clone() for name, tensor in second.state_dict().items()}
    saved(tmp_path, first)
    load(tmp_path, second)
    tensors = dict(second.named_parameters()) | dict(second.named_buffers())
    for name, tensor in [*first.named_parameters(), *first.named_buffers()]:
        assert same_bits(tensor.detach(), tensors[name].detach()), name
    assert stride == {name: tensor.stride() for name, tensor in second.state_dict().items()}
    for name, tensor in second.state_dict().items():
        memory[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
        assert same_bits(memory[name], around(tensor)), name


def test_the_files_say_what_they_hold(tmp_path) -> None:
    """By safetensors' own reader: the dtypes that it knows, and bytes for the others."""
    from torch import complex32, complex128

    model = Holder({str(dtype).removeprefix("torch."): bits((4, 6), dtype) for dtype in DTYPES})
    folder = saved(tmp_path, model)
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        for dtype in DTYPES:
            name = f"buffer_{str(dtype).removeprefix('torch.')}"
            found = file.get_tensor(f"{name}:weight:0")
            assert found.dtype == (torch.uint8 if dtype in (complex32, complex128) else dtype), name
            assert same_bits(found.view(torch.uint8), model.get_buffer(name).view(-1).view(torch.uint8)), name
    assert read_index(folder).tensors["buffer_complex128"].dtype == "C128"
    assert main(["inspect", str(folder)]) == 0


def test_a_conjugate_view(tmp_path) -> None:
    """Its memory holds other numbers than it has."""
    numbers = bits((3, 5), torch.complex64).nan_to_num()
    first, second = Holder({"a": numbers.conj()}), Holder({"a": torch.zeros_like(numbers).conj()})
    assert first.buffer_a.is_conj()
    saved(tmp_path, first)
    load(tmp_path, second)
    assert same_bits(second.buffer_a, numbers.conj())
    plain = Holder({"a": torch.zeros_like(numbers)})
    load(tmp_path, plain)
    assert same_bits(plain.buffer_a, numbers.conj())


EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t[:1].expand(4, 6),
    "columns": lambda t: t[:, :1].expand(4, 6),
    "both": lambda t: t[:1, :1].expand(4, 6),
    "windows": lambda t: t.reshape(-1).as_strided((4, 6), (2, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.complex128])
@pytest.mark.parametrize("how", EXPANDED)
def test_elements_that_share_memory(tmp_path, how, dtype) -> None:
    """They are stored each, and loaded where those that share memory here have one value; else nothing is changed."""
    first, second = (Holder({"a": EXPANDED[how](bits((4, 6), dtype, seed))}) for seed in (1, 2))
    saved(tmp_path / "shared", first)
    load(tmp_path / "shared", second)
    assert same_bits(first.buffer_a, second.buffer_a)
    assert second.buffer_a.untyped_storage().nbytes() == 24 * dtype.itemsize
    saved(tmp_path / "apart", Holder({"a": bits((4, 6), dtype, 3)}))
    weight = second.linear.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"'buffer_a' has strides \(.*\) here, so elements share memory which have"
    ):
        load(tmp_path / "apart", second)
    assert same_bits(first.buffer_a, second.buffer_a)
    assert torch.equal(weight, second.linear.weight)
    plain = Holder({"a": bits((4, 6), dtype, 4)})
    load(tmp_path / "shared", plain)
    assert same_bits(plain.buffer_a, first.buffer_a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_trained(tmp_path, layout) -> None:
    """A run whose weights lie otherwise in memory goes on to the bit, in its layout and in another."""

    def built(how: str, seed: int) -> tuple[nn.Module, GWTAdamW]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 6), nn.Conv2d(3, 4, 3), nn.LayerNorm(7))
        for parameter in model.parameters():
            parameter.data = LAYOUTS[how](parameter.data)
        return model, GWTAdamW(model.parameters(), level=2, recipe="paper")

    def train(run: tuple[nn.Module, GWTAdamW], seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in run[0].parameters():
            parameter.grad = torch.randn(parameter.shape)
        run[1].step()

    first = built(layout, 1)
    train(first, 1)
    gwt_dist.save(tmp_path, *first, step=1)
    others = [built(layout, 2), built("contiguous", 2)]
    for run in others:
        gwt_dist.load(tmp_path, *run)
    for run in (first, *others):
        train(run, 2)
    for run in others:
        for a, b in zip(first[0].parameters(), run[0].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("engine", "here"), [("ddp", "transposed"), ("fsdp2", "inside"), ("zero2", "every second")])
def test_engines(ranks, tmp_path, torch_extensions_dir, engine, here) -> None:
    assert ranks(2, engines_case, str(tmp_path), engine, "channels last", here) == [[], []]


def test_columns_whose_part_is_transposed(ranks, tmp_path) -> None:
    for errors in ranks(2, columns_case, str(tmp_path)):
        assert max(errors) < 1e-6


def test_no_dtype_becomes_another_in_silence(tmp_path) -> None:
    """Only floats of 16 bits or more are rounded into each other."""
    roundable = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    model = Holder({str(dtype).removeprefix("torch."): bits((2, 3), dtype) for dtype in DTYPES})
    saved(tmp_path, model)
    for dtype in DTYPES:
        for other in DTYPES:
            if dtype == other or {dtype, other} <= roundable:
                continue
            tensors = {str(d).removeprefix("torch."): bits((2, 3), other if d == dtype else d) for d in DTYPES}
            with pytest.raises(CheckpointError, match=r"which is no rounding"):
                load(tmp_path, Holder(tensors))


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.quint8)


class Wrapped(Tensor):
    """A tensor that is made of others, as torchao's quantized weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default
        return cls(args[0].inner)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "'buffer_a' is of layout sparse_coo and not dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "'buffer_a' is of layout sparse_csr and not dense"),
        (quantized, "'buffer_a' is torch.quint8, which checkpoints do not hold"),
        (lambda: torch.empty(3, device="meta"), "'buffer_a' is on the meta device and has no elements"),
        (lambda: Wrapped(torch.ones(3)), "'buffer_a' is a Wrapped, which is made of other tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_tensors_that_are_not_stored(tmp_path, make, message) -> None:
    """Neither saved nor, where the checkpoint has a plain one, loaded into; `exclude` is a way out."""
    model = Holder({"a": make()})
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()
    shape = tuple(model.buffer_a.shape)
    saved(tmp_path / "plain", Holder({"a": torch.ones(shape)}))
    weight = model.linear.weight.detach().clone()
    with pytest.raises(CheckpointError, match="'buffer_a' is"):
        load(tmp_path / "plain", model)
    assert torch.equal(weight, model.linear.weight)
    index = read_index(saved(tmp_path / "without", model, exclude="buffer_a"))
    assert index.excluded["buffer_a"].shape == shape
    load(tmp_path / "without", model)


def test_shapes_are_all_kinds() -> None:
    assert {len(shape) for shape in SHAPES} == {1, 2, 3, 4}
