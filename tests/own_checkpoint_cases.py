"""What the ranks of `test_own_checkpoints.py` run: the checkpoints of the engines themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from checkpoint_cases import AFTER, BEFORE, Trained, error_of, steps, uninterrupted


def dcp_case(folder: str, load: str, save: str, first: int, last: int) -> float:
    """Steps `first` to `last` in float64 under FSDP2, between two checkpoints of torch.distributed.checkpoint."""
    trained = Trained("fsdp2", torch.float64)
    if load:
        # On a fresh optimizer this makes torch step with gradients of zero.
        model, optimizer = get_state_dict(trained.model, trained.optimizer)
        content = {"model": model, "optimizer": optimizer}
        dcp.load(content, checkpoint_id=Path(folder, load))
        set_state_dict(
            trained.model,
            trained.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
        )
    trained.train(steps()[first:last])
    if save:
        model, optimizer = get_state_dict(trained.model, trained.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=Path(folder, save))
    if last < BEFORE + AFTER:
        return 0.0
    return error_of(trained.weights(), uninterrupted(torch.float64))


def fake_step_case() -> dict[str, Any]:
    """What `get_optimizer_state_dict` leaves in a fresh optimizer."""
    trained = Trained("fsdp2", torch.float64)
    before = trained.weights()
    get_optimizer_state_dict(trained.model, trained.optimizer)
    after = trained.weights()
    states = trained.optimizer.state.values()
    local = [s.to_local() if isinstance(s, DTensor) else s for state in states for k, s in state.items() if k != "step"]
    return {
        "moved": [n for n in before if not torch.equal(before[n], after[n])],
        "largest": max(float(s.abs().max()) for s in local if s.numel()),
        "steps": {float(state["step"]) for state in states},
        "lr": [group["lr"] for group in trained.optimizer.param_groups],
    }


def weights_only_case(folder: str, kind: str) -> list[str]:
    """Types of what `torch.load(weights_only=True)` reads of the state of a rank, put into a new optimizer."""
    trained = Trained(kind)
    trained.train(steps()[:BEFORE])
    path = Path(folder, f"{kind}-{dist.get_rank()}")
    torch.save(trained.optimizer.state_dict(), path)
    content = torch.load(path, weights_only=True)
    again = Trained(kind)
    again.optimizer.load_state_dict(content)
    with torch.no_grad():
        for mine, other in zip(again.model.parameters(), trained.model.parameters(), strict=True):
            mine.copy_(other)
    again.train(steps()[BEFORE:])
    assert error_of(again.weights(), uninterrupted(torch.float32)) < 1e-6
    kinds = {type(value).__name__ for state in content["state"].values() for value in state.values()}
    return sorted(kinds | {type(v).__name__ for g in content["param_groups"] for v in g.values()})


def other_world_case(folder: str, stage: int, save: bool) -> str:
    """The error of DeepSpeed's own `load_checkpoint` with another number of ranks."""
    trained = Trained(f"zero{stage}")
    try:
        if save:
            trained.train(steps()[:BEFORE])
            trained.model.save_checkpoint(folder)
            return ""
        before = [p.detach().clone() for p in trained.optimizer.shards]
        try:
            trained.model.load_checkpoint(folder)
        except Exception as error:
            assert all(torch.equal(a, b) for a, b in zip(before, trained.optimizer.shards, strict=True))
            return repr(error)
        return "no error"
    finally:
        trained.close()


def universal_case(folder: str, stage: int, inject: bool) -> str:
    """The error of DeepSpeed's conversion to a universal checkpoint."""
    from deepspeed.checkpoint.ds_to_universal import main

    trained = Trained(f"zero{stage}")
    trained.train(steps()[:BEFORE])
    trained.model.save_checkpoint(folder, tag="here")
    trained.close()
    dist.barrier()
    if dist.get_rank():
        return ""
    arguments = argparse.Namespace(
        input_folder=str(Path(folder, "here")),
        output_folder=str(Path(folder, "universal")),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=inject,
    )
    try:
        main(arguments)
    except BaseException as error:
        return repr(error)
    return "no error"
