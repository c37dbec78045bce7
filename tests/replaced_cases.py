"""What the ranks of `test_replaced.py` run: parameters that an engine put others in the place of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

import gwt_dist
from fsdp1_cases import refusal, unit_options
from gwt_dist import GWTAdamW
from roads_cases import alone, batch, fsdp1, fsdp2, net, optimizer_of, train
from zero_cases import settings


def replaced_case(what: str) -> str:
    """The message of the first steps of an optimizer that holds what the model does not compute with."""
    if what in ("initialize", "deepspeed.initialize", "fully_shard after steps", "swapped groups", "fsdp1 after steps"):
        model: Any = net()
        optimizer = optimizer_of(model)
        train((model, optimizer), 0, 2)
    if what == "initialize":
        return refusal(lambda: gwt_dist.initialize(model=model, optimizer=optimizer, config=settings(2)))
    if what == "deepspeed.initialize":
        import deepspeed

        config = settings(2) | {"zero_allow_untested_optimizer": True}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        found = refusal(lambda: gwt_dist.attach(optimizer, engine))
        engine.destroy()
        return found
    if what == "fsdp1 after steps":
        wrapped = FullyShardedDataParallel(model, **unit_options("FULL_SHARD", True))
        return refusal(lambda: gwt_dist.attach(optimizer, wrapped))
    if what == "before fsdp1":  # and never attached
        model = net()
        optimizer = optimizer_of(model)
        wrapped = FullyShardedDataParallel(model, **unit_options("FULL_SHARD", False))
        optimizer.step()  # before any backward pass, which tells nothing
        return refusal(lambda: train((wrapped, optimizer), 0, 1))
    if what == "a block before fsdp1":  # the others have gradients
        model = net()
        optimizer = optimizer_of(model)
        model[2] = FullyShardedDataParallel(model[2], **unit_options("FULL_SHARD", False))
        return refusal(lambda: train((model, optimizer), 0, 1))
    if what == "fsdp1 half wrapped":
        options = unit_options("FULL_SHARD", False)
        model = net()
        model[0] = FullyShardedDataParallel(model[0], **options)
        optimizer = optimizer_of(model)
        model[2] = FullyShardedDataParallel(model[2], **options)
        wrapped = FullyShardedDataParallel(model, **options)
        return refusal(lambda: gwt_dist.attach(optimizer, wrapped))
    if what in ("fully_shard after steps", "swapped groups"):
        fully_shard(model)
        if what == "swapped groups":
            optimizer.param_groups[0]["params"] = list(model.parameters())
    elif what == "before fully_shard":
        model = net()
        optimizer = optimizer_of(model)
        fully_shard(model)
    elif what == "one block before fully_shard":
        model = net()
        old = list(model[0].parameters())
        fully_shard(model)
        optimizer = GWTAdamW([*old, *list(model.parameters())[2:]], level=2, recipe="energy")
    else:
        assert what == "after a forward pass"
        model, _ = fsdp2()
        with torch.no_grad():
            model(batch(0))
        optimizer = optimizer_of(model)
    return refusal(lambda: train((model, optimizer), 0, 1))


def exchanged_case() -> float:
    """How far from one process an optimizer is that was built before the weights of its model had memory."""
    with torch.device("meta"):
        model = net()
    for block in (model[0], model[2]):
        fully_shard(block)
    fully_shard(model)
    optimizer = optimizer_of(model)
    model.to_empty(device="cpu")
    start = net().state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distribute_tensor(start[name], p.device_mesh, p.placements))
    train((model, optimizer), 0, 3)
    model.to_empty(device="cpu")  # after steps too
    its = alone()
    train(its, 0, 3)
    found = [optimizer.state[p]["exp_avg"].full_tensor() for p in model.parameters()]
    expected = [its[1].state[p]["exp_avg"] for p in its[0].parameters()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def legitimate_case() -> list[str]:
    """What must not be taken for it: unused and frozen parameters, reference models, two models at once, a rewrap."""
    messages = []
    # A plain model that has no gradients yet, beside one of the same shapes under FSDP1 that has.
    (plain, optimizer), (flat, its) = alone(), fsdp1(False)
    flat(batch(0)).square().mean().backward()
    messages += [refusal(optimizer.step), refusal(its.step)]
    messages.append(refusal(lambda: train((plain, optimizer), 0, 1)))
    # A plain model beside a sharded one of the same shapes that has gradients, and parameters that nobody uses.
    whole_one, sharded = alone(), fsdp2()
    unused = nn.Parameter(torch.zeros(8, 8))
    whole_one[1].add_param_group({"params": [unused]})
    for _ in range(2):
        sharded[0](batch(0)).square().mean().backward()
        messages.append(refusal(whole_one[1].step))  # no gradient at all
        whole_one[0](batch(0)).square().mean().backward()
        messages += [refusal(whole_one[1].step), refusal(sharded[1].step)]
        whole_one[1].zero_grad()
        sharded[1].zero_grad()
    # A sharded model with a forward pass under no_grad between steps, as for evaluation, and an unused layer.
    model, optimizer = fsdp2()
    for number in range(2):
        with torch.no_grad():
            model(batch(number))
        messages.append(refusal(lambda: train((model, optimizer), 0, 1)))
    torch.manual_seed(1)
    # The optimizer after the forward pass, and `reshard` between.
    model, _ = fsdp2()
    with torch.no_grad():
        model(batch(0))
    model.reshard()
    messages.append(refusal(lambda: train((model, optimizer_of(model)), 0, 1)))
    # Groups that another library fills with the sharded parameters, before the first step.
    model = net()
    optimizer = optimizer_of(model)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    messages.append(refusal(lambda: train((model, optimizer), 0, 2)))
    compiled = torch.compile(net(), backend="eager")
    messages.append(refusal(lambda: train((compiled, optimizer_of(compiled)), 0, 1)))
    return sorted(set(messages))
