"""What makes a run the same run, whoever goes on with it and on how many ranks."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

from gwt_dist.train import ds_config
from gwt_dist.train.config import TrainConfig
from gwt_dist.train.corpus import is_dataset_name


def run_identity(
    config: TrainConfig,
    engine_config: dict[str, Any],
    sizes: ds_config.BatchSizes,
    llama: Any,
    corpus_sha256: str,
    trained: str | None,
) -> dict[str, Any]:
    """What must be alike for a run to be resumed, flat: field name to plain value.

    All optimizer parameters belong to it, as they are taken from the checkpoint and a new value in the JSON would be
    ignored in silence. The number of ranks and the ZeRO stage do not: they change neither update nor text.
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
        "precision": ds_config.precision(engine_config),
        "corpus.sha256": corpus_sha256,
        "tokenizer": config.tokenizer,
        "tokenizer.sha256": None if trained is None else hashlib.sha256(trained.encode()).hexdigest(),
    }
    plain |= {f"model.{key}": getattr(llama, key) for key in shapes}
    plain |= {"optimizer.type": optimizer["type"]}
    plain |= {f"optimizer.{key}": value for key, value in params.items()}
    plain |= {
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "train_batch_size": sizes.train,
        "shuffle_buffer": config.shuffle_buffer if is_dataset_name(config.corpus) else None,
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def optimizer_defaults(kind: str) -> dict[str, Any]:
    """Defaults of GWTAdamW and `param_groups`; a key that the JSON leaves out still has a value."""
    if kind != "GWTAdamW":
        return {}
    from gwt_dist import GWTAdamW, param_groups
    from gwt_dist.recipes import DEFAULT

    found: dict[str, Any] = {}
    for function in (param_groups, GWTAdamW):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty and name != "params":
                found[name] = parameter.default
    return found | {"recipe": DEFAULT}  # None in the signature, by which the optimizer knows that nobody named one
