"""`portable`: a Trainer goes on from what another number of ranks saved, with the losses of the run that went on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from forks import Forks
from gwt_dist.integrations.portable import FOLDER
from gwt_dist.integrations.transformers import portable
from portable_cases import SAVED, SEQUENCES, STEPS, losses_case, portable_trainer
from ranks import run_ranks

# A loss of about 4 in fp32 has steps of 5e-7; one process sums in another order than two ranks.
NEAR = 2e-6
# Batches are shuffled and masks of dropout drawn from one random state, and there are no files of its optimizer.
DRAWN: dict[str, Any] = {
    "save_only_model": True,
    "dropout": 0.1,
    "accelerator_config": {"use_seedable_sampler": False},
}

ALL = pytest.mark.skipif("GWT_TEST_ALL" not in os.environ, reason="takes its time: make support has it")


@pytest.fixture(scope="module")
def forks(nothing_left_over: None) -> Iterator[Forks]:
    started = Forks("deepspeed", "transformers.trainer", "accelerate")
    yield started
    started.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A checkpoint of one process with random states that count, and the losses of its run."""
    folder = tmp_path_factory.mktemp("one")
    losses = losses_case("one", str(folder), SEQUENCES, **DRAWN)
    checkpoint = folder / f"checkpoint-{SAVED}"
    assert not (checkpoint / "optimizer.pt").exists() and (checkpoint / FOLDER / "latest").exists()
    return checkpoint, losses


def apart(losses: dict[int, float], resumed: dict[int, float]) -> float:
    """The largest difference after the checkpoint; that there is one for each step, and that they differ by step."""
    rest = range(SAVED + 1, STEPS + 1)
    assert sorted(losses) == sorted(resumed) == list(range(1, STEPS + 1))
    assert losses[rest[0]] - losses[STEPS] > 0.05
    return max(abs(losses[step] - resumed[step]) for step in rest)


@pytest.mark.support("DeepSpeed", "transformers' Trainer with `portable`, ZeRO-2 on 2 ranks resumed by 1 process")
@pytest.mark.usefixtures("torch_extensions_dir")
def test_what_two_ranks_saved_under_zero2_one_process_resumes(forks: Forks, tmp_path: Path) -> None:
    losses, others = run_ranks(losses_case, 2, "zero2", str(tmp_path), 4, forks=forks)
    assert losses == others
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    assert len(list((checkpoint / FOLDER).rglob("rank-*.safetensors"))) == 2
    resumed = losses_case("one", str(tmp_path / "on"), 4, str(checkpoint), gradient_accumulation_steps=2)
    assert apart(losses, resumed) < NEAR


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "transformers' Trainer with `portable`, between engines and numbers of ranks")
@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("zero3", 2), ("one", 1)),  # of which the Trainer has no weights that one process could load
        pytest.param(("one", 1), ("zero2", 2), marks=ALL),
        pytest.param(("fsdp2", 2), ("zero1", 4), marks=ALL),
        pytest.param(("ddp", 2), ("zero3", 2), marks=ALL),
    ],
)
def test_engines_and_ranks(forks: Forks, tmp_path: Path, first: Any, then: Any) -> None:
    runs = []
    for (engine, ranks), resume in ((first, None), (then, str(tmp_path / "run0" / f"checkpoint-{SAVED}"))):
        folder = str(tmp_path / f"run{len(runs)}")
        runs.append(run_ranks(losses_case, ranks, engine, folder, SEQUENCES // ranks, resume, forks=forks)[0])
    assert apart(*runs) < NEAR


def test_schedule_and_random_states_go_on_bit_by_bit(saved: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    checkpoint, losses = saved
    assert apart(losses, losses_case("one", str(tmp_path), SEQUENCES, str(checkpoint), **DRAWN)) == 0
    without = losses_case("one", str(tmp_path / "without"), SEQUENCES, str(checkpoint), **(DRAWN | {"dropout": 0.0}))
    assert apart(losses, without) > 1e-3  # so the masks of dropout are seen in the losses


def test_frozen_weights_may_be_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"exclude": "all-frozen", "max_steps": SAVED + 1}
    losses = losses_case("one", str(tmp_path), SEQUENCES, **options)
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    index = json.loads((checkpoint / FOLDER / f"step-{SAVED:08d}" / "index.json").read_text())
    assert "model.embed_tokens.weight" in index["excluded"]
    assert losses_case("one", str(tmp_path / "on"), SEQUENCES, str(checkpoint), **options) == losses


def test_moments_of_another_format_where_they_may_be(saved: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    checkpoint, losses = saved
    said = {**DRAWN, "state_dtype": "int8"}
    with pytest.raises(ValueError, match="convert_state=True"):
        losses_case("one", str(tmp_path), SEQUENCES, str(checkpoint), **said)
    assert (
        0
        < apart(losses, losses_case("one", str(tmp_path), SEQUENCES, str(checkpoint), convert_state=True, **said))
        < 0.1
    )


def test_what_is_no_way_to_go_on(saved: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    checkpoint, _ = saved

    def resume(folder: Path, batch: int = SEQUENCES, **changed: Any) -> None:
        portable_trainer("one", str(tmp_path / "on"), batch, **changed).train(resume_from_checkpoint=str(folder))

    with pytest.raises(ValueError, match="saved by a run of 8 sequences a step, and here are 4: skipping its 5 steps"):
        resume(checkpoint, 4)
    resume(checkpoint, 4, ignore_data_skip=True, max_steps=SAVED + 1)

    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns(FOLDER))
    with pytest.raises(ValueError, match=r"bare has no folder 'gwt_dist': it was saved without portable"):
        resume(bare)

    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    state = json.loads((mixed / "trainer_state.json").read_text())
    (mixed / "trainer_state.json").write_text(json.dumps(state | {"global_step": 6}))
    with pytest.raises(ValueError, match=r"after 5 steps and trainer_state.json beside it says 6"):
        resume(mixed)

    index = next((mixed / FOLDER).rglob("index.json"))
    index.write_text(index.read_text().replace("random", "nodmar"))
    with pytest.raises(ValueError, match=r"index\.json"):  # damage stays damage, in words of its own
        resume(mixed)


def test_other_trainers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear of transformers 5\S* has no save_model, _prepare_for_training"):
        portable(nn.Linear(2, 2))


def test_twice_is_once(tmp_path: Path) -> None:
    trainer = portable_trainer("one", str(tmp_path), 4)
    before = trainer.save_model
    assert portable(trainer) is trainer
    assert trainer.save_model == before
    trainer.save_model(str(tmp_path / "model"))  # the model alone, before there is an optimizer
    assert not (tmp_path / "model" / FOLDER).exists()
