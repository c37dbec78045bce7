"""The LLaMA to train: transformers' own class, shapes from a JSON file, weights from the seed."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gwt_dist.train.config import read_mapping, refuse_unknown_keys
from gwt_dist.train.ds_config import zero_stage

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


def model_config(path: Path, vocab_size: int, sequence_length: int) -> LlamaConfig:
    """The `LlamaConfig` in a JSON file, with the tokenizer's vocabulary.

    Raises:
        ValueError: unknown key, sequences longer than the model's positions, or shapes that do not
            fit each other.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    shapes = read_mapping(path)
    refuse_unknown_keys(shapes, LlamaConfig().to_dict(), str(path))
    try:
        config = LlamaConfig(**shapes | {"vocab_size": vocab_size, "use_cache": False})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length={sequence_length} is more than max_position_embeddings="
            f"{config.max_position_embeddings} of {path}; lower the one or raise the other"
        )
    heads = config.num_attention_heads
    shared = config.num_key_value_heads or heads
    if heads % shared:
        raise ValueError(f"{path}: num_key_value_heads={shared} must divide {heads} heads")
    return config


def build_model(config: LlamaConfig, seed: int, engine_config: dict[str, Any]) -> LlamaForCausalLM:
    """A LLaMA with weights that depend on `seed` alone, not on ranks or ZeRO stage.

    Under ZeRO-3 it is built inside `deepspeed.zero.Init`, so that no rank ever holds all of it;
    this is a collective then.
    """
    from transformers import LlamaForCausalLM

    partitioned = zero_stage(engine_config) == 3
    context: Any = contextlib.nullcontext()
    if partitioned:
        import deepspeed

        context = deepspeed.zero.Init(config_dict_or_path=engine_config)
    with context:
        model = LlamaForCausalLM(config)
    initialise(model, config.initializer_range, seed, partitioned)
    return model


def initialise(model: nn.Module, std: float, seed: int, partitioned: bool = False) -> None:
    """LLaMA's initialisation, in place: normal for matrices, ones for norms, zeros for biases.

    Done here because under zero.Init transformers' own finds empty tensors. Each tensor has a
    generator of its own, seeded by (seed, name), so order and partitioning do not matter.
    """
    for name, parameter in model.named_parameters():
        gathered: Any = contextlib.nullcontext()
        if partitioned:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)
        with gathered, torch.no_grad():
            if parameter.ndim > 1:
                key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def token_losses(engine: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [batch, length] in nats, fp32, of `tokens` [batch, length + 1] (int64)."""
    logits = engine(input_ids=tokens[:, :-1], use_cache=False).logits
    targets = tokens[:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
