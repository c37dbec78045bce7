"""Every engine beside one process in fp64 on the CPU: one rank over NCCL, and two ranks that share a card over gloo."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator

from gpu_parts.children import Child, Stopped
from gpu_parts.engine_ranks import Case, run
from gpu_parts.setting import NO_TIME, Row, Setting
from gwt_dist.keys import KEYS

TORCH = "plain", "DDP", "FSDP2", "FSDP2 + fuse_backward", "FSDP1", "FSDP1 + fuse_backward"
DEEPSPEED = "ZeRO-1", "ZeRO-2", "ZeRO-3"
SECONDS = 45.0  # of one case, the start of its ranks included


def recipes() -> list[tuple[str, int, dict[str, str]]]:
    """Names, levels, and further keys: matrix products in fp32 too, where they are in bf16 by themselves."""
    found: list[tuple[str, int, dict[str, str]]] = [("energy", 2, {}), ("paper", 3, {}), ("orthogonal", 1, {})]
    return found + ([("orthogonal", 1, {"products": "fp32"})] if "products" in KEYS else [])


def rows(setting: Setting) -> Iterator[Row]:
    """All engines on one rank, then on two, then DeepSpeed's, whose import takes longest."""
    chosen = setting.engines or (TORCH if setting.smoke else (*TORCH, *DEEPSPEED))
    if setting.smoke and not setting.engines:
        yield {"case": ", ".join(DEEPSPEED), "note": "not in a smoke: DeepSpeed compiles for a CPU; --engines ZeRO-2"}
    if any(name in DEEPSPEED for name in chosen) and importlib.util.find_spec("deepspeed") is None:
        yield {"case": ", ".join(DEEPSPEED), "note": "deepspeed is not installed"}
        chosen = tuple(name for name in chosen if name not in DEEPSPEED)
    alone = "nccl" if setting.on_gpu else "gloo"
    for kind in (TORCH, DEEPSPEED):
        for world_size, backend in ((1, alone), (2, "gloo")):
            its = [name for name in kind if name in chosen and (name != "plain" or world_size == 1)]
            cases = [(name, *recipe) for name in its for recipe in recipes()]
            if setting.smoke:  # one recipe for each engine, for the next engine the next
                cases = [(name, *recipes()[i % len(recipes())]) for i, name in enumerate(its)]
            yield from _on_ranks(setting, world_size, backend, cases)


def _on_ranks(setting: Setting, world_size: int, backend: str, cases: list[Case]) -> Iterator[Row]:
    """One row a case. Ranks take one case after the other; after one that stops them the rest gets fresh ranks."""
    waiting = list(cases)
    while waiting:
        if setting.left() < 3:
            for case in waiting:
                yield _row(case, world_size, backend) | {"note": NO_TIME}
            return
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                Child(run, rank, world_size, backend, setting.device, waiting, folder) for rank in range(world_size)
            ]
            try:
                stopped = False
                while waiting and not stopped:
                    deadline = min(setting.deadline, time.monotonic() + SECONDS)
                    found, stopped = _together(ranks, deadline)
                    yield _row(waiting.pop(0), world_size, backend) | found
            finally:
                for rank in ranks:
                    rank.end(0.0 if stopped else 2.0)


def _row(case: Case, world_size: int, backend: str) -> Row:
    engine, recipe, level, keys = case
    further = "".join(f", {key} {value}" for key, value in keys.items())
    return {"case": engine, "ranks": world_size, "backend": backend, "recipe": f"{recipe}-{level}{further}"}


def _together(ranks: list[Child], deadline: float) -> tuple[Row, bool]:
    """What all ranks say of one case, the worst of it; and whether any of them has stopped."""
    found: Row = {}
    for number, rank in enumerate(ranks):
        try:
            row = rank.receive(deadline)
        except Stopped as error:
            return {"error": f"rank {number}: {error}"}, True
        for key, value in (row or {"error": "no row"}).items():
            if key == "ok":
                found[key] = found.get(key, True) and value
            elif isinstance(value, float):
                found[key] = max(found.get(key, 0.0), value)
            else:
                found.setdefault(key, value)
        if row is None or "case" in row:  # it has ended
            return {"error": found.get("error", "a rank ended early")}, True
    if "error" in found:
        found.pop("ok", None)
    return found, "error" in found and len(ranks) > 1  # ranks may wait for each other from here on
