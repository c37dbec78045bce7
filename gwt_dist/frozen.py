"""Weights that are frozen and thawed under an engine that steps on buffers of several tensors.

In one process a frozen weight has no gradient, so the optimizer leaves it alone. A flat buffer has a gradient all the
same, zero at the places of what is frozen, and moments and weight decay would go on moving it. So the tensors behind a
buffer are asked whether they are trained, at each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from gwt_dist.comm import Shard


class Frozen:
    """Which tensors of which buffers are frozen, and the steps that went by without them."""

    def __init__(self) -> None:
        self._missed: dict[Tensor, dict[str, int]] = {}
        self._left_out: list[Tensor] = []

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Remember parameters that were frozen when the engine was built, which has no buffer for them."""
        self._left_out = list(parameters)

    def among(self, parameters: Iterable[Tensor], shards: Mapping[Tensor, Shard]) -> dict[int, frozenset[str]]:
        """By the id of a flat parameter, the names of its tensors that are frozen now; only where there are any.

        Raises `ValueError` for a tensor that was thawed and that this engine cannot train as one process would.
        """
        if any(parameter.requires_grad for parameter in self._left_out):
            thawed = next(parameter for parameter in self._left_out if parameter.requires_grad)
            raise ValueError(
                f"a parameter of shape {tuple(getattr(thawed, 'ds_shape', thawed.shape))} was frozen when the engine "
                f"was built and is to be trained now: the engine has no place for it, so no step would ever change "
                f"it. Save (gwt_dist.save), build the engine with all parameters that are to be trained, and load"
            )
        found = {}
        for parameter in parameters if shards else ():
            shard = shards.get(parameter)
            if shard is None or not shard.owners:
                continue
            still = [t.fqn for t, owner in zip(shard.tensors, shard.owners, strict=False) if not owner.requires_grad]
            missed = self._missed.get(parameter, {})
            if still:
                found[id(parameter)] = frozenset(still)
            for name in sorted(missed.keys() - still):
                raise ValueError(
                    f"{name!r} was frozen for {missed[name]} steps and is to be trained again, and the engine keeps it "
                    f"in one buffer with tensors that were not: they have one count of steps, and the bias correction "
                    f"of {name!r} would be another than in one process. Give weights that are frozen and thawed "
                    f"together a parameter group of their own before the engine is built"
                )
        return found

    def pass_by(self, parameter: Tensor, names: Iterable[str]) -> None:
        """Count a step of a buffer that these of its tensors did not take."""
        missed = self._missed.setdefault(parameter, {})
        for name in names:
            missed[name] = missed.get(name, 0) + 1

    def missed(self, parameter: Tensor) -> Mapping[str, int]:
        """By name, how many steps of a buffer its tensors have not taken; only of those that are frozen."""
        return self._missed.get(parameter, {})

    def restore(self, parameter: Tensor, missed: Mapping[str, int]) -> None:
        """The state of a buffer was loaded, whose tensors did not take these of its steps."""
        self._missed[parameter] = dict(missed)
