"""Spelled-out norms: from a reduction to the values that are normalizations.

Every reduction is a beginning. The tensors it may be a statistic of are tried in turn (through
casts, squares and the subtraction of a mean), the operators after it are lifted to polynomials, and
the first values that *are* normalizations, as identities of polynomials, are returned with their
specs.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, close
from normfx.classify import Form, classify, evaluate
from normfx.laws import RULES
from normfx.lift import Lift
from normfx.lifted import Lifted, normal_dims
from normfx.ops import NormSpec
from normfx.passes.composites import Core, wide
from normfx.passes.facts import Facts
from normfx.passes.materialise import can_be_made, materialise
from normfx.record import Refusal

aten = torch.ops.aten


REDUCTIONS = frozenset(
    {
        aten.mean,
        aten.sum,
        aten.var,
        aten.std,
        aten.var_mean,
        aten.std_mean,
        aten.norm,
        aten.linalg_vector_norm,
        aten.frobenius_norm,
        aten.adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d,
    }
)
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
    """The norms that a reduction is a statistic of."""
    source = reduction.args[0]
    held = g.tensor(source)
    if not isinstance(source, fx.Node) or held is None:
        return Found()
    dims = _dims(reduction, held.dim())
    missed: Found | None = None
    for x in _roots(source):
        root = g.tensor(x)
        if root is None or not root.is_floating_point() or not dims:
            continue
        lift = Lift(x, frozenset(dims), facts.order, grad=facts.grad)
        if lift.value_of(reduction) is None:
            if lift.stuck is not None and lift.stuck.law == "symbolic-correction":
                missed = Found([], _after(reduction), _miss(lift, reduction))
            continue
        matches, rooted = _forward(facts, lift, reduction)
        region = [n for n, v in lift.values.items() if v is not None and n is not x]
        cores = [(node, _core(facts, lift, node, form, region)) for node, form in matches]
        made = [(node, core) for node, core in cores if core is not None]
        if made:
            return Found(made, region)
        rooted = matches[0][0] if matches else rooted
        if rooted is not None and missed is None:
            missed = Found([], region, _miss(lift, rooted))
    return missed or Found()


def _after(node: fx.Node) -> list[fx.Node]:
    """A node and what known operators make of it: all that one near miss stands for."""
    found = [node]
    for current in found:
        if len(found) < MAX_VISITED:
            known = [u for u in current.users if g.packet(u) in RULES and u not in found]
            found += known
    return found


def _dims(reduction: fx.Node, rank: int) -> set[int]:
    if g.packet(reduction) in (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d):
        return {rank - 1 - i for i in range(len(g.arguments(reduction)["output_size"]))}
    return normal_dims(g.arguments(reduction).get("dim"), rank)


def _miss(lift: Lift, rooted: fx.Node) -> Miss:
    value, stuck = lift.values.get(rooted), lift.stuck
    if stuck is not None and stuck.law in _LAWS:
        return Miss(_LAWS[stuck.law], rooted, stuck.node)
    reads_x = isinstance(value, Lifted) and any(
        lift.ring.atoms[i].has_x for i in value.poly.atoms()
    )
    code = Refusal.NOT_A_NORM if reads_x else Refusal.FACTOR_ONLY
    return Miss(code, rooted, rooted if stuck is None else stuck.node)


def _roots(source: fx.Node) -> list[fx.Node]:
    """The tensors that a reduction of `source` may be a statistic of, deepest first."""
    chain = [source]
    current = source
    while g.packet(current) in _LOOK_THROUGH and len(chain) < 12:
        inputs = [a for a in current.args[:2] if isinstance(a, fx.Node)]
        if g.packet(current) in (aten.type_as,):
            inputs = inputs[:1]
        if len({_origin(i) for i in inputs}) == 1:
            current = inputs[0]
        elif (
            g.packet(current) is aten.sub and len(inputs) == 2 and _is_mean_of(inputs[1], inputs[0])
        ):
            current = inputs[0]
        else:
            break
        chain.append(current)
    return list(reversed(chain))


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
            form = classify(lift.ring, value.poly) if _is_like_x(lift, node, value) else None
            if form is not None and form.denominator.variance and not form.centre:
                uncentred.append((node, form))  # perhaps a part of a norm multiplied out
            elif form is not None:
                matches.append((node, form))
                continue
        for user in node.users:
            if user not in seen and user in facts.order and user.op == "call_function":
                seen.add(user)
                heapq.heappush(heap, (facts.order[user], user))
    return matches or uncentred[:1], scaled or rooted


def _is_like_x(lift: Lift, node: fx.Node, value: Lifted) -> bool:
    """Whether a value has the shape of x, each dim standing for the axis of x at its place."""
    sizes = g.shape(lift.x) or ()
    if str(g.shape(node)) != str(sizes):
        return False
    return all(a == i or str(sizes[i]) == "1" for i, a in enumerate(value.axes))


def _too_wide(facts: Facts, lift: Lift, poly: Poly) -> bool:
    """Whether a value has an operand as wide as x that is no parameter: past any affine part."""
    everything = {i for i, s in enumerate(g.shape(lift.x) or ()) if str(s) != "1"}
    for index in poly.atoms():
        atom = lift.ring.atoms[index]
        if atom.kind == "opaque" and isinstance(atom.key, fx.Node) and everything <= atom.varies:
            if atom.key not in facts.constant and len(everything) > 0:
                return True
    return False


def _core(
    facts: Facts, lift: Lift, node: fx.Node, form: Form, region: list[fx.Node]
) -> Core | None:
    """A form as a spec and operands."""
    ring, denominator = lift.ring, form.denominator
    out = g.dtype(node)
    assert out is not None
    stats = wide(g.dtype(lift.x) or out)
    for inner in region:
        held = g.dtype(inner)
        if held is torch.float64:
            stats = torch.float64
    n = lift.count().constant()
    eps_poly, weight_poly, bias_poly = lift.settled(denominator.eps), form.weight, form.bias
    if eps_poly is None or not _is_given(facts, lift, eps_poly):
        return None
    if not all(can_be_made(lift, p) for p in (eps_poly, weight_poly, bias_poly)):
        return None
    number = evaluate(ring, eps_poly)
    eps = None if number is not None else materialise(facts, lift, eps_poly, node, stats)
    weight = (
        None if weight_poly.constant() == 1 else materialise(facts, lift, weight_poly, node, stats)
    )
    bias = None if not bias_poly else materialise(facts, lift, bias_poly, node, stats)
    spec = NormSpec(
        kind="",
        dims=tuple(sorted(lift.dims)),
        statistic="variance" if denominator.variance else "mean-square",
        centre=form.centre,
        eps=number,
        eps_place=denominator.place,
        scale=form.scale,
        stats_dtype=stats,
        norm_dtype=out if weight is None and bias is None else stats,
        out_dtype=out,
    )
    return Core(_presented(spec, n, tensor_eps=eps is not None), lift.x, weight, bias, eps)


def _is_given(facts: Facts, lift: Lift, eps: Poly) -> bool:
    """Whether an eps is one: numbers, parameters, single numbers, but nothing made from x."""
    for atom in (lift.ring.atoms[i] for i in eps.atoms()):
        inner = [p for p in (atom.base, atom.floor) if p is not None]
        if not all(_is_given(facts, lift, p) for p in inner):
            return False
        if atom.kind != "opaque" or atom.key in facts.constant:
            continue
        if str(g.shape(atom.key)) != "()" or lift.depends(atom.key):
            return False
    return True


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


def _presented(spec: NormSpec, n: Fraction | None, *, tensor_eps: bool) -> NormSpec:
    """The same function with the numbers as people write them: unbiased variances, sums."""
    if close(spec.scale, 1.0):
        spec = spec._replace(scale=1.0)
    if (
        spec.eps == 0 and not tensor_eps
    ):  # a root without eps: torch's norm and deviation know its slope at zero
        spec = spec._replace(eps_place="outside")
    if n is None or n <= 1 or tensor_eps or spec.eps is None:
        return spec._replace(eps=_tidy(spec.eps))
    count = float(n)
    if spec.statistic == "variance" and close(spec.scale, math.sqrt((count - 1) / count)):
        grown = count / (count - 1)
        spec = spec._replace(scale=1.0, correction=1, eps=spec.eps * _by_place(spec, grown))
    elif spec.statistic == "mean-square" and (
        close(spec.scale, 1 / math.sqrt(count)) or spec.eps_place in ("outside", "floor")
    ):
        scale = spec.scale * math.sqrt(count)
        scale = 1.0 if close(scale, 1.0) else scale
        spec = spec._replace(
            statistic="sum-square", scale=scale, eps=spec.eps * _by_place(spec, count)
        )
    return spec._replace(eps=_tidy(spec.eps))


def _by_place(spec: NormSpec, factor: float) -> float:
    return factor if spec.eps_place in ("inside", "floor-inside") else math.sqrt(factor)


def _tidy(eps: float | None) -> float | None:
    """A number without the last digits that scaling it left behind."""
    return None if eps is None else float(f"{eps:.14g}")
