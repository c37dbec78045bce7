"""What this machine has, which kernels would run on it, and what of a model and a configuration would be refused."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from gwt_dist import ds_json
from gwt_dist.declare import Program
from gwt_dist.engines import refusals
from gwt_dist.groups import keys_of_rest, param_groups
from gwt_dist.kernels import build, choice, cpu, triton
from gwt_dist.kernels.build import BuildError
from gwt_dist.layout import Fragment
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.piece import Piece
from gwt_dist.recipes import DEFAULT, check_group, level_of, program_of
from gwt_dist.units import units_of

REFUSED, WARNING = "refused", "warning"
# Distributions, and what they are for here.
PACKAGES = {
    "torch": "needed",
    "PyWavelets": "needed",
    "numpy": "of PyWavelets",
    "deepspeed": "ZeRO",
    "fairscale": "OSS, ShardedDataParallel, FullyShardedDataParallel",
    "transformers": "the recipe, the Trainer",
    "accelerate": "the Trainer",
    "lightning": "",
    "torchtitan": "",
    "safetensors": "checkpoints",
    "mpi4py": "ranks under mpirun",
    "triton": "kernels for GPUs",
    "ninja": "compiling",
}
PROGRAMS = {
    "mpirun": "MPI",
    "ssh": "the deepspeed launcher on several hosts",
    "pdsh": "its default runner",
    "srun": "SLURM",
    "ninja": "compiling",
    "nvidia-smi": "GPUs",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is told: `kind` is "refused" or "warning"."""

    kind: str
    text: str


def versions() -> dict[str, str | None]:
    """Of Python and of each package; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("gwt_dist", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = str(torch.__version__)  # with its build, such as +cpu
    return found


def machine() -> dict[str, str | None]:
    """Where each program is, the compiler and its cache, GPUs and MPI; None for what is not there."""
    from torch.utils import cpp_extension

    found = {name: shutil.which(name) for name in PROGRAMS}
    compiler = cpp_extension.get_cxx_compiler()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "C++ compiler": shutil.which(compiler),
        "compiled kernels in": str(build.folder()),
        "CPU": f"{os.cpu_count()} threads, {build.capability()}",
        "GPU": ", ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus) or None,
        "torch is built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone",
        "MPI backend of torch": "yes" if torch.distributed.is_mpi_available() else None,
        **found,
    }


def kernels(keys: Mapping[str, Any], dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """By kind of device: the kernel that a matrix would get in a group of these `keys`, and why.

    Raises `ValueError` for a key that is wrong.
    """
    group = {"recipe": DEFAULT, "level": level_of(keys.get("recipe")), "wavelet": "haar", **keys}
    check_group(group, "the group")
    level, wavelet = group["level"], group["wavelet"]
    program = program_of(group, level)
    found = {kind: _kernel(torch.device(kind), level, wavelet, dtype, program) for kind in ("cpu", "cuda")}
    for its in found.values() if program.travels else ():
        if its["kernel"] != "none":
            its["why"] += "; products of matrices by torch, or on some GPUs by a kernel of their own"
    return found


def _kernel(device: torch.device, level: int, wavelet: str, dtype: torch.dtype, program: Program) -> dict[str, str]:
    fragment = Fragment("the matrix", (64, 4096), 0, 64 * 4096)
    piece = Piece.of(fragment, units_of(fragment.shape, level, wavelet).moments(fragment), level, wavelet)
    forced = os.environ.get(choice.VARIABLE, "")
    if forced not in ("", *choice.NAMES):
        return {"kernel": "none", "why": f"{choice.VARIABLE}={forced!r} must be one of {choice.NAMES}: a step raises"}
    name = forced or {"cpu": "cpu", "cuda": "triton"}[device.type]
    because = f"{choice.VARIABLE} forces it" if forced else "the fastest that takes it"
    if device.type == "cuda" and not torch.cuda.is_available():
        because += "; torch finds no GPU here"
    missing = "" if name == "eager" else choice.missing_of(name, device, dtype, program, [piece])
    if missing and forced:
        return {"kernel": "none", "why": f"{choice.VARIABLE}={forced} cannot take {missing}: a step raises"}
    if missing:
        return {"kernel": "eager", "why": f"{name} cannot take {missing}"}
    problem = {"cpu": _compiles, "triton": _triton}.get(name, lambda _: "")(program)
    if problem.startswith("!"):
        return {"kernel": "none" if forced else "eager", "why": problem[1:]}
    return {"kernel": name, "why": "; ".join(part for part in (because, problem) if part)}


def _compiles(program: Program) -> str:
    """How the library for this machine comes to be; what stands in its way after a "!"."""
    if cpu.library(program).exists():
        try:
            cpu.prepare(program)
        except BuildError as error:
            return f"!{error}"
        return "compiled already"
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"!no C++ compiler ({compiler!r} is not on the PATH), so it cannot be compiled"
    if not cpp_extension.is_ninja_available():
        return "!ninja is not installed, so it cannot be compiled: pip install ninja"
    return "compiled at the first step, which takes up to a minute, once"


def _triton(program: Program) -> str:
    try:
        triton.prepare(program)
    except BuildError as error:
        # Without a GPU nothing can be asked of it; whether it is installed can.
        return f"!{error}" if torch.cuda.is_available() or "package triton" in str(error) else ""
    return ""


def examine(
    settings: dict[str, Any] | None, model: nn.Module | None, options: Mapping[str, Any] | None
) -> Iterator[Finding]:
    """What a run would refuse, by the functions that refuse it, and what is worth a warning.

    Args:
        settings: A DeepSpeed JSON as `gwt_dist.ds_json.read` reads it.
        model: The model, on the meta device.
        options: Keywords of `GWTAdamW` and ``targets`` from the command line, before those of the JSON.
    """
    chosen = dict(options or {})
    if settings is not None:
        yield from (Finding(REFUSED, reason) for reason in refusals.reasons(settings))
        yield from _autos(list(ds_json.autos(settings)))
        if any(ds_json.mistakes(settings)):
            return
        try:
            chosen = {**params_of(settings), **chosen}
        except ValueError as error:
            yield Finding(REFUSED, str(error))
            return
        kind = ds_json.value(settings, "optimizer.type")
        if kind not in (None, ds_json.TYPE):
            yield Finding(
                WARNING,
                f"optimizer.type is {kind!r}, so DeepSpeed would step with that, unless you pass a "
                f"GWTAdamW, which is then refused beside the section. Write {ds_json.TYPE!r}, or remove the section",
            )
        yield from _deepspeed_warnings(settings)
    try:
        groups = _groups(model, chosen)
        optimizer = GWTAdamW(groups)
        if model is not None:
            refusals.refuse_experts(model.named_parameters())
        refusals.refuse_groups(settings or {}, optimizer.param_groups)
    except ValueError as error:
        yield Finding(REFUSED, str(error))
        return
    if note := refusals.offload_note(settings or {}, optimizer):
        yield Finding(WARNING, note)
    yield from _group_warnings(optimizer)


def params_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer.params`` of a section that is ours, without what is "auto"; raises `ValueError` as a run does."""
    params = ds_json.section_of(settings) or {}
    autos = set(ds_json.autos({"optimizer": {"params": params}}))
    left_out = {key for key in params if any(path.startswith(f"optimizer.params.{key}") for path in autos)}
    return ds_json.checked({key: value for key, value in params.items() if key not in left_out})


def _groups(model: nn.Module | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    if model is not None:
        return param_groups(model, **options)
    matrix, other = (nn.Parameter(torch.empty(64, 4096, device="meta")) for _ in range(2))
    keys = {"level": level_of(options.get("recipe"))}
    keys |= {key: value for key, value in options.items() if key not in ("targets", "rest")}
    return [{"params": [matrix], **keys}, {"params": [other], **keys_of_rest(keys, options.get("rest") or {})}]


def _autos(paths: Sequence[str]) -> Iterator[Finding]:
    """What the Trainer fills in may stand in its JSON; nothing fills in the others."""
    filled = [path for path in paths if path in ds_json.FILLED]
    if filled:
        yield Finding(
            WARNING,
            f'"auto" is filled in by transformers\' Trainer and by Accelerate, and nothing of it is examined here; '
            f"gwt_dist.initialize refuses it: {', '.join(filled)}",
        )
    yield from (Finding(REFUSED, ds_json.why_auto(path)) for path in paths if path not in filled)


def _deepspeed_warnings(settings: Mapping[str, Any]) -> Iterator[Finding]:
    zero = settings.get("zero_optimization")
    if ds_json.value(settings, "sequence_parallel_size", 1) > 1 and "data_parallel_size" in settings:
        yield Finding(
            WARNING,
            "sequence_parallel_size beside data_parallel_size: DeepSpeed makes a device mesh of them and sums no "
            "gradient over the ranks of a sequence, unless an mpu is passed. Without one attach refuses it",
        )
    if "gradient_clipping" not in settings:
        yield Finding(WARNING, "gradient_clipping is not set, and DeepSpeed clips at 1.0 then; write what you want")
    offloads = isinstance(zero, Mapping) and zero.get("offload_optimizer")  # a section may be "auto", which is told
    if offloads and settings.get("zero_force_ds_cpu_optimizer") is not False:
        yield Finding(
            WARNING,
            "offload_optimizer without zero_force_ds_cpu_optimizer: gwt_dist.initialize sets it to false, but the "
            "Trainer and Accelerate would put DeepSpeedCPUAdam in the place of GWTAdamW, which attach then refuses. "
            'Write "zero_force_ds_cpu_optimizer": false',
        )


def _group_warnings(optimizer: GWTAdamW) -> Iterator[Finding]:
    for group in optimizer.param_groups:
        level, shapes = group["level"], [tuple(p.shape) for p in group["params"] if p.dim() >= 2]
        if not level:
            continue
        if level > choice.MAX_LEVEL:
            yield Finding(WARNING, f"level {level}: the compiled kernels end at {choice.MAX_LEVEL}, so eager steps it")
        wide = [shape for shape in shapes if prod(shape[1:]) < 1 << level]
        if wide:
            yield Finding(
                WARNING,
                f"level {level} has units of {1 << level} elements, and {len(wide)} of its {len(shapes)} matrices have "
                f"shorter rows (the first is {wide[0]}): a row is one unit there, and a higher level saves nothing",
            )
        if units_of((2, 64), level, group["wavelet"]).length == 64 != 1 << level:
            yield Finding(
                WARNING,
                f"wavelet {group['wavelet']!r}: its unit is a whole row, so eager steps it, and each row that a rank "
                f"boundary cuts is exchanged whole",
            )
