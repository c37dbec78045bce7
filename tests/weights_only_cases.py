"""What the ranks of `test_weights_only.py` run: models under every engine that start from weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fairscale_cases
import gwt_dist
from fsdp1_cases import unit_options
from fsdp2_cases import shard
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.engines.weights import clean
from zero_cases import Dot, Net, settings

Weights = dict[str, Tensor]
UNLIKE = 7.0  # what all weights are before they are loaded


class Grown(Net):
    """Two rows more, a weight that the checkpoint does not have, and one less."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_q = Dot(68, 97)
        self.extra = Dot(3, 5)
        del self.mlp_tiny


class Started:
    """A model of equal weights and an optimizer of another level and recipe than the checkpoint's, or torch's AdamW."""

    def __init__(
        self, kind: str, net: Callable[[], nn.Module] = Net, adamw: bool = False, frozen: str = "none"
    ) -> None:
        self.is_zero = kind.startswith("zero")
        bf16 = self.is_zero and "fp32" not in kind
        self.module: Any = net()
        for name, parameter in self.module.named_parameters():
            parameter.data.fill_(UNLIKE)
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
        self.trained = {name: tuple(p.shape) for name, p in self.module.named_parameters() if p.requires_grad}
        self.model: Any = self.module
        if kind == "fsdp2":
            self.model = shard(self.module, "rows")
        elif kind.startswith("fsdp1"):
            common = unit_options("FULL_SHARD", kind == "fsdp1")
            self.module.frozen = FullyShardedDataParallel(self.module.frozen, **common)
            self.model = FullyShardedDataParallel(self.module, **common)
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.module)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        options: dict[str, Any] = {} if adamw else {"level": 3, "recipe": "energy", "wavelet": "db2"}
        self.optimizer: Any = (torch.optim.AdamW if adamw else GWTAdamW)(parameters, lr=0.0, **options)
        if kind.startswith("fsdp1") and not adamw:
            gwt_dist.attach(self.optimizer, self.model)
        if self.is_zero:
            import deepspeed

            zero = {"stage3_param_persistence_threshold": 100} if kind == "zero3 persistent" else {}
            config = settings(int(kind[4]), bf16, **zero)
            if kind.endswith("accumulation"):
                config["data_types"] = {"grad_accum_dtype": "fp32"}
            start = deepspeed.initialize if adamw else gwt_dist.initialize
            self.model = start(model=self.module, optimizer=self.optimizer, config=config)[0]

    def weights(self, masters: bool) -> Weights:
        """Whole weights, as the optimizer steps them or as the model computes with them."""
        if self.is_zero:
            from deepspeed import zero
            from deepspeed.utils import safe_get_full_fp32_param

            found = {}
            with zero.GatheredParameters([p for p in self.module.parameters() if hasattr(p, "ds_id")]):
                found = {n: p.detach().clone() for n, p in self.module.named_parameters()}
            if masters:
                for name, parameter in self.module.named_parameters():
                    if parameter.requires_grad and (master := safe_get_full_fp32_param(parameter)) is not None:
                        found[name] = master.detach().clone().view(found[name].shape)
            return found
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return {clean(n): p.detach().clone() for n, p in self.model.named_parameters()}
        whole = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in self.module.named_parameters())
        return {name: tensor.detach().clone() for name, tensor in whole}

    def step(self, rate: float = 0.0) -> None:
        """Of rate 0 it changes nothing but what an engine holds beside the weights, which then comes to light."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nested: dict[str, Weights] = {}
        for name, shape in self.trained.items():
            module, _, parameter = name.partition(".")
            nested.setdefault(module, {})[parameter] = torch.ones(shape)
        loss = self.model(nested)
        if self.is_zero:
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()

    def close(self) -> None:
        if self.is_zero:
            self.model.destroy()


def expected(folder: str | Path) -> Weights:
    """The weights in the checkpoint of `checkpoint_runs.saved_run`, as safetensors reads them."""
    stored = load_file(Path(folder) / "step-00000002" / "rank-00000.safetensors")
    shapes = {name: parameter.shape for name, parameter in Net().named_parameters()}
    return {name: stored[f"{name}:weight:0"].view(shape) for name, shape in shapes.items()}


def unlike(found: Weights, right: Weights) -> list[str]:
    """Names of weights that are not the rounding of what they should be."""
    return [n for n, w in found.items() if not torch.equal(w, right[n].to(w.dtype))]


def start_case(folder: str, kinds: Sequence[tuple[str, bool]], frozen: str = "none") -> dict[Any, Any]:
    """Of each engine, with GWTAdamW or AdamW: which weights are wrong after a load and after a step of rate 0; what the
    load says; whether the step count or options of the checkpoint came along; whether a step of rate 0.01 trains.
    """
    right, results = expected(folder), {}
    for kind, adamw in kinds:
        started = Started(kind, adamw=adamw, frozen=frozen)
        loaded = gwt_dist.load(folder, started.model, None if started.is_zero else started.optimizer, weights_only=True)
        wrong = [unlike(started.weights(masters), right) for masters in (True, False)]
        taken = {float(state["step"]) for state in started.optimizer.state.values() if "step" in state}
        rates = {group["lr"] for group in started.optimizer.param_groups}
        started.step()
        wrong += [unlike(started.weights(masters), right) for masters in (True, False)]
        started.step(0.01)
        moved = set(unlike(started.weights(True), right))
        told = (loaded.step, loaded.extra, loaded.random_restored, bool(loaded.left))
        # DeepSpeed takes a step on zeros of its own when it is built.
        results[kind, adamw] = (wrong, told, taken - {0.0, 1.0}, rates, moved ^ started.trained.keys())
        started.close()
    return results


def grown_case(folder: str, kinds: Sequence[str]) -> dict[str, Any]:
    """A head grown by two rows, one weight more and one less: refused as a whole, and loaded but for what is left."""
    right, results = expected(folder), {}
    right |= {"attn_q.weight": torch.full((68, 97), UNLIKE), "extra.weight": torch.full((3, 5), UNLIKE)}
    for kind in kinds:
        started = Started(kind, Grown)
        messages = []
        for keywords in ({"weights_only": True}, {"strict": False}):
            try:
                gwt_dist.load(folder, started.model, started.optimizer, **keywords)
            except CheckpointError as error:
                messages.append(str(error))
        untouched = all(bool((w == UNLIKE).all()) for w in started.weights(True).values())
        left = gwt_dist.load(folder, started.model, started.optimizer, weights_only=True, strict=False).left
        started.step()
        wrong = [unlike(started.weights(masters), right) for masters in (True, False)]
        told = (left.in_checkpoint, left.in_model, dict(left.other_shape), left.excluded)
        results[kind] = (untouched, messages, told, wrong)
        started.close()
    return results


def whole_tensors_case(folder: str) -> dict[str, Any]:
    """ZeroRedundancyOptimizer and fairscale, in float64: wrong weights after a load."""
    from whole_tensor_cases import built, fresh_model

    right, results = expected(folder), {}
    for kind in ("zro", "oss", "sdp"):
        engine = built(kind, 1, "energy")
        for parameter in engine.module.parameters():
            parameter.data.fill_(UNLIKE)
        gwt_dist.load(folder, engine.model, engine.optimizer, weights_only=True)
        results[kind] = unlike({n: p.detach() for n, p in engine.module.named_parameters()}, right)
    with fairscale_cases.streams_on_cpu():
        for kind in ("flat", "modules", "tensors"):
            model = fairscale_cases.shard(fresh_model(), kind)  # has no frozen weight
            optimizer = torch.optim.AdamW(model.parameters())
            loaded = gwt_dist.load(folder, model, optimizer, weights_only=True, strict=False)
            with model.summon_full_params():
                results[kind] = unlike({n: p.detach() for n, p in model.named_parameters()}, right)
            results[kind] += [*loaded.left.in_checkpoint, *loaded.left.in_model]
    return results


def inner_module_case(folder: str, kinds: Sequence[str]) -> list[list[str]]:
    """The module within an engine that keeps masters, given in its place: what a save and the loads say."""
    results = []
    for kind in kinds:
        started = Started(kind)
        basic = started.model.basic_optimizer
        results.append([])
        for call in (
            lambda s=started: gwt_dist.load(folder, s.module, weights_only=True),
            lambda s=started, o=basic: gwt_dist.load(folder, s.module, o, weights_only=True),
            lambda s=started, o=basic: gwt_dist.load(folder, s.module, o),
            lambda s=started, o=basic: gwt_dist.save(f"{folder}-more", s.module, o, step=1),
        ):
            try:
                call()
                results[-1].append("no error")
            except CheckpointError as error:
                results[-1].append(str(error))
        # The engine's own optimizer leads to the masters.
        gwt_dist.load(folder, started.module, started.model.optimizer, weights_only=True)
        results[-1] += unlike(started.weights(True), expected(folder))
        started.close()
    return results
