"""Recognise: find every normalization, prove what it is, and put one canonical node in its place.

ATen's own normalizations are read off their arguments. For a spelled-out one, every reduction is a beginning: the
tensors it may be a statistic of are tried in turn (through casts, squares and the subtraction of a mean), the
operators after it are lifted to polynomials, and the first value that *is* a normalization (an identity of
polynomials, see `classify.py`) is replaced. Then the operators after that, as long as the value stays
weight * norm + bias, are taken in as its affine part.

What looked like a norm (a statistic and a root of it) and is none is recorded as a near miss with the first law
that failed. The graph can be run after this stage; inner values that are read from outside stay where they are.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from normfx import graph as g
from normfx.algebra import Poly, close
from normfx.classify import Form, classify, evaluate
from normfx.lift import RULES, Lift, Lifted, Stuck, literal, normal_dims
from normfx.ops import NormSpec, norm, short
from normfx.passes.composites import Core, composite, wide
from normfx.record import Journal, NearMiss, Record, Refusal, Site

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
# Another look at the same numbers.
_LOOKS = frozenset(
    {
        aten.view,
        aten.reshape,
        aten.unsqueeze,
        aten.squeeze,
        aten.expand,
        aten.to,
        aten._to_copy,
        aten.alias,
        aten.detach,
    }
)
# A spelled-out norm, from its first statistic to its last operator, has about fifteen nodes; the most that a
# site may visit bounds the time spent on a reduction that is no norm at all.
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


def recognise(gm: fx.GraphModule, journal: Journal, *, grad: bool) -> None:
    """Replaces every normalization of the graph by a canonical node, and records each in the journal.

    Args:
        gm: a captured graph; changed in place.
        journal: gets a `Site` for each norm, in the order of the graph, and a `NearMiss` for what is none.
        grad: whether gradients flow through the graph (then `detach` is no identity).

    Refuses:
        see `record.REFUSALS`, section recognition.
    """
    _Recogniser(gm, journal, grad=grad).run()


class _Recogniser:
    def __init__(self, gm: fx.GraphModule, journal: Journal, *, grad: bool) -> None:
        self.graph, self.journal, self.grad = gm.graph, journal, grad
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.constant = g.parameter_only(gm.graph)
        self.writes = [
            (self.order[node], {g.storage(a) for a in g.mutated_arguments(node)})
            for node in gm.graph.nodes
            if g.mutated_arguments(node)
        ]
        self.grad_epochs = [
            self.order[node]
            for node in gm.graph.nodes
            if getattr(node.target, "__name__", "") == "_set_grad_enabled"
        ]
        self.done: set[fx.Node] = set()  # reductions that belong to a site already
        self.missed: set[fx.Node] = set()  # values of near misses
        self.found: list[tuple[int, Site]] = []

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            core = composite(node)
            if core is not None:
                self._place(node, core, region=[node])
            elif g.packet(node) in REDUCTIONS and node not in self.done and node.users:
                self._reduction(node)
        self._static_norms()
        self._unread_roots()
        self.journal.sites += [site for _, site in sorted(self.found, key=lambda pair: pair[0])]

    # -- spelled-out norms -----------------------------------------------------------------------

    def _reduction(self, reduction: fx.Node) -> None:
        source = reduction.args[0]
        if not isinstance(source, fx.Node) or g.tensor(source) is None:
            return
        named = g.arguments(reduction)
        if "adaptive" in str(reduction.target):
            sizes = reduction.args[1]
            dims = normal_dims([-1 - i for i in range(len(sizes))], len(g.shape(source) or ()))  # type: ignore[arg-type]
        else:
            dims = normal_dims(named.get("dim"), len(g.shape(source) or ()))
        miss: tuple[Stuck | None, fx.Node, Lift] | None = None
        for x in self._roots(source):
            held = g.tensor(x)
            if held is None or not held.is_floating_point() or not dims:
                continue
            lift = Lift(x, frozenset(dims), self.order, grad=self.grad)
            if lift.value_of(reduction) is None:
                continue
            matches, rooted = self._forward(lift, reduction)
            if matches:
                self._take(lift, matches)
                return
            if rooted is not None and miss is None:
                miss = (lift.stuck, rooted, lift)
        if miss is not None:
            self._near_miss(*miss)

    def _roots(self, source: fx.Node) -> list[fx.Node]:
        """The tensors that a reduction of `source` may be a statistic of, deepest first."""
        chain = [source]
        current = source
        while g.packet(current) in _LOOK_THROUGH and len(chain) < 12:
            inputs = [a for a in current.args[:2] if isinstance(a, fx.Node)]
            if g.packet(current) in (aten.type_as,):
                inputs = inputs[:1]
            if len({self._origin(i) for i in inputs}) == 1:
                current = inputs[0]
            elif (
                g.packet(current) is aten.sub
                and len(inputs) == 2
                and self._is_mean_of(inputs[1], inputs[0])
            ):
                current = inputs[0]
            else:
                break
            chain.append(current)
        return list(reversed(chain))

    def _origin(self, node: fx.Node) -> fx.Node:
        """A node behind casts and copies."""
        while g.packet(node) in (
            aten.to,
            aten._to_copy,
            aten.clone,
            aten.contiguous,
            aten.alias,
            aten.abs,
        ):
            source = node.args[0]
            if not isinstance(source, fx.Node):
                break
            node = source
        return node

    def _is_mean_of(self, mean: fx.Node, x: fx.Node) -> bool:
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
        return isinstance(source, fx.Node) and self._origin(source) is self._origin(x)

    def _forward(
        self, lift: Lift, reduction: fx.Node
    ) -> tuple[list[tuple[fx.Node, Form]], fx.Node | None]:
        """The first values after a statistic that are norms; and the first root taken of a statistic."""
        matches: list[tuple[fx.Node, Form]] = []
        rooted: fx.Node | None = None
        heap = [(self.order[reduction], reduction)]
        seen = {reduction}
        identity = tuple(range(lift.rank))
        x_shape = [str(s) for s in g.shape(lift.x) or ()]
        while heap and len(seen) < MAX_VISITED:
            _, node = heapq.heappop(heap)
            value = lift.value_of(node)
            if value is None:
                continue
            if isinstance(value, Lifted):
                if rooted is None and _has_root(lift, value.poly):
                    rooted = node
                if len(value.poly.terms) > MAX_TERMS or self._too_wide(lift, value.poly):
                    continue
                full = [str(s) for s in g.shape(node) or ()] == x_shape
                if full and all(a in (None, i) for i, a in enumerate(value.axes)):
                    form = (
                        classify(lift.ring, value.poly)
                        if _full_axes(value.axes, identity, lift)
                        else None
                    )
                    if form is not None:
                        matches.append((node, form))
                        continue
            for user in node.users:
                if user not in seen and user in self.order and user.op == "call_function":
                    seen.add(user)
                    heapq.heappush(heap, (self.order[user], user))
        return matches, rooted

    def _too_wide(self, lift: Lift, poly: Poly) -> bool:
        """Whether a value has an operand as wide as x that is no parameter: it is past any norm's affine part."""
        everything = {i for i, s in enumerate(g.shape(lift.x) or ()) if str(s) != "1"}
        for index in poly.atoms():
            atom = lift.ring.atoms[index]
            if (
                atom.kind == "opaque"
                and isinstance(atom.key, fx.Node)
                and everything <= atom.varies
            ):
                if atom.key not in self.constant and len(everything) > 0:
                    return True
        return False

    def _take(self, lift: Lift, matches: list[tuple[fx.Node, Form]]) -> None:
        region = [n for n, v in lift.values.items() if v is not None and n is not lift.x]
        self.done.update(n for n in region if g.packet(n) in REDUCTIONS)
        for node, form in matches:
            core = self._core(lift, node, form, region)
            if core is not None:
                self._place(node, core, region)

    def _core(self, lift: Lift, node: fx.Node, form: Form, region: list[fx.Node]) -> Core | None:
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
        settled = [lift.settled(p) for p in (denominator.eps, form.weight, form.bias)]
        if any(p is None or not self._can_be_made(lift, p) for p in settled):
            return None
        eps_poly, weight_poly, bias_poly = settled
        number = evaluate(ring, eps_poly)
        eps = None if number is not None else self._materialise(lift, eps_poly, node)
        weight = None if weight_poly.constant() == 1 else self._materialise(lift, weight_poly, node)
        bias = None if not bias_poly else self._materialise(lift, bias_poly, node)
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

    def _can_be_made(self, lift: Lift, poly: Poly) -> bool:
        """Whether a polynomial can be written with operators: symbolic sizes have no node to read."""
        atoms = [lift.ring.atoms[i] for i in poly.atoms()]
        return all(
            isinstance(a.key, fx.Node)
            if a.kind == "opaque"
            else a.base is None or self._can_be_made(lift, a.base)
            for a in atoms
        )

    def _materialise(self, lift: Lift, poly: Poly, before: fx.Node) -> Any:
        """A polynomial of opaque operands as a node of the graph: an operand itself, or the sum that it is."""
        total: Any = None
        for monomial, coefficient in poly.terms.items():
            term: Any = float(coefficient)
            for index, exponent in monomial:
                atom = lift.ring.atoms[index]
                factor = self._atom_node(lift, index, exponent, before)
                if atom.kind == "constant":
                    term = term * factor
                else:
                    term = (
                        factor if term == 1.0 else self._emit(aten.mul.Tensor, factor, term, before)
                    )
            total = term if total is None else self._emit(aten.add.Tensor, total, term, before)
        return total

    def _atom_node(self, lift: Lift, index: int, exponent: Any, before: fx.Node) -> Any:
        atom = lift.ring.atoms[index]
        if atom.kind == "constant":
            return float(atom.key) ** float(exponent)  # type: ignore[arg-type]
        base = atom.key if atom.kind == "opaque" else self._materialise(lift, atom.base, before)  # type: ignore[arg-type]
        assert isinstance(base, fx.Node), "a symbolic size never stands alone in an affine part"
        if atom.kind == "floor":
            low = self._materialise(lift, atom.floor, before)  # type: ignore[arg-type]
            base = self._emit(aten.clamp_min.default, base, low, before)
        return (
            base
            if exponent == 1
            else self._emit(aten.pow.Tensor_Scalar, base, float(exponent), before)
        )

    def _emit(self, target: Any, a: Any, b: Any, before: fx.Node) -> fx.Node:
        if not isinstance(a, fx.Node):
            a, b = b, a
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, (a, b))
        left, right = g.tensor(a), g.tensor(b) if isinstance(b, fx.Node) else b
        assert left is not None
        with left.fake_mode if hasattr(left, "fake_mode") else torch.no_grad():  # type: ignore[attr-defined]
            made.meta["val"] = target(left, right)
        made.meta["stack_trace"] = before.meta.get("stack_trace")
        self.order[made] = self.order[before]
        if all(i in self.constant for i in made.all_input_nodes):
            self.constant.add(made)
        return made

    # -- the affine part -------------------------------------------------------------------------

    def _extend(self, node: fx.Node, core: Core) -> tuple[fx.Node, Core, list[fx.Node]]:
        """Takes in what follows a norm as long as it stays weight * norm + bias (one reader at a time)."""
        taken: list[fx.Node] = []
        if core.spec.statistic in ("batch", "static"):
            return node, core, taken
        last, closed = node, False
        lift = Lift(node, frozenset(core.spec.dims), self.order, grad=self.grad)
        best = (node, core, taken)
        while len(last.users) == 1 and not closed:
            (user,) = last.users
            value = (
                lift.value_of(user) if user in self.order and user.op == "call_function" else None
            )
            if not isinstance(value, Lifted) or value.axes != tuple(range(lift.rank)):
                break
            if [str(s) for s in g.shape(user) or ()] != [str(s) for s in g.shape(node) or ()]:
                break
            extended = self._with_affine(lift, user, value.poly, core)
            if extended is None:
                break
            taken = [*taken, user]
            last = user
            cast_after_affine = g.packet(user) in (aten.to, aten._to_copy, aten.type_as) and (
                extended.weight is not None or extended.bias is not None
            )
            closed = cast_after_affine and g.dtype(user) != g.dtype(user.args[0])  # type: ignore[arg-type]
            best = (last, extended, taken)
        return best

    def _with_affine(self, lift: Lift, node: fx.Node, poly: Poly, core: Core) -> Core | None:
        inside, outside = lift.ring.split(poly, ("x",))
        weight: dict[Any, Any] = {}
        for monomial, coefficient in inside.terms.items():
            rest = tuple((i, e) for i, e in monomial if i != 0)
            if dict(monomial).get(0) != 1 or any(
                lift.ring.atoms[i].kind != "opaque" for i, _ in rest
            ):
                return None
            weight[rest] = coefficient
        factor = Poly(weight)
        number = factor.constant()
        spec = core.spec
        if number is not None and number != 1:
            if core.weight is not None or core.bias is not None or outside:
                return None
            return replace(
                core, spec=self._after(node, core, spec._replace(scale=spec.scale * float(number)))
            )
        has_weight, has_bias = number is None, bool(outside)
        if (has_weight and (core.weight is not None or core.bias is not None)) or (
            has_bias and core.bias is not None
        ):
            return None
        if (
            len(factor.terms) > 2
            or len(outside.terms) > 1
            or any(lift.ring.atoms[i].kind != "opaque" for i in outside.atoms())
        ):
            return None
        static = all(
            lift.ring.atoms[i].key in self.constant for i in (factor.atoms() | outside.atoms())
        )
        if not static and not self._broadcasts(lift, factor, outside):
            return None
        if (
            has_bias
            and static
            and not has_weight
            and core.weight is None
            and not self._channel_like(lift, outside)
        ):
            return None
        if spec.affine_dim is not None and (core.weight is not None or core.bias is not None):
            return None
        made = replace(core, spec=self._after(node, core, spec._replace(affine_dim=None)))
        with self.graph.inserting_before(node):
            if has_weight:
                made = replace(made, weight=self._materialise(lift, factor, node))
            if has_bias:
                made = replace(made, bias=self._materialise(lift, outside, node))
        return made

    def _after(self, node: fx.Node, core: Core, spec: NormSpec) -> NormSpec:
        """The spec with the dtypes of the value after one more operator."""
        out = g.dtype(node)
        assert out is not None
        source = node.args[0] if isinstance(node.args[0], fx.Node) else None
        plain = core.weight is None and core.bias is None
        is_cast = g.packet(node) in (
            aten.to,
            aten._to_copy,
            aten.type_as,
            aten.clone,
            aten.contiguous,
        )
        origin = spec.origin if out == core.spec.out_dtype and is_cast else "algebra"
        if plain:  # what the norm is rounded to before its affine part
            rounded = out if is_cast else core.spec.out_dtype
            return spec._replace(norm_dtype=rounded, out_dtype=out, origin=origin)
        del source
        return spec._replace(out_dtype=out, origin=origin)

    def _broadcasts(self, lift: Lift, *polys: Poly) -> bool:
        """Whether each operand is constant along a dim that statistics are not taken over (AdaLN's, per sample)."""
        sizes = g.shape(lift.x) or ()
        others = {i for i, s in enumerate(sizes) if i not in lift.dims and str(s) != "1"}
        return all(
            not others <= lift.ring.atoms[i].varies
            for poly in polys
            for i in poly.atoms()
            if others
        ) and bool(others)

    def _channel_like(self, lift: Lift, bias: Poly) -> bool:
        return all(lift.ring.atoms[i].varies <= lift.dims for i in bias.atoms())

    # -- placing ---------------------------------------------------------------------------------

    def _place(self, node: fx.Node, core: Core, region: list[fx.Node]) -> None:
        refusal = self._unsafe(node, core, region)
        if refusal is not None:
            code, guilty = refusal
            self.journal.near_misses.append(
                NearMiss(
                    _name(node),
                    code,
                    g.location(node),
                    guilty.name,
                    f"{core.spec.kind} not replaced",
                )
            )
            return
        last, core, taken = self._extend(node, core)
        if taken and self._unsafe(last, core, [*region, *taken]) is not None:
            return
        spec = core.spec
        if not spec.kind:
            spec = spec._replace(kind=_kind(spec))
        if core.x in self.constant:
            spec = spec._replace(kind=_WEIGHT_KINDS.get(spec.kind, f"Weight{spec.kind}"))
        rank = len(g.shape(core.x) or ())
        spec = spec._replace(contiguous=_becomes_contiguous(core.x, last))
        operands = (core.x, core.weight, core.bias, core.eps, core.running_mean, core.running_var)
        with self.graph.inserting_after(last):
            made = self.graph.call_function(norm, operands, {"spec": spec, "rank": rank})
        g.inherit_meta(made, last)
        self.order[made] = self.order[last]
        site = _site(node, made, spec, rank)
        site.on_weight = core.x in self.constant
        made.meta["normfx_site"] = site
        last.replace_all_uses_with(made, propagate_meta=False)
        g.erase_dead({*region, *taken, node}, self.graph)
        site.records.append(
            Record(
                "recognise",
                f"recognise-{spec.origin.replace('_', '-')}",
                True,
                None,
                made.name,
                site.location,
            )
        )
        self.found.append((self.order[last], site))

    def _unsafe(
        self, node: fx.Node, core: Core, region: list[fx.Node]
    ) -> tuple[Refusal, fx.Node] | None:
        """Why a region may not be replaced by one node at its end, if so."""
        operands = (core.x, core.weight, core.bias, core.eps, core.running_mean, core.running_var)
        inputs = [i for i in operands if isinstance(i, fx.Node)]
        inside = [n for n in (*region, node) if self.order[n] <= self.order[node]]
        first, last = min(self.order[n] for n in inside), self.order[node]
        watched = {g.storage(n) for n in (*inputs, *inside)} - {None}
        for position, written in self.writes:
            if first <= position < last and written & watched and position != self.order[node]:
                guilty = next(n for n, i in self.order.items() if i == position)
                return Refusal.MUTATED, guilty
        if any(first < epoch < last for epoch in self.grad_epochs):
            return Refusal.GRAD_MODE, node
        return None

    def _near_miss(self, stuck: Stuck | None, rooted: fx.Node, lift: Lift) -> None:
        value = lift.values.get(rooted)
        if isinstance(value, Lifted) and not any(
            lift.ring.atoms[i].has_x for i in value.poly.atoms()
        ):
            code = Refusal.FACTOR_ONLY
        else:
            code = Refusal.NOT_A_NORM
        if stuck is not None and stuck.law in _LAWS and stuck.law != "operator-law":
            code = _LAWS[stuck.law]
        guilty = rooted if stuck is None else stuck.node
        self.missed.update(n for n, v in lift.values.items() if v is not None)
        self.journal.near_misses.append(
            NearMiss(_name(rooted), code, g.location(guilty), guilty.name)
        )

    def _unread_roots(self) -> None:
        """Records roots of activations that no statistic over fixed dims leads to (a cumulative one, say)."""
        for node in self.graph.nodes:
            if g.packet(node) not in (aten.rsqrt,) or node in self.constant or node in self.missed:
                continue
            held = g.tensor(node)
            if held is not None and held.dim():
                self.journal.near_misses.append(
                    NearMiss(_name(node), Refusal.UNKNOWN_STATISTIC, g.location(node), node.name)
                )

    # -- statistics that are parameters -----------------------------------------------------------

    def _static_norms(self) -> None:
        """X * A + B, where A is made with the root of a given variance: a frozen BatchNorm, UN in eval mode."""
        for root in [
            n for n in self.graph.nodes if n in self.constant and _is_root_of_given_variance(n)
        ]:
            pending, seen = [root], {root}
            while pending:
                for user in list(pending.pop().users):
                    if user in seen:
                        continue
                    seen.add(user)
                    if user in self.constant:
                        pending.append(user)
                    elif user in self.order and g.packet(user) in (
                        aten.mul,
                        aten.div,
                        aten.addcmul,
                    ):
                        self._static(user, root)

    def _static(self, node: fx.Node, root: fx.Node) -> None:
        dynamic = [i for i in node.all_input_nodes if i not in self.constant]
        if len(dynamic) != 1 or g.shape(dynamic[0]) is None:
            return
        x, mean = dynamic[0], None
        lift = Lift(x, frozenset(), self.order, grad=self.grad)
        last, form = None, None
        current: fx.Node | None = node
        while current is not None:
            value = lift.value_of(current)
            same = [str(s) for s in g.shape(current) or ()] == [str(s) for s in g.shape(x) or ()]
            if not isinstance(value, Lifted) or value.axes != tuple(range(lift.rank)) or not same:
                break
            inside, outside = lift.ring.split(value.poly, ("x",))
            linear = all(dict(m).get(0) == 1 for m in inside.terms)
            opaque = {i for i in inside.atoms() | outside.atoms() if i}
            if not linear or any(lift.ring.atoms[i].key not in self.constant for i in opaque):
                break
            last = current
            form = (
                Poly({tuple((i, e) for i, e in m if i): c for m, c in inside.terms.items()}),
                outside,
            )
            (current,) = current.users if len(current.users) == 1 else (None,)
            if current is not None and (current.op != "call_function" or current not in self.order):
                break
        if last is None or form is None:
            return
        subtracted = []
        if (
            g.packet(x) is aten.sub
            and len(x.users) == 1
            and x.args[1] in self.constant
            and not x.kwargs
        ):
            if str(g.shape(x.args[0])) == str(g.shape(x)):  # type: ignore[arg-type]
                subtracted = [x]
                x, mean = x.args[0], x.args[1]  # type: ignore[assignment]
        out = g.dtype(last)
        assert out is not None
        stats = wide(torch.promote_types(g.dtype(x) or out, out))
        spec = NormSpec(
            "FrozenBatchNorm",
            (),
            "static",
            eps=_given_eps(root),
            stats_dtype=stats,
            norm_dtype=stats,
            out_dtype=out,
        )
        weight = self._materialise(lift, form[0], last)
        bias = self._materialise(lift, form[1], last) if form[1] else None
        if not isinstance(weight, fx.Node) or not (bias is None or isinstance(bias, fx.Node)):
            return
        region = [
            n for n, v in lift.values.items() if v is not None and self.order[n] <= self.order[last]
        ]
        self._place(last, Core(spec, x, weight, bias, None, mean), [*region, *subtracted])


_WEIGHT_KINDS = {
    "LayerNorm": "WeightStandardization",
    "BatchNorm": "WeightStandardization",
    "L2Norm": "WeightNorm",
}


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


def _full_axes(axes: tuple[int | None, ...], identity: tuple[int, ...], lift: Lift) -> bool:
    sizes = g.shape(lift.x) or ()
    return all(a == i or str(sizes[i]) == "1" for i, a in zip(identity, axes, strict=True))


def _presented(spec: NormSpec, n: Fraction | None, *, tensor_eps: bool) -> NormSpec:
    """The same function with the numbers as people write them: unbiased variance, sums instead of means."""
    if close(spec.scale, 1.0):
        spec = spec._replace(scale=1.0)
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


def _kind(spec: NormSpec) -> str:
    if spec.statistic == "variance":
        return "LayerNorm" if spec.centre else "SimpleNorm"
    if spec.centre:
        return "CentredNorm"
    return "L2Norm" if spec.statistic == "sum-square" and spec.scale == 1.0 else "RMSNorm"


def _site(node: fx.Node, made: fx.Node, spec: NormSpec, rank: int) -> Site:
    dims = tuple(range(1, rank)) if spec.groups else spec.dims
    if spec.groups == 0 and dims and dims == tuple(range(rank - len(dims), rank)):
        dims = tuple(d - rank for d in dims)
    return Site(
        name=_name(node),
        kind=spec.kind,
        dims=dims,
        eps=short(spec.eps),
        dtype=str(g.dtype(made.args[0])).removeprefix("torch."),  # type: ignore[arg-type]
        location=g.location(node),
        weight=made.args[1] is not None,
        bias=made.args[2] is not None,
        origin=spec.origin,
    )


def _becomes_contiguous(x: fx.Node, result: fx.Node) -> bool:
    """Whether the result is laid out contiguously although x is not: later views may rely on it."""
    given, made = g.tensor(x), g.tensor(result)
    if given is None or made is None or str(given.stride()) == str(made.stride()):
        return False
    return made.is_contiguous()


def _is_root_of_given_variance(node: fx.Node) -> bool:
    """sqrt(p + eps) or its inverse, of a given p and a positive number eps."""
    packet = g.packet(node)
    half = packet is aten.pow and node.args[1] in (0.5, -0.5)
    return (packet in (aten.rsqrt, aten.sqrt) or half) and _given_eps(node) is not None


def _given_eps(root: fx.Node) -> float | None:
    """The eps of sqrt(p + eps) where p is a parameter or buffer behind views and casts, else None."""
    radicand = root.args[0]
    if (
        not isinstance(radicand, fx.Node)
        or g.packet(radicand) is not aten.add
        or len(radicand.args) != 2
    ):
        return None
    given, eps = radicand.args
    eps = literal(eps) if isinstance(eps, fx.Node) else eps
    while isinstance(given, fx.Node) and g.packet(given) in _LOOKS:
        given = given.args[0]
    plain = isinstance(given, fx.Node) and given.op in ("placeholder", "get_attr")
    return float(eps) if plain and isinstance(eps, (int, float)) and eps > 0 else None


def _name(node: fx.Node) -> str:
    return g.module_path(node) or node.name
