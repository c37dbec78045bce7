"""Everything between the command line and the first step: text, model, engine, run folder.

Nothing is written before all of it has been checked on every rank.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gwt_dist import memory
from gwt_dist.groups import param_groups
from gwt_dist.memory import StateBytes
from gwt_dist.train import checkpoints, ds_config, model, stream, tokens
from gwt_dist.train.batches import Batches, ShuffledBatches, Validation
from gwt_dist.train.config import TrainConfig, find_file, read_mapping
from gwt_dist.train.corpus import Corpus, is_dataset_name, load_corpus
from gwt_dist.train.metrics import Metrics, read_metrics
from gwt_dist.train.ranks import Ranks


@dataclass(slots=True)
class Session:
    """A run that is ready for its next step. `start_step` steps are done already.

    `planned` is this rank's optimizer state by arithmetic; None where the optimizer is another one
    or ZeRO is off.
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


def open_session(config: TrainConfig, ranks: Ranks) -> Session:
    """Check everything, build the engine, load a checkpoint if asked, create the run folder.

    A collective: all ranks call it.

    Raises:
        ValueError: anything about the configuration, the text or the checkpoint that is wrong.
    """
    import deepspeed

    import gwt_dist

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls torch by older names; nothing that the user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if config.threads:
        torch.set_num_threads(config.threads)
    engine_config, sizes = ds_config.load(find_file(config.deepspeed_config), ranks.world_size)
    model_file = find_file(config.model, "configs/models")
    checkpoint = checkpoints.open_run(config)
    streamed = is_dataset_name(config.corpus)
    splits = stream.open_stream(config.corpus) if streamed else (None, None)
    corpus = _read_corpus(config, splits)

    deepspeed.init_distributed()
    # Every rank has seen the folder as it was before any of them may write into it.
    dist.barrier()
    trained = _trained_tokenizer(config, corpus, splits[0], checkpoint)
    tokenizer = tokens.load_tokenizer(config.tokenizer, trained)
    llama = model.model_config(model_file, tokenizer.vocab_size, config.sequence_length)
    identity = run_identity(config, engine_config, sizes, ranks.world_size, llama, corpus.sha256)
    if checkpoint:
        checkpoints.check_identity(checkpoint, identity)
    validation = Validation(
        *tokens.encode_stream(tokenizer, corpus.validation),
        config.sequence_length,
        config.eval_tokens,
    )
    batches = _batches(config, ranks, sizes, tokenizer, corpus, splits)

    torch.manual_seed(config.seed)
    module = model.build_model(llama, config.seed, engine_config)
    planned = planned_state(module, engine_config, ranks)
    engine, *_ = gwt_dist.initialize(
        model=module,
        config=engine_config,
        lr_scheduler=lambda optimizer: _schedule(optimizer, config),
    )
    start_step = 0
    if checkpoint:
        batches.load_state_dict(checkpoints.load(engine, checkpoint))
        start_step = checkpoint.step
    record = {
        "identity": identity,
        "train": dataclasses.asdict(config),
        "deepspeed": engine_config,
        "model": {"file": model_file.name, **read_mapping(model_file)},
        "corpus": {"source": corpus.source, "sha256": corpus.sha256},
        "versions": _versions(),
    }
    metrics = _open_folder(config, ranks, record, trained, checkpoint, start_step)
    return Session(config, ranks, engine, sizes, batches, validation, metrics, record, start_step, planned)


def planned_state(module: torch.nn.Module, engine_config: dict[str, Any], ranks: Ranks) -> StateBytes | None:
    """Bytes of optimizer state of this rank, from shapes alone, before any is allocated.

    Raises:
        ValueError: the targets match nothing.
    """
    optimizer, stage = engine_config["optimizer"], ds_config.zero_stage(engine_config)
    if optimizer["type"] != "GWTAdamW" or stage == 0:
        return None
    chosen = {k: v for k, v in optimizer["params"].items() if k in ("level", "targets", "wavelet")}
    return memory.plan_zero(
        memory.specs(module.named_parameters(), param_groups(module, **chosen)),
        stage=stage,
        world_size=ranks.world_size,
        rank=ranks.rank,
        sub_group_size=int(engine_config["zero_optimization"].get("sub_group_size", 1e9)),
    )


def run_identity(
    config: TrainConfig,
    engine_config: dict[str, Any],
    sizes: ds_config.BatchSizes,
    world_size: int,
    llama: Any,
    corpus_sha256: str,
) -> dict[str, Any]:
    """What must be alike for a run to be resumed, flat: field name to plain value.

    All optimizer parameters belong to it, as DeepSpeed takes them from the checkpoint and a new
    value in the JSON would be ignored in silence.
    """
    optimizer = engine_config["optimizer"]
    params = optimizer_defaults(optimizer["type"]) | optimizer.get("params", {})
    shapes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
    )
    # In the order in which a difference explains the others.
    plain: dict[str, Any] = {
        "world_size": world_size,
        "zero_stage": ds_config.zero_stage(engine_config),
        "precision": ds_config.precision(engine_config),
        "corpus.sha256": corpus_sha256,
        "tokenizer": config.tokenizer,
    }
    plain |= {f"model.{key}": getattr(llama, key) for key in shapes}
    plain |= {"optimizer.type": optimizer["type"]}
    plain |= {f"optimizer.{key}": value for key, value in params.items()}
    plain |= {
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "train_batch_size": sizes.train,
        "gradient_accumulation_steps": sizes.accumulation,
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def optimizer_defaults(kind: str) -> dict[str, Any]:
    """Defaults of GWTAdamW and `param_groups`; a key that the JSON leaves out still has a value."""
    if kind != "GWTAdamW":
        return {}
    from gwt_dist import GWTAdamW, param_groups

    found: dict[str, Any] = {}
    for function in (param_groups, GWTAdamW):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty and name != "params":
                found[name] = parameter.default
    return found


def _read_corpus(config: TrainConfig, splits: tuple[Any, Any]) -> Corpus:
    if splits[0] is None:
        return load_corpus(config.corpus)
    # A token covers some four characters at most on average in the usual vocabularies; 8 is safe.
    return stream.validation_documents(config.corpus, *splits, characters=8 * config.eval_tokens)


def _trained_tokenizer(
    config: TrainConfig,
    corpus: Corpus,
    stream_split: Any,
    checkpoint: checkpoints.Checkpoint | None,
) -> str | None:
    """The BPE of this run as JSON, from rank 0, which trains or reads it. A collective."""
    size = tokens.bpe_size(config.tokenizer)
    if size is None:
        return None
    result: list[str | None] = [None, None]  # the tokenizer, or else what went wrong
    if dist.get_rank() == 0:
        try:
            saved = checkpoint.run_folder / "tokenizer.json" if checkpoint else None
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
        ids, _ = tokens.encode_stream(tokenizer, corpus.train)
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
    checkpoint: checkpoints.Checkpoint | None,
    start_step: int,
) -> Metrics:
    output = Path(config.output)
    inherited: list[dict[str, Any]] = []
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            inherited = read_metrics(checkpoint.run_folder / "metrics.jsonl", start_step)
        checkpoints.write_json(output / checkpoints.RECORD, record)
        if trained is not None:
            (output / "tokenizer.json").write_text(trained, encoding="utf-8")
    return Metrics(output, inherited, start_step, enabled=ranks.rank == 0)
