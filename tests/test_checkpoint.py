"""Checkpoints of one process: the format, what is refused, and every kind of damage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import gwt_dist
from gwt_dist import CheckpointError, Fragment, GWTAdamW, LayoutError, param_groups
from gwt_dist.checkpoint import checkpoints, files, read_index
from gwt_dist.layout import Overlap
from zero_cases import Net, gradients, initial, load, options, shapes_of

Run = tuple[nn.Module, GWTAdamW]


def built(level: int = 2, recipe: str = "paper", wavelet: str = "haar", model: nn.Module | None = None) -> Run:
    model = model or Net()
    load(model, initial(shapes_of(model)))
    return model, GWTAdamW(param_groups(model, targets=["attn", "mlp"], **options(level, recipe, wavelet)))


def train(run: Run, steps: list[dict[str, Tensor]]) -> None:
    for step in steps:
        for name, gradient in step.items():
            run[0].get_parameter(name).grad = gradient.clone()
        run[1].step()


def steps() -> list[dict[str, Tensor]]:
    return list(gradients(shapes_of(Net()), 5))


def content(run: Run) -> list[Tensor]:
    """Everything that a load changes."""
    states = [value for state in run[1].state.values() for value in state.values()]
    return [t.clone() for t in [*run[0].state_dict().values(), *states]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoint of two steps."""
    run = built()
    train(run, steps()[:2])
    gwt_dist.save(tmp_path / "run", *run, step=2, extra={"tokens": 7})
    return tmp_path / "run"


# --- intervals


@st.composite
def fragments(draw: st.DrawFn, shape: tuple[int, ...]) -> Fragment:
    """Any interval of a tensor, or the same interval of several of its rows, at some offset of a buffer."""
    rows, columns = shape[0], prod(shape[1:])
    if draw(st.booleans()):
        first, last = sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        low, high = sorted(draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
        if first < last and low < high:
            start = first * columns + low
            return Fragment("t", shape, start, start + high - low, draw(st.integers(0, 5)), last - first)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    return Fragment("t", shape, start, stop, draw(st.integers(0, 5)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Fragment, Fragment]:
    shape = draw(st.sampled_from([(5, 7), (1, 9), (6, 1), (3, 2, 4), (4, 5)]))
    return draw(fragments(shape)), draw(fragments(shape))


def elements(fragment: Fragment) -> dict[int, int]:
    """Element of the tensor -> its place in the buffer."""
    held = [element for low, high in fragment.intervals for element in range(low, high)]
    return {element: fragment.offset + i for i, element in enumerate(held)}


@given(pairs())
def test_an_intersection_is_what_both_hold(pair: tuple[Fragment, Fragment]) -> None:
    a, b = pair
    mine, others = elements(a), elements(b)
    found = []
    for o in a.intersect(b):
        assert o.rows > 0 and o.columns > 0
        for row in range(o.rows):
            for i in range(o.columns):
                found.append((o.source + row * o.source_stride + i, o.destination + row * o.destination_stride + i))
    assert sorted(found) == sorted((mine[e], others[e]) for e in mine.keys() & others.keys())
    assert len(a.intersect(b)) <= 3


def test_fragments_of_other_shapes_have_no_intersection() -> None:
    with pytest.raises(LayoutError, match="have the shapes"):
        Fragment("t", (2, 3), 0, 6).intersect(Fragment("t", (3, 2), 0, 6))


@given(pairs(), st.integers(1, 40))
def test_pieces_make_up_a_fragment(pair: tuple[Fragment, Fragment], most: int) -> None:
    whole = pair[0]
    before, files.PIECE_BYTES = files.PIECE_BYTES, 4 * most
    try:
        pieces = list(files.split(whole, 4))
    finally:
        files.PIECE_BYTES = before
    found = [element for piece in pieces for element in elements(piece)]
    assert found == list(elements(whole))
    assert all(piece.numel <= max(most, whole.stop - whole.start if whole.rows > 1 else 0) for piece in pieces)


# --- there and back


@pytest.mark.parametrize("recipe", ["paper", "energy"])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_the_run_goes_on_to_the_bit(tmp_path, recipe, wavelet) -> None:
    run = built(3, recipe, wavelet)
    train(run, steps()[:2])
    gwt_dist.save(tmp_path, *run, step=2, extra={"text": "ä", "list": [1, 2.5, None]})
    again = built(3, recipe, wavelet)
    loaded = gwt_dist.load(tmp_path, *again)
    assert (loaded.step, loaded.extra) == (2, {"text": "ä", "list": [1, 2.5, None]})
    assert same(content(run), content(again))
    train(run, steps()[2:])
    train(again, steps()[2:])
    assert same(content(run), content(again))


def test_before_the_first_step(tmp_path) -> None:
    run = built()
    gwt_dist.save(tmp_path, *run, step=0)
    again = built()
    train(again, steps()[:1])
    gwt_dist.load(tmp_path, *again)
    assert not again[1].state
    assert same(content(again), content(run))


def test_small_pieces(saved, tmp_path, monkeypatch) -> None:
    """Tensors in many pieces are the tensors in one."""
    run = built()
    gwt_dist.load(saved, *run)
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    gwt_dist.save(tmp_path / "small", *run, step=2)
    again = built()
    folder = gwt_dist.load(tmp_path / "small", *again).folder
    assert len(read_index(folder).tensors["mlp_down.weight"].parts["weight"].pieces) == -(-16 * 5461 // 250)
    assert same(content(run), content(again))


def test_buffers_frozen_and_wrapped(tmp_path) -> None:
    """Buffers of any dtype, frozen weights, and names without what torch.compile puts into them."""

    def model() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        net[2].weight.requires_grad_(False)
        net.register_buffer("left_out", torch.zeros(3), persistent=False)
        return net

    torch.manual_seed(1)
    first = model()
    optimizer = GWTAdamW([p for p in first.parameters() if p.requires_grad])
    first(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    folder = gwt_dist.save(tmp_path, torch.compile(first, backend="eager"), optimizer, step=1)
    index = read_index(folder)
    assert index.tensors["1.num_batches_tracked"].dtype == "I64"
    assert "left_out" not in index.tensors
    second = model()
    again = GWTAdamW([p for p in second.parameters() if p.requires_grad])
    gwt_dist.load(tmp_path, second, again)
    assert same(content((first, optimizer)), content((second, again)))
    assert int(second[1].num_batches_tracked) == 1


def test_options_and_schedule(tmp_path) -> None:
    run = built()
    run[1].param_groups[0]["weight_decay"] = 0.125
    schedule = torch.optim.lr_scheduler.ExponentialLR(run[1], 0.5)
    train(run, steps()[:1])
    schedule.step()
    gwt_dist.save(tmp_path, *run, step=1, scheduler=schedule)
    again = built()
    other = torch.optim.lr_scheduler.ExponentialLR(again[1], 0.9)
    gwt_dist.load(tmp_path, *again, scheduler=other)
    assert [g["lr"] for g in again[1].param_groups] == [0.005, 0.005]
    assert again[1].param_groups[0]["weight_decay"] == 0.125
    assert again[1].param_groups[0]["betas"] == (0.9, 0.999)
    train(again, steps()[1:2])
    other.step()
    assert [g["lr"] for g in again[1].param_groups] == [0.0025, 0.0025]


def test_a_tensor_learning_rate_stays_a_tensor(saved) -> None:
    model = Net()
    rate = torch.tensor(0.7)
    optimizer = GWTAdamW(param_groups(model, targets=["attn", "mlp"], **{**options(2, "paper"), "lr": rate}))
    gwt_dist.load(saved, model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)


def test_bf16_weights_without_masters(saved) -> None:
    """Masters are rounded into bf16 weights; moments stay in fp32."""
    run, low = built(), built(model=Net().bfloat16())
    gwt_dist.load(saved, *run)
    gwt_dist.load(saved, *low)
    for (name, weight), rounded in zip(run[0].named_parameters(), low[0].parameters(), strict=True):
        assert torch.equal(weight.bfloat16(), rounded), name
    states = [value for state in run[1].state.values() for value in state.values()]
    assert same(states, [value for state in low[1].state.values() for value in state.values()])


def test_the_files_are_safetensors_with_checksums(saved) -> None:
    folder = saved / "step-00000002"
    for line, root in (((saved / "latest").read_text(), saved), ((folder / "index.json.sha256").read_text(), folder)):
        sha256, name = line.split()
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == sha256
    index, tensors = read_index(folder), load_file(folder / "rank-00000.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "index.json.sha256", "rank-00000.safetensors"]
    run = built()
    gwt_dist.load(saved, *run)
    for name, weight in run[0].named_parameters():
        assert torch.equal(tensors.pop(f"{name}:weight:0").view(weight.shape), weight)
        for kind in ("exp_avg", "exp_avg_sq") if weight.requires_grad else ():
            assert torch.equal(tensors.pop(f"{name}:{kind}:0"), run[1].state[weight][kind].view(-1))
    assert sorted(tensors) == ["random:0:python:0", "random:0:torch:0"]
    stored = sum(part.bytes for _, part in index.stored())
    assert stored + index.files["rank-00000.safetensors"].header_bytes == index.files["rank-00000.safetensors"].bytes


# --- folders


def test_latest_keep_and_what_is_never_overwritten(tmp_path) -> None:
    run = built()
    for step in (1, 2, 3, 4):
        train(run, steps()[:1])
        gwt_dist.save(tmp_path, *run, step=step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert gwt_dist.load(tmp_path, *built()).step == 4
    assert gwt_dist.load(tmp_path, *built(), which=3).step == 3
    assert gwt_dist.load(tmp_path, *built(), which="step-00000003").step == 3
    with pytest.raises(CheckpointError, match="step-00000004 exists, and nothing in it is overwritten"):
        gwt_dist.save(tmp_path, *run, step=4)
    with pytest.raises(CheckpointError, match=r"step-00000001.*checkpoints there: step-00000003, step-00000004"):
        gwt_dist.load(tmp_path, *built(), which=1)
    with pytest.raises(CheckpointError, match="neither 'latest', a step, nor"):
        gwt_dist.load(tmp_path, *built(), which="../step-00000003")
    with pytest.raises(CheckpointError, match="there is no checkpoint that was saved to the end"):
        gwt_dist.load(tmp_path / "elsewhere", *built())


def test_what_dead_saves_leave(saved) -> None:
    """Files half written are never read and then cleared; a checkpoint without `latest` is replaced."""
    run = built()
    gwt_dist.load(saved, *run)
    (saved / ".step-00000003.saving").mkdir()
    (saved / ".step-00000003.saving" / "rank-00000.safetensors").write_bytes(b"half")
    shutil.copytree(saved / "step-00000002", saved / "step-00000004")  # killed before `latest` was moved
    assert gwt_dist.load(saved, *built()).step == 2
    gwt_dist.save(saved, *run, step=3)
    gwt_dist.save(saved, *run, step=4)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", *(f"step-0000000{i}" for i in (2, 3, 4))]
    assert gwt_dist.load(saved, *built()).step == 4


def test_nothing_is_left_of_a_save_that_fails(saved) -> None:
    run = built()
    with pytest.raises(CheckpointError, match=r"the index cannot be written as JSON.*set"):
        gwt_dist.save(saved, *run, step=3, extra={1, 2})
    with pytest.raises(CheckpointError, match="JSON"):
        gwt_dist.save(saved, *run, step=3, extra=float("nan"))
    run[1].param_groups[1]["mine"] = object()
    with pytest.raises(CheckpointError, match="option 'mine' of parameter group 1 cannot be written as JSON"):
        gwt_dist.save(saved, *run, step=3)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", "step-00000002"]


# --- what does not fit


def wider(model: nn.Module) -> nn.Module:
    model.extra = nn.Linear(3, 3)
    return model


def reshaped() -> nn.Module:
    model = Net()
    model.mlp_thin = type(model.mlp_thin)(3, 9)
    return model


MISFITS: dict[str, tuple[Callable[[], Run], str]] = {
    "level": (lambda: built(3), r"'attn_q.weight' has level=2, wavelet='haar' in .* and level=3"),
    "wavelet": (lambda: built(wavelet="db2"), r"wavelet='haar' in .* and level=2, wavelet='db2' in this optimizer"),
    "recipe": (lambda: built(recipe="energy"), r"second_moment='approximation' \(recipe 'paper'\)"),
    "more": (
        lambda: built(model=wider(Net())),
        r"does not have extra.bias, extra.weight: the checkpoint is of another",
    ),
    "shape": (
        lambda: built(model=reshaped()),
        r"'mlp_thin.weight' has shape \(9, 3\) in .* and \(3, 9\) in this model",
    ),
    "frozen": (
        lambda: (m := Net(), GWTAdamW([m.attn_q.weight])),
        r"has moments of 'embed.weight', which this optimizer",
    ),
    "another model": (lambda: (Net(), GWTAdamW(Net().parameters())), "is none of the model's as it is now"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(saved, case) -> None:
    build, message = MISFITS[case]
    run = build()
    before = content(run)
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(saved, *run)
    assert same(before, content(run))


def test_groups_that_were_apart_are_not_joined(tmp_path) -> None:
    run = built(0)
    half = list(run[0].parameters())[:3]
    apart = [{"params": half, "lr": 0.5}, {"params": [p for p in run[0].parameters() if p.requires_grad][3:]}]
    gwt_dist.save(tmp_path, run[0], GWTAdamW(apart, level=0), step=0)
    with pytest.raises(CheckpointError, match=r"had lr of their own in .*, and here they are in one parameter group"):
        gwt_dist.load(tmp_path, *built(0))


# --- damage


def refused(path: Path, run: Run, before: list[Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        gwt_dist.load(path, *run)
    assert same(before, content(run)), "half of it was loaded"
    return str(caught.value)


def test_every_flipped_bit_is_found(saved) -> None:
    run = built()
    train(run, steps()[2:4])
    before, generator = content(run), random.Random(3)
    files_of = [saved / "latest", *sorted((saved / "step-00000002").iterdir())]
    assert len(files_of) == 4
    for path in files_of:
        original = path.read_bytes()
        # Half of them at the start, where the header of a file is; the data is longer than it by far.
        for length in [8 * min(len(original), 2600)] * 40 + [8 * len(original)] * 40:
            bit = generator.randrange(length)
            damaged = bytearray(original)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert path.name.removesuffix(".sha256") in refused(saved, run, before), bit
        path.write_bytes(original)
    assert gwt_dist.load(saved, *run).step == 2


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "index.json.sha256"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long", "link", "folder", "pipe"])
def test_files_that_are_not_what_was_written(saved, tmp_path, name, how) -> None:
    run = built()
    before, path = content(run), saved / "step-00000002" / name
    original = path.read_bytes()
    path.unlink()
    if how == "link":
        (tmp_path / "elsewhere").write_bytes(original)
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes({"empty": b"", "short": original[:-1], "long": original + b"\0"}[how])
    assert name in refused(saved, run, before)


def test_a_file_of_another_run(saved, tmp_path) -> None:
    """The same layout, so the same header; other numbers."""
    run = built()
    train(run, steps()[2:4])
    gwt_dist.save(tmp_path / "other", *run, step=2)
    name = "step-00000002/rank-00000.safetensors"
    shutil.copy(tmp_path / "other" / name, saved / name)
    assert "rank-00000.safetensors is damaged: bytes" in refused(saved, run, content(run))


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another index with checksums that are right: what someone could write who means harm."""
    folder = path / "step-00000002"
    index = json.loads((folder / "index.json").read_text())
    changed = change(index)
    text = json.dumps(index if changed is None else changed).encode() if not isinstance(changed, bytes) else changed
    sha256 = hashlib.sha256(text).hexdigest()
    (folder / "index.json").write_bytes(text)
    (folder / "index.json.sha256").write_text(f"{sha256}  index.json\n")
    (path / "latest").write_text(f"{sha256}  step-00000002/index.json\n")


def renamed(to: str) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        text = json.dumps(index).replace("rank-00000.safetensors", to)
        index.clear()
        index.update(json.loads(text))

    return change


def piece_of(index: dict[str, Any], kind: str = "weight") -> dict[str, Any]:
    return index["tensors"]["attn_q.weight"]["parts"][kind]["pieces"][0]


def void(_: object) -> None:
    """Nothing, of whatever a change returns."""


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda i: i.update(version=2), "has the format version 2 and this gwt_dist reads 1"),
    "another format": (lambda i: i.update(format="x"), "is not the index of a checkpoint"),
    "a list": (lambda i: [1], "is not the index of a checkpoint"),
    "not JSON": (lambda i: b"{", "is not JSON"),
    "deep": (lambda i: b"[" * 200000, "is not JSON"),
    "NaN": (lambda i: i.update(extra=float("nan")), "holds NaN"),
    "unknown key": (lambda i: i.update(more=1), "the index should have the keys"),
    "up": (renamed("../step-00000002/rank-00000.safetensors"), "is no plain file name"),
    "absolute": (renamed("/etc/passwd"), "is no plain file name"),
    "hidden": (renamed(".."), "is no plain file name"),
    "not there": (renamed("rank-00001.safetensors"), "rank-00001.safetensors is missing"),
    "huge": (lambda i: i["files"]["rank-00000.safetensors"].update(bytes=1 << 50), "and the file 58"),
    "shape": (lambda i: i["tensors"]["attn_q.weight"].update(shape=[1 << 40, 1 << 40]), "is no shape of a tensor"),
    "beyond": (lambda i: piece_of(i).update(offset=1 << 40), "do not lie in its data"),
    "header": (lambda i: piece_of(i).update(offset=0), "do not lie in its data"),
    "rows": (lambda i: piece_of(i).update(rows=1 << 40, stop=0), "do not lie in its data"),
    "twice": (
        lambda i: i["tensors"]["attn_q.weight"]["parts"]["weight"]["pieces"].append(piece_of(i)),
        "do not lie in its data|do not make up the tensor",
    ),
    "gap": (lambda i: piece_of(i).update(start=1), "do not make up the tensor"),
    "negative": (lambda i: piece_of(i).update(start=-1), "is no number of things"),
    "boolean": (lambda i: piece_of(i).update(start=True), "is a bool"),
    "checksum": (lambda i: piece_of(i).update(sha256="0" * 64), "rank-00000.safetensors is damaged"),
    "dtype": (lambda i: i["tensors"]["attn_q.weight"].update(dtype="F128"), "dtype is 'F128'"),
    "state": (
        lambda i: void(i["tensors"]["attn_q.weight"]["parts"].pop("exp_avg")),
        r"parts are \['exp_avg_sq', 'weight'\]",
    ),
    "group": (lambda i: i["tensors"]["attn_q.weight"].update(group=9), "group is 9, of 2"),
    "option": (lambda i: i["groups"][0].update(lr="1"), "lr='1' in a parameter group"),
    "params": (lambda i: i["groups"][0].update(params=[]), "hold params"),
    "moments": (
        lambda i: i["tensors"]["attn_q.weight"]["parts"].update(
            exp_avg=i["tensors"]["attn_q.weight"]["parts"]["weight"]
        ),
        "do not lie in its data|exp_avg of 'attn_q.weight' has shape",
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_index_is_refused(saved, case) -> None:
    change, message = FORGERIES[case]
    forge(saved, change)
    run = built()
    before = content(run)
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(saved, *run)
    assert same(before, content(run))


def test_a_forged_index_that_is_right_loads(saved) -> None:
    """What `forge` does is not what is refused."""
    forge(saved, lambda index: index.update(extra=5))
    assert gwt_dist.load(saved, *built()).extra == 5


# --- memory


def test_memory_of_save_and_load(tmp_path, monkeypatch) -> None:
    """No more than a piece beside the state itself, counted by the allocations of torch and of Python."""
    monkeypatch.setattr(files, "PIECE_BYTES", 1 << 18)
    model = nn.Linear(512, 4096, bias=False)
    optimizer = GWTAdamW(model.parameters(), level=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = 4096 * 512 * (4 + 2 * 2)  # weights, and both moments of half their length
    saving = peak(lambda: gwt_dist.save(tmp_path, model, optimizer, step=1))
    again = nn.Linear(512, 4096, bias=False)
    other = GWTAdamW(again.parameters(), level=1)
    loading = peak(lambda: gwt_dist.load(tmp_path, again, other))
    moments = state // 2
    assert saving <= 0.1 * state
    assert moments <= loading <= moments + 0.1 * state  # the weights were there before
    assert same(content((model, optimizer)), content((again, other)))


def peak(what: Callable[[], Any]) -> int:
    """Most bytes held at once beyond those before: of Python objects and of CPU tensors."""
    held, most = 0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        what()
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most + python


def test_overlaps_are_plain_numbers() -> None:
    assert Fragment("t", (4, 6), 2, 20).intersect(Fragment("t", (4, 6), 1, 4, 0, 4)) == (
        Overlap(1, 2, 0, 6, 1, 3),
        Overlap(2, 3, 5, 6, 3, 3),
        Overlap(1, 1, 17, 6, 9, 3),
    )
