"""What the options of ``gwt-dist plan`` and a DeepSpeed JSON say, as values."""

from __future__ import annotations

import copy
import json
from typing import Any

from gwt_dist import ds_json

OPTION = {"targets": "target"}  # keys of the JSON with another name on the command line
# Options that answer what is "auto" in a JSON, which the Trainer fills in when it runs.
ANSWERS = {
    "bf16.enabled": "weights",
    "bfloat16.enabled": "weights",
    "fp16.enabled": "weights",
    "gradient_accumulation_steps": "accumulation",
    "train_micro_batch_size_per_gpu": "micro_batch",
}
_THRESHOLD = "zero_optimization.stage3_param_persistence_threshold"


def asked(settings: dict[str, Any]) -> list[str]:
    """The keys of `ANSWERS` that are "auto" and that decide something."""
    autos = set(ds_json.autos(settings))
    bf16 = "bf16.enabled" not in autos and ds_json.value(settings, "bf16.enabled", False)
    return [path for path in ANSWERS if path in autos and not (bf16 and path == "fp16.enabled")]


def answered(settings: dict[str, Any], values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """A DeepSpeed JSON with the answers of the command line where it is "auto", as far as bytes depend on it.

    Args:
        settings: The JSON, which is left as it is.
        values: Of the options that `ANSWERS` names.
        given: Names of the options that were given.

    Raises:
        ValueError: For all that is "auto" and has no answer, at once.
    """
    found, left = copy.deepcopy(settings), []
    for path in asked(settings):
        option, (section, _, key) = ANSWERS[path], path.rpartition(".")
        if option in given:
            said = values[option]
            (found[section] if section else found)[key] = said == section.replace("bfloat", "bf") if section else said
        else:
            left.append(f"{path} (give --{option.replace('_', '-')})")
    autos = set(ds_json.autos(settings))
    if "train_batch_size" in autos:
        del found["train_batch_size"]  # it follows from the others
    if _THRESHOLD in autos and ds_json.value(settings, "zero_optimization.stage", 0) == 3:
        left.append(f"{_THRESHOLD} (write a number; the Trainer takes 10 times the hidden size)")
    decided = "weights" in given and not left and ds_json.precision(found)
    if decided and decided != values["weights"]:
        raise ValueError(f"--weights {values['weights']} and the DeepSpeed JSON, which would make weights {decided}")
    if left:
        raise ValueError(
            f'"auto" is filled in by the Trainer when it runs, and a plan needs a value: {", ".join(left)}'
        )
    return found


def mesh_of(text: str) -> tuple[int, int]:
    """Replicas and shards of ``--mesh``."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--mesh {text!r} must be REPLICASxSHARDS, such as 8x8")
    return int(parts[0]), int(parts[1])


def rest_of(parts: list[str]) -> dict[str, Any]:
    """Keys of ``--rest``: numbers, true, false and null as in JSON, True, False and None, all else text."""
    of_python = {"True": True, "False": False, "None": None}
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals) or key in found:
            raise ValueError(f"--rest {part!r} must be KEY=VALUE, each key once, such as --rest level=1")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = of_python.get(value, value)
    return found


def params_of(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """What a DeepSpeed JSON says of the groups and the command line does not.

    "auto" is left out where the Trainer fills it in: no bytes depend on those keys.
    """
    said = {
        key: value
        for key, value in (ds_json.section_of(settings) or {}).items()
        if OPTION.get(key, key) not in given
        and not (value == ds_json.AUTO and f"optimizer.params.{key}" in ds_json.FILLED)
    }
    return ds_json.checked(said)


def batch_of(
    settings: dict[str, Any], batch: dict[str, int], given: set[str], world: int, fixed: bool
) -> dict[str, int]:
    """`batch` with what the file says of it on so many ranks and the command line does not; `fixed`: no --fit."""
    from gwt_dist.train.ds_config import batch_sizes

    names = {"accumulation": "gradient_accumulation_steps", "micro_batch": "train_micro_batch_size_per_gpu"}
    said: dict[str, Any] = {
        key: batch[option] if option in given else ds_json.value(settings, key) for option, key in names.items()
    }
    micro = said["train_micro_batch_size_per_gpu"]
    # The size of the whole is another one as soon as a part of it or the number of ranks is not the file's.
    if not given & set(names) and (fixed or micro is None):
        said["train_batch_size"] = ds_json.value(settings, "train_batch_size")
    if micro is None and said.get("train_batch_size") is None:
        said["train_micro_batch_size_per_gpu"] = batch["micro_batch"]
    split = ds_json.value(settings, "sequence_parallel_size", 1)
    if world % split:
        raise ValueError(f"{world} ranks cannot be shared out by sequence_parallel_size={split}; give another --world")
    sizes = batch_sizes(said, world // split, "the DeepSpeed JSON")
    return {**batch, "accumulation": sizes.accumulation, "micro_batch": sizes.micro}
