"""A recipe that is a declaration and two functions: state a unit, a row and a place in a row, sums over all three."""

from __future__ import annotations

from torch import Tensor, ones_like, zeros_like

from gwt_dist.declare import Extent, Field, Pass, Program, Sum
from gwt_dist.formulas import FORMULAS, Share
from gwt_dist.keys import Key
from gwt_dist.recipes import RECIPES, Recipe, register

FIELDS = Field("velocity", Extent.UNIT), Field("row_sq", Extent.ROW), Field("place_sq", Extent.COLUMN)
SUMS = Sum("g2"), Sum("row", Extent.ROW), Sum("place", Extent.COLUMN, numbers=2)
PROGRAM = Program("toy", FIELDS, (Pass("look", SUMS), Pass("move", writes=True)))


class Toy:
    """Momentum over the root of a moving mean square of its row, of its place in the row, and of the tensor."""

    @staticmethod
    def look(share: Share) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        a_N = share.piece.transform.approximation(share.x_NU)
        share.state["velocity"].mul_(share.rule["beta1"]).add_(a_N)
        square_N = a_N.double().square()
        return {"g2": square_N, "row": square_N, "place": (square_N, ones_like(square_N))}

    @staticmethod
    def move(share: Share) -> Tensor:
        state, sums, rate = share.state, share.sums, share.rule["toy"]
        total, rows = sums["place"][0], sums["place"][1].clamp(min=1)
        state["row_sq"].lerp_(sums["row"].to(state["row_sq"]), rate)
        state["place_sq"].lerp_((total / rows).to(state["place_sq"]), rate)
        square_N = share.spread_rows(state["row_sq"]) + share.spread_columns(state["place_sq"])
        u_N = state["velocity"] / (square_N + sums["g2"].to(square_N)).sqrt().add(1e-3)
        u_NU = share.piece.transform.synthesis(share.x_NU, u_N, ones_like(u_N), zeros_like(u_N))
        return u_NU * share.rule.lr


if "toy" not in RECIPES:  # a pool of ranks imports it once, and so does whoever runs them
    FORMULAS["toy"] = Toy
    adamw = RECIPES["energy"]
    register(
        "toy",
        Recipe(
            lambda _: PROGRAM, adamw.plain, lambda options: adamw.numbers(options) | {"toy": options["toy"]}, ("toy",)
        ),
        {"toy": Key(0.1, lambda value: 0 < value <= 1, "must be in (0, 1]")},
    )
