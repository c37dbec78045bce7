"""What ``gwt-dist plan --activations`` counts: of a model that it is told of, four ways."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gwt_dist.activations.measure import DTYPES, MEASURES, Held, attention, chosen_of, held, shapes
from gwt_dist.blocks import outermost
from gwt_dist.cli.models import meta_model

_ATTENTION = "gwt_dist_shapes"  # the name of `attention` within transformers


def count(name: str, dtype: str, sequences: int, tokens: int) -> dict[str, Held]:
    """Bytes that one rank holds of a forward and a backward pass, by measure.

    Recomputation is left out for a model without blocks, and 8 bits for one of
    which `compress_activations` chooses no module.

    Args:
        name: As for `read_model`. The model takes token ids, (sequences, tokens), and returns a loss, or logits,
            (sequences, tokens, words); one that takes ``labels`` is called as those of transformers are.
        dtype: Of the weights in the forward pass: "fp32", "bf16" or "fp16".
        sequences: Of a micro-batch.
        tokens: Of each.

    Raises:
        ValueError: If the model cannot be built or run on shapes alone.
    """
    found = {}
    with shapes(DTYPES[dtype]):
        model = meta_model(name, nullcontext()).train()
        _fuse_attention(model)
        ids_BT = torch.zeros(sequences, tokens, dtype=torch.long)
        for measure, (recomputed, in_8_bits) in MEASURES.items():
            if (recomputed and not outermost(model)) or (in_8_bits and not chosen_of(model)):
                continue
            try:
                found[measure] = held(model, lambda its: _loss(its, ids_BT), recomputed=recomputed, in_8_bits=in_8_bits)
            except Exception as error:
                raise ValueError(
                    f"activations of {name} cannot be counted: on token ids of shape ({sequences}, {tokens}) its "
                    f"forward or backward pass raised {type(error).__name__}: {' '.join(str(error).split())[:300]}. It "
                    f"runs on shapes without numbers, so nothing may ask for a number (.item(), if tensor). Leave "
                    f"--activations out, or give package.module:function of a model that can"
                ) from error
    return found


def _loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    takes = inspect.signature(model.forward).parameters
    if "labels" in takes:
        no_cache = {"use_cache": False} if "use_cache" in takes else {}
        loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, **no_cache).loss
        return loss
    found: Any = model(ids_BT)
    if not isinstance(found, Tensor) or found.dim() not in (0, 3):
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"it returned {shown}, and must return a loss, or logits (sequences, tokens, words)")
    return cross_entropy(found.flatten(0, 1).float(), ids_BT.flatten()) if found.dim() else found


def _fuse_attention(model: nn.Module) -> None:
    """Let a model of transformers call `attention` in place of torch's, before which it would repeat keys."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, attention)
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
