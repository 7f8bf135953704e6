"""In-place operators on temporaries become functional: `var.add(eps).sqrt_()` is a square root.

Recognition reasons about values, and a write to memory is opaque to it. Where nothing else sees the
write, `op(a)` is what `op_(a)` leaves in `a`, and whoever reads `a` later reads the result instead:

    b = op_(a); c = f(a)   becomes   b = op(a); c = f(b)

All writes to one piece of memory are replaced or none, so that `g.storage` stays true of every
write that is left: a view of `b` keeps the value it had as a view of `a`. None is replaced unless

- the memory is the graph's own (no input, no constant), and nothing that may keep or return it
  behind its schema's back (a higher-order or custom operator, a sparse tensor) reads it;
- every write is an in-place operator with one functional twin by its schema, and not random;
- no other tensor on that memory (a view, a base) that was made before a write is read after it;
- no switch of the grad mode, or of any mode, lies between the first tensor on it and a write;
- the result lies in memory in the same way, and autograd and autocast treat both forms alike.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from normfx import graph as g
from normfx.layout import is_one
from normfx.torch_internals import symbolic_meta_functions

aten = torch.ops.aten


def functional(gm: fx.GraphModule) -> None:
    """Makes in-place ATen calls functional where that is provably the same.

    Args:
        gm: a captured graph, which is changed; the caller recompiles it.
    """
    if all(_twin(node.target) is None for node in gm.graph.nodes):
        return
    survey = _Survey(gm.graph)
    forms = {n: f for m in survey.memories.values() if not m.kept for n, f in m.forms.items()}
    newest: dict[fx.Node, fx.Node] = {}  # by tensor: the node that holds what it holds by now
    for node in list(gm.graph.nodes):
        for read in node.all_input_nodes:
            if survey.tensor[read] in newest:
                node.replace_input_with(read, newest[survey.tensor[read]])
        if node in forms:
            newest[survey.tensor[node]] = _replace(node, *forms[node])


def _replace(node: fx.Node, made: torch.Tensor, final: torch.Tensor) -> fx.Node:
    """Makes a call functional, and returns the node that holds what it left in its operand."""
    twin = _twin(node.target)
    assert twin is not None
    node.target = twin
    node.meta["val"] = made
    if final is made:
        return node
    node.meta.pop("tensor_meta", None)  # of the other dtype
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten.to.dtype, (node, final.dtype))
    g.inherit_meta(cast, node)
    cast.meta["val"] = final
    return cast


@dataclass(slots=True)
class _Memory:
    """The tensors that share one piece of memory, as far as the survey has come."""

    era: int  # the switches of a mode before the first of them
    kept: bool = False  # whether its writes stay in place
    reads: dict[fx.Node, int] = field(default_factory=dict)  # by tensor: where it is last read
    forms: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class _Survey:
    """One walk over a graph: which tensors share memory, and which writes to it have to stay.

    Attributes:
        tensor: the first node that holds the same tensor as a node: an in-place operator returns
            the tensor that it was given, and a view is another one.
        memories: what was found, by one of the storages that are the same memory.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.tensor: dict[fx.Node, fx.Node] = {}
        self.memories: dict[int, _Memory] = {}
        self._parent: dict[int, int] = {}  # storages that are the same memory, as a forest
        self._last: dict[fx.Node, int] = {}
        for order, node in enumerate(graph.nodes):
            self._last.update(dict.fromkeys(node.all_input_nodes, order))
            self._join(node)
        self._autocast = any("enter_autocast" in _name(node) for node in graph.nodes)
        self._grad, self._era = torch.is_grad_enabled(), 0
        for order, node in enumerate(graph.nodes):
            self._visit(node, order)

    def _visit(self, node: fx.Node, order: int) -> None:
        if _switches_mode(node):
            self._era += 1
            if _name(node) == "_set_grad_enabled":
                self._grad = bool(node.args[0])
        written = g.mutated_arguments(node)
        twin = _twin(node.target)
        tensor = self.tensor[node] = node if twin is None else self.tensor[written[0]]
        for memory in self._of(*written):
            forms = None
            if twin is not None and not memory.kept and memory.era == self._era:
                if self._others_are_dead(memory, tensor, order):
                    forms = self._forms(node, twin, written[0])
            if forms is None:
                memory.kept = True
            else:
                memory.forms[node] = forms
        for memory in self._of(node):
            memory.reads[tensor] = max(memory.reads.get(tensor, -1), self._last.get(node, -1))
        if not _is_known(node):
            for memory in self._of(node, *node.all_input_nodes):
                memory.kept = True

    def _others_are_dead(self, memory: _Memory, tensor: fx.Node, order: int) -> bool:
        for other in list(memory.reads):
            if other is not tensor:
                if memory.reads[other] >= order:
                    return False
                del memory.reads[other]  # for good: each is met once, so that the walk is linear
        return True

    def _forms(
        self, node: fx.Node, twin: torch._ops.OpOverload, written: fx.Node
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The fake values of the functional call and of its cast to what the write leaves.

        None where the functional call does something else.
        """
        held = g.tensor(written)
        if held is None or self._autocasts(twin, held.device.type):
            return None
        try:
            made = _run(node, twin, grad=self._grad)
        except RuntimeError:  # no kernel for these operands
            return None
        floats = [t for t in map(g.tensor, node.all_input_nodes) if t is not None and _is_float(t)]
        if self._grad and floats:
            # `gt` and `copy` have no gradients where `gt_` and `copy_` have.
            if made.grad_fn is None or made.grad_fn.name().endswith("NotImplemented"):
                return None
            made = made.detach()
        final = made
        if made.dtype != held.dtype:
            # A pointwise operator computes in the promoted dtype and casts to the one it writes,
            # but the gradients of its operands are not rounded at the same places.
            if self._grad or torch.Tag.pointwise not in twin.tags:
                return None
            with g.fake_mode(node):
                final = made.to(held.dtype)
        fresh = all(_storage(made) != g.storage(i) for i in node.all_input_nodes)
        return (made, final) if fresh and _lie_alike(final, held) else None

    def _autocasts(self, twin: torch._ops.OpOverload, device: str) -> bool:
        """Whether autocast may run the twin in another dtype: in-place calls it leaves alone."""
        if not self._autocast and not torch.is_autocast_enabled(device):
            return False
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}", None)
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return key is None or any(map(twin.has_kernel_for_dispatch_key, (key, composite)))

    def _of(self, *nodes: fx.Node) -> list[_Memory]:
        roots = {self._find(s) for s in map(g.storage, nodes) if s is not None}
        return [self.memories.setdefault(root, _Memory(self._era)) for root in roots]

    def _find(self, storage: int) -> int:
        while (parent := self._parent.setdefault(storage, storage)) != storage:
            storage = self._parent[storage] = self._parent[parent]
        return storage

    def _join(self, node: fx.Node) -> None:
        """Joins the storages of a result and of the operands that it may share them with.

        The values alone do not tell. A tensor that a write made to require a gradient has one
        storage in dynamo's values and another in the trace's; and `dropout` in eval mode returns
        its operand, but a copy of it for fake tensors.
        """
        target, mine = node.target, g.storage(node)
        if mine is None or not isinstance(target, torch._ops.OpOverload):
            return
        random = torch.Tag.nondeterministic_seeded in target.tags
        for source in node.all_input_nodes if random else _may_be_viewed(node):
            theirs = g.storage(source)
            if theirs is None or self._find(mine) == self._find(theirs):
                continue
            certain = random or source in g.mutated_arguments(node)
            # The schema of `to` and `reshape` leaves open whether they copy.
            if certain or _storage(_run(node, target)) == theirs:
                self._parent[self._find(mine)] = self._find(theirs)


@functools.cache
def _twin(target: Any) -> torch._ops.OpOverload | None:
    """The functional form of an in-place ATen operator: the same arguments, a new result."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name, arguments = target.overloadpacket.__name__, target._schema.arguments
    if (
        not name.endswith("_")
        or name.startswith("_")  # private: nobody promises what it means
        or [a.is_write for a in arguments] != [True] + [False] * (len(arguments) - 1)
        or {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(target.tags)
    ):
        return None
    packet = getattr(aten, name[:-1], None)
    twins = [  # by arguments and not by the overload's name: pow_.Scalar is pow.Tensor_Scalar
        overload
        for overload in (getattr(packet, o) for o in (packet.overloads() if packet else ()))
        if _signature(overload) == _signature(target)
        and not overload._schema.is_mutable
        and [(str(r.type), r.alias_info) for r in overload._schema.returns] == [("Tensor", None)]
    ]
    return twins[0] if len(twins) == 1 else None


def _signature(target: torch._ops.OpOverload) -> list[tuple[Any, ...]]:
    return [
        (a.name, str(a.type), a.kwarg_only, a.default_value if a.has_default_value() else None)
        for a in target._schema.arguments
    ]


def _is_known(node: fx.Node) -> bool:
    """Whether a node keeps and returns the memory of its operands only as its schema says."""
    if node.op != "call_function":
        return node.op == "output"
    target = node.target
    tensors = [n for n in (node, *node.all_input_nodes) if g.tensor(n) is not None]
    if any(g.storage(n) is None for n in tensors):
        return False
    if target is operator.getitem:
        (source,) = node.all_input_nodes
        return _is_known(source) and len({str(u.args[1]) for u in source.users}) == len(
            source.users
        )
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.inplace_view in target.tags:
        return False
    returns = target._schema.returns
    return target.namespace in ("aten", "prims") and (
        [str(r.type) for r in returns] == ["Tensor"]
        or all(str(r.type) == "Tensor" and r.alias_info is None for r in returns)
    )


def _may_be_viewed(node: fx.Node) -> list[fx.Node]:
    """The operands that a result may be a view of, by the schema of an ATen call."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target._schema.returns[0].alias_info is None:
        return []
    bound = g.arguments(node)
    marked = [bound.get(a.name) for a in target._schema.arguments if a.alias_info is not None]
    return [m for m in marked if isinstance(m, fx.Node)]


def _switches_mode(node: fx.Node) -> bool:
    """Whether a call is of no operator and returns nothing: a switch of grad mode, of autocast."""
    called = node.op == "call_function" and not isinstance(node.target, torch._ops.OperatorBase)
    return called and g.value(node) is None


def _run(node: fx.Node, target: Any, *, grad: bool = False) -> Any:
    """The fake value of a call with a node's operands, as leaves that require gradients if so."""

    def operand(argument: fx.Node) -> Any:
        held = g.tensor(argument)
        if held is None or not grad:
            return g.value(argument)
        return held.detach().requires_grad_(_is_float(held))

    with symbolic_meta_functions(g.fake_mode(node)), torch.set_grad_enabled(grad):
        args, kwargs = map_arg((node.args, node.kwargs), operand)
        return target(*args, **kwargs)


def _is_float(held: torch.Tensor) -> bool:
    return held.is_floating_point() or held.is_complex()


def _storage(held: torch.Tensor) -> int:
    return held.untyped_storage()._cdata


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal strides in storages of one size, decided without a guard.

    The stride of a dim of size one is read by nobody.
    """

    def lies(t: torch.Tensor) -> tuple[Any, ...]:
        strides = (0 if is_one(n) else s for n, s in zip(t.shape, t.stride(), strict=True))
        return (*t.shape, *strides, t.storage_offset(), t.untyped_storage().nbytes())

    return a.device == b.device and statically_known_true(sym_eq(lies(a), lies(b)))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))
