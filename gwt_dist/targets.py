"""What a target matches: weight matrices by the names of their modules. Knows no torch, so that plans need none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gwt_dist.units import check_level

BLOCKS = "blocks"  # the matrices of the blocks, as `gwt_dist.blocks` finds them; it may be none
ALL = "all-linear"  # every matrix that is neither an embedding, nor tied to one, nor a kernel
Targets = str | Sequence[str] | Mapping[str, int]
_OF_PARAMETER = re.compile(r"\.weight\$?$")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that a target can match."""

    name: str  # of its module, or of the parameter where that is not called ``weight``
    in_blocks: bool = False
    is_tied: bool = False  # to an embedding
    is_stacked: bool = False  # [experts, rows, columns]: a matrix for each expert
    is_kernel: bool = False  # of a convolution: a row for each output channel


def levels_by_pattern(targets: Targets, level: int) -> dict[str, int]:
    """The patterns of `targets` in order, each with its level; raises `ValueError` for what is no pattern or level."""
    if isinstance(targets, Mapping):
        patterns = dict(targets)
    else:
        patterns = dict.fromkeys([targets] if isinstance(targets, str) else targets, level)
    if not patterns:
        raise ValueError("targets is empty, so every weight would be AdamW; name modules, or use torch.optim.AdamW")
    for pattern, its in patterns.items():
        checked_pattern(pattern, "target", "module name")
        check_level(its)
    return patterns


def checked_pattern(pattern: object, what: str, whose: str) -> str:
    """A pattern that `matches` takes; raises `ValueError`, in which it is a `what` for a `whose`, for anything else."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{what} {pattern!r} must be a part of a {whose} or a regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from error
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is a part of a name, or a regular expression that matches all of it."""
    return pattern in name or re.fullmatch(pattern, name) is not None


def first_match(patterns: Iterable[str], matrix: Matrix | None) -> str | None:
    """The first pattern that matches a matrix; None for no match, and for what is no matrix."""
    if matrix is None:
        return None
    for pattern in patterns:
        if pattern == BLOCKS:
            found = matrix.in_blocks
        elif pattern == ALL:
            found = not (matrix.is_tied or matrix.is_kernel)
        else:
            # The name of the parameter, as `describe` prints it, for a pattern that ends like it.
            whole = f"{matrix.name}.weight" if _OF_PARAMETER.search(pattern) else matrix.name
            found = matches(pattern, matrix.name) or matches(pattern, whole)
        if found:
            return pattern
    return None


def unmatched(patterns: Iterable[str], matched: Iterable[str | None], trained: Iterable[Matrix]) -> str:
    """What to tell if `BLOCKS` matched nothing, '' if it did; raises `ValueError` for another pattern that did not.

    `matched` are the patterns that matched any of the `trained` matrices.
    """
    trained, patterns = list(trained), list(patterns)
    found, told, names = set(matched), "", sorted(matrix.name for matrix in trained)
    for pattern in patterns:
        if pattern in found:
            continue
        takers = {first_match(patterns, its): its.name for its in trained if first_match([pattern], its)}
        if takers and pattern in (BLOCKS, ALL) and not takers.keys() & {BLOCKS, ALL}:  # what is left may be none
            continue
        for taker, name in takers.items():
            raise ValueError(
                f"target {pattern!r} comes too late: the first that matches decides, and {name!r} is taken by "
                f"{taker!r}. Write {pattern!r} before it"
            )
        if pattern != BLOCKS:
            shown = ", ".join(names[:4]) or "none, there is no weight matrix to be trained"
            raise ValueError(
                f"target {pattern!r} matches no weight matrix to be trained, so it would be AdamW in silence. Names "
                f"that can match: {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            )
        told = (
            f"the model has no weight matrix to be trained within blocks, nor others beside embeddings and the output "
            f"layer, so no weight has a level by the target {BLOCKS!r} and all of these are AdamW's. Name modules in "
            f"targets, or use torch.optim.AdamW"
        )
    return told
