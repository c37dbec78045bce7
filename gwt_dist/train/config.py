"""The settings of a pre-training run: one frozen dataclass, its file and its command line.

`TrainConfig` is the single source of truth: the YAML/JSON reader, the argument parser and `--help`
are derived from its fields. What belongs to the engine (batch sizes, precision, clipping, ZeRO
stage, optimizer) lives in the DeepSpeed JSON instead, see `ds_config.py`; `lr`, `level` and `recipe` take the place of
three of its values.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from gwt_dist import shipped


def _key(default: Any, help: str, told: str = "") -> Any:
    """A field; `told` is its default in words, where that is None."""
    return field(default=default, metadata={"help": help, "default": told or repr(default)})


_OF_JSON = "as the JSON says"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything about a run that is not the engine's business; see `launch/pretrain.py --help`.

    Raises:
        ValueError: a value is outside its range; the message names key, value and range.
    """

    model: str = _key("tiny", "name of a file in configs/models, or a path to such a JSON file")
    deepspeed_config: str = _key(
        "configs/zero2.json",
        "DeepSpeed JSON: batch sizes, precision, clipping, ZeRO stage and optimizer",
    )
    lr: float | None = _key(None, "optimizer.params.lr of the DeepSpeed JSON for this run", _OF_JSON)
    level: int | None = _key(None, "optimizer.params.level of the DeepSpeed JSON for this run", _OF_JSON)
    recipe: str | None = _key(None, "optimizer.params.recipe of the DeepSpeed JSON for this run", _OF_JSON)
    corpus: str = _key(
        "stdlib",
        "text: 'stdlib' (Python's own sources and docs), 'packages' (those of installed packages too) or 'packages:N' "
        "(at most N megabytes of them), a folder, file or glob of .txt/.jsonl, or "
        "a `datasets` name, 'owner/name' or 'owner/name:config', streamed",
    )
    tokenizer: str = _key(
        "bytes",
        "'bytes', 'bpe:N' (N tokens, trained on the corpus), or what AutoTokenizer loads",
    )
    sequence_length: int = _key(256, "predicted tokens in one sequence")
    steps: int = _key(400, "optimizer steps in the whole run")
    warmup_steps: int = _key(
        None, "optimizer steps over which the learning rate rises from 0", "a tenth of steps, at most 40"
    )
    min_lr_ratio: float = _key(0.1, "learning rate at the end of the cosine, as a share of its top")
    seed: int = _key(0, "seed of the initial weights and of the data order")
    eval_every: int = _key(100, "optimizer steps between validations; 0: only at the end")
    eval_tokens: int = _key(65536, "validation tokens, rounded down to whole sequences")
    log_every: int = _key(10, "optimizer steps between lines of metrics.jsonl")
    save_every: int = _key(200, "optimizer steps between checkpoints; 0: only at the end")
    keep: int = _key(2, "newest checkpoints kept; 0: all")
    output: str = _key("runs/pretrain", "run folder; must be empty or absent unless resuming")
    resume: str = _key(
        "",
        "'latest' (of the output folder; what --resume alone means; under torchrun --max-restarts the run begins if "
        "there is none yet), a run folder, or a checkpoint (RUN/checkpoints/step-*)",
    )
    timeout: int = _key(1800, "seconds that a rank waits for the others before it gives up")
    threads: int = _key(0, "CPU threads of torch per rank; 0: torch's own choice")
    compress_activations: bool = _key(False, "what the backward pass needs of norms, MLPs and projections in 8 bits")
    shuffle_buffer: int = _key(10000, "documents of a streamed corpus that are shuffled together, a rank")

    def __post_init__(self) -> None:
        for name in ("model", "deepspeed_config", "corpus", "tokenizer", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give a name or a path")
        for name in ("sequence_length", "steps", "eval_tokens", "log_every", "shuffle_buffer", "timeout"):
            _require(name, getattr(self, name), at_least=1)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(40, self.steps // 10))
        for name in ("warmup_steps", "seed", "eval_every", "save_every", "keep", "threads"):
            _require(name, getattr(self, name), at_least=0)
        if self.recipe == "":
            raise ValueError("recipe is empty; name one, or leave it to the DeepSpeed JSON")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio!r} is outside 0 to 1")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than steps={self.steps}: the learning "
                "rate would never reach its top; lower warmup_steps"
            )
        if self.eval_tokens < self.sequence_length:
            raise ValueError(
                f"eval_tokens={self.eval_tokens} is less than one sequence of "
                f"sequence_length={self.sequence_length}; raise eval_tokens"
            )


def _require(name: str, value: int, *, at_least: int) -> None:
    if value < at_least:
        raise ValueError(f"{name}={value} must be at least {at_least}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The one mapping in a `.json`, `.yaml` or `.yml` file.

    Raises:
        ValueError: missing or unreadable file, a key given twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"configuration file {path} is no text ({error}); name a .json or .yaml file") from None
    except OSError as error:
        raise ValueError(f"configuration file {path} cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, path))
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.load(text, _OneOfEach)
        else:
            raise ValueError(f"{path} is neither .json nor .yaml; rename it")
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be parsed: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected 'key: value' pairs")
    return content


class _OneOfEach(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.YAMLError(f"key {key.value!r} stands twice;{key.start_mark} is the second")
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key {twice[0]!r} stands twice in {path}; keep one of them")
    return dict(pairs)


def refuse_unknown_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first of `keys` that is not in `known`, naming the nearest."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in {where}; {hint}")


def find_file(name: str, folder: str = "", suffix: str = ".json") -> Path:
    """A configuration file by path, or by bare name in `folder` (such as 'configs/models').

    Relative paths are tried from the working directory, then among the files that come with the package.

    Raises:
        ValueError: no such file; the message lists the bare names that exist.
    """
    for candidate in [name, *([f"{folder}/{name}{suffix}"] if folder else [])]:
        if (found := shipped.find(candidate)) is not None:
            return found
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder; name a configuration file")
    shown = f"; the names in {folder} are {', '.join(shipped.names(folder, suffix))}" if folder else ""
    raise ValueError(f"no such configuration file: {name!r}{shown}")


def _convert(kind: type, value: Any, key: str, where: str) -> Any:
    """`value` as `kind`; YAML reads '1e-3' as text and '1e4' of a whole number as a float."""
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool) or value is None or isinstance(value, (dict, list)):
            raise ValueError
        if kind is int:
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (ValueError, OverflowError, KeyError):
        expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
        raise ValueError(f"{key}={value!r} in {where}: expected {expected}") from None


def _kinds() -> dict[str, type]:
    """The type of each field, of one that may be None the other."""
    hints = get_type_hints(TrainConfig)
    return {name: next((kind for kind in get_args(hint) if kind is not NoneType), hint) for name, hint in hints.items()}


def config_from(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A `TrainConfig` from plain values; `where` names their source in errors.

    Raises:
        ValueError: unknown key, wrong type, or a value out of range.
    """
    kinds = _kinds()
    refuse_unknown_keys(values, kinds, where)
    converted = {key: _convert(kinds[key], value, key, where) for key, value in values.items()}
    return TrainConfig(**converted)


def build_parser() -> argparse.ArgumentParser:
    """The command line: `--config FILE` and one option per field of `TrainConfig`."""
    parser = argparse.ArgumentParser(
        prog="pretrain",
        description="Pre-train a LLaMA under DeepSpeed ZeRO with wavelet-space Adam moments.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML or JSON file with any of the keys below")
    # Required by the deepspeed launcher, which adds it to the command of every rank.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    kinds = _kinds()
    for item in dataclasses.fields(TrainConfig):
        names = [f"--{item.name}"]
        if "_" in item.name:
            names.append(f"--{item.name.replace('_', '-')}")
        # `--resume` alone means the newest checkpoint of the output folder.
        alone: dict[str, Any] = {"nargs": "?", "const": "latest"} if item.name == "resume" else {}
        parser.add_argument(
            *names,
            **alone,
            dest=item.name,
            default=argparse.SUPPRESS,
            metavar=kinds[item.name].__name__.upper(),
            help=f"{item.metadata['help']} (default: {item.metadata['default']})",
        )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[TrainConfig, int | None]:
    """The configuration and the launcher's local rank, if it gave one.

    Options on the command line win over the file, the file over the defaults.

    Raises:
        ValueError: anything wrong with the file, a key or a value.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        options = [name for action in parser._actions for name in action.option_strings]
        refuse_unknown_keys([rest[0].split("=")[0]], options, "the command line")
    given = vars(arguments)
    file, local_rank = given.pop("config"), given.pop("local_rank")
    values: dict[str, Any] = {}
    if file is not None:
        path = find_file(file)
        values = dict(read_mapping(path))
        config_from(values, str(path))
    source = "the command line" if file is None else f"the command line and {file}"
    return config_from(values | given, source), local_rank
