"""Checkpoints of version 1, which the code of commit 8685465 wrote: they load to the bit, and go on as the newest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.fsdp import fully_shard

import gwt_dist
from checkpoint_runs import Run
from gwt_dist.checkpoint import find, read_index
from gwt_dist.checkpoint.format import VERSION
from gwt_dist.cli.app import main
from trajectories import content, trained
from zero_cases import settings

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

DATA = Path(__file__).parent / "data" / "checkpoints"
# ZeRO-2 with bf16 weights on two ranks, FSDP2 on three; the others are of one process.
RECIPES = {"paper": "paper", "energy": "energy", "orthogonal": "orthogonal", "zero-2": "paper", "fsdp2": "orthogonal"}


def path_of(name: str) -> Path:
    return DATA / f"version-1-{name}"


def differ(name: str, run: Run) -> list[str]:
    """What is not, to the bit, what was there when it was saved."""
    with np.load(f"{path_of(name)}.npz") as expected:
        found = {key: value.numpy() for key, value in content(*run).items()}
        assert found.keys() == set(expected.files)
        return [key for key in found if found[key].tobytes() != expected[key].tobytes()]


@pytest.mark.parametrize("name", RECIPES)
def test_version_1(tmp_path, capsys, name) -> None:
    run = trained(RECIPES[name], 0)
    loaded = gwt_dist.load(path_of(name), *run)
    assert loaded.extra == {"recipe": RECIPES[name]}
    assert differ(name, run) == []
    folder = gwt_dist.save(tmp_path, *run, step=loaded.step)
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == VERSION
    assert index["tensors"]["attn.bias"]["fields"] == {
        "exp_avg": {"extent": "unit", "format": "fp32"},
        "exp_avg_sq": {"extent": "unit", "format": "fp32"},
        "limited_norm": {"extent": "tensor", "format": "fp32"},
    }
    again = trained(RECIPES[name], 0)
    gwt_dist.load(tmp_path, *again)
    assert differ(name, again) == []
    old, new = (_told(capsys, path) for path in (path_of(name), tmp_path))
    assert [one["recipe"] for one in old] == [RECIPES[name] if one["level"] else None for one in old]
    for one, other in zip(old, new, strict=True):
        state = run[1].state[run[0].get_parameter(one["name"])]
        moments = {key: value.nbytes for key, value in state.items() if value.numel() > 1}
        assert one["state_bytes"] == other["state_bytes"] == moments
        assert (one["level"], one["step"]) == (other["level"], other["step"]) == (other["level"], loaded.step)


def _told(capsys: pytest.CaptureFixture[str], path: Path) -> list[dict]:
    assert main(["inspect", "--json", str(path)]) == 0
    return sorted(json.loads(capsys.readouterr().out)["tensors"], key=lambda one: str(one["name"]))


def test_both_versions_say_the_same_of_one_run(tmp_path) -> None:
    """The entries that are parsed, files and checksums included."""
    run = trained("paper", 0)
    gwt_dist.load(path_of("paper"), *run)
    folder = gwt_dist.save(tmp_path, *run, step=7, random_states=False)
    old, new = (read_index(where).tensors for where in (find(path_of("paper"), "latest")[0], folder))
    for name, entry in new.items():
        one, other = (
            {kind: [c.sha256 for c in part.chunks] for kind, part in e.parts.items()} for e in (old[name], entry)
        )
        assert one == other
        assert (old[name].fields, old[name].numbers) == (entry.fields, entry.numbers)
        assert entry.numbers["limited_norm"] == run[1].state[run[0].get_parameter(name)]["limited_norm"].item()


def road_case(name: str, folder: str, zero: bool) -> None:
    """A checkpoint of version 1 into an engine on these ranks, and saved from there."""
    model, optimizer = trained(RECIPES[name], 0)
    engine = model
    if zero:
        engine = gwt_dist.initialize(model=model, optimizer=optimizer, config=settings(2))[0]
    else:
        names = dict(model.named_parameters())
        fully_shard(model)
        places = {id(p): n for n, p in names.items()}
        groups = [
            dict(g, params=[model.get_parameter(places[id(p)]) for p in g["params"]]) for g in optimizer.param_groups
        ]
        optimizer = gwt_dist.GWTAdamW(groups)
    gwt_dist.load(path_of(name), engine, optimizer)
    gwt_dist.save(folder, engine, optimizer, step=3)
    if zero:
        engine.destroy()


@pytest.mark.support("checkpoints", "of format version 1: ZeRO-2 to FSDP2 and back, 2 and 3 ranks")
@pytest.mark.parametrize(("name", "world", "zero"), [("zero-2", 3, False), ("fsdp2", 2, True)])
def test_version_1_into_another_engine(ranks, tmp_path, name, world, zero) -> None:
    ranks(world, road_case, name, str(tmp_path), zero, timeout=120)
    run = trained(RECIPES[name], 0)
    gwt_dist.load(tmp_path, *run)
    assert differ(name, run) == []
