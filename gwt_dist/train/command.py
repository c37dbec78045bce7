"""The command: arguments in, exit code out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gwt_dist.train.config import TrainConfig, parse_arguments
from gwt_dist.train.ranks import Ranks, may_restart, ranks_from_environment

DONE = 0
USER_ERROR = 2
NON_FINITE = 3
NOT_SAVED = 4
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun
SECONDS_FOR_THE_FIRST = 5.0
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Pre-train as the command line says.

    Returns:
        0 at the end of the run, 2 for a mistake of the user (told in one line), 3 for a NaN or
        infinite loss, 4 for a checkpoint that could not be written, 130 when stopped by SIGINT or SIGTERM.
    """
    try:
        config, local_rank = parse_arguments(argv)
        ranks = ranks_from_environment(local_rank)
    except ValueError as error:
        return _fail(error, USER_ERROR)
    try:
        return _run(config, ranks)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        _leave()


def start() -> NoReturn:
    """Run `main` and end the process with its exit code, without the interpreter's own ending.

    In that ending gloo's threads can abort a process that has done all its work, which would turn a
    good run into a failed one.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(config: TrainConfig, ranks: Ranks) -> int:
    from gwt_dist.checkpoint import CheckpointError
    from gwt_dist.train.checkpoints import RunComplete, write_json
    from gwt_dist.train.loop import NonFiniteLoss, train
    from gwt_dist.train.session import open_session
    from gwt_dist.train.summary import summarise
    from gwt_dist.train.watch import OptimizerWatch

    try:
        session = open_session(config, ranks)
    except ValueError as error:
        return _fail(error, USER_ERROR)
    except RunComplete as complete:
        if ranks.rank == 0:
            print(complete, flush=True)
        return DONE
    try:
        watch = OptimizerWatch(session.engine)
        outcome = train(session, watch)
    except NonFiniteLoss as error:
        return _fail(error, NON_FINITE)
    except CheckpointError as error:
        return _fail(error, NOT_SAVED)
    finally:
        session.metrics.close()
    if outcome.stopped:
        if ranks.rank == 0:
            at = f"at step {outcome.steps_done} of {config.steps}"
            told = f"stopped and saved {at}; go on with --output {config.output} --resume latest"
            print(told if session.saves else f"stopped {at}; nothing was saved, see above", flush=True)
        return INTERRUPTED
    kind = session.record["deepspeed"]["optimizer"]["type"]
    summary = summarise(session.engine.module.parameters(), kind, session.planned, watch, outcome)
    if ranks.rank == 0:
        write_json(Path(config.output) / "summary.json", summary.as_dict())
        print(summary.table(), flush=True)
    return DONE


def _fail(error: Exception, code: int) -> int:
    """Tell the error once on each machine: what is wrong may be a file of that machine.

    torchrun prints the file that it names at its very end, below dozens of lines of its own, and that of the rank that
    failed first: the other ranks leave the first place to rank 0, which has the same to say, until torchrun ends them.
    """
    first, told = os.environ.get("LOCAL_RANK", "0") == "0", os.environ.get(ERROR_FILE)
    if told:
        if not first:
            time.sleep(SECONDS_FOR_THE_FIRST)
        said = {"message": f"error: {error}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(told).write_text(json.dumps({"message": said}), encoding="utf-8")
    if first and (not told or may_restart()):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
