"""Indexes of earlier versions as ones of today, JSON to JSON, before anything in them is checked.

Version 1 knew two moments and the norm of a limiter. Versions 1 and 2 kept what is the user's as JSON made it, with
lists for tuples and text for keys; it stays so, but for the milestones of a MultiStepLR, which would never be reached.
Before version 4 all state was in fp32.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from gwt_dist.formats import FP32


def lift_index(content: dict[str, Any]) -> dict[str, Any]:
    """An index of version 1 or 2, which had the engine's schedule among its counters; entries are left as they are."""
    engine = dict(content["engine"] or {})
    schedules = {"engine_schedule": engine.pop("lr_scheduler", None), "scheduler": content["scheduler"]}
    if schedules["scheduler"] == schedules["engine_schedule"]:
        schedules["scheduler"] = None  # the engine's own was given to `save`, and written twice
    wrapped = {
        key: None if state is None else {"class": "", "state": _lift_state(state)} for key, state in schedules.items()
    }
    return content | wrapped | {"engine": engine or None, "excluded": {}, "tied": {}}


def _lift_state(state: Any) -> Any:
    """That of a schedule of torch's, within others too."""
    if not isinstance(state, dict):
        return state
    steps, inner = state.get("milestones"), state.get("_schedulers")
    if isinstance(steps, dict) and all(re.fullmatch(r"[0-9]{1,18}", key) for key in steps):
        state = state | {"milestones": Counter({int(key): value for key, value in steps.items()})}
    return state | {"_schedulers": [_lift_state(one) for one in inner]} if isinstance(inner, list) else state


def lift_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of version 1 as one of version 2."""
    norm = entry.pop("limited_norm")
    fields = {}
    if entry["step"] is not None:
        # Only what has a level may be without a second moment.
        kept = [name for name in ("exp_avg", "exp_avg_sq") if name in entry["parts"] or not entry["level"]]
        fields = {name: {"extent": "unit"} for name in kept} | {"limited_norm": {"extent": "tensor"}}
    return entry | {"fields": fields, "numbers": {"limited_norm": norm or 0.0} if fields else {}}


def lift_field(field: dict[str, Any]) -> dict[str, Any]:
    """What version 2 or 3 says of a field as version 4 does."""
    return field | {"format": FP32}
