"""What a run shows at its end: bytes that were measured, beside what AdamW would hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gwt_dist.memory import StateBytes
from gwt_dist.train.watch import OptimizerWatch

if TYPE_CHECKING:
    from gwt_dist.train.loop import Outcome

ADAMW_MOMENTS = 2
_ADAMW_BYTES = ADAMW_MOMENTS * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes that one rank holds. `wavelet_*` are the groups of level 1 and more, `plain_*` the
    rest, their state but for `scalars`; `*_adamw` is what AdamW would hold for the same elements, two
    fp32 moments. `scalars` are step counters and what else there is one of a tensor, such as limiter
    norms; `masters` the fp32 copies of weights that ZeRO keeps; `gradients` those handed to the
    optimizer, by the buffer.
    """

    rank: int
    wavelet_moments: int
    wavelet_adamw: int
    plain_moments: int
    plain_adamw: int
    scalars: int
    weights: int
    masters: int
    gradients: int


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(parameters: Sequence[Any], watch: OptimizerWatch) -> RankBytes:
    """Bytes of this rank, counted on the live tensors; `parameters` are the model's."""
    sums = dict.fromkeys(("wavelet_moments", "wavelet_adamw", "plain_moments", "plain_adamw"), 0)
    scalars = 0
    for parameter, state in watch.optimizer.state.items():
        kind = "wavelet" if watch.levels.get(parameter, 0) > 0 else "plain"
        sums[f"{kind}_adamw"] += ADAMW_MOMENTS * parameter.numel() * torch.float32.itemsize
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                if name in watch.scalars:
                    scalars += _bytes(value)
                else:
                    sums[f"{kind}_moments"] += _bytes(value)
    # Under ZeRO-3 a parameter is empty between steps and its part of this rank is ds_tensor.
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    held = {id(parameter) for parameter in parameters}
    return RankBytes(
        rank=dist.get_rank(),
        scalars=scalars,
        weights=sum(_bytes(part) for part in parts),
        masters=sum(_bytes(p) for p in watch.levels if id(p) not in held),
        gradients=sum(watch.gradient_bytes.values()),
        **sums,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run; all of it goes into `summary.json`.

    `seconds_after_last_line` is of the last checkpoint: what each line of `metrics.jsonl` has under `seconds`.
    """

    steps: int
    validation_loss: float
    bits_per_byte: float
    tokens_per_second: float
    optimizer_time_share: float
    seconds_after_last_line: dict[str, float]
    optimizer: str
    world_size: int
    ranks: tuple[RankBytes, ...]
    planned: tuple[StateBytes | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "state_a_weight": self.a_weight()}

    def a_weight(self) -> dict[str, float | None]:
        """Bytes of state for each weight, over all ranks: of the whole model, and of its groups with a level."""
        both = ("wavelet", "plain")
        adamw = {kind: sum(getattr(rank, f"{kind}_adamw") for rank in self.ranks) for kind in both}
        have = {kind: sum(getattr(rank, f"{kind}_moments") for rank in self.ranks) for kind in both}
        whole = sum(have.values()) + sum(rank.scalars for rank in self.ranks), sum(adamw.values())
        shares = {"model": whole, "leveled": (have["wavelet"], adamw["wavelet"])}
        return {name: _ADAMW_BYTES * its / would if would else None for name, (its, would) in shares.items()}

    def table(self) -> str:
        """Text for the terminal: bytes per rank, then the results."""
        rows = [("bytes per rank", *(f"rank {r.rank}" for r in self.ranks), "of AdamW's")]
        planned = [plan for plan in self.planned if plan is not None]
        for label, kind, plan_field in (
            ("moments, groups with a level", "wavelet", "wavelet"),
            ("moments, groups at level 0", "plain", "rest"),
        ):
            have = [getattr(r, f"{kind}_moments") for r in self.ranks]
            would = [getattr(r, f"{kind}_adamw") for r in self.ranks]
            share = f"{sum(have) / sum(would):.4f}" if sum(would) else "-"
            rows.append((label, *(f"{n:,}" for n in have), share))
            if planned:
                rows.append(("  planned", *(f"{getattr(p, plan_field):,}" for p in planned), ""))
            rows.append(("  AdamW would hold", *(f"{n:,}" for n in would), ""))
        if planned:
            rows.append(("units cut between ranks", *(f"{p.cut:,}" for p in planned), ""))
        for label, name in (
            ("step counters, norms", "scalars"),
            ("weights", "weights"),
            ("fp32 masters", "masters"),
            ("gradients at the step", "gradients"),
        ):
            rows.append((label, *(f"{getattr(r, name):,}" for r in self.ranks), ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        shares = [("the whole model", "model"), ("the groups with a level", "leveled")]
        told = [f"{self.a_weight()[key]:.4f} of {what}" for what, key in shares if self.a_weight()[key] is not None]
        lines += [
            "",
            f"state, bytes a weight: {', '.join(told) or '-'} (AdamW {_ADAMW_BYTES})",
            f"{self.optimizer}, {self.steps} steps, {self.world_size} ranks",
            f"validation loss {self.validation_loss:.4f} nats a token, {self.bits_per_byte:.4f} bits a byte",
            f"{self.tokens_per_second:,.0f} tokens/s, "
            f"{100 * self.optimizer_time_share:.1f} % of the time in the optimizer's step",
        ]
        return "\n".join(lines)


def summarise(
    parameters: Iterable[Any], optimizer: str, planned: StateBytes | None, watch: OptimizerWatch, outcome: Outcome
) -> Summary:
    """Gather the figures of all ranks; `parameters` are the model's, `optimizer` is a name. A collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (measure(list(parameters), watch), planned))
    seconds = outcome.timed_seconds
    return Summary(
        steps=outcome.steps_done,
        validation_loss=outcome.validation_loss,
        bits_per_byte=outcome.bits_per_byte,
        tokens_per_second=outcome.timed_tokens / seconds if seconds else 0.0,
        optimizer_time_share=watch.clock.total("optimizer") / seconds if seconds else 0.0,
        seconds_after_last_line=watch.clock.take(),
        optimizer=optimizer,
        world_size=len(gathered),
        ranks=tuple(bytes_ for bytes_, _ in gathered),
        planned=tuple(plan for _, plan in gathered),
    )
