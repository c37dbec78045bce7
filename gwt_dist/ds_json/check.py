"""What a DeepSpeed JSON says, and what in it is no value: "auto", a value of another kind, a misspelt key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gwt_dist import keys
from gwt_dist.ds_json.known import (
    AUTO,
    FILLED,
    OPTIMIZER_KEYS,
    OURS,
    OURS_KEYS,
    OWN_AUTO,
    SECTION,
    TOP_LEVEL_KEYS,
    TYPE,
    must_be,
    problem,
)
from gwt_dist.ds_json.read import joined


def value(settings: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """What `settings` say of one key, written ``"zero_optimization.stage"``; `default` for nothing or null.

    Raises `ValueError` that names the key for "auto" and for a value of another kind.
    """
    found: Any = settings
    names = path.split(".")
    for i, key in enumerate(names):
        if found is None:
            return default
        if not isinstance(found, Mapping):
            raise ValueError(must_be(".".join(names[:i]), found, SECTION[1]))
        found = found.get(key)
    if found is None:
        return default
    if found == AUTO:
        raise ValueError(why_auto(path))
    wrong = problem(path, found)
    if wrong:
        raise ValueError(wrong)
    return found


def precision(settings: Mapping[str, Any]) -> str:
    """'bf16', 'fp16' or 'fp32': the storage of the weights in the forward pass; raises `ValueError` as `value`."""
    # DeepSpeed reads the older name where the newer is not there.
    brain = "bf16" if settings.get("bf16") is not None else "bfloat16"
    if value(settings, f"{brain}.enabled", False):
        return "bf16"
    return "fp16" if value(settings, "fp16.enabled", False) else "fp32"


def autos(settings: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are "auto" and that DeepSpeed itself has no such value for."""
    for path, found in _walk(settings, ""):
        if found == AUTO and not any(f"{path}.".startswith(f"{own}.") for own in OWN_AUTO):
            yield path


def why_auto(path: str) -> str:
    """Why a key may not be "auto", and what to write."""
    if path in FILLED:
        return (
            f'{path} is "auto", which transformers\' Trainer and Accelerate replace by what they are told; '
            f"nothing does here, and DeepSpeed would take its default in silence. Write the value"
        )
    return (
        f'{path} is "auto", which nothing replaces, not even transformers\' Trainer or Accelerate at all times; '
        f"DeepSpeed would take its default in silence. Write the value, or remove the key"
    )


def mistakes(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is of a wrong kind or misspelt so that DeepSpeed would ignore it; "auto" is none of them."""
    for path, found in _walk(settings, "", sections=True):
        wrong = "" if found == AUTO else problem(path, found)
        if wrong:
            yield wrong
    yield from misspelt(settings)
    ours = settings.get(OURS, {})
    if not isinstance(ours, Mapping) or not set(ours) <= set(OURS_KEYS):
        yield (
            f"section {OURS!r} of the DeepSpeed JSON is {ours!r}, which gwt_dist.initialize could not follow: it may "
            f"have {', '.join(OURS_KEYS)} alone"
        )
    for section in ("optimizer", "scheduler"):
        said = settings.get(section)
        if isinstance(said, Mapping):
            yield from _misspelt(said, OPTIMIZER_KEYS, f"section {section!r} of the DeepSpeed JSON", cutoff=0.6)
    if _enabled(settings, "fp16") and (_enabled(settings, "bf16") or _enabled(settings, "bfloat16")):
        yield "fp16.enabled and bf16.enabled are both true; keep one of them"


def misspelt(settings: Mapping[str, Any]) -> Iterator[str]:
    """The top-level keys that are nearly DeepSpeed's, and which it would ignore."""
    yield from _misspelt(settings, (*TOP_LEVEL_KEYS, OURS), "the DeepSpeed JSON", cutoff=0.85)


def refuse(settings: Mapping[str, Any], where: str = "") -> None:
    """Raise `ValueError` for the first mistake and the first "auto"; `where` names the file."""
    for wrong in mistakes(settings):
        raise ValueError(f"{wrong}{where and f' (in {where})'}")
    for path in autos(settings):
        raise ValueError(f"{why_auto(path)}{where and f' (in {where})'}")


def section_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """``optimizer.params`` where the optimizer section is ours, None where there is none or another.

    Raises `ValueError` for a section that DeepSpeed could not read, and for our type in another spelling.
    """
    kind = value(settings, "optimizer.type")
    if kind is None and value(settings, "optimizer"):
        raise ValueError(
            f"the optimizer section of the DeepSpeed JSON has no type, and DeepSpeed would step with nothing; write "
            f'"type": "{TYPE}", or remove the section'
        )
    near = difflib.get_close_matches(str(kind).lower(), [TYPE.lower()], n=1, cutoff=0.85)
    if kind != TYPE and near:
        raise ValueError(f"optimizer.type={kind!r} of the DeepSpeed JSON is no optimizer; write {TYPE!r}")
    return dict(value(settings, "optimizer.params", {})) if kind == TYPE else None


def checked(params: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer.params`` as keywords of `GWTAdamW` and `param_groups`.

    Raises `ValueError` for an unknown key, "auto", text that is a number in quotes, and targets or rest of another
    kind.
    """
    keys.refuse_unknown(params, "optimizer.params", "targets", "rest")
    for path in autos({"optimizer": {"params": params}}):
        raise ValueError(why_auto(path))
    options = _checked(params, "optimizer.params")
    if "rest" in options:
        if not isinstance(options["rest"], Mapping):
            raise ValueError(must_be("optimizer.params.rest", options["rest"], SECTION[1]))
        keys.refuse_unknown(options["rest"], "optimizer.params.rest")
        options["rest"] = _checked(options["rest"], "optimizer.params.rest")
    targets = options.get("targets", "")
    for part, level in targets.items() if isinstance(targets, Mapping) else ():
        if not isinstance(level, int):
            raise ValueError(f"optimizer.params.targets.{part}={level!r} must be a level, a whole number")
    if not isinstance(targets, (str, list, tuple, Mapping)):
        raise ValueError(
            f"optimizer.params.targets={targets!r} must be a part of a module name, a list of such parts, or an "
            f"object of parts and their levels"
        )
    return options


def _checked(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of a group; raises `ValueError` for text that is a number in quotes."""
    options = dict(params)
    for key, found in options.items():
        if isinstance(found, str) and _in_quotes(found):
            raise ValueError(
                f"{where}.{key} is the text {found!r}; write the value without quotes (in YAML, which takes 1e-3 for "
                f"text, as 1.0e-3)"
            )
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    return options


def _walk(found: Any, path: str, sections: bool = False) -> Iterator[tuple[str, Any]]:
    """Each value with its key; objects and lists themselves too, if `sections`."""
    inside: Iterable[tuple[Any, Any]] | None = None
    if isinstance(found, Mapping):
        inside = found.items()
    elif isinstance(found, (list, tuple)):
        inside = enumerate(found)
    if path and (inside is None or sections):
        yield path, found
    for key, inner in inside or ():
        yield from _walk(inner, joined(path, key), sections)


def _misspelt(said: Mapping[str, Any], known: Iterable[str], where: str, cutoff: float) -> Iterator[str]:
    known = list(known)
    for key in said:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=cutoff) if key not in known else []
        if near:
            yield f"unknown key {key!r} in {where}, which DeepSpeed would ignore in silence; did you mean {near[0]!r}?"


def _enabled(settings: Mapping[str, Any], section: str) -> bool:
    found = settings.get(section)
    return isinstance(found, Mapping) and found.get("enabled") is True


def _in_quotes(text: str) -> bool:
    """Whether text looks like a number, a truth value or null."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false", "null")
    return True
