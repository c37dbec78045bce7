"""SCALE: gradients of one size for each output, and a momentum in the head alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist.study.peers.each import Each

LEAST_RMS = 1e-8


class SCALE(Each):
    """SCALE (arXiv 2506.16659): gradients over the root of the mean of their squares, taken for each output.

        m = mu*m + (1-mu)*g in the head, g itself elsewhere
        W = (1 - lr*wd)*W - lr * m / rms(m of one output)

    The paper writes matrices [inputs, outputs] and normalizes columns. torch's Linear weights are [outputs, inputs], so
    an output is a row. An embedding is a table [tokens, width] whose outputs are its columns. As in the authors' code
    the root of the mean is taken, where the paper has the length: sqrt(inputs) times the step.

    Args:
        matrices: Weights [outputs, inputs] without momentum.
        embeddings: Tables [tokens, width] without momentum.
        heads: Weights [outputs, inputs] with momentum, the one state that is kept: fp32 or bf16, as their gradient.
        lr: Rate of them all.
        momentum: mu.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        embeddings: Iterable[nn.Parameter],
        heads: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        parts = [(matrices, 1, 0.0), (embeddings, 0, 0.0), (heads, 1, momentum)]
        groups = [{"params": list(those), "along": along, "momentum": mu} for those, along, mu in parts]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "weight_decay": weight_decay})

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Decay, and a step along the gradient or momentum with its root mean square brought to 1."""
        m = self._momentum(parameter, gradient, group["momentum"]) if group["momentum"] else gradient
        rms = m.square().mean(group["along"], keepdim=True).sqrt_().clamp_(min=LEAST_RMS)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(m / rms, alpha=-group["lr"])

    def _momentum(self, parameter: nn.Parameter, gradient: Tensor, mu: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        m: Tensor = state["momentum"].lerp_(gradient, 1 - mu)
        return m


def parts(rest: Mapping[str, nn.Parameter], embedding: str, head: str) -> tuple[list[nn.Parameter], ...]:
    """What is no hidden matrix, by what SCALE does with it: embeddings, heads, and vectors for Adam.

    Args:
        rest: Parameters by name.
        embedding: A part of the names of embeddings.
        head: A part of the names of heads.

    Raises:
        ValueError: A matrix is neither or both, or there is no head to keep a momentum for, as where the head is the
            embedding: the paper says nothing of it.
    """
    embeddings: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in rest.items():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif (embedding in name) == (head in name):
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} has {'both' if head in name else 'neither'} of the names of "
                f"embeddings, {embedding!r}, and of heads, {head!r}, in it, so it is not known along which axis its "
                "gradient is normalized. Set the options embedding and head"
            )
        else:
            (heads if head in name else embeddings).append(parameter)
    if not heads:
        raise ValueError(
            f"no name has {head!r} in it, so nothing would have a momentum, which is no SCALE any more. Set the option "
            f"head, or untie the head from the embedding; there are: {', '.join(rest) or 'none'}"
        )
    return embeddings, heads, vectors
