"""`GWTAdamW`: Adam with moments in wavelet space, for whole tensors and for the fragments of a sharding engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gwt_dist import dtensor, replaced, state
from gwt_dist.comm import Shard
from gwt_dist.keys import COMMON, REFUSED_OF_TORCH, of_recipes, plain, refuse_misspelt
from gwt_dist.notes import bare_note, notes_of
from gwt_dist.plan import Plan
from gwt_dist.recipes import DEFAULT, check_group
from gwt_dist.shards import is_flat
from gwt_dist.stacks import number_of
from gwt_dist.steps import Group, Steps

logger = logging.getLogger(__name__)


class GWTAdamW(torch.optim.Optimizer):
    r"""Adam whose moments live on the wavelet approximation of the gradient, ``2**level`` times smaller than AdamW's.

    Drop-in for `torch.optim.AdamW`: ``model.parameters()`` alone are level 0, AdamW, and a warning says so;
    `param_groups` chooses the matrices that get a level. Tensors of two or more dimensions are read as ``[shape[0],
    rest]`` (a kernel is a row for each output channel), along their rows; scalars and 1-D tensors are level 0 always.

    DTensor parameters (FSDP2, HSDP, tensor parallelism) are recognised at the first step. Under an engine that hides
    the layout of the weights behind flat buffers (DeepSpeed ZeRO, FSDP1), call `gwt_dist.attach(optimizer, engine)`
    once, or use `gwt_dist.initialize`. A step on such a buffer that was never attached raises; it never becomes another
    optimizer.

    Every keyword is also a key of a parameter group. State of a parameter: ``step`` (0-d fp32), ``exp_avg`` and
    ``exp_avg_sq`` (``[R, ceil(C / 2**level)]``, one packed vector for a flat buffer; fp32, or fp64 for fp64
    parameters) and ``limited_norm`` (one number a tensor), or what else the recipe declares. A flat buffer has in each
    what its tensors have; a field that none of them has is not there.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a float or a 0-d tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the uncorrected ``sqrt(exp_avg_sq)``, as in the published code.
        weight_decay: Decoupled, multiplied by ``lr``.
        level: 0 (AdamW) to 16, of groups that say none; moments shrink by ``2**level``. None is 0.
        wavelet: A discrete wavelet of PyWavelets, ``"haar"`` being the fast closed form.
        recipe: ``"orthogonal"``, which None stands for (momentum alone; the update of the whole matrix is
            orthogonalized as Muon's, on one rank each, see `formulas.orthogonal`), ``"energy"`` (twice the state: a
            second moment of the unit's energy too, details weighted by their coherence, no product of matrices, no
            limiter, no collective), ``"foam"`` (the same moments, details bounded by their own squares, see
            `formulas.residual`), ``"factored"``, ``"came"`` (a momentum, and rows and columns in place of a second
            moment, see `formulas.factored`), ``"adalomo"`` (rows and columns alone, with a rate that is relative to
            the weights), ``"low-rank"`` (GaLore: Adam in a subspace of each matrix, kept by one rank, see
            `formulas.low_rank`) or ``"paper"`` (moment of the approximation, full details, norm-growth limiter 1.01).
            Tensors of level 0 are AdamW but under ``"adalomo"``, with a ``rank`` and with ``least_level=0``. A tensor
            that looks like an embedding, and would be orthogonalized because no recipe was named, is told by a warning.
        stacked: Whether a tensor of three dimensions is a stack of matrices, ``[E, R, C]``, as the experts of a
            mixture: each of them is stepped as a parameter by itself, units lie within its rows, and state has the
            ``E`` in front (``exp_avg``: ``[E, R, ceil(C / 2**level)]``). Tensors of less are what they always are, of
            more an error. Shape alone does not say it: the kernel of a convolution has three dimensions too.
        scale: Factor on the update of tensors that the recipe takes, as matrices are under ``"orthogonal"``; None as
            the recipe says, so that AdamW's `lr` is theirs too (``"paper"``, ``"low-rank"``: the published 0.25).
        second_moment: ``"approximation"``, ``"energy"`` or ``"none"``, which orthogonalizes; None as the recipe says.
        detail_gain: Factor on the details, 0 to 1, as 1 with ``"orthogonal"``, or ``"coherence"``: more for units
            whose gradients are steady, see `formulas.weighed`; None as the recipe says.
        limiter: Largest growth of the update's norm in one step, at least 1, or 0 for none; None as the recipe says.
        nesterov: Whether the update takes ``b1*m + (1-b1)*a``, a step further than the momentum ``m`` of the
            approximation ``a``, wherever it is not AdamW's; None as the recipe says: ``"orthogonal"`` does.
        cautious: Whether a weight decays only where its update does not take it away from zero (arXiv 2510.12402).
        correct_bias: False leaves ``sqrt(1-b2**t)/(1-b1**t)``, the published form of the correction, out.
        nor: Of ``"orthogonal"``: decay rate of the mean squares of rows of the orthogonalized matrix, which are brought
            to one size (NorMuon, arXiv 2510.05491; 0.95 there), R numbers more a matrix; 0 for none.
        clip_threshold: Of ``"factored"``, ``"came"`` and ``"adalomo"``: the most that the root mean square of a
            normalized gradient may be; more is scaled down.
        confidence_beta: Of ``"came"``: decay rate of the squares of how far updates are from their mean (CAME,
            arXiv 2307.02047; 0.9999 there, uncorrected).
        decay_rate: Of the same: second moments decay by ``1 - t**decay_rate`` instead of ``betas[1]``; -0.8 with
            ``"adalomo"``, 0, which is for ``betas[1]``, with the others.
        critical: Of ``"paper"``, ``"energy"``, ``"foam"`` and ``"orthogonal"``: how many gradients of large norm, by
            their coefficients, stay for each tensor and join those that follow (Memory-Augmented Optimizers, ICLR
            2022; see `formulas.critical`); 0 for none. Each costs as much as a moment in fp32.
        critical_decay: Of the same: what their priorities are multiplied by at each step.
        critical_form: Of the same: ``"mean"`` of the fresh one and all of them, or the ``"sum"`` of it and their mean.
        rank: Of ``"low-rank"``: vectors of the subspace, as with galore-torch (see `GaLoreAdamW`); 0 is AdamW.
        update_proj_gap: Of the same: steps from one subspace of a matrix to the next.
        proj_type: Of the same: vectors along the shorter side (``"std"``), or as the others of `keys.PROJ_TYPES`.
        residual: Of the same: whether what the subspace leaves out goes along (Fira, arXiv 2410.01623).
        randomized: Of the same: subspaces by products with random vectors, many times faster than a decomposition.
        refresh_offset: Of the same: by how many steps a group renews its subspaces earlier than others do.
        products: Of ``"orthogonal"``: dtype in which matrices travel and are multiplied: ``"bf16"`` (sums in fp32),
            ``"fp32"`` (fp64 for fp64 parameters) or ``"auto"``, bf16 on GPUs that have it and fp32 elsewhere.
        least_level: Of ``"orthogonal"``, ``"factored"`` and ``"came"``: 0 takes matrices of level 0 too, which is
            Muon, Adafactor and CAME; 1, the default, leaves them to AdamW, as embeddings are. ``"adalomo"`` takes all
            matrices. Vectors are AdamW's always.
        state_dtype: In which format moments are kept: ``"fp32"`` (fp64 for fp64 parameters), ``"bf16"``, or ``"int8"``
            with an fp32 scale for 64 neighbours of a row, ``exp_avg_scale``. See `formulas.codecs`. What is kept is
            what the update uses, and its bits are the same under every sharding.
        stochastic_rounding: For bf16 parameters without fp32 masters: rounds weights by chance, the same under every
            sharding, so that changes below half of what bf16 can say are not lost.
        rounding_seed: Of both, 0 to 2**32 - 1; the same on all ranks.
        foreach: Of `torch.optim.AdamW`, as those that follow; a step is fused anyway.
        fused: Likewise.
        capturable: A step can be captured anyway (docs/kernels.md).
        amsgrad: True is refused.
        maximize: Likewise.
        differentiable: Likewise.

    Raises:
        ValueError: For a value out of range, an unknown wavelet or recipe, a misspelt key, complex or sparse tensors.
    """

    _is_recipe_named = True  # by the arguments; of a copy nobody knows, so it tells nothing
    _is_untold = False  # whether no level was said, and no warning told of it
    is_default = False  # whether a group has the default recipe because nobody named one

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        level: int | None = None,
        wavelet: str = "haar",
        recipe: str | None = None,
        stacked: bool = False,
        scale: float | None = None,
        second_moment: str | None = None,
        detail_gain: float | str | None = None,
        limiter: float | None = None,
        nesterov: bool | None = None,
        cautious: bool | None = None,
        correct_bias: bool | None = None,
        nor: float | None = None,
        clip_threshold: float | None = None,
        confidence_beta: float | None = None,
        decay_rate: float | None = None,
        critical: int | None = None,
        critical_decay: float | None = None,
        critical_form: str | None = None,
        rank: int | None = None,
        update_proj_gap: int | None = None,
        proj_type: str | None = None,
        residual: bool | None = None,
        randomized: bool | None = None,
        refresh_offset: int | None = None,
        products: str | None = None,
        least_level: int | None = None,
        state_dtype: str | None = None,
        stochastic_rounding: bool | None = None,
        rounding_seed: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        said = dict(locals())
        self._forget_layout()
        defaults = {key: plain(said[key]) for key in (*COMMON, *of_recipes()) if key in said}
        defaults |= {"recipe": DEFAULT if recipe is None else recipe, "level": 0 if level is None else plain(level)}
        self._is_untold = level is None
        self._is_recipe_named = recipe is not None
        check_group({key: said[key] for key in REFUSED_OF_TORCH} | defaults, "the arguments of GWTAdamW")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises `ValueError` for values out of range, and parameters of a dtype for which a key of the group is not.
        """
        where = f"parameter group {len(self.param_groups)}"
        refuse_misspelt(param_group, where)
        param_group = {key: its if key == "params" else plain(its) for key, its in param_group.items()}
        check_group({**self.defaults, **param_group}, where)
        unnamed = not self._is_recipe_named and "recipe" not in param_group
        unleveled = "level" not in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # `deepspeed.zero.Init` leaves an empty tensor behind.
        shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in group["params"]]
        try:
            for shape in shapes if group["stacked"] else ():
                number_of(shape)
            self._steps.refuse_dtypes(group["params"], self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._steps.given.update(dict.fromkeys(group["params"], True))
        self.is_default |= unnamed
        for note in notes_of(group, shapes, where, unnamed=unnamed and unleveled, bare=unleveled and self._is_untold):
            self._is_untold &= note != bare_note(group, shapes, where)
            logger.warning(note)

    def is_given(self, parameter: Tensor) -> bool:
        """Whether somebody passed this parameter, rather than an engine a buffer of its own."""
        return parameter in self._steps.given

    @property
    def shards(self) -> Mapping[Tensor, Shard]:
        """What this rank holds of each flat parameter, as `attach` read it.

        Raises `ValueError` for a copy of an attached optimizer: nobody knows what its parameters hold.
        """
        self.refuse_copy()
        return self._steps.shards

    def plan_of(self, parameter: Tensor, group: int) -> Plan | None:
        """The layout of a parameter and of its state; `group` is the number of its parameter group.

        None for a buffer of an engine that was never given to this optimizer. Raises `ValueError` as `step` does.
        """
        self.refuse_copy()
        return self._steps.plan_of(parameter, group, self.param_groups)

    def attach(self, shards: Mapping[Tensor, Shard]) -> None:
        """Take the layout of flat parameters as an engine adapter read it: parameter to what this rank holds of it.

        Users call `gwt_dist.attach`, which reads and checks the layout first. Raises `ValueError` if a parameter
        already has state in another layout, or there is state of parameters that are not held any more.
        """
        self._steps.refuse_dtypes(shards, self.param_groups)
        for parameter, shard in shards.items():
            if self.state.get(parameter) and self._steps.copied.get(parameter) != state.layout_of(shard):
                raise ValueError(
                    f"the parameter that holds {shard.tensors[0].fqn!r} already has optimizer state; attach before the "
                    f"first step and before loading a checkpoint, or its moments would belong to other elements. "
                    f"{replaced.CARRY}"
                )
        replaced.refuse_left_state(self.state, [*self._parameters(), *shards, *self._steps.shards])
        for parameter, shard in shards.items():
            self._steps.attach(parameter, shard)
        owners = {id(owner) for shard in shards.values() for owner in shard.owners}
        if owners:
            frozen = [p for p in self._steps.given if not p.requires_grad and id(p) not in owners]
            self._steps.frozen.leave_out(frozen)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        A parameter that ranks share joins its collectives whatever its gradient, so that all make the same calls.
        Parameters whose update is fused into the backward pass have no gradient any more; if any has one, which
        somebody set, they take part as the others.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            ValueError: For a flat parameter of a sharding engine that was never attached, a sparse gradient, or a
                level, wavelet or recipe that was changed after the first step, if the state would mean something else.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refuse_copy()
        if self._fused and getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "a GradScaler drives an optimizer whose update was fused into the backward pass: the update has taken "
                "the scaled gradient already. Train in bfloat16 without a scaler, or without fuse_backward"
            )
        # A backward pass leaves none of them: somebody set it, as torch does where it wants state to be there.
        by_hand = any(parameter.grad is not None for parameter in self._fused)
        fused = set() if by_hand else {id(parameter) for parameter in self._fused}
        members = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if id(p) not in fused]
        self._steps.take(members, self.param_groups, self.state)
        self._is_cleared = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._is_cleared = True

    def is_waiting(self) -> bool:
        """Whether there are gradients that no step has taken, as far as `step` and `zero_grad` of this optimizer tell.

        Those that are left after a step are taken until `zero_grad`. Gradients that are not finite do not count, as
        the step of a GradScaler leaves them out.
        """
        parameters = self._parameters() if self._is_cleared else []
        gradients = [dtensor.local(p.grad) for p in parameters if p.grad is not None]
        return any(bool(g.any()) for g in gradients) and all(bool(g.isfinite().all()) for g in gradients)

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """One step of `parameters` alone; ranks that share them pass the same ones in the same order of calls."""
        self.refuse_copy()
        members = self._steps.numbered(parameters, self.param_groups)
        self._steps.take(members, self.param_groups, self.state)

    def missed(self, parameter: Tensor) -> Mapping[str, int]:
        """By name, how many steps of a flat parameter its tensors did not take because they were frozen."""
        return self._steps.frozen.missed(parameter)

    def restored(self, parameter: Tensor, missed: Mapping[str, int] | None = None) -> None:
        """The state of a parameter was loaded: its tensors have taken the steps that it says, but those `missed`."""
        self._steps.frozen.restore(parameter, missed or {})

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within it, backward passes only add to the gradients of parameters whose update is fused into them.

        For all micro-batches of a step but the last; without `fuse_backward` it changes nothing.
        """
        self.is_accumulating, before = True, self.is_accumulating
        try:
            yield
        finally:
            self.is_accumulating = before

    def fuse(self, parameters: Iterable[Tensor]) -> None:
        """Leave `parameters` out of `step`: `gwt_dist.fuse_backward` calls `update` for them in the backward pass."""
        for parameter in parameters:
            self._fused[parameter] = True
        # A GradScaler then calls `step` with its scale instead of unscaling gradients that are gone.
        self._step_supports_amp_scaling = True

    def state_dict(self) -> Group:
        """State as torch has it; tensors and plain numbers only, DTensors where the parameters are DTensors.

        Where flat parameters are attached it has ``layouts`` beside what torch has: which elements their states are of,
        so that `load_state_dict` refuses those of another rank; and ``missed`` where any of their tensors are frozen.

        Raises `ValueError` for parameters whose columns are cut within a unit: their moments are no DTensor, and a
        checkpoint would keep one rank's as if they were everyone's. And for state of parameters that are in no group,
        as those of ZeRO-3 between steps; and where a function of torch asks that would gather flat buffers, or what
        only some of the ranks keep.
        """
        state.check_writable(self.state, self.param_groups, self._steps)
        state.refuse_gathering(self._steps.shards.values(), self.state)
        told = state.layouts(self.param_groups, self._steps)
        missed = state.missed(self.param_groups, self._steps)
        return super().state_dict() | {key: its for key, its in ((state.LAYOUTS, told), (state.MISSED, missed)) if its}

    def load_state_dict(self, state_dict: Group) -> None:
        """Load what `state_dict` returned; moments keep their own precision whatever the dtype of the parameter.

        Raises `ValueError`, before anything is changed, if levels, wavelets, the recipe or what is kept differ from
        this optimizer's, a value is out of range, or a moment is not what this rank keeps in this layout: another size,
        placement or mesh, the elements of another rank, a whole tensor where ranks have parts of it, or the reverse.
        """
        self.refuse_copy()
        parameters = state.check_loadable(state_dict, self.param_groups, self._steps)
        super().load_state_dict(state.completed(state_dict, self.param_groups))
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for key, values in state_dict["state"].items():
            if key in parameters:
                parameter = parameters[key]
                state.put_back(self.state[parameter], values, parameter, groups[id(parameter)])
                self.restored(parameters[key], state_dict.get(state.MISSED, {}).get(key))

    def __getstate__(self) -> Group:
        given = [p for p in self._parameters() if p in self._steps.given and p not in self._steps.shards]
        flat = [p for p in given if is_flat(p)]  # which a copy of the parameter does not say
        return {
            **super().__getstate__(),
            "_given": [p for p in given if not is_flat(p)],
            "_attached": [*((p, state.layout_of(shard)) for p, shard in self._steps.shards.items()),
                          *((p, []) for p in flat), *self._steps.copied.items()],
            "_missed": [(p, dict(its)) for p in self._steps.shards if (its := self.missed(p))],
        }  # fmt: skip

    def __setstate__(self, pickled: Group) -> None:
        given, attached = pickled.pop("_given", None), pickled.pop("_attached", ())
        missed = pickled.pop("_missed", ())
        super().__setstate__(pickled)
        state.fill_keys(self.param_groups)
        if "_steps" not in self.__dict__:  # unpickled or deep-copied, rather than loading a state_dict
            self._forget_layout()
            if given is None:  # pickled before it said so
                given, attached = state.given_of(self.param_groups, self.state)
            for parameter in given:
                self._steps.given[parameter] = True
            for parameter, layout in attached:
                self._steps.copied[parameter] = layout
            for parameter, its in missed:
                self.restored(parameter, its)

    def refuse_copy(self) -> None:
        """Raise `ValueError` for a copy of an attached optimizer that was not attached itself."""
        if self._steps.copied:
            raise ValueError(replaced.copied(len(self._steps.copied)))

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _forget_layout(self) -> None:
        self._steps = Steps()
        self._fused: dict[Tensor, bool] = {}  # parameters updated in the backward pass -> True
        self.is_accumulating = False  # within `accumulating`
        self._is_cleared = True  # no step was taken since `zero_grad`
        self.holding: set[Any] = set()  # those among which `fuse_backward` divides them that have gradients to add to
