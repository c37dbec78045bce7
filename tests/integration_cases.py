"""What the ranks of `test_examples.py` run: an example, watched, and beside it one process on the same batches.

A launcher starts it as a script:

integration_cases.py CASE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

EXAMPLES = Path(__file__).parents[1] / "examples"
Losses = list[float]


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """The token ids that any embedding sees in training."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            seen.append(inputs[0].detach().clone())

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def trainer(engine: str, folder: str) -> tuple[nn.Module, Any, Losses, str]:
    from transformers_trainer import train

    trained = train(engine, folder)
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return trained.model, trained.optimizer, losses, _held(trained) + " " + type(trained.model_wrapped).__name__


def resumed(engine: str, folder: str) -> tuple[nn.Module, Any, Losses, str]:
    """Ten steps, and in a new Trainer ten more from its checkpoint."""
    from accelerate.state import AcceleratorState
    from transformers_trainer import train

    train(engine, folder, steps=10)
    AcceleratorState._reset_state()
    trained = train(engine, folder, resume=True)
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return trained.model, trained.optimizer, losses, _held(trained) + " " + type(trained.model_wrapped).__name__


def _held(trained: Any) -> str:
    from gwt_dist.integrations.transformers import AttachCallback

    (held,) = [c.held for c in trained.callback_handler.callbacks if isinstance(c, AttachCallback)]
    return str(held)


def accelerate(engine: str, _: str) -> tuple[nn.Module, Any, Losses, str]:
    from accelerate_loop import train

    model, optimizer, losses = train(engine)
    return model, optimizer, losses, type(model).__name__


def lightning(strategy: str, _: str) -> tuple[nn.Module, Any, Losses, str]:
    from lightning_module import train

    trained, module = train(strategy, dist_size())
    held = trained.callbacks[0].held  # type: ignore[attr-defined]
    return module.model, trained.optimizers[0], module.losses, f"{held} {type(trained.strategy).__name__}"


def torchtitan(_: str, __: str) -> tuple[nn.Module, Any, Losses, str]:
    from torchtitan_container import train

    model, optimizers, losses = train()
    (optimizer,) = optimizers  # type: ignore[misc]
    return model, optimizer, losses, type(optimizers).__name__


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


CASES: dict[str, Callable[[str, str], tuple[nn.Module, Any, Losses, str]]] = {
    "trainer": trainer,
    "resumed": resumed,
    "accelerate": accelerate,
    "lightning": lightning,
    "torchtitan": torchtitan,
}


def reference(framework: str, batches: list[list[Tensor]]) -> dict[str, Tensor]:
    """The weights of one process with a plain `GWTAdamW` on the mean of the ranks' gradients, a step an entry."""
    from tiny import tiny_llama

    from gwt_dist import GWTAdamW, param_groups

    model = tiny_llama()
    groups = param_groups(model, level=2, recipe="energy", weight_decay=0.1)
    if framework in ("trainer", "resumed"):  # norms do not decay in the Trainer
        norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
        groups = [
            {**g, "params": [p for p in g["params"] if (id(p) in norms) == norm], "weight_decay": 0.0 if norm else 0.1}
            for g in groups
            for norm in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
    optimizer = GWTAdamW(groups, lr=1e-3)
    for step in batches:
        optimizer.zero_grad()
        for ids in step:
            options = {}
            if framework in ("trainer", "resumed"):
                options = {"num_items_in_batch": torch.tensor(sum(x[:, 1:].numel() for x in step))}
            loss = model(input_ids=ids, labels=ids, **options).loss
            (loss * (len(step) if options else 1)).backward()
        for parameter in model.parameters():
            parameter.grad /= len(step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights, gathered."""
    model = getattr(model, "module", model)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def state_bytes(optimizer: Any) -> int:
    """Bytes of the moments on this rank."""
    from gwt_dist.engines.attach import find_optimizer

    total = 0
    for state in find_optimizer(optimizer).state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            local = state[name].to_local() if isinstance(state[name], DTensor) else state[name]
            total += local.numel() * local.element_size()
    return total


def example_case(case: str, folder: str) -> dict[str, Any]:
    """An example on this rank, which is of no use for another one afterwards: frameworks remember what they were."""
    framework, _, engine = case.partition("-")
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    if engine == "deepspeed":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
    with watched() as seen:
        model, optimizer, losses, engaged = CASES[framework](engine, folder)
    from tiny import tiny_llama

    final, start = whole(model), dict(tiny_llama().named_parameters())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    error = float("nan")
    if dist.get_rank() == 0:
        expected = reference(framework, [list(step) for step in zip(*everyone, strict=True)])
        moved = sum(float((expected[n] - start[n]).double().square().sum()) for n in final)
        wrong = sum(float((expected[n] - final[n]).double().square().sum()) for n in final)
        error = (wrong / moved) ** 0.5
    different = [not torch.equal(everyone[0][i], everyone[-1][i]) for i in range(len(seen))]
    from gwt_dist.engines.attach import find_optimizer

    groups = find_optimizer(optimizer).param_groups
    return {
        "engaged": engaged,
        "sharded_layers": sum(type(m).__name__ == "FSDPLlamaDecoderLayer" for m in model.modules()),
        "dtensors": all(isinstance(p, DTensor) for p in model.parameters()),
        "losses": losses,
        "error": error,
        "state_bytes": state_bytes(optimizer),
        "steps": len(seen),
        "different": all(different),
        "levels": sorted({group["level"] for group in groups}),
    }


def own_loop_case(name: str) -> dict[str, Any]:
    """The loop without frameworks: its losses, subspaces that this rank keeps, gradients after a backward pass."""
    sys.path.insert(0, str(EXAMPLES))
    import own_loop  # type: ignore[import-not-found]

    model, optimizer, losses = own_loop.train(name)
    model(**{key: value[None] for key, value in own_loop.Text()[0].items()}).loss.backward()
    left = sum(p.grad is not None for p in model.parameters()) if name == "adalomo" else 0
    kept = sum("projector" in state and state["projector"].to_local().numel() > 0 for state in optimizer.state.values())
    return {"losses": losses, "gradients": left, "kept": kept}


def main(case: str, folder: str) -> None:
    result = example_case(case, folder)
    Path(folder, f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo can abort a process that has done all its work


if __name__ == "__main__":
    main(*sys.argv[1:])
