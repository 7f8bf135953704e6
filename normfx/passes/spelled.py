"""Spelled-out norms: from a statistic to the values that are normalizations.

Every statistic is a beginning. The tensors it may be a statistic of are tried in turn (through
casts, views, squares and the subtraction of a mean), the operators after it are lifted to
polynomials, and the first values that *are* normalizations, as identities of polynomials, are
returned with their specs.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Atom, Poly
from normfx.classify import Form, classify
from normfx.families import match_family
from normfx.laws import ARRANGEMENTS, PRODUCTS, RULES, STATISTICS, VIEWS
from normfx.lift import Lift
from normfx.lifted import Lifted, Operand
from normfx.passes.composites import Core
from normfx.passes.facts import Facts
from normfx.passes.present import present
from normfx.record import Refusal

aten = torch.ops.aten


# A statistic, or the function of a family that has none.
REDUCTIONS = STATISTICS.keys() | {aten.tanh}
# What a statistic may be taken of, other than x itself.
_LOOK_THROUGH = frozenset(
    {
        aten.pow,
        aten.square,
        aten.abs,
        aten.mul,
        aten.sub,
        aten.div,
        aten.neg,
        aten.to,
        aten._to_copy,
        aten.clone,
        aten.contiguous,
        aten.alias,
        aten.detach,
        aten.dropout,
        aten.type_as,
        aten.slice,
        aten.narrow,
        aten.split,
        aten.split_with_sizes,
        aten.chunk,
        aten.tensor_split,
        aten.pad,
        aten.constant_pad_nd,
        operator.getitem,
        *VIEWS,
        *ARRANGEMENTS,
    }
)
# A spelled-out norm, from its first statistic to its last operator, has about fifteen nodes; the
# most that a site may visit bounds the time spent on a reduction that is no norm at all.
MAX_VISITED = 48
MAX_TERMS = 48

_LAWS = {
    "broadcast-axis-differs": Refusal.BROADCAST,
    "reduction-over-other-dims": Refusal.OTHER_DIMS,
    "statistic-of-another-tensor": Refusal.OTHER_TENSOR,
    "view-mixes-dims": Refusal.VIEW_MIXES_DIMS,
    "symbolic-correction": Refusal.SYMBOLIC_CORRECTION,
    "operator-law": Refusal.OPERATOR_LAW,
}


@dataclass(frozen=True, slots=True)
class Miss:
    """What looked like a norm and is none: the first law that failed, and the node where it did."""

    code: Refusal
    at: fx.Node
    guilty: fx.Node


@dataclass(slots=True)
class Found:
    """What came of a reduction.

    Attributes:
        cores: pairs of a value and the norm that it is.
        region: the nodes that were read as part of it.
        miss: why it is no norm, if it looked like one.
    """

    cores: list[tuple[fx.Node, Core]] = field(default_factory=list)
    region: list[fx.Node] = field(default_factory=list)
    miss: Miss | None = None


def spelled(facts: Facts, reduction: fx.Node) -> Found:
    """The norms that a value of `REDUCTIONS` is a statistic of."""
    source = _source(facts, reduction)
    if source is None:
        return Found()
    chain = _chain(source)
    missed: Found | None = None
    seen: set[fx.Node] = set()  # other looks at an x that was tried
    for depth, x in enumerate(chain):
        root = g.tensor(x)
        if x in seen or root is None or not root.is_floating_point():
            continue
        lift = Lift(x, facts.order, grad=facts.grad, path=chain[depth + 1 :])
        lifted = lift.value_of(reduction)
        seen.update(n for n in chain if n is not x and _is_x(lift, n))
        if lifted is None:
            if lift.stuck is not None and lift.stuck.law == "symbolic-correction":
                missed = Found([], _after(reduction), _miss(facts, lift, reduction, reduction))
            continue
        matches, rooted = _forward(facts, lift, reduction)
        region = [n for n, v in lift.values.items() if v is not None and n is not x]
        cores = [(node, present(facts, lift, node, form, region)) for node, form in matches]
        made = [(node, core) for node, core in cores if core is not None]
        if made:
            return Found(made, region)
        rooted = matches[0][0] if matches else rooted
        if rooted is not None and missed is None:
            missed = Found([], region, _miss(facts, lift, rooted, reduction))
    return missed or Found()


def _source(facts: Facts, reduction: fx.Node) -> fx.Node | None:
    """The tensor that a value of `REDUCTIONS` may be a statistic of, or something made of it."""
    source: Any = reduction.args[0]
    if g.packet(reduction) is aten.tanh:  # of a parameter times x
        inputs = source.all_input_nodes if g.packet(source) is aten.mul else []
        varying = [i for i in inputs if i not in facts.constant]
        return varying[0] if len(inputs) == 2 and len(varying) == 1 else None
    if g.packet(reduction) in PRODUCTS:  # of x with itself, or of parameters
        source, *others = reduction.all_input_nodes
        if reduction not in facts.constant and any(
            _chain(o)[0] is not _chain(source)[0] for o in others
        ):
            return None
    return source if isinstance(source, fx.Node) and g.tensor(source) is not None else None


def _is_x(lift: Lift, node: fx.Node) -> bool:
    value = lift.value_of(node)
    return isinstance(value, Lifted) and value.poly.terms == lift.ring.x.terms


def _after(node: fx.Node) -> list[fx.Node]:
    """A node and what known operators make of it: all that one near miss stands for."""
    found = [node]
    for current in found:
        if len(found) < MAX_VISITED:
            known = [u for u in current.users if g.packet(u) in RULES and u not in found]
            found += known
    return found


def _miss(facts: Facts, lift: Lift, rooted: fx.Node, first: fx.Node) -> Miss:
    """The first law that failed: of an operator, of the statistics, or of the form."""
    value, stuck = lift.values.get(rooted), lift.stuck
    if stuck is not None and stuck.law in _LAWS:
        return Miss(_LAWS[stuck.law], rooted, stuck.node)
    over: set[Any] = set()
    for node in sorted(lift.values, key=facts.order.__getitem__):
        made = lift.values[node]
        if g.packet(node) not in REDUCTIONS or not isinstance(made, Lifted):
            continue
        for atom in _moments(lift, made.poly):
            over.add(atom.key)
            if lift.ring.order_of(atom) is None:
                return Miss(Refusal.OTHER_TENSOR, rooted, node)
            if len(over) > 1:
                return Miss(Refusal.OTHER_DIMS, rooted, node)
    reads_x = isinstance(value, Lifted) and any(
        lift.ring.atoms[i].has_x for i in value.poly.atoms()
    )
    code = Refusal.NOT_A_NORM if reads_x else Refusal.FACTOR_ONLY
    return Miss(code, rooted, rooted if stuck is None else stuck.node)


def _moments(lift: Lift, poly: Poly) -> list[Atom]:
    """The moments of a polynomial, also those inside of roots."""
    found: list[Atom] = []
    for atom in (lift.ring.atoms[i] for i in sorted(poly.atoms())):
        if atom.kind == "moment":
            found.append(atom)
        else:
            found += [m for p in (atom.base, atom.other) if p for m in _moments(lift, p)]
    return found


def _chain(source: fx.Node) -> list[fx.Node]:
    """The tensors that a statistic of `source` may be of, deepest first."""
    chain = [source]
    current = source
    while (g.packet(current) or current.target) in _LOOK_THROUGH and len(chain) < 16:
        inputs = [a for a in current.args[:2] if isinstance(a, fx.Node)]
        if g.packet(current) in (aten.type_as, aten.view_as, aten.reshape_as):
            inputs = inputs[:1]
        if len({_origin(i) for i in inputs}) == 1:
            current = inputs[0]
        elif (
            g.packet(current) is aten.sub and len(inputs) == 2 and _is_mean_of(inputs[1], inputs[0])
        ):
            current = inputs[0]
        elif (
            g.packet(current) is aten.mul and len(inputs) == 2 and _is_as_large(inputs[0], current)
        ):
            current = inputs[0]  # x times a mask, or the other way round
        else:
            break
        chain.append(current)
    return list(reversed(chain))


def _is_as_large(a: fx.Node, b: fx.Node) -> bool:
    return str(g.shape(a)) == str(g.shape(b))


def _origin(node: fx.Node) -> fx.Node:
    """A node behind casts and copies."""
    while g.packet(node) in (
        aten.to,
        aten._to_copy,
        aten.clone,
        aten.contiguous,
        aten.alias,
        aten.abs,
        aten.neg,
    ):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _is_mean_of(mean: fx.Node, x: fx.Node) -> bool:
    while (
        g.packet(mean) not in (aten.mean, aten.sum)
        and mean.args
        and isinstance(mean.args[0], fx.Node)
    ):
        if g.packet(mean) not in RULES and mean.target not in RULES:
            return False
        if g.packet(mean) in (aten.var_mean, aten.std_mean):
            break
        mean = mean.args[0]
    source = mean.args[0] if mean.args else None
    return isinstance(source, fx.Node) and _origin(source) is _origin(x)


def _forward(
    facts: Facts, lift: Lift, reduction: fx.Node
) -> tuple[list[tuple[fx.Node, Form]], fx.Node | None]:
    """The first values after a statistic that are norms, and where a root of it meets x."""
    matches: list[tuple[fx.Node, Form]] = []
    uncentred: list[tuple[fx.Node, Form]] = []
    rooted: fx.Node | None = None
    scaled: fx.Node | None = None
    heap = [(facts.order[reduction], reduction)]
    seen = {reduction}
    while heap and len(seen) < MAX_VISITED:
        _, node = heapq.heappop(heap)
        value = lift.value_of(node)
        if value is None:
            continue
        if isinstance(value, Lifted):
            if _has_root(lift, value.poly):
                rooted = rooted or node
                if scaled is None and any(lift.ring.atoms[i].has_x for i in value.poly.atoms()):
                    scaled = node
            if len(value.poly.terms) > MAX_TERMS or _too_wide(facts, lift, value.poly):
                continue
            form = None
            if lift.seen_as(value.layout, g.shape(node)) is not None:
                form = classify(lift.ring, value.poly) or match_family(lift.ring, value.poly)
            if form is not None and form.statistic == "variance" and not form.centre:
                uncentred.append((node, form))  # perhaps a part of a norm multiplied out
            elif form is not None:
                matches.append((node, form))
                continue
        for user in node.users:
            if user not in seen and user in facts.order and user.op == "call_function":
                seen.add(user)
                heapq.heappush(heap, (facts.order[user], user))
    return matches or uncentred[:1], scaled or rooted


def _too_wide(facts: Facts, lift: Lift, poly: Poly) -> bool:
    """Whether a value has an operand as wide as x that is no parameter: past any affine part."""
    for atom in (lift.ring.atoms[i] for i in poly.atoms()):
        if atom.kind == "opaque" and isinstance(atom.key, Operand) and lift.ring.axes:
            if lift.ring.axes <= atom.varies and atom.key.node not in facts.constant:
                return True
    return False


def _has_root(lift: Lift, poly: Poly) -> bool:
    """Whether a root of a moment occurs in a value."""
    for monomial in poly.terms:
        for index, exponent in monomial:
            atom = lift.ring.atoms[index]
            if atom.has_moment and isinstance(exponent, Fraction):
                return True
            if atom.base is not None and _has_root(lift, atom.base):
                return True
    return False
