"""Snapshots: a graph after a stage as plain values, which later stages cannot change.

A recorder watches the pipeline (`pipeline.rewrite(observe=...)`). Stages change one graph in place,
so a node that a stage left alone is the same object before and after: it keeps its number. What
was not touched is not read again, so that all stages of a deep model cost little more than one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from normfx import graph as g
from normfx.cost import Cost, cost_of
from normfx.ops import NormSpec, norm, row_scale, short
from normfx.record import Site
from normfx.torch_internals import fake_mode_of, is_fake, is_module_state, is_symbolic, source_name


class Ref(NamedTuple):
    """An operand: the number of the node that makes it."""

    uid: int


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph.

    Attributes:
        uid: its number; the same in two stages if it is the same node.
        op: "input", "constant", "body" (of an operator), "call" or "output".
        target: what is called, for exports; None for others.
        operator: its name without the overload ("linear"), or the qualified name of an input.
        arguments: (keyword or "", argument) in order. An argument is a `Ref`, literal text, or a
            tuple of arguments.
        value: dtype and shape ("float32[s0, 8]"), or "" where they are not known.
        module: the path of the module that it comes from, or "".
        trace: the stack of the user's lines, as torch keeps it, or "".
        rule: the rule that made it, or "".
        site: the site of the norm that it is, or is a part of.
        is_state: whether it is an input that is a parameter or a buffer.
    """

    uid: int
    op: str
    target: Any
    operator: str
    arguments: tuple[tuple[str, Any], ...]
    value: str
    module: str
    trace: str
    rule: str = ""
    site: Site | None = None
    is_state: bool = False

    def operands(self) -> list[int]:
        """The numbers of the nodes that it reads, in order."""
        return [ref.uid for _, argument in self.arguments for ref in refs(argument)]


def refs(argument: Any) -> Iterator[Ref]:
    """The operands in an argument."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, tuple):
        for inner in argument:
            yield from refs(inner)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A graph after a stage.

    Attributes:
        stage: the name of the stage.
        nodes: in the order in which they run.
        cost: of one call, without what is computed from parameters alone; of stages with canonical
            nodes, else None.
    """

    stage: str
    nodes: tuple[Node, ...]
    cost: Cost | None = None

    def by_uid(self) -> dict[int, Node]:
        """The nodes by their numbers."""
        return {node.uid: node for node in self.nodes}


@dataclass(slots=True)
class Recorder:
    """An observer of the pipeline that keeps a snapshot of every stage, and of bodies apart.

    Attributes:
        snapshots: by the name of the stage, in order.
        bodies: recorders of the bodies of operators (activation checkpoints), by the name of the
            body in the graph.
    """

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    bodies: dict[str, Recorder] = field(default_factory=dict)
    _uids: dict[fx.Node, int] = field(default_factory=dict)
    _seen: dict[fx.Node, tuple[Any, Node]] = field(default_factory=dict)
    _inputs: dict[str, fx.Node] = field(default_factory=dict)
    _made: dict[fx.Node, Any] = field(default_factory=dict)
    _computed: dict[Any, Any] = field(default_factory=dict)
    _symbols: dict[str, str] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, stage: str, module: fx.GraphModule) -> None:
        """Takes a snapshot."""
        graph = module.graph
        for node in graph.nodes:
            self._uids.setdefault(node, len(self._uids))
        self._inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
        nodes = tuple(map(self._node, graph.nodes))
        self.snapshots[stage] = Snapshot(stage, nodes, _cost(graph) if stage in COSTED else None)

    def body(self, name: str) -> Callable[[str, fx.GraphModule], None]:
        """The observer of a body."""
        return self.bodies.setdefault(name, Recorder())

    def forget(self) -> None:
        """Lets go of the graphs: the snapshots stay."""
        self._seen.clear()
        self._uids.clear()
        self._inputs.clear()
        self._made.clear()
        self._computed.clear()
        for body in self.bodies.values():
            body.forget()

    def _node(self, node: fx.Node) -> Node:
        state = (node.target, node.args, node.kwargs, node.meta.get("normfx_site"))
        known = self._seen.get(node)
        if known is not None and all(a is b for a, b in zip(known[0], state, strict=True)):
            return known[1]
        made = self._read(node)
        self._seen[node] = state, made
        return made

    def _read(self, node: fx.Node) -> Node:
        op, operator = self._name(node) if known_op(node) else ("call", _operator(node))
        return Node(
            uid=self._uids[node],
            op=op,
            target=node.target if op == "call" else None,
            operator=operator,
            arguments=tuple(self._arguments(node)),
            value=self._value(self._held(node)) if op != "output" else "",
            module=g.module_path(node),
            trace=str(node.meta.get("stack_trace") or ""),
            rule=str(node.meta.get("normfx_rule") or ""),
            site=node.meta.get("normfx_site"),
            is_state=op == "constant" or (op == "input" and is_module_state(node)),
        )

    def _name(self, node: fx.Node) -> tuple[str, str]:
        """What kind of value a node is that calls nothing, and where it is from, as a name."""
        if node.op == "output":
            return "output", "return"
        if node.op == "placeholder" and "normfx_made_from" in node.meta:
            return "input", self._made_from(node)
        if node.op == "placeholder":
            source = source_name(node)
            path = g.clean_path(source) if is_module_state(node) else _argument_name(source)
            return "input", path or self._numbered("input")
        if isinstance(g.value(node), torch.Tensor):
            return "constant", self._numbered("constant")
        return "body", self._numbered("body")

    def _made_from(self, node: fx.Node) -> str:
        """`out.weight'` for what takes the place of `out.weight`: it has its shape, and its reader.

        What takes no place is named by its own: `conv.bias'` of a convolution without a bias.
        """
        sources = map(self._inputs.get, node.meta["normfx_made_from"])
        same = [self._name(s)[1] for s in sources if s and g.shape(s) == g.shape(node)]
        reader = next(iter(node.users), node)
        module = g.module_path(reader)
        if isinstance(reader.target, torch._ops.OpOverload) and module:
            roles = [k for k, given in g.arguments(reader).items() if given is node]
            own = [name for name in same if name.startswith(f"{module}.")]
            if own or set(roles) & {"weight", "bias"}:
                return (own[0] if own else f"{module}.{roles[0]}") + "'"
        return f"{same[0]}'" if same else self._numbered("hoisted")

    def _numbered(self, kind: str) -> str:
        number = self._counts[kind] = self._counts.get(kind, -1) + 1
        return f"{kind}.{number}"

    def _arguments(self, node: fx.Node) -> Iterator[tuple[str, Any]]:
        if node.op == "placeholder" or node.op == "get_attr":
            return
        if g.is_call(node, norm, row_scale):
            operands = _NORM_OPERANDS if node.target is norm else _SCALE_OPERANDS
            named: dict[str, Any] = dict(zip(operands, node.args, strict=False))
            for name, operand in named.items():
                if operand is not None:
                    yield name, self._argument(operand)
            yield "", spec_text(node.kwargs["spec"], g.dtype(node))  # pyright: ignore
            return
        if isinstance(node.target, torch._ops.OpOverload):
            bound = g.arguments(node)
            for position, given in enumerate(node.target._schema.arguments):
                if given.name in _NOT_SHOWN or given.name not in bound:
                    continue
                if not given.has_default_value() and position < _BY_PLACE:
                    yield "", self._argument(bound[given.name])
                elif not given.has_default_value() or not _is_default(
                    bound[given.name], given.default_value
                ):
                    yield given.name, self._argument(bound[given.name])
            return
        args = node.args
        if node.op == "output":
            args = node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args
        for argument in args:
            yield "", self._argument(argument)
        for name, argument in node.kwargs.items():
            if name not in _NOT_SHOWN and argument is not None:
                yield name, self._argument(argument)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return Ref(self._uids[argument])
        if isinstance(argument, NormSpec):
            return spec_text(argument, None)
        if isinstance(argument, (tuple, list)):
            return tuple(map(self._argument, argument))
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return ("slice", *map(self._argument, parts))
        return self._literal(argument)

    def _literal(self, literal: Any) -> str:
        if isinstance(literal, (torch.dtype, torch.memory_format)):
            return str(literal).removeprefix("torch.")
        if isinstance(literal, torch.device):
            return "device"
        if isinstance(literal, float) and math.isfinite(literal):
            return repr(short(literal))
        if isinstance(literal, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._renamed(str(literal))
        if literal is None or isinstance(literal, (bool, int, float, str, complex)):
            return repr(literal)
        return re.sub(r" at 0x[0-9a-f]+", "", str(literal)).splitlines()[0][:80]

    def _held(self, node: fx.Node) -> Any:
        """The fake value of a node; rules leave it out where no later stage asks for it."""
        held = g.value(node)
        target: Any = node.target
        computes = isinstance(target, torch._ops.OpOverload) or g.is_call(node, norm, row_scale)
        if held is not None or not computes:
            return held
        if node in self._made:
            return self._made[node]
        given = map_arg((node.args, node.kwargs), lambda n: self._made.get(n, g.value(n)))
        if any(self._made.get(n, g.value(n)) is None for n in node.all_input_nodes):
            return None
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        if not leaves or not all(map(is_static_fake, leaves)) or g.mutated_arguments(node):
            return None
        key = (target, repr(tree_map_only(torch.Tensor, _look, given)))
        if key not in self._computed:
            with fake_mode_of(leaves), torch.no_grad():
                self._computed[key] = target(*given[0], **given[1])
        self._made[node] = self._computed[key]
        return self._made[node]

    def _value(self, held: Any) -> str:
        if isinstance(held, torch.Tensor):
            sizes = ", ".join(map(str, held.shape))
            return f"{str(held.dtype).removeprefix('torch.')}[{self._renamed(sizes)}]"
        if isinstance(held, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"number {self._renamed(str(held))}"
        if isinstance(held, (tuple, list)):
            return f"({', '.join(map(self._value, held))})"
        return ""

    def _renamed(self, text: str) -> str:
        """Symbols by the order in which they first appear: torch's own numbers are hashes."""
        if not any(c.isalpha() for c in text):
            return text
        return _SYMBOL.sub(lambda m: self._symbols.setdefault(m[0], f"s{len(self._symbols)}"), text)


# The stages whose cost is compared: both have canonical norms, which the cost model knows.
COSTED = ("recognise", "hoist")

_SYMBOL = re.compile(r"\b[suzf]+\d+\b")
_NORM_OPERANDS = ("", "weight", "bias", "eps", "mean", "square", "gate")
_SCALE_OPERANDS = ("", "eps", "square")
# Where a value lies, who computes it, and what `spec_text` has.
_NOT_SHOWN = frozenset({"device", "layout", "pin_memory", "rank", "cudnn_enable", "cudnn_enabled"})
# How many arguments say by their place what they are; `batch_norm` has eight.
_BY_PLACE = 3


def known_op(node: fx.Node) -> bool:
    """Whether a node calls nothing."""
    return node.op in ("placeholder", "get_attr", "output")


def is_static_fake(held: torch.Tensor) -> bool:
    """Whether a tensor is fake and of known sizes, so that computing with it leaves no guard."""
    return is_fake(held) and not any(map(is_symbolic, held.shape))


def _look(held: torch.Tensor) -> str:
    return f"{held.dtype}{list(held.shape)}{held.device}"


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet = target.overloadpacket
        home = target.namespace
        return packet.__name__ if home == "aten" else f"{home}.{packet.__name__}"
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _is_default(given: Any, default: Any) -> bool:
    """Whether an argument says what its absence would: no node equals a default."""
    return not isinstance(given, fx.Node) and type(given) is type(default) and given == default


def _argument_name(source: str) -> str:
    """`L['ids']` as `ids`, `L['args'][0]` as `args.0`."""
    return ".".join(re.findall(r"\w+", source.removeprefix("L").replace("'", "")))


def spec_text(spec: NormSpec, dtype: torch.dtype | None) -> str:
    """A spec as a person would say it: `RMSNorm over [2], eps 1e-06`, and what is not usual."""
    parts = [f"{spec.kind} over {list(spec.dims)}"]
    if spec.eps is not None:
        parts.append(f"eps {short(spec.eps)!r}")
    usual = NormSpec("", ())
    for name in _UNUSUAL:
        given = getattr(spec, name)
        if given != getattr(usual, name):
            parts.append(f"{name} {given!r}")
    if spec.stats_dtype != dtype and dtype is not None:
        parts.append(f"statistics in {str(spec.stats_dtype).removeprefix('torch.')}")
    if spec.norm_dtype not in (spec.out_dtype, spec.stats_dtype):
        parts.append(f"rounded to {str(spec.norm_dtype).removeprefix('torch.')}")
    return ", ".join(parts)


_UNUSUAL = (
    *("correction", "eps_place", "scale", "groups", "prefix", "beyond", "window", "alpha"),
    *("power", "momentum"),
)


def _cost(graph: fx.Graph) -> Cost:
    """Of the nodes that run in each call."""
    constant = g.parameter_only(graph)
    return cost_of(n for n in graph.nodes if n not in constant)


def sites_of(nodes: Sequence[Node]) -> dict[int, Site]:
    """The sites of nodes that have one, by the numbers of the nodes."""
    return {node.uid: node.site for node in nodes if node.site is not None}
