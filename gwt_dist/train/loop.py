"""The training loop: one path for every engine setting, one all-reduce of its own per step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gwt_dist.train.batches import checksum
from gwt_dist.train.checkpoints import keep_state
from gwt_dist.train.model import token_losses
from gwt_dist.train.ranks import StopRequest
from gwt_dist.train.session import Session
from gwt_dist.train.watch import OptimizerWatch


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the weights are still those of the step before."""


@dataclass(slots=True)
class Outcome:
    """What the loop leaves for the summary. Times are seconds of training steps alone, validation
    and checkpoints apart, the first step of this start apart too (it compiles and allocates).
    """

    steps_done: int
    saved: int  # step of the newest checkpoint; 0: none
    stopped: bool
    validation_loss: float
    bits_per_byte: float
    timed_tokens: int
    timed_seconds: float


def train(session: Session, watch: OptimizerWatch) -> Outcome:
    """Train from `session.start_step` to the last step, or until a stop is asked for.

    Raises:
        NonFiniteLoss: a loss on any rank is NaN or infinite; all ranks raise it, unsaved.
    """
    config, rank = session.config, session.ranks.rank
    tokens_per_step = session.sizes.train * config.sequence_length
    outcome = Outcome(session.start_step, session.start_step, False, math.nan, math.nan, 0, 0.0)
    bar = tqdm(
        total=config.steps,
        initial=session.start_step,
        disable=rank != 0,
        unit="step",
        mininterval=1.0,
    )
    with bar, StopRequest() as stop:
        for step in range(session.start_step, config.steps):
            done, last = step + 1, step + 1 == config.steps
            logged = done % config.log_every == 0 or last
            watch.clock.lap("other")
            started = time.perf_counter()
            lr = float(session.engine.get_lr()[0])
            loss, batch, stopping = _one_step(session, watch, step, outcome.saved, stop, logged=logged and rank == 0)
            seconds = time.perf_counter() - started
            if step > session.start_step:
                outcome.timed_tokens += tokens_per_step
                outcome.timed_seconds += seconds
            else:
                watch.clock.merge("first step")
            outcome.steps_done = done
            if logged:
                session.metrics.write(
                    done,
                    loss=loss,
                    lr=lr,
                    gradient_norm=_as_float(session.engine.get_global_grad_norm()),
                    skipped_steps=session.engine.skipped_steps,
                    tokens=done * tokens_per_step,
                    batch=batch,
                    **(watch.limited_norms() if rank == 0 else {}),
                    tokens_per_second=tokens_per_step / seconds,
                    seconds=watch.clock.take(),
                )
                watch.clock.lap("other")
            if last or (config.eval_every and done % config.eval_every == 0):
                outcome.validation_loss, outcome.bits_per_byte = evaluate(session)
                watch.clock.lap("evaluation")
                if not math.isfinite(outcome.validation_loss):
                    raise NonFiniteLoss(
                        f"the validation loss is {outcome.validation_loss} after step {done}; {_kept(outcome.saved)}"
                    )
                session.metrics.write(
                    done,
                    validation_loss=outcome.validation_loss,
                    bits_per_byte=outcome.bits_per_byte,
                    seconds=watch.clock.take(),
                )
            bits = outcome.bits_per_byte
            bar.set_postfix_str(
                f"loss {loss:.4f}" + (f", bits/byte {bits:.3f}" if math.isfinite(bits) else ""),
                refresh=False,
            )
            bar.update()
            due = last or stopping or (config.save_every and done % config.save_every == 0)
            if due and session.saves:
                watch.clock.lap("other")
                place = session.batches.state_dict()
                keep_state(Path(config.output), session.engine, done, place, session.kept_beside, config.keep)
                watch.clock.lap("checkpoint")
                outcome.saved = done
            if stopping and not last:
                outcome.stopped = True
                break
    return outcome


def _one_step(
    session: Session, watch: OptimizerWatch, step: int, saved: int, stop: StopRequest, *, logged: bool
) -> tuple[float, str, bool]:
    """Mean loss over the train batch, the checksum of its text, and whether any rank was asked to stop.

    `logged`: the limiter norms of this step will be asked for.
    """
    engine, accumulation, lap = session.engine, session.sizes.accumulation, watch.clock.lap
    # Loss of this rank, its wish to stop and the checksum of its text (whole numbers, exact in fp64), in one vector:
    # the only all-reduce of the loop.
    report = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for micro_step in range(accumulation):
        batch = session.batches.batch(step, micro_step)
        report[2] += checksum(batch)
        lap("data")
        loss = token_losses(engine, torch.from_numpy(batch).to(engine.device)).mean()
        report[0] += loss.detach().double() / accumulation
        if micro_step == accumulation - 1:
            report[1] = float(stop.requested)
            dist.all_reduce(report)
            mean = report[0].item() / session.ranks.world_size
            # A NaN or infinity of one rank survives the sum, so all ranks decide alike.
            if not math.isfinite(mean):
                raise NonFiniteLoss(
                    f"the loss is {mean} at step {step + 1}; the run stops before this step "
                    f"changes the weights, {_kept(saved)}"
                )
            if logged:
                watch.remember_norms()
        lap("forward")
        engine.backward(loss)
        lap("backward")
        engine.step()
        lap("engine")
    return mean, f"{int(report[2]):x}", bool(report[1] > 0)


def _kept(saved: int) -> str:
    kept = f"the last checkpoint is of step {saved}" if saved else "nothing was saved yet"
    return f"{kept}. Lower the learning rate, raise warmup_steps, or look at the text of this step"


@torch.no_grad()
def evaluate(session: Session) -> tuple[float, float]:
    """Validation loss in nats per predicted token, and bits per byte of the predicted text.

    A collective; the same windows for any number of ranks.
    """
    engine, ranks = session.engine, session.ranks
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)  # nats, tokens, bytes
    for batch in session.validation.batches(ranks.rank, ranks.world_size, session.sizes.micro):
        losses = token_losses(engine, torch.from_numpy(batch.tokens).to(engine.device))
        counted = torch.from_numpy(batch.counted).to(engine.device)
        # where(), as 0 * NaN of a window that only fills up would be NaN.
        nats = torch.where(counted > 0, losses.double().sum(dim=1), 0.0)
        sums[0] += nats.sum()
        sums[1] += counted.sum() * losses.shape[1]
        sums[2] += float((batch.counted * batch.text_bytes).sum())
    engine.train()
    dist.all_reduce(sums)
    nats_total, tokens, text_bytes = sums.tolist()
    return nats_total / tokens, nats_total / (math.log(2) * max(text_bytes, 1.0))


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
