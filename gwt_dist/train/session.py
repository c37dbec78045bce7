"""Everything between the command line and the first step: text, model, engine, run folder.

Nothing is written before all of it has been checked on every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gwt_dist import memory
from gwt_dist.groups import param_groups
from gwt_dist.memory import StateBytes
from gwt_dist.train import checkpoints, ds_config, model, stream, tell, tokens
from gwt_dist.train.batches import Batches, ShuffledBatches, Validation
from gwt_dist.train.config import TrainConfig, find_file, read_mapping
from gwt_dist.train.corpus import Corpus, is_dataset_name, load_corpus
from gwt_dist.train.identity import run_identity
from gwt_dist.train.metrics import FORMAT, Metrics, read_metrics
from gwt_dist.train.ranks import Ranks, init_method, limit_waiting


@dataclass(slots=True)
class Session:
    """A run that is ready for its next step. `start_step` steps are done already.

    `planned` is this rank's optimizer state by arithmetic; None where the optimizer is another one
    or ZeRO is off. `saves`: whether checkpoints are written; `kept_beside` goes into them.
    """

    config: TrainConfig
    ranks: Ranks
    engine: Any
    sizes: ds_config.BatchSizes
    batches: Batches
    validation: Validation
    metrics: Metrics
    record: dict[str, Any]
    start_step: int
    planned: StateBytes | None
    saves: bool
    kept_beside: dict[str, Any]


def open_session(config: TrainConfig, ranks: Ranks) -> Session:
    """Check everything, build the engine, load a checkpoint if asked, create the run folder.

    A collective: all ranks call it.

    Raises:
        ValueError: anything about the configuration, the text or the checkpoint that is wrong.
        RunComplete: a restarted run has done all its steps already.
    """
    import deepspeed

    import gwt_dist

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls torch by older names; nothing that the user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if config.threads:
        torch.set_num_threads(config.threads)
    begun = checkpoints.open_run(config)
    engine_file, world_size = find_file(config.deepspeed_config), ranks.world_size
    said = {"lr": config.lr, "level": config.level, "recipe": config.recipe}
    engine_config, sizes = ds_config.load(engine_file, world_size, begun.batch if begun else None, said)
    kind = engine_config["optimizer"]["type"]
    saves = kind == "GWTAdamW"
    if begun and not saves:
        raise ValueError(f"resume: checkpoints are of GWTAdamW, and optimizer.type in {engine_file} is {kind!r}")
    model_file = find_file(config.model, "configs/models")
    streamed = is_dataset_name(config.corpus)
    splits = stream.open_stream(config.corpus) if streamed else (None, None)
    corpus = _read_corpus(config, splits)

    timeout = timedelta(seconds=config.timeout)
    deepspeed.init_distributed(timeout=timeout, init_method=init_method())
    # Every rank has seen the folder as it was before any of them may write into it.
    dist.barrier()
    trained = _trained_tokenizer(config, corpus, splits[0], begun)
    tokenizer = tokens.load_tokenizer(config.tokenizer, trained)
    llama = model.model_config(model_file, tokenizer.vocab_size, config.sequence_length)
    identity = run_identity(config, engine_config, sizes, llama, corpus.sha256, trained)
    if begun:
        checkpoints.check_identity(begun, identity)
        checkpoints.check_streams(begun, world_size)
    validation = Validation(
        *tokens.encode_stream(tokenizer, corpus.validation),
        config.sequence_length,
        config.eval_tokens,
    )
    batches = _batches(config, ranks, sizes, tokenizer, corpus, splits)

    torch.manual_seed(config.seed)
    module = model.build_model(llama, config.seed, engine_config)
    if config.compress_activations:
        gwt_dist.compress_activations(module)
    planned = planned_state(module, engine_config, ranks)
    engine, *_ = gwt_dist.initialize(
        model=module,
        config=engine_config,
        lr_scheduler=lambda optimizer: _schedule(optimizer, config),
    )
    limit_waiting(timeout)
    start_step, rates = 0, (0.0, 0.0)
    if begun and begun.checkpoint:
        checkpoints.restore_state(engine, begun, config.seed)
        start_step = begun.step
        rates = float(engine.get_lr()[0]), tell.rate(engine.lr_scheduler, start_step)
        if begun.streams is not None:
            batches.load_state_dict(begun.streams[ranks.rank])
    shapes = {"file": model_file.name, **read_mapping(model_file)}
    record: dict[str, Any] = {
        "format": FORMAT,
        "identity": identity,
        "batch": begun.batch if begun else {"sequences": sizes.train, "ranks": world_size},
        "ranks": world_size,
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else engine.device.type,
        "train": dataclasses.asdict(config),
        "deepspeed": engine_config,
        "model": shapes,
        "corpus": {"source": corpus.source, "sha256": corpus.sha256},
        "versions": _versions(),
    }
    earlier = checkpoints.read_record(begun.run_folder) if begun else {}
    if begun:
        record["resumed"] = [*(step for step in earlier.get("resumed", []) if step < start_step), start_step]
    metrics = _open_folder(config, ranks, record, trained, begun, start_step)
    if ranks.rank == 0:
        told = [
            tell.vocabulary(shapes, tokenizer.vocab_size),
            *tell.resumed(begun, config, sizes, world_size, rates, earlier),
            "" if saves else tell.unsaved(kind),
        ]
        print(*filter(None, told), sep="\n", end="\n" if any(told) else "", file=sys.stderr)
    return Session(
        config,
        ranks,
        engine,
        sizes,
        batches,
        validation,
        metrics,
        record,
        start_step,
        planned,
        saves,
        {"model_config": llama.to_dict(), "identity": identity, "batch": record["batch"]},
    )


def planned_state(module: torch.nn.Module, engine_config: dict[str, Any], ranks: Ranks) -> StateBytes | None:
    """Bytes of optimizer state of this rank, from shapes alone, before any is allocated.

    Raises:
        ValueError: the targets match nothing, or a parameter of the optimizer is wrong.
    """
    optimizer, stage = engine_config["optimizer"], ds_config.zero_stage(engine_config)
    if optimizer["type"] != "GWTAdamW" or stage == 0:
        return None
    return memory.plan_zero(
        memory.specs(module.named_parameters(), param_groups(module, **optimizer["params"])),
        stage=stage,
        world_size=ranks.world_size,
        rank=ranks.rank,
        sub_group_size=int(engine_config["zero_optimization"].get("sub_group_size", 1e9)),
    )


def _read_corpus(config: TrainConfig, splits: tuple[Any, Any]) -> Corpus:
    if splits[0] is None:
        return load_corpus(config.corpus)
    # A token covers some four characters at most on average in the usual vocabularies; 8 is safe.
    return stream.validation_documents(config.corpus, *splits, characters=8 * config.eval_tokens)


def _trained_tokenizer(
    config: TrainConfig,
    corpus: Corpus,
    stream_split: Any,
    begun: checkpoints.Begun | None,
) -> str | None:
    """The BPE of this run as JSON, from rank 0, which trains or reads it. A collective."""
    size = tokens.bpe_size(config.tokenizer)
    if size is None:
        return None
    result: list[str | None] = [None, None]  # the tokenizer, or else what went wrong
    if dist.get_rank() == 0:
        try:
            saved = begun.run_folder / "tokenizer.json" if begun else None
            if saved and saved.is_file():
                result[0] = saved.read_text(encoding="utf-8")
            elif stream_split is None:
                result[0] = tokens.train_bpe(corpus.train, size)
            else:
                raise ValueError(
                    f"tokenizer {config.tokenizer!r} cannot be trained on a streamed corpus; train "
                    "it on files first, or name one that transformers loads"
                )
        except ValueError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise ValueError(result[1])
    return result[0]


def _batches(
    config: TrainConfig,
    ranks: Ranks,
    sizes: ds_config.BatchSizes,
    tokenizer: tokens.Tokenizer,
    corpus: Corpus,
    splits: tuple[Any, Any],
) -> Batches:
    length = config.sequence_length
    if splits[0] is None:
        ids = tokens.token_stream(tokenizer, corpus.train)
        return ShuffledBatches(ids, length, sizes, rank=ranks.rank, seed=config.seed)
    from datasets.distributed import split_dataset_by_node

    return stream.StreamedBatches(
        split_dataset_by_node(splits[0], rank=ranks.rank, world_size=ranks.world_size),
        config.corpus,
        tokenizer,
        length,
        micro=sizes.micro,
        seed=config.seed,
        buffer=config.shuffle_buffer,
        skip_held_out=splits[1] is None,
    )


def _schedule(optimizer: Any, config: TrainConfig) -> Any:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        min_lr_rate=config.min_lr_ratio,
    )


def _versions() -> dict[str, str]:
    import deepspeed
    import transformers

    import gwt_dist

    modules = (gwt_dist, torch, deepspeed, transformers)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


def _open_folder(
    config: TrainConfig,
    ranks: Ranks,
    record: dict[str, Any],
    trained: str | None,
    begun: checkpoints.Begun | None,
    start_step: int,
) -> Metrics:
    output = Path(config.output)
    inherited: list[dict[str, Any]] = []
    failed: list[str] = [""]
    if ranks.rank == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
            if begun:
                inherited = read_metrics(begun.run_folder / "metrics.jsonl", start_step)
            checkpoints.write_json(output / checkpoints.RECORD, record)
            if trained is not None:
                (output / "tokenizer.json").write_text(trained, encoding="utf-8")
        except OSError as error:
            failed[0] = f"output {output} cannot be written: {error.strerror}; name another --output"
    dist.broadcast_object_list(failed, src=0)
    if failed[0]:
        raise ValueError(failed[0])
    return Metrics(output, inherited, start_step, enabled=ranks.rank == 0)
