"""How long saving and loading takes, and how many bytes it writes, beside DeepSpeed's and PyTorch's own checkpoints.

Four contenders hold the same LLaMA on the same two gloo ranks and take turns, round after round, on the same disk:
`gwt_dist.save` and `load` under ZeRO-2 and FSDP2, DeepSpeed's `save_checkpoint` under ZeRO-2 and
`torch.distributed.checkpoint` under FSDP2, the latter two with AdamW. Writes a dated Markdown table into
``benchmarks/results/``::

    make bench-checkpoints
    python benchmarks/checkpoint_time.py --model tiny --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "benchmarks", ROOT / "tests", ROOT):  # the package need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gwt_dist  # noqa: E402
from gwt_dist import GWTAdamW, dtensor, param_groups  # noqa: E402
from gwt_dist.checkpoint.holdings import Run  # noqa: E402
from ranks import RankPool, run_ranks  # noqa: E402

LEVEL = 2
CONTENDERS = {
    "gwt_dist, ZeRO-2": "GWTAdamW level 2",
    "DeepSpeed save_checkpoint, ZeRO-2": "AdamW",
    "gwt_dist, FSDP2": "GWTAdamW level 2",
    "torch.distributed.checkpoint, FSDP2": "AdamW",
}


@dataclass
class Times:
    """Seconds of every round, the slowest rank's, and bytes."""

    save: list[float] = field(default_factory=list)
    flushed: list[float] = field(default_factory=list)  # until the last byte is on the disk
    load: list[float] = field(default_factory=list)
    bytes: int = 0


class Contender:
    """A model and its optimizer under an engine after one step, and that engine's way to save and load."""

    def __init__(self, name: str, model: str, steps: int = 1) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.name = name
        torch.manual_seed(0)
        shapes = json.loads((ROOT / "configs" / "models" / f"{model}.json").read_text())
        self.model: Any = LlamaForCausalLM(LlamaConfig(**shapes, use_cache=False))
        self.vocabulary = shapes["vocab_size"]
        self.sharded = name.endswith("FSDP2")
        if self.sharded:
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        ours = CONTENDERS[name] != "AdamW"
        parameters = param_groups(self.model, level=LEVEL, recipe="energy") if ours else self.model.parameters()
        self.optimizer: Any = (GWTAdamW if ours else torch.optim.AdamW)(parameters, lr=1e-4)
        if not self.sharded:
            import deepspeed

            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "bf16": {"enabled": False},
                "zero_optimization": {"stage": 2},
            }
            start = gwt_dist.initialize if ours else deepspeed.initialize
            self.model = start(model=self.model, optimizer=self.optimizer, config=config)[0]
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """One step on a few tokens, so that there are moments."""
        tokens = torch.arange(8)[None] % self.vocabulary
        loss = self.model(input_ids=tokens, labels=tokens).loss
        if self.sharded:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.model.backward(loss)
            self.model.step()

    def save(self, path: Path) -> None:
        """Save by the contender's own means, without anything turned off or on."""
        import torch.distributed.checkpoint as dcp

        if self.name.startswith("gwt_dist"):
            gwt_dist.save(path, self.model, self.optimizer, step=1)
        elif self.name.startswith("DeepSpeed"):
            self.model.save_checkpoint(str(path), tag="here")
        else:
            dcp.save(self.content(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Put back what `save` wrote."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        if self.name.startswith("gwt_dist"):
            gwt_dist.load(path, self.model, self.optimizer)
        elif self.name.startswith("DeepSpeed"):
            self.model.load_checkpoint(str(path), tag="here")
        else:
            content = self.content()
            dcp.load(content, checkpoint_id=path)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=content["model"],
                optim_state_dict=content["optimizer"],
            )

    def content(self) -> dict[str, Any]:
        """What `torch.distributed.checkpoint` saves."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def bytes(self) -> int:
        """Of this rank: weights, masters and moments."""
        weights = Run(self.model, self.optimizer).weights
        buffers: list[Tensor] = [local.buffer for local in (*weights.model, *weights.copies, *weights.masters)]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        buffers += [dtensor.local(value) for value in states if isinstance(value, Tensor)]
        return sum(buffer.nbytes for buffer in buffers)


def times_of_rank(model: str, place: str, rounds: int) -> dict[str, Times]:
    """All contenders in turn; the first round counts for nothing."""
    warnings.simplefilter("ignore")
    contenders = [Contender(name, model) for name in CONTENDERS]
    times = {contender.name: Times() for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            one, path = times[contender.name], Path(place, "checkpoint")
            save = seconds(lambda c=contender, p=path: c.save(p))
            flush = seconds(lambda p=path: flushed(p))
            load = seconds(lambda c=contender, p=path: c.load(p))
            if number:
                one.save.append(save)
                one.flushed.append(save + flush)
                one.load.append(load)
            one.bytes = sum(p.stat().st_size for p in files(path))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(path)
                os.sync()
            dist.barrier()
    return times


def seconds(what: Callable[[], object]) -> float:
    """Of the slowest rank, from when all begin."""
    dist.barrier()
    begin = time.perf_counter()
    what()
    mine = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return float(mine)


def files(path: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (p for p in path.rglob("*") if p.is_file())


def flushed(path: Path) -> None:
    """Whoever has not flushed a file to the disk does it now."""
    if dist.get_rank() == 0:
        for file in files(path):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def memory_of_rank(model: str, name: str, place: str, save: bool) -> tuple[int, int, int]:
    """Bytes of weights before a load and of all state after it, and the most that was resident beyond what was before.

    A process of its own loads, so that no memory of others is used again in silence.
    """
    warnings.simplefilter("ignore")
    contender = Contender(name, model, steps=1 if save else 0)
    if save:
        contender.save(Path(place))
        return 0, 0, 0
    before = contender.bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    resident = status("VmRSS")
    contender.load(Path(place))
    return before, contender.bytes(), status("VmHWM") - resident


def status(key: str) -> int:
    """A number of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def table(times: dict[str, Times], memory: dict[str, float]) -> list[str]:
    """Markdown rows."""
    lines = [
        "| checkpoint | optimizer | save, s | until on the disk, s | load, s | bytes | checksums | peak on load |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, one in times.items():
        shown = [
            f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            for values in (one.save, one.flushed, one.load)
        ]
        peak = f"{memory[name]:.3f}" if name in memory else ""
        checked = "SHA-256" if name.startswith("gwt_dist") else "none"
        lines.append(f"| {name} | {CONTENDERS[name]} | {' | '.join(shown)} | {one.bytes:,} | {checked} | {peak} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    from step_time import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="130m", help="of configs/models")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument(
        "--place", type=Path, default=None, help="a folder on the disk to measure; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    now, memory = datetime.now(timezone.utc), {}
    with tempfile.TemporaryDirectory(dir=arguments.place, prefix="checkpoints-") as place:
        pool = RankPool(2)
        try:
            times = pool.run(times_of_rank, arguments.model, place, arguments.rounds, timeout=3000)[0]
        finally:
            pool.close()
        for name in CONTENDERS:
            if name.startswith("gwt_dist"):
                path = str(Path(place, name.split()[-1]))
                run_ranks(memory_of_rank, 2, arguments.model, name, path, True, timeout=600)
                found = run_ranks(memory_of_rank, 2, arguments.model, name, path, False, timeout=600)
                memory[name] = max((before + most) / after for before, after, most in found)
    lines = [
        f"# Time of a checkpoint, {now:%Y-%m-%d %H:%M} UTC",
        "",
        machine(),
        "",
        f"LLaMA-{arguments.model.upper()}, fp32, 2 ranks over gloo with one thread each, the same disk, in turn in one "
        f"run; medians of {arguments.rounds} rounds (smallest to largest). The page cache cannot be dropped here, so "
        "all loads read from memory; what counts is the work beside the disk. `until on the disk` flushes what the "
        "contender has not flushed itself: gwt_dist and torch.distributed.checkpoint flush every file, DeepSpeed none. "
        "`peak on load` is what a rank holds at most while it loads into a fresh process, divided by its own weights, "
        "masters and moments.",
        "",
        *table(times, memory),
        "",
    ]
    print("\n".join(lines), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{now:%Y-%m-%d}-checkpoints.md"
    path.write_text("\n".join(lines))
    print(f"written: {path}")


if __name__ == "__main__":
    import checkpoint_time  # the ranks import it by its name

    checkpoint_time.main()
