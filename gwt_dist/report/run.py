"""A run folder of the recipe, read with suspicion: it may be cut off, damaged, half done, or not one at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gwt_dist.train.metrics import FORMAT, PHASES

RECORD, METRICS, SUMMARY = "run.json", "metrics.jsonl", "summary.json"
SECTIONS = ("train", "deepspeed", "model", "corpus")  # of the record: what is a setting
NUMBERS = (
    "loss",
    "lr",
    "gradient_norm",
    "tokens",
    "tokens_per_second",
    "limited_norm_mean",
    "limited_norm_max",
    "limited_share",
    "validation_loss",
    "bits_per_byte",
)
RANK_BYTES = (
    "rank",
    "weights",
    "gradients",
    "masters",
    "wavelet_moments",
    "wavelet_adamw",
    "plain_moments",
    "plain_adamw",
    "scalars",
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says. `training` and `validation` are lines of its `metrics.jsonl`; `lacking` is told."""

    name: str
    record: dict[str, Any]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    summary: dict[str, Any] | None
    lacking: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        """Of every step, as the sequences of a step do not change."""
        return int(self.training[0]["tokens"]) // int(self.training[0]["step"])

    @property
    def resumed(self) -> list[int]:
        """Steps after which the run went on: those that its record lists. Of a record that lists none, the last logged
        step before each later start, which the line after it tells by its `first step`.
        """
        if "resumed" in self.record:
            return [step for step in self.record["resumed"] if step]
        lines = sorted((*self.training, *self.validation), key=lambda line: int(line["step"]))
        began = (line for line, after in pairwise(lines) if "first step" in (after.get("seconds") or {}))
        return [int(line["step"]) for line in began]

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text, by their dotted names."""
        return dict(flat({section: self.record.get(section) for section in SECTIONS}))

    @property
    def ranks(self) -> list[dict[str, int]]:
        """Bytes that each rank held at the end; none without a summary."""
        return self.summary["ranks"] if self.summary else []

    @property
    def moments(self) -> tuple[int, int]:
        """Bytes of the moments of all ranks, and those of AdamW in their place; zeros without a summary."""
        ours, adamw = (
            sum(rank[f"wavelet_{kind}"] + rank[f"plain_{kind}"] for rank in self.ranks) for kind in ("moments", "adamw")
        )
        return ours, adamw

    def seconds(self) -> dict[str, float]:
        """By phase, of the whole run: all its lines, and the last checkpoint. Empty where none were logged."""
        found = dict.fromkeys(PHASES, 0.0)
        after = [self.summary.get("seconds_after_last_line", {})] if self.summary else []
        for times in [line.get("seconds") or {} for line in (*self.training, *self.validation)] + after:
            for phase, seconds in times.items():
                found[phase] += seconds
        return {phase: seconds for phase, seconds in found.items() if seconds}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with a name of its own.

    Raises:
        ValueError: a folder that is none of a run, holds no step yet, is damaged, or comes from a newer version; two
            of them are the same.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError("the same run folder is named twice")
    short = [place.name for place in places]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the run folder, which the recipe was given as --output")
    record = _object(folder / RECORD)
    if record is None:
        raise ValueError(f"{folder} is no run folder: it has no {RECORD}, which the recipe writes at its start")
    version = record.get("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{folder / RECORD} has format {version!r}, and this gwt_dist knows {FORMAT} at most: the run is of a "
            "newer version. Upgrade gwt_dist to show it"
        )
    resumed = record.get("resumed", [])
    if not isinstance(resumed, list) or not all(map(_whole, resumed)):
        raise ValueError(f"{folder / RECORD}: resumed is {resumed!r}, and not a list of steps")
    lines, cut = _lines(folder / METRICS)
    training = [line for line in lines if "loss" in line]
    if not training:
        raise ValueError(f"{folder / METRICS} holds no step yet: there is nothing to show before log_every steps")
    for line in training:
        if not isinstance(line.get("tokens"), int) or line["tokens"] < line["step"]:
            raise ValueError(f"{folder / METRICS}: step {line['step']} has tokens {line.get('tokens')!r}")
    lacking = []
    if cut:
        lacking.append(f"the last line of {METRICS} is cut off and left out")
    if "seconds" not in training[-1]:
        lacking.append("no times and no limiter norms: the run is of a version that did not log them")
    summary = _summary(folder / SUMMARY)
    if summary is None:
        lacking.append(f"no {SUMMARY}: the run goes on, or was stopped. Bytes of its ranks are told at the end")
    elif summary["steps"] != training[-1]["step"]:
        lacking.append(
            f"{SUMMARY} is of step {summary['steps']}, and the run went on to {training[-1]['step']}: bytes are those "
            "of then"
        )
    validation = [line for line in lines if "validation_loss" in line]
    return Run(name, record, training, validation, summary, tuple(lacking))


def _lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a `metrics.jsonl`, and whether one more was cut off, by a kill or because it is being written."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    lines: list[dict[str, Any]] = []
    step = 1
    for number, text in enumerate(texts, 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts) and not text.endswith("\n"):
                return lines, True
            raise ValueError(f"{where} is not JSON: the file is damaged, and the curve would have a hole") from None
        if not isinstance(line, dict) or not _whole(line.get("step")) or line["step"] < step:
            raise ValueError(f"{where} has no step after {step - 1}: {text.strip()[:80]!r}")
        step = line["step"]
        for key in NUMBERS:
            if line.get(key) is not None and not _number(line[key]):
                raise ValueError(f"{where}: {key} is {line[key]!r}, which is no number")
        _check_seconds(line.get("seconds", {}), where)
        lines.append(line)
    return lines, False


def _summary(path: Path) -> dict[str, Any] | None:
    found = _object(path)
    if found is None:
        return None
    if not _whole(found.get("steps")):
        raise ValueError(f"{path}: steps is {found.get('steps')!r}, which is no number")
    ranks = found.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise ValueError(f"{path} has no bytes of ranks; it was not written by the recipe")
    for rank in ranks:
        for key in RANK_BYTES:
            if not isinstance(rank, dict) or not _whole(rank.get(key)):
                raise ValueError(f"{path}: {key} of a rank is missing or no number; it was not written by the recipe")
    _check_seconds(found.get("seconds_after_last_line", {}), str(path))
    return found


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds an object; None if it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object")
    return found


def _check_seconds(found: Any, where: str) -> None:
    if not isinstance(found, Mapping) or not all(k in PHASES and _number(v) for k, v in found.items()):
        raise ValueError(f"{where}: seconds are {found!r}, and not numbers by phase ({', '.join(PHASES)})")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and text of all that a mapping of mappings holds; None is left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)


def last(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[int, float] | None:
    """The step and the value of the last line that has a finite one; None if none has."""
    for line in reversed(lines):
        value = finite(line.get(key))
        if value is not None:
            return int(line["step"]), value
    return None


def finite(value: Any) -> float | None:
    """What can be drawn: a number; None for what is missing, NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None
