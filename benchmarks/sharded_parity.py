"""Is an optimizer under a sharding engine still the same optimizer? One probe for this one and for others.

Every optimizer trains the same matrices on the same gradients in one process, and on two gloo ranks under FSDP2 and
DeepSpeed ZeRO. The gradients are injected, and both ranks bring the same, so that their average is exact: whatever
differs, the optimizer did. Prints a Markdown table of ``||delta_sharded - delta_one|| / ||delta_one||``, delta being
the change of a matrix over all steps, for the worst matrix::

    pip install --no-build-isolation 'gwt_dist[deepspeed,compare]'
    python benchmarks/sharded_parity.py --output parity.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "tests", ROOT):  # tests/ranks.py starts the ranks; the package need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gwt_dist import GWTAdamW, __version__, attach  # noqa: E402
from ranks import RankPool, RanksFailed  # noqa: E402

Build = Callable[[nn.Module], torch.optim.Optimizer]

SHAPES = ((64, 96), (66, 97), (16, 5461))  # the last is as wide as the MLP of the field's 1B LLaMA
SIZES = (1.0, 0.25, 4.0, 1.0, 2.0)  # of the gradients, step by step; powers of two, which averaging keeps exact
RANKS = 2
LR = 0.01
ENGINES = {"fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
ROUNDING = 1e-3  # a relative difference that rounding in fp32 does not explain
ABSENT = "not installed"


class Layer(nn.Linear):
    """A Linear whose input is its gradient: the loss is the sum of their products."""

    def forward(self, gradient: Tensor) -> Tensor:
        """A scalar whose derivative with respect to the weight is `gradient`, bit for bit."""
        return (self.weight * gradient).sum()


class Probe(nn.Module):
    """A layer of each shape, the same weights in every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(columns, rows, bias=False) for rows, columns in SHAPES)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A loss whose gradients are these, one a layer."""
        return torch.stack([layer(g) for layer, g in zip(self.layers, gradients, strict=True)]).sum()


class Failed(Exception):
    """What an optimizer or engine raised, told in one line."""


@dataclass
class Row:
    """What was seen of one optimizer: by engine, the relative difference or why there is none."""

    cells: dict[str, float | str] = field(default_factory=dict)
    readable: str = "-"  # "yes", or why `torch.load(weights_only=True)` does not read its state_dict


def measure(builders: Mapping[str, Build], engines: Sequence[str], steps: int, timeout: float) -> dict[str, Row]:
    """Run the probe.

    Args:
        builders: By label, what makes the optimizer of a model; a module-level function or a `partial` of one, which
            the ranks import by name.
        engines: Keys of `ENGINES`.
        steps: Number of steps.
        timeout: Seconds for one optimizer under one engine; ranks that take longer are killed.
    """
    rows: dict[str, Row] = {}
    with closing(RankPool(1)) as one, closing(RankPool(RANKS)) as several:
        if importlib.util.find_spec("deepspeed") is not None and any(e.startswith("zero") for e in engines):
            one.run(compile_op, timeout=300.0)
        for label, build in builders.items():
            row = rows[label] = Row()
            try:
                expected, row.readable = one.run(one_process, build, steps, timeout=timeout)[0]
            except RanksFailed as failure:
                row.cells = dict.fromkeys(engines, f"in one process: {reason(failure)}")
                continue
            for engine in engines:
                if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                    row.cells[engine] = ABSENT
                    continue
                try:
                    row.cells[engine] = max(several.run(sharded, build, engine, steps, expected, timeout=timeout))
                except RanksFailed as failure:
                    row.cells[engine] = reason(failure)
                print(f"{label}, {ENGINES[engine]}: {row.cells[engine]}", file=sys.stderr, flush=True)
    return rows


def reason(failure: RanksFailed) -> str:
    """What the first rank that failed says: its exception, or how its process ended."""
    raised = re.search(r"^[\w.]*Failed: (.*)$", str(failure), re.M)
    ended = re.search(r"^--- rank \d+: (.*)$", str(failure), re.M)
    found = raised or ended
    return found[1] if found else str(failure).splitlines()[0]


def compile_op() -> None:
    """Compile DeepSpeed's CPU extension where that is still to be done, once, before ranks would do it all at once."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME):
        builder.load()


def one_process(build: Build, steps: int) -> tuple[list[Tensor], str]:
    """The weights after training in this process alone, and whether the state_dict can be read again safely."""
    try:
        model = Probe()
        optimizer = build(model)
        for gradients in injected(steps):
            model(gradients).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], readable(optimizer)
    except Exception as error:
        raise Failed(first_line(error)) from None


def sharded(build: Build, engine: str, steps: int, expected: list[Tensor]) -> float:
    """How far training under an engine ends from `expected`, for the worst matrix, relative to its change."""
    start = [p.detach().clone() for p in Probe().parameters()]
    try:
        found = fsdp2(build, steps) if engine == "fsdp2" else zero(build, steps, int(engine.removeprefix("zero")))
    except Exception as error:
        raise Failed(first_line(error)) from None
    differences = [
        (f.double() - e.double()).norm() / (e.double() - s.double()).norm()
        for f, e, s in zip(found, expected, start, strict=True)
    ]
    return float(torch.stack(differences).max())  # NaN if one is, unlike Python's max


def fsdp2(build: Build, steps: int) -> list[Tensor]:
    """The whole weights after training under `fully_shard`, each layer a unit of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = Probe()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build(model)
    for gradients in injected(steps):
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters() if isinstance(p, DTensor)]


def zero(build: Build, steps: int, stage: int) -> list[Tensor]:
    """The whole weights after training in fp32 under a stage of DeepSpeed ZeRO."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # on by default
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = Probe()
    optimizer = build(model)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if isinstance(optimizer, GWTAdamW):
        attach(optimizer, engine)
    for gradients in injected(steps):
        engine.backward(engine(gradients))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        found = [p.detach().clone() for p in model.parameters()]
    engine.destroy()
    return found


def injected(steps: int) -> Iterator[list[Tensor]]:
    """The gradients of each step, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        yield [SIZES[step % len(SIZES)] * torch.randn(shape, generator=generator) for shape in SHAPES]


def readable(optimizer: torch.optim.Optimizer) -> str:
    """``"yes"`` if `torch.load(weights_only=True)` reads the state_dict, or its refusal."""
    file = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        return first_line(error)
    return "yes"


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its message, without the escapes that colour a terminal."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(chr(27) + r'[[][0-9;]*m', '', line)}".strip()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The control: elementwise, so sharding cannot change it."""
    return torch.optim.AdamW(model.parameters(), lr=LR)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """Muon of torch, with its own defaults."""
    return torch.optim.Muon(model.parameters(), lr=LR)


def gwt(model: nn.Module, recipe: str, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of this project, at level 2."""
    return GWTAdamW(model.parameters(), lr=LR, level=2, recipe=recipe, **options)


def galore(model: nn.Module, package: str, **options: Any) -> torch.optim.Optimizer:
    """GaLore of rank 4, otherwise as its documentation has it; of galore-torch or of this project."""
    kind = importlib.import_module(package).GaLoreAdamW
    group = {"params": list(model.parameters()), "rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer: torch.optim.Optimizer = kind([group | options], lr=LR)
    return optimizer


def apollo(model: nn.Module, rank: int, scale_type: str, scale: int) -> torch.optim.Optimizer:
    """APOLLO as its documentation has it."""
    from apollo_torch import APOLLOAdamW

    group = {
        "params": list(model.parameters()),
        "rank": rank,
        "proj": "random",
        "scale_type": scale_type,
        "scale": scale,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    optimizer: torch.optim.Optimizer = APOLLOAdamW([group], lr=LR)
    return optimizer


def fira(model: nn.Module) -> torch.optim.Optimizer:
    """Fira of rank 4, the rest as for GaLore."""
    from pytorch_optimizer import Fira

    parameters = list(model.parameters())
    group = {"params": parameters, "rank": 4, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
    optimizer: torch.optim.Optimizer = Fira([group], lr=LR)
    return optimizer


def came(model: nn.Module) -> torch.optim.Optimizer:
    """CAME with its own defaults."""
    from pytorch_optimizer import CAME

    optimizer: torch.optim.Optimizer = CAME(model.parameters(), lr=LR)
    return optimizer


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    """AdaFactor with its own defaults."""
    from pytorch_optimizer import AdaFactor

    optimizer: torch.optim.Optimizer = AdaFactor(model.parameters(), lr=LR)
    return optimizer


def torchao_8bit(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of torchao with states of eight bits."""
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(model.parameters(), lr=LR)
    return optimizer


def bitsandbytes_8bit(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes with states of eight bits."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(model.parameters(), lr=LR)
    return optimizer


@dataclass(frozen=True)
class Candidate:
    """An optimizer to try: its label, what makes it, and the distribution and module that must be installed."""

    label: str
    build: Build
    distribution: str = "torch"
    module: str = "torch"


CANDIDATES = {
    "adamw": Candidate("torch AdamW (control)", adamw),
    "muon": Candidate("torch Muon", muon),
    "gwt-paper": Candidate("GWTAdamW, paper", partial(gwt, recipe="paper")),
    "gwt-energy": Candidate("GWTAdamW, energy", partial(gwt, recipe="energy")),
    "gwt-orthogonal": Candidate("GWTAdamW, orthogonal", partial(gwt, recipe="orthogonal")),
    "gwt-critical": Candidate("GWTAdamW, energy, critical=3", partial(gwt, recipe="energy", critical=3)),
    "gwt-came": Candidate("GWTAdamW, came", partial(gwt, recipe="came")),
    "gwt-adalomo": Candidate("GWTAdamW, adalomo", partial(gwt, recipe="adalomo")),
    "gwt-galore": Candidate("GaLoreAdamW of gwt_dist", partial(galore, package="gwt_dist")),
    "gwt-fira": Candidate("the same with residual=True", partial(galore, package="gwt_dist", residual=True)),
    "galore": Candidate(
        "GaLore (galore-torch)", partial(galore, package="galore_torch"), "galore-torch", "galore_torch"
    ),
    "apollo": Candidate(
        "APOLLO (apollo-torch)", partial(apollo, rank=4, scale_type="channel", scale=1), "apollo-torch", "apollo_torch"
    ),
    "apollo-mini": Candidate(
        "APOLLO-Mini (apollo-torch)",
        partial(apollo, rank=1, scale_type="tensor", scale=128),
        "apollo-torch",
        "apollo_torch",
    ),
    "fira": Candidate("Fira (pytorch_optimizer)", fira, "pytorch_optimizer", "pytorch_optimizer"),
    "came": Candidate("CAME (pytorch_optimizer)", came, "pytorch_optimizer", "pytorch_optimizer"),
    "adafactor": Candidate("AdaFactor (pytorch_optimizer)", adafactor, "pytorch_optimizer", "pytorch_optimizer"),
    "torchao-8bit": Candidate("AdamW8bit (torchao)", torchao_8bit, "torchao", "torchao"),
    "bnb-8bit": Candidate("AdamW8bit (bitsandbytes)", bitsandbytes_8bit, "bitsandbytes", "bitsandbytes"),
}


def table(rows: Mapping[str, Row], engines: Sequence[str]) -> str:
    """The rows as Markdown, with the messages of what failed below."""
    notes: dict[str, int] = {}

    def failed(message: str) -> str:
        return message if message == ABSENT else f"FAIL [{notes.setdefault(message, len(notes) + 1)}]"

    def shown(cell: float | str) -> str:
        if isinstance(cell, str):
            return failed(cell)
        text = f"{cell:.1e}" if cell else "0"
        return text if cell <= ROUNDING else f"**{text}**"

    heads = ["optimizer", *(ENGINES[e] for e in engines), "`weights_only=True`"]
    lines = [heads, ["---"] * len(heads)]
    for label, row in rows.items():
        cells = [shown(row.cells[e]) for e in engines]
        lines.append([label, *cells, row.readable if row.readable in ("yes", "-", ABSENT) else failed(row.readable)])
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return text + "".join(f"\n{number}. `{message}`" for message, number in notes.items()) + "\n" * bool(notes)


def setting(candidates: Sequence[Candidate], steps: int) -> str:
    """When and with what this was run."""
    names = ["torch", "deepspeed", *sorted({c.distribution for c in candidates} - {"torch"})]
    versions = [f"Python {platform.python_version()}", f"gwt_dist {__version__}"]
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} {ABSENT}")
    today = datetime.now(timezone.utc).date()
    return (
        f"{today}; {processor()}, {os.cpu_count()} cores; {RANKS} gloo ranks of one thread; {steps} steps in fp32.\n\n"
        f"{', '.join(versions)}.\n"
    )


def processor() -> str:
    """The model of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    for option, known in (("--optimizers", CANDIDATES), ("--engines", ENGINES)):
        parser.add_argument(option, choices=known, default=list(known), help=f"some of: {', '.join(known)}", **names)
    parser.add_argument("--steps", type=int, default=5, help="steps of each run (default: 5)")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for each run (default: 180)")
    parser.add_argument("--output", type=Path, help="file for the table, which is printed as well")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.timeout <= 0:
        parser.error("--steps and --timeout must be positive")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is installed, list what is not, print and write the table."""
    options = arguments(argv)
    # DeepSpeed looks for `ninja` on the path; bitsandbytes looks for kernels on the network, which this is not about.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [CANDIDATES[name] for name in options.optimizers]
    found = {c.label: c.build for c in chosen if importlib.util.find_spec(c.module) is not None}
    rows = measure(found, options.engines, options.steps, options.timeout)
    absent = Row(dict.fromkeys(options.engines, ABSENT), ABSENT)
    rows = {c.label: rows.get(c.label, absent) for c in chosen}
    text = setting(chosen, options.steps) + "\n" + table(rows, options.engines)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import sharded_parity  # under the name by which the ranks can import what they are sent

    sharded_parity.main()
