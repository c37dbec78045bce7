"""A study file: which optimizers, at which rates, on which batches, and for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gwt_dist.study.values import ascending, entries, flag, number, text, whole
from gwt_dist.train.config import find_file, read_mapping, refuse_unknown_keys

PRIORITIES = (1, 2, 3)
DEVICES = ("cpu", "cuda", "auto")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch size: `tokens` in an optimizer step, `steps` of a run at full length, and the share of them of one that
    chooses, `short`; None is the study's.
    """

    tokens: int
    steps: int
    short: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """The settings of a row that are searched: rates, and the coefficient of the weight decay."""

    lr: float
    rest_lr: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One optimizer of a study, with all that does not change between its runs.

    `lr` are the rates to choose from, of the matrices in attention and MLP. The rest (embeddings, norms, head) has a
    rate of its own, one of `rest_lr`, or `rest_factor` times that of the matrices. All tensors have the weight decay,
    one of `weight_decay`. `like` names another row whose best settings this one takes as they are, all of them.
    """

    name: str
    optimizer: str
    lr: tuple[float, ...] = ()
    rest_lr: tuple[float, ...] = ()
    rest_factor: float = 1.0
    weight_decay: tuple[float, ...] = (0.0,)
    like: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    priority: int = 2
    batches: tuple[int, ...] = ()
    source: str = ""

    @property
    def start(self) -> Point:
        """Where the search begins: the lowest rate of the matrices, the middle one of the rest, the least decay."""
        lr = self.lr[0]
        rest = self.rest_lr[len(self.rest_lr) // 2] if self.rest_lr else lr * self.rest_factor
        return Point(lr, rest, self.weight_decay[0])

    def moved(self, point: Point, axis: str, value: float) -> Point:
        """`point` with another value on an axis; where the rest has no rates it follows the matrices."""
        point = replace(point, **{axis: value})
        return replace(point, rest_lr=value * self.rest_factor) if axis == "lr" and not self.rest_lr else point


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What a study file says; the defaults of its keys stand here.

    A row's rates are tried at `short`, a share of the steps, then the rates of its rest, then its weight decays, each
    with the best of those before. The best rate and its two neighbours are tried at full length. Rates go on, `extend`
    times at most, until both neighbours of the best are worse; beyond the row's own by `factor`.

    Models and batches are on `device`; "auto" is a GPU where torch sees one. `precision` "bf16" is autocast over fp32
    weights, `compile` torch.compile of forward and backward, `attention` what transformers calls `attn_implementation`.
    The table has the difference of each row to the row `reference` on the same seeds.
    """

    rows: tuple[Row, ...]
    batches: tuple[Batch, ...]
    name: str = "study"
    model: str = "study"
    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    attention: str = "sdpa"
    corpus: str = "stdlib"
    tokenizer: str = "bytes"
    sequence_length: int = 256
    micro_batch: int = 8
    eval_tokens: int = 65536
    warmup: float = 0.1
    min_lr_ratio: float = 0.1
    clipping: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    short: float = 0.25
    extend: int = 3
    factor: float = 2.0
    reference: str = ""

    def batches_of(self, row: Row) -> tuple[Batch, ...]:
        """The batch sizes of `row`, in the order of the study."""
        return tuple(batch for batch in self.batches if not row.batches or batch.tokens in row.batches)


def read_study(name: str) -> Study:
    """The study in a YAML file: a path, or a bare name in configs/studies.

    Raises:
        ValueError: no such file, an unknown key (the nearest is named), or a value that cannot be right.
    """
    path = find_file(name, "configs/studies", ".yaml")
    return study_from(read_mapping(path), str(path), path.stem)


def study_from(values: Mapping[str, Any], where: str, name: str = "study") -> Study:
    """A `Study` from plain values; `where` names their source in errors.

    Raises:
        ValueError: as `read_study`.
    """
    known = {item.name: item for item in dataclasses.fields(Study)}
    refuse_unknown_keys(values, known, where)
    given: dict[str, Any] = {"name": name}
    for key, value in values.items():
        if key == "rows":
            given[key] = tuple(row for entry in entries(value, key, where) for row in _rows(entry, where))
        elif key == "batches":
            given[key] = tuple(_batch(entry, where) for entry in entries(value, key, where))
        elif key == "seeds":
            given[key] = tuple(whole(seed, key, where, 0) for seed in entries(value, key, where))
        elif isinstance(known[key].default, bool):
            given[key] = flag(value, key, where)
        elif isinstance(known[key].default, str):
            given[key] = text(value, key, where)
        elif isinstance(known[key].default, int):
            given[key] = whole(value, key, where, 0 if key == "extend" else 1)
        else:
            given[key] = number(value, key, where)
    for key in ("rows", "batches"):
        if not given.get(key):
            raise ValueError(f"{where} has no {key}; a study needs at least one")
    study = Study(**given)
    _check(study, where)
    return study


def _check(study: Study, where: str) -> None:
    names = [row.name for row in study.rows]
    by_name = {row.name: row for row in study.rows}
    if study.reference not in ("", *names):
        raise ValueError(f"reference={study.reference!r} in {where} is none of its rows: {', '.join(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rows of {where} are called {twice[0]!r}; give each a name of its own")
    tokens = [batch.tokens for batch in study.batches]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"batches of {where} name the same tokens twice: {tokens}")
    for row in study.rows:
        strange = sorted(set(row.batches) - set(tokens))
        if row.like and (row.like not in names or by_name[row.like].like):
            raise ValueError(
                f"row {row.name!r} of {where} is like {row.like!r}, which is no row with rates of its own; there are "
                f"{', '.join(name for name, other in by_name.items() if not other.like)}"
            )
        if strange:
            raise ValueError(f"row {row.name!r} of {where} is for batches of {strange[0]} tokens; there are {tokens}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds={list(study.seeds)} in {where} must be different numbers, at least one")
    if study.device not in DEVICES:
        raise ValueError(f"device={study.device!r} in {where} must be one of {', '.join(DEVICES)}")
    if study.precision not in PRECISIONS:
        raise ValueError(f"precision={study.precision!r} in {where} must be one of {', '.join(PRECISIONS)}")
    for key, low, high in (("warmup", 0, 1), ("min_lr_ratio", 0, 1)):
        if not low <= getattr(study, key) <= high:
            raise ValueError(f"{key}={getattr(study, key)} in {where} is outside {low} to {high}")
    for short in (study.short, *(batch.short for batch in study.batches)):
        if short is not None and not 0 < short <= 1:
            raise ValueError(f"short={short} in {where} must be above 0 and at most 1")
    if study.factor <= 1:
        raise ValueError(f"factor={study.factor} in {where} must be above 1")
    if study.clipping < 0:
        raise ValueError(f"clipping={study.clipping} in {where} must be at least 0, which is none")
    sequence = study.sequence_length
    for batch in study.batches:
        if batch.tokens % sequence or (batch.tokens // sequence) % min(study.micro_batch, batch.tokens // sequence):
            raise ValueError(
                f"a batch of {batch.tokens} tokens in {where} is no multiple of sequence_length={sequence} times "
                f"micro_batch={study.micro_batch}"
            )
    if study.eval_tokens < sequence:
        raise ValueError(f"eval_tokens={study.eval_tokens} in {where} is less than one sequence of {sequence}")


def _rows(entry: Any, where: str) -> list[Row]:
    """The row of one entry, or one for each of its `levels`."""
    if not isinstance(entry, dict):
        raise ValueError(f"a row of {where} is {entry!r}; expected 'key: value' pairs")
    entry = dict(entry)
    here = f"row {entry.get('name', '?')!r} of {where}"
    refuse_unknown_keys(entry, {item.name for item in dataclasses.fields(Row)} | {"levels"}, here)
    for key in ("name", "optimizer"):
        if key not in entry:
            raise ValueError(f"{here} has no {key}")
    searched = sorted({"lr", "rest_lr", "rest_factor", "weight_decay"} & set(entry))
    if ("lr" in entry) == ("like" in entry) or ("like" in entry and searched):
        found = ", ".join(searched) or "neither"
        raise ValueError(f"{here} must have lr, or like and no settings of its own; it has {found}")
    if "weight_decay" in (entry.get("options") or {}):
        raise ValueError(f"weight_decay of {here} stands in its options; write it beside lr, where it may be a list")
    levels = entry.pop("levels", None)
    row = _row(entry, here)
    if levels is None:
        return [row]
    return [
        dataclasses.replace(
            row, name=f"{row.name}-{level}", options=row.options | {"level": whole(level, "levels", here, 0)}
        )
        for level in entries(levels, "levels", here)
    ]


def _row(entry: dict[str, Any], here: str) -> Row:
    given: dict[str, Any] = {
        key: text(entry[key], key, here) for key in ("name", "optimizer", "source", "like") if key in entry
    }
    for key, least in (("lr", "above 0"), ("rest_lr", "at least 0"), ("weight_decay", "at least 0")):
        if key in entry:
            given[key] = ascending(entry[key], key, least, here)
    if "rest_factor" in entry:
        given["rest_factor"] = number(entry["rest_factor"], "rest_factor", here)
        if given["rest_factor"] < 0:
            raise ValueError(f"rest_factor={given['rest_factor']} in {here} must be at least 0")
    if {"rest_lr", "rest_factor"} <= set(given):
        raise ValueError(f"{here} has rest_lr and rest_factor; keep one")
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise ValueError(f"options={options!r} in {here}: expected 'key: value' pairs")
    priority = whole(entry.get("priority", 2), "priority", here, 1)
    if priority not in PRIORITIES:
        raise ValueError(f"priority={priority} in {here} must be one of {PRIORITIES}")
    batches = tuple(whole(tokens, "batches", here, 1) for tokens in entries(entry.get("batches", []), "batches", here))
    return Row(**given, options=options, priority=priority, batches=batches)


def _batch(entry: Any, where: str) -> Batch:
    if not isinstance(entry, dict):
        raise ValueError(f"a batch of {where} is {entry!r}; expected tokens: and steps:")
    here = f"batches of {where}"
    refuse_unknown_keys(entry, ("tokens", "steps", "short"), here)
    missing = sorted({"tokens", "steps"} - set(entry))
    if missing:
        raise ValueError(f"a batch of {where} has no {missing[0]}")
    short = None if entry.get("short") is None else number(entry["short"], "short", here)
    return Batch(**{key: whole(entry[key], key, here, 1) for key in ("tokens", "steps")}, short=short)


def shapes_of(study: Study) -> Path:
    """The file with the shapes of the model."""
    return find_file(study.model, "configs/models")
