"""What each rank of `test_two_hosts.py` runs, whatever started it: steps under ZeRO-2 and FSDP2, and who it was.

`python two_hosts_job.py FOLDER` writes `FOLDER/rank<n>.pt`.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import zero_cases
from fsdp2_cases import TARGETS, backward, shard
from gwt_dist import GWTAdamW, param_groups
from gwt_dist.train.ranks import ranks_from_environment
from zero_cases import Net, gradients, initial, load, options, shapes_of

LEVEL, RECIPE, STEPS = 2, "paper", 3


def zero2() -> dict[str, Tensor]:
    """The fp32 weights after the steps, gathered."""
    config = zero_cases.settings(2)
    config["optimizer"] = {"type": "GWTAdamW", "params": {**options(LEVEL, RECIPE), "targets": TARGETS}}
    model, engine = zero_cases.build(config)
    zero_cases.train(engine, model, STEPS)
    found = zero_cases.masters(model)
    engine.destroy()
    return found


def fsdp2() -> dict[str, Tensor]:
    """The float64 weights after the steps, gathered."""
    model = Net().double()
    shapes = shapes_of(model)
    load(model, initial(shapes))
    sharded = shard(model, "rows")
    optimizer = GWTAdamW(param_groups(sharded, targets=TARGETS, **options(LEVEL, RECIPE)))
    for step in gradients(shapes, STEPS):
        optimizer.zero_grad()
        backward(sharded, step, "")
        optimizer.step()
    parameters = {n: p for n, p in sharded.named_parameters() if p.requires_grad}
    assert all(isinstance(p, DTensor) for p in parameters.values())
    return {n: p.detach().full_tensor() for n, p in parameters.items() if isinstance(p, DTensor)}


def main() -> None:
    """Meet the other ranks, train, write the file."""
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))  # deepspeed adds --local_rank
    ranks = ranks_from_environment(None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = {
        "host": socket.gethostname(),
        "ranks": dataclasses.astuple(ranks),
        "address": os.environ["MASTER_ADDR"],
        "zero2": zero2(),
        "fsdp2": fsdp2(),
    }
    torch.save(result, folder / f"rank{ranks.rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's own ending


if __name__ == "__main__":
    main()
