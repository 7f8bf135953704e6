"""The whole function: where x is divided by its root, and what stands around that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spellings.gaps import GAPS
from spellings.layouts import frames, home, plain
from spellings.mutations import (
    GRADIENTS,
    MUTATIONS,
    NO_GRADIENTS,
    WITH_ANOTHER,
    elsewhere,
)
from spellings.norms import Norm, affine_shape
from spellings.program import Program
from spellings.statistics import Statistics
from spellings.text import DTYPES


class Writer(Statistics):
    """Writes a spelling of a norm.

    Args:
        draw: hypothesis's.
        norm: what it computes.
        mutation: what is broken, or nothing.
        distributed: whether it is multiplied out: x * (w*r) + (b - m*w*r).
    """

    def __init__(self, draw: Any, norm: Norm, mutation: str, *, distributed: bool = False) -> None:
        super().__init__(draw, norm, mutation)
        self.distributed = distributed
        self.other_norm: Norm | None = None  # with the statistics over something else
        self.grad = self.is_mutation(*GRADIENTS) or self.rarely()
        if self.is_mutation(*NO_GRADIENTS):
            self.grad = False
        self._lay_out()

    def _lay_out(self) -> None:
        """Chooses the layouts of the statistics, of the quotient and of the affine part."""
        norm, rules = self.norm, MUTATIONS.get(self.mutation, {})
        whole, others = self.home, frames(norm)
        if norm.statistic == "global-response":
            others = []
        layout, divided = rules.get("layout"), rules.get("divided")
        if layout == "permuted":
            self.frame = self.pick(*[f for f in others if f.order != whole.order])
        elif layout != "as it is" and others and not (whole.clean and self.pick(1, 1, 0)):
            self.frame = self.pick(*others)
        ambiguous = not self.mutation and self.is_ambiguous(self.frame) and "equal-sizes" in GAPS
        if ambiguous:
            divided = "there"
            if norm.gate == "swish":
                self.frame = plain(norm)
        self.where = self.frame
        if divided != "there" and layout != "as it is" and self.pick(True, False):
            self.where = whole
        if divided == "home" or (norm.gate == "swish" and not self.holds_operands(self.where)):
            self.where = whole
        self.affine_frame = whole
        if self.holds_operands(self.where) and (layout == "as it is" or self.pick(1, 1, 0)):
            self.affine_frame = whole if ambiguous else self.where
        kept = tuple(d for d in range(len(whole.dims)) if d not in self.frame.reduced)
        may_be_vectors = self.where == self.frame == whole and kept == norm.affine and kept
        special = self.mutation or norm.prefix or norm.weight == "lerp" or norm.gate != "none"
        if may_be_vectors and not special and norm.statistic != "global-response":
            self.vectors = self.pick(True, True, False)

    def write(self) -> Program:
        norm = self.norm
        dtype = DTYPES[norm.dtype]
        name = f"torch.{norm.dtype}"
        x = self.input("x", norm.shape, dtype)
        if norm.gate in ("before", "after") or self.is_mutation(*WITH_ANOTHER):
            self.input("z", norm.shape, dtype)
        if norm.bias:
            self.operands["b"] = self._raw_or_laid_out("b")
        if norm.weight == "scalar":
            self.operands["w"] = self.input("w", self.pick((), (1,)), dtype)
        elif norm.weight != "none":
            self.operands["w"] = self._raw_or_laid_out("w")
        if norm.weight == "1+w":
            weight = self.operands["w"]
            self.operands["w"] = self.let(
                self.pick(
                    f"1 + {weight}",
                    f"{weight} + 1.0",
                    f"torch.add({weight}, 1)",
                    f"1.0 - (-{weight})",
                )
            )
        if norm.gate == "before":
            x = self.let(f"{x} * F.silu(z)")
        source = x
        if norm.dtype == "bfloat16":
            source = self.let(
                self.pick(
                    f"{x}.float()",
                    f"{x}.to(torch.float32)",
                    f"{x}.to(torch.float64)",
                    f"{x}.clone()",
                )
            )
        elif self.rarely():
            source = self.let(self.pick(f"{x}.double()", f"{x}.to({name})"))
        self.lines.append(f"h = {source}")
        y = (
            self.response("h", name)
            if norm.statistic == "global-response"
            else self.body("h", name)
        )
        if norm.gate == "after":
            y = self.mul(y, "F.silu(z)")
        y = self.touch(y)
        if self.pick(True, False):
            y = self.let(self.pick(f"{y}.to({name})", f"{y}.to(x.dtype)", f"{y}.type_as(x)"))
        returned = y
        extra = [v for (what, _), v in self.cache.items() if what in ("mean", "statistic")]
        if not self.mutation and extra and self.rarely():
            returned = f"{y}, {self.pick(*extra)}"
        arguments = ", ".join(self.inputs)
        body = "\n    ".join(line for line in self.lines if line != "pass")
        text = f"def f({arguments}):\n    {body}\n    return {returned}\n"
        return Program(norm, text, self.inputs, self.namespace, self.mutation, self.grad)

    def _raw_or_laid_out(self, name: str) -> str:
        if not self.vectors:
            return self.operand(name, self.affine_frame)
        return self.input(name, affine_shape(self.norm), DTYPES[self.norm.dtype])

    # the norm

    def body(self, h: str, name: str) -> str:
        """X centred and divided by its root, with what follows."""
        norm = self.norm
        there = self.move(h, self.home, self.frame)
        s = self.part(self.other(there))  # what the statistics are taken of
        normalize = (
            norm.statistic == "sum-square"
            and norm.eps_place == "floor"
            and norm.eps_form in ("float", "float32")
            and len(self.frame.reduced) == 1
            and self.where == self.frame
            and not (self.mutation or self.vectors or norm.prefix)
        )
        if normalize and self.pick(True, True, False):
            y = self.let(f"F.normalize({there}, dim={self.frame.reduced[0]}, eps={self.eps()})")
            y = self.let(f"{y} * {norm.scale}") if norm.scale != 1 else y
            return self.finish(y, self.operands.get("w"), name)
        m = self.statistics_mean(s, h) if norm.centre else None
        kind, r = self.statistics_root(s, h)
        r = self.touch(r)
        if norm.dtype != "bfloat16" and self.rarely():
            r = self.let(f"{r}.to({name})")
        if self.where != self.frame:
            m = self._back(m) if m is not None and not self.is_mutation(*_MEAN_IS_HOME) else m
            r = self._back(r) if not self.is_mutation(*_ROOT_IS_HOME) else r
        return self.quotient(h if self.where != self.frame else there, m, kind, r, name)

    def _back(self, v: str) -> str:
        return self.spread(v, self.home)

    def statistics_mean(self, s: str, h: str) -> str:
        m = self.mean(s)
        if self.is_mutation("mean-of-another"):
            m = self.mean(self.part(f"{self.full('z')}.to(h.dtype)"))
        if self.is_mutation("mean-over-another-dim"):
            rank, reduced = len(self.frame.dims), self.frame.reduced
            d = self.pick(*[i for i in range(rank) if i not in reduced])
            m = self.let(f"{h}.mean({d}, keepdim=True)")
        if self.is_mutation(*_MEAN_IS_HOME):
            m = self._elsewhere_of(h, self.mean)
        if self.is_mutation("wrong-axis-mean"):
            m = self.wrong_axis(m)
        if self.is_mutation("detached-mean"):
            dims = self.frame.reduced
            m = self.let(self.pick(f"{m}.detach()", f"{s}.detach().mean({dims}, keepdim=True)"))
        return self.vector(m) if self.vectors else m

    def statistics_root(self, s: str, h: str) -> tuple[str, str]:
        if self.is_mutation("detached-statistic"):
            s = self.let(f"{s}.detach()")
        if self.is_mutation("prefix-longer"):
            k = self.norm.prefix
            (d,) = self.frame.reduced
            self.norm, norm = replace(self.norm, prefix=k + 1), self.norm
            longer = self.let(f"{self.move(h, self.home, self.frame)}.narrow({d}, 0, {k + 1})")
            kind, r = self.root(longer)
            self.norm = norm
            return kind, r
        if self.is_mutation(*_ROOT_IS_HOME):
            kinds: list[str] = []

            def write(of: str) -> str:
                kind, r = self.root(of)
                kinds.append(kind)
                return r

            r = self._elsewhere_of(h, write)
            return kinds[0], r
        if self.is_mutation("no-grad-root"):
            start = len(self.lines)
            saved = dict(self.cache)
            self.cache = {}
            kind, r = self.root(s)
            self.lines[start:] = [
                "with torch.no_grad():\n        " + "\n        ".join(self.lines[start:])
            ] + ["pass"] * (len(self.lines) - start)
            self.cache = saved
        else:
            kind, r = self.root(s)
        if self.is_mutation("detached-root"):
            r = self.let(f"{r}.detach()")
        if self.is_mutation("wrong-axis-root"):
            r = self.wrong_axis(r)
        if self.is_mutation("eps-per-row"):
            d = self.frame.reduced[-1]
            rows = [-1 if i == d else 1 for i in range(len(self.frame.dims))]
            extra = f"torch.linspace(1, 2, {self.frame.shape[d]}).view({rows})"
            r = self.let(f"{r} + {extra}")
        return kind, r

    def _elsewhere_of(self, h: str, write: Any) -> str:
        """A statistic over something else, so that it broadcasts against x."""
        saved = self.norm, self.frame, self.home, self.cache, self.bare
        other = self.other_norm or self.pick(*elsewhere(self.norm))
        if self.is_mutation("both-elsewhere"):
            self.other_norm = other
        self.norm, self.frame, self.home = other, plain(other), home(other)
        self.cache, self.bare = {}, {}
        made = write(self.move(h, self.home, self.frame))
        made = self.spread(made, self.home)
        self.norm, self.frame, self.home, self.cache, self.bare = saved
        return made

    def quotient(self, num: str, m: str | None, kind: str, r: str, name: str) -> str:
        """(num - m) / root, the weight perhaps among it."""
        norm = self.norm
        inside = self.affine_frame == self.where
        weight, bias = self.operands.get("w"), self.operands.get("b")
        fresh = False  # whether num may be written to
        if self.is_mutation("numerator-of-another"):
            num = self.let(f"{self.full('z', self.where)} + 0.0")
        if self.is_mutation("masked-numerator"):
            num = self.let(f"torch.where({num} > 0, {num}, 0.0)")
        if self.is_mutation("silu-numerator", "gate-centred"):
            num = self.let(f"F.silu({num})")
        if self.is_mutation("eps-in-numerator"):
            num = self.let(f"{num} + {norm.eps!r}")
        if self.is_mutation("x-written-between"):
            first = ", ".join(["0"] * len(norm.shape))
            self.lines.append(
                self.pick(
                    "h.add_(1)",
                    "h.mul_(2)",
                    "h[0] = 1.0",
                    f"h[{first}] = 3.0",
                    "x.view(-1).add_(1)",
                )
            )
            self.lines.append("pass")
        c = norm.scale
        if self.is_mutation("mean-not-weighted"):
            wr = self.mul(weight or "", r) if kind == "inverse" else self.let(f"{weight} / {r}")
            mr = self.mul(m or "", r) if kind == "inverse" else self.let(f"{m} / {r}")
            y = self.sub(self.mul(num, wr), mr)
            y = self.let(f"{y} * {c}") if c != 1 else y
            return self.finish(y, None, name)
        if self.is_mutation("two-roots", "two-corrections", "two-eps") and m is not None:
            wr = self.mul(num, r) if kind == "inverse" else self.let(f"{num} / {r}")
            mr = self.mul(m, r) if kind == "inverse" else self.let(f"{m} / {r}")
            factor = 1.001
            if self.is_mutation("two-corrections"):
                n = norm.n
                factor = self.pick((n / (n - 1)) ** 0.5, ((n - 1) / n) ** 0.5)
            if self.is_mutation("two-eps"):
                mr = self._by_another_eps(m, kind, r)
                factor = 1.0
            y = self.let(f"{wr} - {mr} * {factor!r}")
            y = self.let(f"{y} * {c}") if c != 1 else y
            return self.finish(y, weight, name)
        if norm.gate in ("swish", "silu"):
            num = self.gated(num)
        if self.vectors:
            return self.with_vectors(num, m, kind, r, name)
        if self.distributed and m is not None:
            return self.multiplied_out(num, m, kind, r, inside, name)
        if m is not None:
            num = self.centred(num, m)
            fresh = not self.grad or num not in self.cache.values()  # autograd needs that square
        if self.is_mutation("temporary-written"):
            num = self.touch(num)
            first = ", ".join("0" for _ in self.where.dims)
            written = self.pick(
                f"{num}[{first}] = 5.0", f"{num}.mul_({num})", f"{num}[..., 0].zero_()"
            )
            self.lines += [written, "pass"]
        touched = self.touch(num)
        fresh, num = fresh and touched == num, touched
        early = (
            weight is not None and inside and norm.weight != "lerp" and self.pick(0, 0, 0, 1) == 1
        )
        if early:  # the weight before the root
            side = self.pick("num", "root")
            if side == "num":
                num, fresh = self.mul(num, weight or "", fresh=fresh), True
            elif kind == "root":
                kind, r = "inverse", self.let(f"{weight} / {r}")
            else:
                r = self.mul(r, weight or "")
        if c != 1 and self.pick(True, False):
            num, c = self.let(self.pick(f"{num} * {c}", f"{c} * {num}", f"{num} / {1 / c!r}")), 1.0
            fresh = True
        weight = None if early else weight
        if (
            kind == "root"
            and inside
            and c == 1
            and norm.weight != "lerp"
            and bias
            and self.rarely()
        ):
            if weight is not None:
                num = self.mul(num, weight)
            return self._home(self.let(f"torch.addcdiv({bias}, {num}, {r})"))
        if self.is_mutation("floor-division"):
            y = self.let(f"torch.div({num}, {r}, rounding_mode='floor')")
        elif kind == "inverse":
            y = self.mul(num, r, fresh=fresh)
        else:
            y = self.divide(num, r, fresh=fresh)
        touched = self.touch(y)
        fresh, y = touched == y, touched
        if c != 1:
            y = self.let(self.pick(f"{y} * {c}", f"{c} * {y}"))
        return self.finish(y, weight, name, fresh=fresh)

    def _by_another_eps(self, m: str, kind: str, r: str) -> str:
        """M over a root that has twice the eps; made from the root, as another spelling of it."""
        root = r if kind == "root" else self.let(f"1 / {r}")
        if self.norm.eps_place == "inside":
            root = self.let(f"({root} ** 2 + {self.norm.eps!r}).sqrt()")
        else:
            root = self.let(f"{root} + {self.norm.eps!r}")
        return self.let(f"{m} / {root}")

    def multiplied_out(self, num: str, m: str, kind: str, r: str, inside: bool, name: str) -> str:
        """x*a + (b - m*a) with a = w*r."""
        inside = inside and self.norm.weight != "lerp"
        weight = self.operands.get("w") if inside else None
        bias = self.operands.get("b") if inside else None
        c = self.norm.scale
        r = r if kind == "inverse" else self.let(f"1 / {r}")
        a = self.mul(weight, r) if weight else r
        a = self.let(f"{a} * {c}") if c != 1 else a
        shift = self.mul(m, a)
        form = self.pick("a*x + (b - m*a)", "(a*x - m*a) + b", "addcmul")
        if form == "(a*x - m*a) + b":
            y = self.sub(self.mul(num, a), shift)
            y = self.add(y, bias) if bias else y
        else:
            tail = self.sub(bias, shift) if bias else self.let(f"-{shift}")
            fused = form == "addcmul"
            y = self.let(f"torch.addcmul({tail}, {num}, {a})") if fused else self.mul(num, a)
            y = y if fused else self.add(y, tail)
        return self._home(y) if inside else self.finish(y, self.operands.get("w"), name)

    def with_vectors(self, num: str, m: str | None, kind: str, r: str, name: str) -> str:
        """The same, a and b - m*a as vectors, before they are viewed to broadcast."""
        weight, bias = self.operands.get("w"), self.operands.get("b")
        c = self.norm.scale
        r = r if kind == "inverse" else self.let(f"1 / {r}")
        a = self.mul(weight, r) if weight else r
        a = self.let(f"{a} * {c}") if c != 1 else a
        if m is not None and (self.distributed or self.pick(True, False)):
            shift = self.mul(m, a)
            tail = self.put_back(self.sub(bias, shift) if bias else self.let(f"-{shift}"))
            a = self.put_back(a)
            if self.pick(True, False, False):
                return self.let(f"torch.addcmul({tail}, {num}, {a})")
            return self.add(self.mul(num, a), tail)
        y = self.centred(num, self.put_back(m)) if m is not None else num
        fresh = m is not None and (not self.grad or y not in self.cache.values())
        y = self.mul(y, self.put_back(a), fresh=fresh)
        return self.add(y, self.put_back(bias), fresh=True) if bias else y

    def gated(self, h: str) -> str:
        """x * sigmoid(v*x)."""
        inner = h
        if self.is_mutation("gate-of-another"):
            inner = self.full("z", self.where)
        if self.norm.gate == "silu" and self.mutation == "" and self.pick(True, True, False):
            return self.let(f"F.silu({h})")
        if self.norm.gate == "swish":
            inner = self.mul(inner, self.operand("v", self.where))
        if self.is_mutation("gate-shifted"):
            inner = self.add(inner, "0.1")
        gate = self.let(self.pick(f"torch.sigmoid({inner})", f"{inner}.sigmoid()"))
        if self.is_mutation("gate-tanh"):
            gate = self.let(f"torch.tanh({inner})")
        if self.is_mutation("gate-twice"):
            gate = self.let(f"{gate} * {gate}")
        return self.mul(h, gate)

    def centred(self, h: str, m: str) -> str:
        if self.is_mutation("mean-added"):
            return self.add(h, m)
        if self.is_mutation("mean-twice"):
            return self.let(f"{h} - 2 * {m}")
        if self.is_mutation("lerp-off"):
            return self.let(f"2 * ({h} - torch.lerp({h}, {m}.to({h}.dtype), 0.25))")
        made = self.cache.get(("centred", h))
        if made is not None and self.where == self.frame and self.pick(True, False):
            return made  # that of the variance
        if self.rarely():
            return self.let(f"2 * ({h} - torch.lerp({h}, {m}.to({h}.dtype), 0.5))")
        return self.sub(h, m)

    def response(self, h: str, name: str) -> str:
        """x * G / (mean of G + eps), G the norm of x."""
        norm = self.norm
        weight, bias = self.operands.get("w"), self.operands.get("b")
        s = "z.to(h.dtype)" if self.is_mutation("response-of-another") else h
        direct = self.pick(True, True, False)
        length = self.vector_norm(s) if direct else self.square_root(self.sum_of_squares(s))
        if self.is_mutation("response-squared"):
            length = self.let(f"{length} ** 2")
        if self.is_mutation("response-eps-inside"):
            length = self.let(f"({length} ** 2 + {norm.eps!r}).sqrt()")
        beyond = norm.beyond
        if self.is_mutation("response-over-other-dims"):
            every = tuple(d for d in range(len(norm.shape)) if d not in norm.dims)
            beyond = self.pick((0,), every, norm.dims)
        if self.is_mutation("response-not-averaged"):
            mean = self.let(f"{length}.{self.pick('sum', 'amax')}({beyond}, keepdim=True)")
        else:
            mean = self.let(f"{length}.mean({self.pick(*_signs(beyond, len(norm.shape)))}, True)")
        low = self.add_eps(mean)
        forms = ["x*(G/d)", "x*(G/d)", "x*(G*(1/d))", "(x*G)/d", "(x/d)*G", "(x*(1/d))*G"]
        if weight and norm.weight != "lerp" and self.affine_frame == self.where:
            forms += ["(w*x)*n", "x*(n*w)", "x*(n*w)"]
        form = self.pick(*forms)
        if form in ("(w*x)*n", "x*(n*w)"):
            n = self.divide(length, low)
            first, then = (h, n) if form == "(w*x)*n" else (n, h)
            y = self.mul(self.mul(first, weight or ""), then)
            weight = None
        elif form == "x*(G/d)":
            y = self.mul(h, self.divide(length, low))
        elif form == "x*(G*(1/d))":
            y = self.mul(h, self.mul(length, self.let(f"1 / {low}")))
        elif form == "(x*G)/d":
            y = self.divide(self.mul(h, length), low)
        else:
            y = self.divide(h, low) if form == "(x/d)*G" else self.mul(h, self.let(f"1 / {low}"))
            y = self.mul(y, length)
        y = self.let(f"{y} * {norm.scale}") if norm.scale != 1 else y
        if weight and bias and norm.weight != "lerp" and self.pick(True, False, False):
            return self.let(f"torch.addcmul({bias}, {weight}, {y})")
        return self.finish(y, weight, name)

    # what follows

    def _home(self, y: str) -> str:
        """The result, laid out as x is."""
        if self.is_mutation("permuted-not-back-result"):
            return self.let(f"{y}.reshape({self.sizes(self.home)})")
        viewable = not self.rarely()
        return self.move(y, self.where, self.home, viewable=viewable)

    def finish(self, y: str, weight: str | None, name: str, *, fresh: bool = False) -> str:
        """The affine part, before or after the result is laid out as x is."""
        if self.affine_frame == self.where:
            return self._home(self.affine(y, weight, name, fresh=fresh))
        y = self._home(y)
        return self.affine(y, weight, name)

    def affine(self, y: str, weight: str | None, name: str, *, fresh: bool = False) -> str:
        bias = self.operands.get("b")
        if self.rarely():
            y, fresh = self.let(self.pick(f"{y}.to({name})", f"{y}.type_as(x)")), False
        if self.norm.weight == "lerp" and weight:
            return self.let(f"torch.lerp({y}, {bias}.to({y}.dtype), {weight}.to({y}.dtype))")
        if self.is_mutation("addcmul-value") and weight and bias:
            return self.let(f"torch.addcmul({bias}, {y}, {weight}, value=2)")
        if self.is_mutation("addcdiv-value") and bias:
            return self.let(
                f"torch.addcdiv({bias}, {y}, {weight or 'torch.full((), 2.0)'}, value=3)"
            )
        if self.is_mutation("addcmul-value"):
            return self.let(f"torch.add({y} * {weight or 1.0}, {bias}, alpha=2)")
        if self.is_mutation("bias-scaled") and bias:
            y = self.add(y, bias)
            return self.mul(y, weight) if weight else self.let(f"{y} * 3.0")
        if weight and self.norm.weight == "1+w" and "w" in self.inputs and self.rarely():
            y = self.let(f"{y} + {y} * ({weight} - 1)")
            weight = None
        if weight and bias and self.rarely():
            if self.rarely():
                return self.let(f"torch.addcdiv({bias}, {y}, 0.5 / {weight}, value=0.5)")
            return self.let(f"torch.addcmul({bias}, {y}, {weight})")
        if weight:
            y, fresh = self.mul(y, weight, fresh=fresh), True
        return self.add(y, bias, fresh=fresh) if bias else y

    # what the statistics are taken of

    def part(self, h: str) -> str:
        """The prefix of x that the statistics are over, if they are."""
        norm = self.norm
        k = norm.prefix
        if not k and not self.is_mutation("prefix-as-well"):
            return h
        d, rank = self.frame.reduced[-1], len(self.frame.dims)
        size = self.frame.shape[d]
        start = 0
        if self.is_mutation("prefix-as-well"):
            k = max(size // 2, 2)
        if self.is_mutation("prefix-shifted"):
            start = self.pick(1, size - k)
        if self.is_mutation("prefix-of-another"):
            h = f"{self.full('z')}.to(h.dtype)"
        end = start + k
        index = [":"] * d + [f"{start or ''}:{end}"] + [":"] * (rank - d - 1)
        forms = [
            f"{h}[{', '.join(index)}]",
            f"{h}.narrow({self.pick(d, d - rank)}, {start}, {k})",
            f"torch.narrow({h}, {d}, {start}, {k})",
        ]
        if d == rank - 1:
            forms.append(f"{h}[..., {start or ''}:{end}]")
        if start == 0:
            forms.append(f"{h}.split([{k}, {size - k}], {self.pick(d, d - rank)})[0]")
            forms.append(f"torch.split({h}, {k}, dim={d})[0]")
            if 2 * k in (size, size + 1):
                forms.append(f"{h}.chunk(2, {d})[0]")
                forms.append(f"{h}.tensor_split(2, dim={d})[0]")
        elif end == size:
            forms.append(f"{h}.split([{start}, {k}], {d})[1]")
        return self.let(self.pick(*forms))

    def other(self, h: str) -> str:
        """What a mutation takes the statistics of, in place of x."""
        shape = self.frame.shape
        rank = len(shape)
        weight, bias = self.operands.get("w"), self.operands.get("b")
        if self.is_mutation("variance-of-another"):
            return self.let(f"{self.full('z')}.to(h.dtype)")
        if self.is_mutation("gate-on-statistic"):
            return self.let(f"F.silu({h})")
        forms = {
            "statistic-of-relu": f"F.relu({h})",
            "statistic-of-weighted": f"{h} * {weight}",
            "statistic-of-shifted": f"{h} + {bias}",
            "statistic-of-masked": self.pick(
                f"torch.where({h} > 0, {h}, 0.0)",
                f"{h} * ({h} > 0)",
                f"{h}.masked_fill({h} > 0, 0.0)",
                f"{h} * (z > 0).to(h.dtype).reshape_as({h})",
            ),
            "statistic-of-half": f"{h}[..., : {max(shape[-1] // 2, 2)}]",
            "statistic-of-rounded": self.pick(
                f"({h} * 4).to(torch.int32).to({h}.dtype)", f"{h}.round()", f"(10 * {h}).floor()"
            ),
            "statistic-of-flipped": self.pick(
                f"{h}.transpose({rank - 2}, {rank - 1})",
                f"{h}.transpose(0, 1)",
                f"{h}.reshape(-1).reshape({list(reversed(shape))}).mT",
            ),
        }
        made = forms.get(self.mutation)
        return h if made is None else self.let(made)

    def wrong_axis(self, v: str) -> str:
        """A kept statistic laid along the dim that it was reduced over."""
        d = self.frame.reduced[-1]
        return self.let(self.pick(f"{v}.transpose({d}, {d - 1})", f"{v}.transpose({d}, 0)"))


_MEAN_IS_HOME = ("mean-elsewhere", "both-elsewhere")
_ROOT_IS_HOME = ("root-elsewhere", "both-elsewhere")


def _signs(dims: tuple[int, ...], rank: int) -> list[str]:
    return [str(dims), str(tuple(d - rank for d in dims)), str(list(dims))]
