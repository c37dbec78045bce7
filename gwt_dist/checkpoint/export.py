"""The weights of a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gwt_dist.checkpoint import folder
from gwt_dist.checkpoint.dtypes import in_files, torch_dtype
from gwt_dist.checkpoint.exclude import shown
from gwt_dist.checkpoint.files import Reader
from gwt_dist.checkpoint.format import FLOATS, WEIGHT, CheckpointError, Entry, Index

CONFIG = "model_config"  # the key of `extra` that holds the config of the model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# How a model is run, not what it is; the first two can name code to fetch.
_RUNTIME = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_CODE = ("auto_map", "custom_pipelines")


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    progress: Callable[[int], object] = lambda count: None,
    beside: Callable[[Path, Index], object] = lambda folder, index: None,
) -> Path:
    """Write the weights of a checkpoint to a new folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Runs in one process without a process group. Tensors are put together one at a time, every chunk compared with its
    checksum, and one shard is in memory at a time. All of it gets its name when it is on the disk.

    Args:
        checkpoint: A checkpoint's folder, a run's folder, or its ``latest``.
        out: The folder to write; not there yet, or empty.
        config: The model's `transformers` config as a mapping; None takes what `save` was given as
            ``extra={"model_config": config.to_dict()}``.
        dtype: Of all floating-point tensors; None: what each had in the model, to which a master is rounded as the
            engine rounds it. float32 keeps what an fp32 master has beyond a bf16 weight.
        max_shard_size: Bytes of a file, or text such as ``"2GB"``; a tensor that is larger has a file of its own.
        progress: Called with the bytes of a tensor as it is stored, when it is done.
        beside: Called with the folder as it is written, which has config and weights then, and the checkpoint's index;
            for files that belong with them, such as those of `gwt_dist.report.card.describe`.

    Returns:
        `out`.

    Raises:
        CheckpointError: If the checkpoint is damaged, has no config, or is not of the model that the config describes;
            names the tensor or the file.
        ValueError: If `out` holds something or cannot be written, or `max_shard_size` makes no sense.
    """
    out = Path(out).absolute()
    if os.path.lexists(out) and (not out.is_dir() or out.is_symlink() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no empty folder; nothing in it is overwritten: name another one")
    where, sha256 = folder.locate(Path(checkpoint))
    index = folder.read_index(where, sha256)
    if index.excluded:
        raise CheckpointError(
            f"{where} was saved without {shown(index.excluded)} (exclude=), so it is no whole model. Load it with "
            f"gwt_dist.load(..., weights_only=True) into the model that has them, and save that by its own means "
            f"(save_pretrained; of adapters peft's). What is here is in the safetensors files of that folder"
        )
    found = config if config is not None else (index.extra or {}).get(CONFIG) if _mapping(index.extra) else None
    if not _mapping(found):
        raise CheckpointError(
            f"{where} has no config of its model: pass the model's config.json (--config), or save with "
            f'extra={{"{CONFIG}": model.config.to_dict()}}'
        )
    assert found is not None
    names, model_config = _plan(index, found, str(where))
    dtypes = {name: _dtype(index.tensors[name], dtype) for name in names.values()}
    for name in dtypes:
        if in_files(index.tensors[name].dtype)[0] == "U8" != index.tensors[name].dtype:
            raise CheckpointError(f"{name!r} is {index.tensors[name].dtype}, which safetensors files do not have")
    model_config.dtype = str(_main(index, dtypes)).removeprefix("torch.")
    writing = out.with_name(f".{out.name}.exporting")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(writing, ignore_errors=True)  # of an export that was killed
        writing.mkdir()
        with Reader(where, index.files) as reader:
            _write(writing, index, reader, names, dtypes, max_shard_size, progress)
        model_config.save_pretrained(writing)
        beside(writing, index)
        for path in sorted(path for path in writing.rglob("*") if path.is_file()):
            folder.sync_file(path)
        folder.sync_folder(writing)
        os.rename(writing, out)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; name a folder elsewhere") from error
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    folder.sync_folder(out.parent)
    return out


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _plan(index: Index, config: Mapping[str, Any], where: str) -> tuple[dict[str, str], Any]:
    """Names in the export and the tensors of the checkpoint that they stand for, and transformers' config.

    Compares names and shapes with the model that the config describes, built without memory.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    for key in _CODE:
        if key in config:
            raise CheckpointError(f"the config names code of its own ({key}), which an export does not pass on")
    settings = {key: value for key, value in config.items() if key not in _RUNTIME}
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"the config has model_type={kind!r}, which this version of transformers does not have")
    automatic: Any = AutoModelForCausalLM
    try:
        built = CONFIG_MAPPING[kind].from_dict(settings)
        with torch.device("meta"):
            model = automatic.from_config(built, attn_implementation="eager")
    except Exception as error:  # whatever a config makes transformers say
        raise CheckpointError(
            f"transformers builds no model from the config: {' '.join(str(error).split())}"
        ) from error
    built.architectures = [type(model).__name__]
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names: dict[str, str] = {}
    for name in expected:
        if name in index.tensors:
            main = tied.get(name, name)
            if main in names:
                raise CheckpointError(
                    f"{name!r} and {names[main]!r} are apart in {where}, and the config ties them, so one would be "
                    f"lost. Give the config with tie_word_embeddings=false"
                )
            names[main] = name
    missing = sorted(name for name in expected if tied.get(name, name) not in names)
    unexpected = sorted(index.tensors.keys() - expected.keys())
    for found, lacks in ((missing, where), (unexpected, f"the {type(model).__name__} of the config")):
        if found:
            shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
            raise CheckpointError(f"{lacks} does not have {shown}: the config is of another model")
    for name in names.values():
        if index.tensors[name].shape != expected[name]:
            raise CheckpointError(
                f"{name!r} has shape {index.tensors[name].shape} in {where} and {expected[name]} in the model of the "
                f"config"
            )
    return names, built


def _dtype(entry: Entry, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and entry.dtype in FLOATS else torch_dtype(entry.dtype)


def _main(index: Index, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most elements, which is the one that the config names."""
    counts: dict[torch.dtype, int] = {}
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + index.tensors[name].parts[WEIGHT].bytes
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _write(
    writing: Path,
    index: Index,
    reader: Reader,
    names: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str,
    progress: Callable[[int], object],
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    empty: dict[str, Tensor] = {
        name: torch.empty(index.tensors[stored].shape, dtype=dtypes[stored], device="meta")
        for name, stored in names.items()
    }
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} must be at least 1 byte")
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, held in split.filename_to_tensors.items():
        tensors = {}
        for name in held:
            stored = index.tensors[names[name]].parts[WEIGHT]
            tensors[name] = reader.whole(stored, f"weight of {names[name]!r},").to(dtypes[names[name]])
            progress(stored.bytes)
        save_file(tensors, writing / file, metadata={"format": "pt"})
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (writing / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
