"""``gwt-dist plan``: what a run will hold on each rank, before anything is allocated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from gwt_dist import ds_json, shipped
from gwt_dist.cli.models import read_model
from gwt_dist.cli.plan_options import ANSWERS, answered, asked, batch_of, mesh_of, params_of, rest_of
from gwt_dist.formats import FP32, STATE_DTYPES
from gwt_dist.keys import PROJ_TYPES
from gwt_dist.memory import fill
from gwt_dist.memory.deepspeed import setup_of
from gwt_dist.memory.fit import LEVELS, WORLDS, Tried, size, smallest
from gwt_dist.memory.model import ModelSpec, groups_of
from gwt_dist.memory.plan import MemoryPlan
from gwt_dist.memory.report import report
from gwt_dist.memory.setup import DEVICES, ENGINES, Setup
from gwt_dist.recipes import DEFAULT, LEVEL, RECIPES, level_of, readers
from gwt_dist.report.pages import check_free, write_page
from gwt_dist.targets import BLOCKS

logger = logging.getLogger(__name__)

ENGINE = "zero2"
FORWARD = "fp32", "bf16", "fp16"
# What else one may give to have less state, shown beside other optimizers.
OTHERWISE: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8"},
    "level 3": {"level": 3},
    "level 3, int8": {"level": 3, "state_dtype": "int8"},
}
WITH_FILE = ("engine", "weights", "gradients", "offload")


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json or its folder, a name in configs/models or configs/shapes, a cached name of the "
            "Hugging Face hub, or package.module:function that returns an nn.Module."
        ),
    ],
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}, or hsdp: fsdp2 on a mesh.")] = ENGINE,
    world: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    mesh: Annotated[str, typer.Option(help="REPLICASxSHARDS for hsdp and HYBRID_SHARD, such as 8x8.")] = "",
    level: Annotated[
        int | None,
        typer.Option(help=f"Level of the matrices that match a target. [{LEVEL}, 0 where the recipe has none]"),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help=f"Part of a name, or a regular expression; once for each. [{BLOCKS}]")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(sorted(RECIPES))}.")] = DEFAULT,
    wavelet: Annotated[str, typer.Option(help="A discrete wavelet of PyWavelets.")] = "haar",
    state_dtype: Annotated[str, typer.Option(help=f"Format of moments: {', '.join(STATE_DTYPES)}.")] = FP32,
    least_level: Annotated[
        int | None,
        typer.Option(help=f"Of {readers('least_level')}: 0 for matrices of level 0 too. [1]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help=f"Of {readers('rank')}: vectors of the subspace of a matrix.")
    ] = None,
    proj_type: Annotated[
        str | None, typer.Option(help=f"Of {readers('proj_type')}: {', '.join(PROJ_TYPES)}. [{PROJ_TYPES[0]}]")
    ] = None,
    residual: Annotated[
        bool, typer.Option(help=f"Of {readers('residual')}: what the subspace leaves out goes along.")
    ] = False,
    rest: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of what matches no target, such as level=1 or recipe=energy; once for each key."),
    ] = None,
    weights: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64. [bf16 with ZeRO, else fp32]")] = "",
    gradients: Annotated[str, typer.Option(help="Dtype in which gradients are accumulated. [as the weights]")] = "",
    offload: Annotated[str, typer.Option(help="none, optimizer, weights or both.")] = "none",
    deepspeed_config: Annotated[
        Path | None, typer.Option(help="A DeepSpeed JSON, for engine, dtypes, offload and the optimizer's settings.")
    ] = None,
    use_orig_params: Annotated[bool, typer.Option(help="Of FSDP1.")] = True,
    device: Annotated[str, typer.Option(help=f"{' or '.join(DEVICES)}: in which dtype matrices travel.")] = "cuda",
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences in a forward pass of a rank.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 2048,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of a rank in a step.")] = 1,
    activations: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(FORWARD)}: dtype of weights in the forward pass, whose activations are counted as they "
            "are, in 8 bits, recomputed, and both. Takes seconds."
        ),
    ] = "",
    low_rank: Annotated[int | None, typer.Option(min=1, help="Of GaLore and APOLLO. [a quarter of the width]")] = None,
    fit: Annotated[
        str, typer.Option(help="Bytes of a device, such as 24GB: the smallest --level and --world not given that fit.")
    ] = "",
    reserve: Annotated[str, typer.Option(help="Bytes that --fit leaves for what is not counted.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with bars to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --html.")] = False,
) -> None:
    """Bytes of each rank for weights, gradients, masters and moments, and what is sent in a step. Allocates nothing."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
    if engine not in (*ENGINES, "hsdp"):
        raise ValueError(f"engine {engine!r} must be one of {', '.join(ENGINES)}, or hsdp")
    if activations and activations not in FORWARD:
        raise ValueError(f"--activations {activations!r} must be one of {', '.join(FORWARD)}")
    if activations and fit:
        raise ValueError(
            "--fit does not count --activations, so what it finds would not fit: leave --fit out once, choose what is "
            "done about activations, and give its bytes as --reserve"
        )
    spec = read_model(model)
    if html is not None:
        check_free(html, force)
    # Arguments of `param_groups`, and what is beside them.
    options: dict[str, Any] = {
        "level": level,
        "targets": target or BLOCKS,
        "wavelet": wavelet,
        "recipe": recipe,
        "limiter": None,
        "state_dtype": state_dtype,
        "least_level": least_level,
        "rank": rank,
        "proj_type": proj_type,
        "residual": residual or None,
        "rest": rest_of(rest or []),
    }
    batch = {"accumulation": accumulation, "micro_batch": micro_batch, "sequence": sequence}
    settings: dict[str, Any] | None = None
    replicas = 1
    if mesh:
        replicas, shards = mesh_of(mesh)
        if "world" in given and world != replicas * shards:
            raise ValueError(f"--mesh {mesh} has {replicas * shards} ranks and --world says {world}; leave one out")
        world = replicas * shards
        given.add("world")
    if engine == "hsdp":
        engine = "fsdp2"
        if not mesh:
            raise ValueError("hsdp needs --mesh REPLICASxSHARDS, such as --mesh 8x8")
    if deepspeed_config is not None:
        settings = ds_json.read(shipped.find(deepspeed_config) or deepspeed_config)
        both = sorted(f"--{name}" for name in given & set(WITH_FILE) - {ANSWERS[path] for path in asked(settings)})
        if both:
            raise ValueError(f"{', '.join(both)} and --deepspeed-config: the file says it already; leave one out")
        for mistake in ds_json.mistakes(settings):
            raise ValueError(f"{mistake} (in {deepspeed_config})")
        if ds_json.section_of(settings) is None and (kind := ds_json.value(settings, "optimizer.type")):
            logger.warning(
                "optimizer.type is %r in %s; planned is %s in its place", kind, deepspeed_config, ds_json.TYPE
            )
        settings = answered(settings, {**batch, "weights": weights}, given)
        base = setup_of(settings, world)
        options |= params_of(settings, given)
    else:
        zero = engine.startswith("zero")
        base = Setup(
            engine,
            world,
            replicas=replicas,
            weights=weights or ("bf16" if zero else "fp32"),
            gradients=gradients or None,
            offload=offload,
            use_orig_params=use_orig_params,
        )
    if options["level"] is None:
        options["level"] = level_of(options["recipe"])

    fixed = "world" in given or not fit
    if settings is not None and fixed:
        batch_of(settings, batch, given, world, fixed)  # what is wrong with it, before anything is planned

    def make(lv: int, ranks: int) -> MemoryPlan:
        groups = groups_of(spec, **{**options, "level": lv})
        return fill.plan(spec, groups, replace(base, world_size=ranks, device=device))

    tried: list[Tried] = []
    limit = 0
    if fit:
        levels = (options["level"],) if "level" in given or not RECIPES[options["recipe"]].is_leveled else LEVELS
        found, limit, tried = _fit(make, fit, reserve, given, levels, base)
        options["level"] = tried[-1].level
    else:
        found = make(options["level"], base.world_size)
    if found is not None:
        if settings is not None:
            batch = batch_of(settings, batch, given, found.setup.world_size, fixed)
        split = ds_json.value(settings or {}, "sequence_parallel_size", 1)
        content = _content(found, spec, options, batch, split, low_rank or options["rank"])
        if activations:
            content["activations"] = _activations(model, activations, batch, split, content["device"]["worst_rank"])
    else:
        content = {"fits": False}
    if fit:
        content["fit"] = {"limit": limit, "tried": [_tried(t) for t in tried]}
    from gwt_dist.cli import plan_show

    if html is not None and found is not None:
        write_page(html, plan_show.page(content), force=force)
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        plan_show.show(content)
        if html is not None and found is not None:
            print(f"written: {html}")
    if found is None:
        raise typer.Exit(1)


def _content(
    found: MemoryPlan, spec: ModelSpec, options: dict[str, Any], batch: dict[str, int], split: int, low_rank: int | None
) -> dict[str, Any]:
    high = groups_of(spec, 1, options["targets"])
    targeted = {name for group in high if group.level for name, _ in group.tensors}
    otherwise = []
    for name, keys in OTHERWISE.items() if targeted else ():  # a model without matrices has been told so
        if keys.get("level", LEVELS[-1] + 1) <= options["level"] or keys.get("state_dtype") == options["state_dtype"]:
            continue
        said = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in keys.items())
        with suppress(ValueError):  # what the recipe has not
            otherwise.append((name, said, groups_of(spec, **options | keys)))
    content = report(found, targeted, low_rank, batch["accumulation"], otherwise)
    content["setup"] |= {**options, **batch, "tokens": prod(batch.values()) * found.setup.world_size // split}
    return content


def _activations(model: str, dtype: str, batch: dict[str, int], split: int, device: int) -> dict[str, Any]:
    """Of a rank whose device holds `device` bytes beside them."""
    from gwt_dist.cli.activations import count  # torch

    sequences, tokens = batch["micro_batch"], -(-batch["sequence"] // split)
    measures = count(model, dtype, sequences, tokens)
    return {
        "dtype": dtype,
        "sequences": sequences,
        "tokens": tokens,
        "measures": [
            {"name": name, "kept": held.kept, "most": held.most, "device": device + held.most}
            for name, held in measures.items()
        ],
    }


def _fit(
    make: Callable[[int, int], MemoryPlan], fit: str, reserve: str, given: set[str], levels: Sequence[int], base: Setup
) -> tuple[MemoryPlan | None, int, list[Tried]]:
    limit = size(fit) - size(reserve)
    if limit <= 0:
        raise ValueError(f"--reserve {reserve} leaves nothing of --fit {fit}")
    # Ranks that all hold the same need no fewer bytes when they are more.
    fixed = "world" in given or base.engine in ("single", "ddp", "zero0")
    found, tried = smallest(make, limit, levels, (base.world_size,) if fixed else WORLDS)
    return found, limit, tried


def _tried(one: Tried) -> dict[str, Any]:
    return {"level": one.level, "world_size": one.world_size, "device": one.device, "fits": one.fits}
