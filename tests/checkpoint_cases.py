"""What the ranks of the checkpoint tests run: the model of `zero_cases` under every engine, saved under one and loaded
under another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gwt_dist
from fsdp1_cases import wrapped
from fsdp2_cases import backward, inject, shard
from gwt_dist import CheckpointError, GWTAdamW, dtensor
from gwt_dist.checkpoint import write
from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.holdings import Run
from gwt_dist.engines.weights import clean
from zero_cases import Net, gradients, initial, load, options, settings, shapes_of, train_on
from zero_engine_cases import masters

Weights = dict[str, Tensor]
ENGINES = ("ddp", "fsdp2", "fsdp1", "fsdp1 flat", "zero1", "zero2", "zero3")
ZERO: dict[str, dict[str, Any]] = {
    "zero3": {"stage3_param_persistence_threshold": 0},
    "zero3 persistent": {"stage3_param_persistence_threshold": 100},
    "zero3 sub-groups": {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000},
    "zero2 round robin": {"round_robin_gradients": True},
    "zero2 aligned": {"parameter_alignment": True},
    "zero2 offload": {"offload_optimizer": {"device": "cpu"}},
    "zero3 offload": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
LEVEL, RECIPE, BEFORE, AFTER = 2, "paper", 2, 3
# Recipes with keys of their own, by the names that the cases have for them.
KEYS: dict[str, dict[str, Any]] = {
    "normuon": {"recipe": "orthogonal", "nor": 0.95},
    "int8": {"recipe": "energy", "state_dtype": "int8", "rounding_seed": 7},
    "bf16": {"recipe": "energy", "state_dtype": "bf16", "rounding_seed": 7},
    "low-rank": {"level": 0, "rank": 3, "update_proj_gap": 3, "residual": True},
    "orthogonal int8": {"recipe": "orthogonal", "products": "fp32", "state_dtype": "int8"},
}


class Trained:
    """A model and its GWTAdamW under one engine, in float64 where the engine carries it, and what is done with them."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, level: int = LEVEL, recipe: str = RECIPE) -> None:
        self.kind, self.dtype = kind, dtype
        settings_of_groups = options(level, recipe) | KEYS.get(recipe, {})
        if kind.startswith("fsdp1"):
            self.model: Any = wrapped("FULL_SHARD", kind == "fsdp1", dtype)
        else:
            self.model = Net()
            load(self.model, initial(shapes_of(self.model)))
            if not kind.startswith("zero"):
                self.model = self.model.to(dtype)
        if kind in ("fsdp2", "hsdp", "columns", "tensor parallel"):
            self.model = shard(self.model, "rows" if kind == "fsdp2" else kind)
        self.module = self.model
        if kind == "ddp":
            self.model = DistributedDataParallel(self.module)
        self.optimizer = GWTAdamW([p for p in self.model.parameters() if p.requires_grad], **settings_of_groups)
        if kind.startswith("fsdp1"):
            gwt_dist.attach(self.optimizer, self.model)
        if kind.startswith("zero"):
            config = settings(int(kind[4]), dtype == torch.bfloat16, **ZERO.get(kind, {}))
            if kind.endswith("fp32 accumulation"):
                config["data_types"] = {"grad_accum_dtype": "fp32"}
            self.model = gwt_dist.initialize(model=self.module, optimizer=self.optimizer, config=config)[0]

    def train(self, steps: Sequence[Weights]) -> None:
        """A step for each of these gradients, through the reduction of the engine where it has one."""
        if self.kind.startswith("zero"):
            train_on(self.model, self.module, list(steps))
            return
        for step in steps:
            self.optimizer.zero_grad()
            if self.kind == "one":
                for name, gradient in step.items():
                    self.module.get_parameter(name).grad = gradient.to(self.dtype)
            elif self.kind in ("columns", "tensor parallel"):
                inject(self.module, step)
            else:
                backward(self.model, step, "")
            self.optimizer.step()

    def weights(self) -> Weights:
        """The whole weights that the optimizer steps, by the engine's own means."""
        if self.kind.startswith("zero"):
            return masters(self.model, self.module)
        if self.kind.startswith("fsdp1"):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return {clean(n): p.detach().clone() for n, p in self.model.named_parameters()}
        return {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in self.module.named_parameters()
        }

    def computes_with(self) -> Weights:
        """The whole weights that the forward pass uses, frozen ones included."""
        if not self.kind.startswith("zero"):
            return self.weights()
        from deepspeed import zero

        parameters = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        with zero.GatheredParameters(parameters, enabled=bool(parameters)):
            return {n: p.detach().clone() for n, p in self.module.named_parameters()}

    def spoil(self) -> None:
        """Weights that no checkpoint has, so that a load which leaves something out is seen."""
        weights = Run(self.model, self.optimizer).weights
        for local in [*weights.model, *weights.copies, *weights.masters]:
            local.buffer.fill_(7)

    def save(self, path: str, step: int, **keywords: Any) -> Path:
        return gwt_dist.save(path, self.model, self.optimizer, step=step, **keywords)

    def load(self, path: str, **keywords: Any) -> Any:
        return gwt_dist.load(path, self.model, self.optimizer, **keywords)

    def close(self) -> None:
        if self.kind.startswith("zero"):
            self.model.destroy()


@cache
def uninterrupted(dtype: torch.dtype, recipe: str = RECIPE) -> Weights:
    """The weights of one process after all steps."""
    whole = Trained("one", dtype, recipe=recipe)
    whole.train(steps())
    return whole.weights()


def steps() -> list[Weights]:
    return list(gradients(shapes_of(Net()), BEFORE + AFTER))


def error_of(found: Weights, expected: Weights) -> float:
    """Largest difference, relative to how far that tensor has moved; NaN is infinitely far."""
    start = initial(shapes_of(Net()))
    errors = [
        float((found[n] - expected[n]).abs().max() / (expected[n] - start[n].to(expected[n].dtype)).abs().max())
        for n in start
    ]
    return max(error if error == error else float("inf") for error in errors)


def stale_of(trained: Trained) -> float:
    """How far the weights that the model computes with are from the rounding of those that the optimizer steps."""
    found, computes = trained.weights(), trained.computes_with()
    return max(float((computes[n].double() - w.to(computes[n].dtype).double()).abs().max()) for n, w in found.items())


def place(folder: str, kind: str, dtype: torch.dtype, world: int) -> str:
    return str(Path(folder, f"{kind} {str(dtype).removeprefix('torch.')} {world}".replace(" ", "-")))


def save_case(folder: str, kinds: Sequence[str], dtype: torch.dtype, recipe: str = RECIPE) -> dict[str, dict[str, Any]]:
    """Two steps, a checkpoint, three more: by engine, how far the weights are from one process; and whether the same
    engine, started anew from the checkpoint, comes to the same bits.
    """
    results = {}
    for kind in kinds:
        through = Trained(kind, dtype, recipe=recipe)
        through.train(steps()[:BEFORE])
        path = place(folder, kind, dtype, dist.get_world_size())
        through.save(path, BEFORE, extra={"by": kind})
        through.train(steps()[BEFORE:])
        expected, computed = through.weights(), through.computes_with()
        through.close()
        again = Trained(kind, dtype, recipe=recipe)
        again.spoil()
        loaded = again.load(path)
        again.train(steps()[BEFORE:])
        found, computes = again.weights(), again.computes_with()
        results[kind] = {
            "error": error_of(expected, uninterrupted(dtype if dtype == torch.float64 else torch.float32, recipe)),
            "differ": [n for n in expected if not torch.equal(found[n], expected[n])]
            + [n for n in computed if not torch.equal(computes[n], computed[n])],
            "loaded": (loaded.step, loaded.extra),
        }
        again.close()
    return results


def load_case(
    folder: str,
    saved: Sequence[tuple[str, torch.dtype, int]],
    kinds: Sequence[str],
    dtype: torch.dtype,
    recipe: str = RECIPE,
) -> dict[tuple[str, int, str], tuple[float, float]]:
    """Three steps under each of `kinds` from each of `saved`, which are engine, dtype and ranks: how far the weights
    are from one process, and how far those that the model computes with from their rounding.
    """
    errors = {}
    for kind in kinds:
        trained = Trained(kind, dtype, recipe=recipe)
        for by, saved_dtype, world in saved:
            if kind == "zero3 persistent":
                trained.train(steps()[:1])  # gathers these weights, so that there are copies to refresh
            trained.spoil()
            trained.load(place(folder, by, saved_dtype, world))
            stale = stale_of(trained)  # before a step refreshes what the engine computes with
            trained.train(steps()[BEFORE:])
            expected = uninterrupted(dtype if dtype == torch.float64 else torch.float32, recipe)
            errors[by, world, kind] = error_of(trained.weights(), expected), max(stale, stale_of(trained))
        trained.close()
    return errors


def one_rank_fails_case(folder: str, what: str) -> dict[str, Any]:
    """Rank 1 alone finds a damaged chunk, or its disk full: what every rank says, and what is left."""
    path = place(folder, what, torch.float32, dist.get_world_size())
    trained = Trained("fsdp2")
    trained.train(steps()[:BEFORE])
    trained.save(path, BEFORE)
    trained.train(steps()[BEFORE:])
    before = {n: p.to_local().clone() for n, p in trained.module.named_parameters()}
    states = [{k: dtensor.local(v).clone() for k, v in s.items()} for s in trained.optimizer.state.values()]
    real_verify, real_write = Reader.verify, write.write_file

    def damaged(self: Reader, stored: Any, chunk: Any, told: str) -> None:
        raise CheckpointError(f"{chunk.file} is damaged, says rank 1")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        Reader.verify, write.write_file = (damaged, real_write) if what == "load" else (real_verify, full)  # type: ignore
    message = "no error"
    try:
        if what == "load":
            trained.load(path)
        else:
            trained.save(path, BEFORE + AFTER)
    except CheckpointError as error:
        message = str(error)
    finally:
        Reader.verify, write.write_file = real_verify, real_write  # type: ignore[method-assign]
    after = {n: p.to_local() for n, p in trained.module.named_parameters()}
    now = [{k: dtensor.local(v) for k, v in s.items()} for s in trained.optimizer.state.values()]
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    changed += [k for a, b in zip(states, now, strict=True) for k in a if not torch.equal(a[k], b[k])]
    trained.load(path)  # what was there before is there still
    trained.train(steps()[BEFORE:])
    return {
        "message": message,
        "changed": changed,
        "folder": sorted(p.name for p in Path(path).iterdir()),
        "error": error_of(trained.weights(), uninterrupted(torch.float32)),
    }


def unused_case(folder: str) -> dict[str, Any]:
    """A parameter without gradients under FSDP2: as it was after loading, and refused by flat buffers."""
    path = place(folder, "unused", torch.float32, dist.get_world_size())
    trained = Trained("fsdp2")
    used = [{n: g for n, g in step.items() if n != "mlp_row.weight"} for step in steps()]
    trained.train(used[:BEFORE])
    trained.save(path, BEFORE)
    again = Trained("fsdp2")
    again.train(steps()[:1])  # a state that the checkpoint does not have
    again.load(path)
    left = again.module.mlp_row.weight in again.optimizer.state
    again.train(steps()[BEFORE:])
    trained.train(steps()[BEFORE:])
    expected, found = trained.weights(), again.weights()
    message = "no error"
    try:
        Trained("fsdp1 flat").load(path)
    except CheckpointError as error:
        message = str(error)
    return {"differ": [n for n in expected if not torch.equal(expected[n], found[n])], "left": left, "flat": message}


def random_case(folder: str, save: bool) -> tuple[bool, float, float]:
    """The next random numbers of this rank, after a save or after loading it."""
    path = place(folder, "random", torch.float32, 0)
    trained = Trained("ddp")
    torch.manual_seed(17 + dist.get_rank())
    random.seed(17 + dist.get_rank())
    restored = True
    if save:
        trained.save(path, 0)
    else:
        torch.manual_seed(5)
        random.seed(5)
        restored = trained.load(path).random_restored
    return restored, float(torch.rand(())), random.random()
