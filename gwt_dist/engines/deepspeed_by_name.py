"""DeepSpeed's functions that read one tensor by its parameter, `deepspeed.utils.safe_get_full_optimizer_state` and its
brothers.

They cut moments as they cut the weights, which are larger: one rank would raise and the others wait for it, or a value
be that of other elements. Weights and gradients they read rightly. What they call is replaced here, on the parameters
and the optimizer of one engine, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

# Methods that take the key of a state, as ZeRO-1 and 2 put them on each parameter and ZeRO-3's optimizer has them.
_METHODS = "get_full_hp_param", "set_full_hp_param", "get_local_fp32_param", "set_local_hp_param", "get_hp_param_device"


def refuse_states(zero: Any) -> None:
    """Make reading and writing of optimizer states by DeepSpeed's functions raise `ValueError`, on every rank alike."""
    for owner in (zero, *getattr(zero, "param_names", {})):
        for name in _METHODS:
            method = getattr(owner, name, None)
            if method is not None and not hasattr(method, "refuses_states"):
                setattr(owner, name, _refusing(method))


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, whose last argument is None for a weight and else the key of a state."""

    @wraps(method)
    def guarded(*args: Any, optim_state_key: str | None = None, **keywords: Any) -> Any:
        keys = [argument for argument in (*args, optim_state_key) if isinstance(argument, str)]
        if keys:
            raise ValueError(
                f"DeepSpeed cuts {keys[0]!r} as it cuts the weights, and moments of GWTAdamW are smaller than they: "
                f"safe_get_full_optimizer_state and its like would read or write those of other elements, or leave "
                f"ranks waiting. gwt_dist.full_state(engine, optimizer, name) returns the whole state of a tensor on "
                f"all ranks; to change a state, use gwt_dist.save and gwt_dist.load"
            )
        return method(*args, **keywords)

    guarded.refuses_states = True  # type: ignore[attr-defined]
    return guarded
