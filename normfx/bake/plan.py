"""Plan: what of a graph's folds may be written into the model.

A parameter may be written to if it is one entry of the state dict, shares its memory with nothing,
and one operator reads it. Those of a norm need a number that makes them neutral.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from normfx import graph as g
from normfx.bake.changes import Change, Factor, lost
from normfx.errors import BakeError
from normfx.live import without_autocast
from normfx.options import Options
from normfx.passes import fold, fold_back
from normfx.passes.fold_back import Writers
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
)
from normfx.passes.readers import Reader
from normfx.passes.verdict import Refused
from normfx.pipeline import rewrite, weights_are_tracked
from normfx.record import Journal, Refusal

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


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
class Plan:
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
        for site in self.journal.sites:  # other rules are off, which says nothing of the model
            site.records = [r for r in site.records if r.code is not Refusal.RULE_OFF]

    def _permit(self, node: fx.Node, plan: Writers | list[Reader]) -> Refused | None:
        """Refuses a fold whose weights cannot be written, or plans to write them."""
        slots: dict[tuple[fx.Node, str], _Slot] = {}
        given = isinstance(plan, Writers)
        only = plan.only if isinstance(plan, Writers) else None
        keeps_shift = only is not None and only.bias is None
        places = (WEIGHT, BIAS, MEAN, SQUARE) if given else (WEIGHT, BIAS)
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
        kept = [s for key, s in self._slots.items() if key not in slots and s.owner is None]
        others = [slot.position for slot in kept]
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
        self, node: fx.Node, plan: Writers | list[Reader], *, keeps_shift: bool
    ) -> dict[tuple[fx.Node, str], fx.Node] | Refused:
        """The operands that a fold changes."""
        found: dict[tuple[fx.Node, str], fx.Node] = {}
        shift: Any = node.args[BIAS]
        if isinstance(plan, Writers):
            moved = shift is not None or node.args[MEAN] is not None
            for writer in (part.writer for part in plan.parts):
                found[writer.node, "weight"] = writer.weight
                bias = shift if keeps_shift else writer.bias
                if bias is None and moved:
                    return Refused(Refusal.NO_BIAS, writer.node)
                if bias is not None:
                    found[writer.node, "bias"] = bias
                    looks = g.shape(bias), g.dtype(bias)
                    if keeps_shift and looks != ((writer.channels,), g.dtype(writer.weight)):
                        return Refused(Refusal.NO_BIAS, writer.node)
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

    def changes(self, *, exact: bool) -> list[Change]:
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
            change = Change(slot.name, held, slot.tensor, made)
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
                change.factor = Factor(compute, place, shape, rest)
                change.lost = lost(slot.tensor, change.factor.divided(made))
            found.append(change)
        for position, value in self._cleared.items():
            held = self.inputs[position]
            if not is_uniform(held, value):
                name, made = self._names[id(held)][0], torch.full_like(held, value)
                found.append(Change(name, held, held, made, original=small[position]))
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
