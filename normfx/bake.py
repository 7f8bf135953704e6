"""Bake: folds that are written into the model itself, so that no second copy of a weight exists.

    norm(x; w, b) V^T + c  =  norm(x; 1, 0) (V diag(w))^T + (c + V b)

What may be folded, and into what, the rules of the compiler say (`passes/fold.py`, `fold_back.py`);
so do the new weights, which are the nodes that these rules make. Here it is decided what may be
written: a parameter that is one entry of the state dict, and that one operator reads. The norm's
own parameters become neutral: weight 1, bias 0, mean 0, variance 1 - eps.

A weight V comes back as V' / w, rounded once, so that nothing but the small vectors has to be kept.
Elements for which that is no way back (w = 0) are kept too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from normfx import graph as g
from normfx.check import in_float64
from normfx.errors import BakeError
from normfx.live import without_autocast
from normfx.options import Options
from normfx.passes import fold, fold_back
from normfx.passes.fold import Reader
from normfx.passes.fold_back import Writer
from normfx.passes.hoist import VIEWS, computing
from normfx.passes.neutral import (
    BIAS,
    EPS,
    MEAN,
    SQUARE,
    WEIGHT,
    evaluated,
    is_neutral,
    is_uniform,
    mark,
)
from normfx.passes.verdict import Refused
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import REFUSALS, Journal, Refusal, Site
from normfx.torch_internals import compile_alone, dynamo_error

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def bake_(
    model: nn.Module, *, clone: bool = False, exact_undo: bool = False, verify: bool = True
) -> Callable[..., Baked]:
    """Folds norms into the weights of an eager model: `baked = normfx.bake_(model)(*args)`.

    The model computes what it did, and its state dict keeps its keys, shapes and dtypes. What is
    folded is decided by the graph of this one call, so the arguments have to be such that all
    that reads a weight runs. While it runs, a second copy of what changes exists.

    Args:
        model: a module in eval mode, not compiled.
        clone: unties a weight that other modules read too: its reader gets a copy of its own. The
            state dict then no longer loads into a model that ties them.
        exact_undo: keep the weights as they were, in the memory of the CPU, for `Baked.undo`.
        verify: run the model once more, and take everything back if its result has changed.

    Returns:
        A function of the model's arguments that returns a `Baked`.

    Raises:
        BakeError: the model cannot be baked. Nothing was changed.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise BakeError(f"bake_ changes the weights of a module; {type(model).__name__} is none.")

    def bake(*args: Any, **kwargs: Any) -> Baked:
        training = [name for name, module in model.named_modules() if module.training]
        if training:
            name = f" (its module {training[0]!r} is)" if training[0] else ""
            raise BakeError(f"the model is in training mode{name}: call model.eval() first.")
        with torch.inference_mode(False), torch.no_grad():
            plan, before = _planned(model, args, kwargs, clone=clone)
            changes = plan.changes(exact=exact_undo)
            baked = Baked(plan.journal.sites, plan.into, model, changes)
            written = _write([(change.tensor, change.made) for change in changes])
            try:
                for change in changes:
                    change.install()
                if verify:
                    _compare(before, model(*args, **kwargs))
            except BaseException:
                for change in changes:
                    change.take_back()
                _write(written)
                raise
            for change in changes:
                change.settle()
            for tensor, value in plan.neutral:
                mark(tensor, value)
        return baked

    return bake


@dataclass(slots=True)
class Baked:
    """What `bake_` did to a model, and the way back.

    Attributes:
        sites: every normalization, with what was decided of it.
        into: for each that was folded, the names of the parameters that took it over, by `id`.
    """

    sites: list[Site]
    into: dict[int, list[str]]
    _model: nn.Module = field(repr=False)
    _changes: list[_Change] = field(repr=False)

    @property
    def bytes(self) -> int:
        """The memory that this record holds."""
        held = {id(t): t for change in self._changes for t in change.held()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def undo(self) -> None:
        """Gives the model its weights back; a second call does nothing.

        Biases and the parameters of norms are as they were. A weight is as it was up to one ulp,
        and bit by bit after `bake_(exact_undo=True)`.

        Raises:
            BakeError: a weight has changed since. Nothing was changed.
        """
        state = self._model.state_dict(keep_vars=True)
        for change in self._changes:
            if not change.is_current(state.get(change.name)):
                raise BakeError(f"{change.name!r} has changed since it was baked.")
        with torch.inference_mode(False), torch.no_grad():
            kept = [change for change in self._changes if change.owner is None]
            _write([(change.tensor, change.restored()) for change in kept])
        for change in self._changes:
            change.take_back()
            mark(change.tensor, None)
        self._changes = []

    def __str__(self) -> str:
        rows = [("norm", "kind", "into", "refused")]
        for site in self.sites:
            into = ", ".join(self.into.get(id(site), [])) or "-"
            codes = ", ".join(dict.fromkeys(site.refusals)) or "-"
            rows.append((site.name, site.kind, into, codes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        for code in sorted({r.code for s in self.sites for r in s.records if r.code}, key=str):
            lines.append(f"{code.value}: {REFUSALS[code].meaning} {REFUSALS[code].hint}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------- what changes


@dataclass(slots=True)
class _Change:
    """A parameter that is written to.

    Attributes:
        name: its entry of the state dict.
        parameter: what that entry is.
        tensor: the same, or a view of it.
        made: what it becomes.
        owner: module, name and parameter, where this is a new one in place of that.
        original: what it was; None for a weight that comes back by division.
        factor: what the weight was multiplied with.
        lost: of what division does not bring back: where, and what it was.
    """

    name: str
    parameter: torch.Tensor
    tensor: torch.Tensor
    made: torch.Tensor
    owner: tuple[nn.Module, str, nn.Parameter] | None = None
    original: torch.Tensor | None = None
    factor: _Factor | None = None
    lost: tuple[torch.Tensor, torch.Tensor] | None = None
    seen: tuple[int, int] = (-1, -1)

    def install(self) -> None:
        """Puts a new parameter in the place of a tied one."""
        if self.owner is not None:
            module, name, _ = self.owner
            module._parameters[name] = self.tensor  # pyright: ignore[reportArgumentType]

    def take_back(self) -> None:
        """Puts a tied parameter back in its place."""
        if self.owner is not None:
            module, name, before = self.owner
            module._parameters[name] = before

    def settle(self) -> None:
        """Lets go of the new numbers, which the parameter has now."""
        self.made = torch.empty(0)
        self.seen = self.tensor._version, self.tensor.data_ptr()

    def is_current(self, entry: torch.Tensor | None) -> bool:
        """Whether this is still the model's parameter, and nobody has written to it."""
        now = self.parameter._version, self.parameter.data_ptr()
        return entry is self.parameter and now == self.seen

    def held(self) -> Iterable[torch.Tensor]:
        """The tensors that are kept for the way back."""
        return (
            *(() if self.original is None else (self.original,)),
            *(() if self.factor is None else self.factor.operands),
            *(self.lost or ()),
        )

    def restored(self) -> torch.Tensor:
        """What the parameter was."""
        if self.original is not None:
            return self.original
        assert self.factor is not None
        assert self.lost is not None
        divided = self.factor.divided(self.tensor)
        index, values = (t.to(divided.device) for t in self.lost)
        flat = divided.flatten()
        flat[index.long()] = values
        return flat.view(divided.shape)


@dataclass(frozen=True, slots=True)
class _Factor:
    """What a weight was multiplied with, element by element, as a function of the small vectors.

    Attributes:
        compute: the graph that made the new weight.
        place: which of its inputs is the weight.
        shape: of that input.
        operands: the others, in order, as they were.
    """

    compute: fx.GraphModule
    place: int
    shape: torch.Size
    operands: tuple[torch.Tensor, ...]

    def divided(self, folded: torch.Tensor) -> torch.Tensor:
        """The weight before, rounded once."""
        ones = torch.ones(self.shape, dtype=torch.float64, device=folded.device)
        inputs = [t.to(folded.device, torch.float64) for t in self.operands]
        inputs.insert(self.place, ones)
        with without_autocast(folded.device):
            (scale,) = _InFloat64(self.compute).run(*inputs)
        return (folded.double() / scale).to(folded.dtype).contiguous()


class _InFloat64(fx.Interpreter):
    """Runs a graph without the roundings in it."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, in_float64(args), in_float64(kwargs))


def _write(changes: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    """Writes all or nothing; returns the tensors with what they were."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        while changes:
            tensor, made = changes[0]
            before.append((tensor, tensor.detach().clone()))
            tensor.copy_(made)
            changes.pop(0)
    except BaseException:
        for tensor, was in before:
            tensor.copy_(was)
        raise
    return before


def _compare(before: Any, after: Any) -> None:
    """Refuses results that differ by more than rounding in a deep model explains."""
    then, now = (
        [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for result in (before, after)
    )
    for old, new in zip(then, now, strict=True):
        if not old.dtype.is_floating_point:
            continue  # a choice between equals may turn on a rounding
        usable = torch.isfinite(old)
        scale = old[usable].abs().amax() if usable.any() else torch.zeros(())
        limit = torch.finfo(old.dtype).eps ** 0.5 * scale
        off = (old - new).abs()[usable]
        if bool((off > limit).any()) or not torch.equal(usable, torch.isfinite(new)):
            raise BakeError(
                "the result of the model has changed, so everything was taken back. If calls of "
                "this model with the same arguments differ in any case, pass verify=False."
            )


# ---------------------------------------------------------------------------- what may change


def _planned(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, clone: bool
) -> tuple[_Plan, Any]:
    """The plan for the graph of a call, and the result of the call."""
    plans: list[_Plan] = []
    errors: list[Exception] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        plan = _Plan(model, example_inputs, clone)
        plans.append(plan)
        try:
            plan.read(gm)
        except Exception as error:  # which dynamo would take for one of its own
            errors.append(error)
        return gm

    try:
        result = compile_alone(model, collect, False, fullgraph=True)(*args, **kwargs)
    except dynamo_error() as error:
        raise BakeError(
            "the call is not one graph, so what else reads a weight is not known."
        ) from error
    if errors:
        raise BakeError(str(errors[0])) from errors[0]
    if len(plans) != 1:
        raise BakeError(f"the call is {len(plans)} graphs; it has to be one.")
    return plans[0], result


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter that an operator of the graph reads.

    Attributes:
        tensor: the parameter, as the operator sees it (through views).
        position: of the parameter among the inputs.
        name: its entry of the state dict.
        owner: the module and the name of it there, if it has to be untied.
    """

    tensor: torch.Tensor
    position: int
    name: str
    owner: tuple[nn.Module, str] | None = None


@dataclass(slots=True)
class _Plan:
    """What is to be written into a model.

    Attributes:
        journal: what was decided of each norm.
        into: names of the parameters that take a norm over, by the `id` of its site.
        neutral: parameters that get one number for all elements, and are marked with it.
    """

    model: nn.Module
    inputs: list[Any]
    clone: bool
    journal: Journal = field(default_factory=Journal)
    into: dict[int, list[str]] = field(default_factory=dict)
    neutral: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    _slots: dict[tuple[fx.Node, str], _Slot] = field(default_factory=dict)
    _cleared: dict[int, float] = field(default_factory=dict)  # by position
    _names: dict[int, list[str]] = field(default_factory=dict)
    _shares: dict[int, int] = field(default_factory=dict)
    _made: list[tuple[_Slot, fx.GraphModule, list[int], bool]] = field(default_factory=list)

    def read(self, gm: fx.GraphModule) -> None:
        """Runs the rules of the compiler on a graph, and keeps what they make of parameters."""
        state = self.model.state_dict(keep_vars=True)
        for name, held in state.items():
            if isinstance(held, torch.Tensor):
                self._names.setdefault(id(held), []).append(name)
        distinct = {
            id(t): t
            for t in (*state.values(), *self.model.buffers(), *self.inputs)
            if isinstance(t, torch.Tensor)
        }
        for held in distinct.values():
            memory = _memory(held)
            self._shares[memory] = self._shares.get(memory, 0) + 1

        def observe(stage: str, module: fx.GraphModule) -> None:
            if stage == "fold":
                self._keep(module)

        options = Options(strict=True, weights="frozen", rules=(fold.RULE, fold_back.RULE))
        tracked = weights_are_tracked(gm, self.inputs)
        rewrite(gm, options, self.journal, tracked=tracked, permit=self._permit, observe=observe)

    def _permit(self, node: fx.Node, plan: Writer | list[Reader]) -> Refused | None:
        """Refuses a fold whose weights cannot be written, or plans to write them."""
        slots: dict[tuple[fx.Node, str], _Slot] = {}
        keeps_shift = isinstance(plan, Writer) and plan.bias is None
        places = (WEIGHT, BIAS, MEAN, SQUARE) if isinstance(plan, Writer) else (WEIGHT, BIAS)
        if keeps_shift:
            places = (WEIGHT, MEAN, SQUARE)
        cleared = self._cleared_by(node, places)
        if isinstance(cleared, Refused):
            return cleared
        if all(self._is_neutral(node, place) for place in places):
            held = [(self.inputs[position], value) for position, value in cleared.items()]
            self.neutral += [(t, value) for t, value in held if is_uniform(t, value)]
            return Refused(Refusal.NEUTRAL, node)
        operands = self._operands(node, plan, keeps_shift=keeps_shift)
        if isinstance(operands, Refused):
            return operands
        for (reader, what), operand in operands.items():
            slot = self._slots.get((reader, what)) or self._slot(reader, operand)
            if isinstance(slot, Refused):
                return slot
            slots[reader, what] = slot
        written = [slot.position for slot in slots.values() if slot.owner is None]
        others = [s.position for key, s in self._slots.items() if key not in slots]
        taken = [*written, *others, *cleared, *self._cleared]
        if len(set(taken)) < len(taken):
            return Refused(Refusal.SHARED, node)
        self._slots |= slots
        self._cleared |= cleared
        self.neutral += [(self.inputs[position], value) for position, value in cleared.items()]
        site: Any = node.meta["normfx_site"]
        self.into.setdefault(id(site), []).extend(slot.name for slot in slots.values())
        return None

    def _operands(
        self, node: fx.Node, plan: Writer | list[Reader], *, keeps_shift: bool
    ) -> dict[tuple[fx.Node, str], fx.Node] | Refused:
        """The operands that a fold changes."""
        found: dict[tuple[fx.Node, str], fx.Node] = {}
        shift: Any = node.args[BIAS]
        if isinstance(plan, Writer):
            found[plan.node, "weight"] = plan.weight
            bias = shift if keeps_shift else plan.bias
            moved = shift is not None or node.args[MEAN] is not None
            if bias is None and moved:
                return Refused(Refusal.NO_BIAS, plan.node)
            if bias is not None:
                found[plan.node, "bias"] = bias
                looks = g.shape(bias), g.dtype(bias)
                if keeps_shift and looks != ((plan.channels,), g.dtype(plan.weight)):
                    return Refused(Refusal.NO_BIAS, plan.node)
            return found
        for reader in plan:
            if node.args[WEIGHT] is not None:
                found[reader.node, "weight"] = reader.weight
            if shift is not None and reader.bias is None:
                return Refused(Refusal.NO_BIAS, reader.node)
            if shift is not None and reader.bias is not None:
                found[reader.node, "bias"] = reader.bias
        return found

    # -- the parameters of the norm

    def _is_neutral(self, node: fx.Node, place: int) -> bool:
        operand: Any = node.args[place]
        if operand is None:
            return True
        known = {n: self._real(n) for n in g.behind([operand]) if n.op == "placeholder"}
        return is_neutral(place, evaluated(operand, known), node.kwargs["spec"])

    def _cleared_by(self, node: fx.Node, places: Iterable[int]) -> dict[int, float] | Refused:
        """The parameters behind a norm's operands, and the numbers that make these neutral."""
        spec: Any = node.kwargs["spec"]
        operands: Any = node.args
        if spec.statistic in ("running", "static") and (operands[EPS] or spec.scale != 1.0):
            return Refused(Refusal.COMPUTED, node)
        found: dict[int, float] = {}
        for place in places:
            operand = operands[place]
            if operand is None:
                continue
            cone = g.behind([operand])
            sources = [n for n in cone if n.op == "placeholder"]
            if len(sources) != 1:
                return Refused(Refusal.COMPUTED, operand)
            source = sources[0]
            refused = self._refused(source) or (
                Refused(Refusal.SHARED, source) if _is_read_beside(cone, node) else None
            )
            if refused is not None:
                return refused
            position = self._position(source)
            held = self._real(source)
            eps = spec.eps or 0.0
            if place == SQUARE:
                candidates = (1.0 - eps,) if 0 <= eps < 1 else ()
            else:
                candidates = (1.0, 0.0)
            for value in candidates:
                filled = torch.full_like(held, value)
                if is_neutral(place, evaluated(operand, {source: filled}), spec):
                    found[position] = float(filled.flatten()[0])
                    break
            else:
                return Refused(Refusal.COMPUTED, operand)
        return found

    # -- the parameters of what takes it over

    def _slot(self, reader: fx.Node, operand: fx.Node) -> _Slot | Refused:
        """The parameter that an operand is, through views, if it may be written to."""
        chain, source = [], operand
        while source.op == "call_function" and g.packet(source) in VIEWS:
            chain.append(source)
            source = source.all_input_nodes[0]
        if source.op != "placeholder":
            return Refused(Refusal.COMPUTED, operand)
        held = self._real(source)
        refused = self._refused(source)
        seen = evaluated(operand, {source: held}) if chain and refused is None else held
        if seen is None or (chain and not _is_whole(seen, held)):
            return Refused(Refusal.COMPUTED, operand)
        if refused is None and not any(len(n.users) > 1 for n in (source, *chain)):
            return _Slot(seen, self._position(source), self._names[id(held)][0])
        if refused is not None and refused.code is not Refusal.SHARED:
            return refused
        owner = self._untied(reader, source) if self.clone and not chain else None
        if owner is None:
            return Refused(Refusal.SHARED, operand)
        named = f"{g.module_path(reader)}.{owner[1]}"
        return _Slot(
            nn.Parameter(held.clone(), held.requires_grad), self._position(source), named, owner
        )

    def _untied(self, reader: fx.Node, source: fx.Node) -> tuple[nn.Module, str] | None:
        """The module that an operator belongs to, if it alone has the parameter for it."""
        path, held = g.module_path(reader), self._real(source)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        module = modules.get(path)
        if module is None or sum(other is module for other in modules.values()) > 1:
            return None
        names = [name for name, own in module._parameters.items() if own is held]
        beside = [user for user in source.users if user is not reader]
        if len(names) != 1 or any(g.module_path(user) == path for user in beside):
            return None
        return module, names[0]

    def _refused(self, source: fx.Node) -> Refused | None:
        """Why a parameter may not be written to, if so."""
        held = self.inputs[self._position(source)]
        names = self._names.get(id(held), [])
        plain = type(held) in (torch.Tensor, nn.Parameter) and held.layout is torch.strided
        if not names or not plain or held.dtype not in _DTYPES or held.device.type == "meta":
            return Refused(Refusal.COMPUTED, source)
        if len(names) > 1 or self._shares[_memory(held)] > 1 or _repeats(held):
            return Refused(Refusal.SHARED, source)
        return None

    def _position(self, source: fx.Node) -> int:
        return list(source.graph.find_nodes(op="placeholder")).index(source)

    def _real(self, source: fx.Node) -> Any:
        return self.inputs[self._position(source)]

    # -- the new numbers

    def _keep(self, gm: fx.GraphModule) -> None:
        """Keeps what computes the new value of each parameter."""
        for (reader, what), slot in self._slots.items():
            weight, bias = _weight_and_bias(reader)
            node = weight if what == "weight" else bias
            compute = computing(gm, [node])
            for made in compute.graph.nodes:
                made.meta.clear()  # the record outlives the graph
            needed = g.behind([node])
            positions = [
                i for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if n in needed
            ]
            self._made.append((slot, compute, positions, what == "weight"))

    def changes(self, *, exact: bool) -> list[_Change]:
        """Everything that is to be written, with its new numbers and the way back."""
        found = []
        small: dict[int, torch.Tensor] = {}  # one copy, whoever needs it
        for position in self._cleared:
            small[position] = self.inputs[position].detach().clone()
        for slot, _, _, is_weight in self._made:
            if not is_weight and slot.owner is None:
                small[slot.position] = self.inputs[slot.position].detach().clone()
        for slot, compute, positions, is_weight in self._made:
            with without_autocast(slot.tensor.device):
                (made,) = compute(*(self.inputs[i].detach() for i in positions))
            if not torch.equal(torch.isfinite(made), torch.isfinite(slot.tensor)):
                raise BakeError(f"{slot.name} would not be finite.")
            held = slot.tensor if slot.owner is not None else self.inputs[slot.position]
            change = _Change(slot.name, held, slot.tensor, made)
            if slot.owner is not None:
                module, name = slot.owner
                change.owner = (module, name, self.inputs[slot.position])
            elif exact:
                change.original = slot.tensor.detach().to("cpu", copy=True)
            elif not is_weight:
                change.original = small[slot.position]
            else:
                place = positions.index(slot.position)
                shape = self.inputs[slot.position].shape
                rest = tuple(small[i] for i in positions if i != slot.position)
                change.factor = _Factor(compute, place, shape, rest)
                change.lost = _lost(slot.tensor, change.factor.divided(made))
            found.append(change)
        for position, value in self._cleared.items():
            held = self.inputs[position]
            if not is_uniform(held, value):
                name, made = self._names[id(held)][0], torch.full_like(held, value)
                found.append(_Change(name, held, held, made, original=small[position]))
        return found


def _weight_and_bias(node: fx.Node) -> tuple[Any, Any]:
    """The weight and bias that an operator reads after it took a norm over."""
    args: Any = node.args
    if g.packet(node) is aten.addmm:
        return args[2], args[0]
    return args[1], args[2] if len(args) > 2 else None


def _is_read_beside(cone: set[fx.Node], node: fx.Node) -> bool:
    return any(user is not node and user not in cone for n in cone for user in n.users)


def _memory(tensor: torch.Tensor) -> int:
    """An identity of the storage of a tensor."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a subclass without a storage of its own
        return id(tensor)


def _is_whole(view: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a view of a tensor has each of its elements once."""
    repeats = any(n > 1 and s == 0 for n, s in zip(view.shape, view.stride(), strict=True))
    return _memory(view) == _memory(held) and view.numel() == held.numel() and not repeats


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor are at one address, or it is a part of a larger one."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _lost(before: torch.Tensor, divided: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is not brought back up to one ulp: its place and its value."""
    was, back = before.double(), divided.double()
    limit = torch.finfo(before.dtype).eps * was.abs()
    kept = ((back - was).abs() > limit) | ~torch.isfinite(back) | ~torch.isfinite(was)
    index = kept.flatten().nonzero().flatten()
    if before.numel() <= torch.iinfo(torch.int32).max:
        index = index.int()
    return index, before.detach().flatten()[index.long()].clone()
