"""Statistics, their eps and their roots, each in as many forms as there are."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch

from spellings.gaps import GAPS
from spellings.layouts import Frame, InFrames
from spellings.norms import Norm

Call = Callable[[str], str]


class Statistics(InFrames):
    """Writes statistics in the layout `frame`."""

    def __init__(self, draw: Any, norm: Norm, mutation: str) -> None:
        super().__init__(draw, norm, mutation)
        self.recompute = self.pick(False, False, True)
        self.cache: dict[tuple[str, str], str] = {}
        self.bare: dict[str, str] = {}  # of a statistic with its dims kept: the same without them
        self.operands: dict[str, str] = {}  # weight and bias
        self.vectors = False  # whether statistics meet weight and bias before they are viewed
        self.where = self.frame  # the layout that x is divided in
        self.grad = False  # whether the function is differentiated

    @property
    def counted(self) -> bool:
        """Whether the number of elements is a number."""
        return not (self.norm.dynamic and 0 in self.norm.dims)

    # reductions

    def dims(self, reduced: tuple[int, ...] | None = None) -> str:
        rank = len(self.frame.dims)
        dims = self.frame.reduced if reduced is None else reduced
        if self.is_mutation("statistic-over-another-dim"):
            dims = (rank - 2,)
        if self.is_mutation("statistic-over-all"):
            dims = tuple(range(rank))
        given = [d - rank if self.pick(True, False) else d for d in dims]
        if len(given) == 1 and self.pick(True, False):
            return str(given[0])
        if len(given) > 1 and self.pick(True, False):
            given.reverse()
        return str(tuple(given)) if self.pick(True, False) else str(list(given))

    def keep(self, call: Call) -> str:
        """A reduction with its dims kept, or dropped and put back."""
        if self.is_mutation("no-keepdim"):
            return self.let(call("keepdim=False"))
        if (
            self.is_mutation("statistic-over-another-dim", "statistic-over-all")
            or self.pick(0, 0, 1) == 0
        ):
            return self.let(call("keepdim=True"))
        return self.put_back(self.let(call("keepdim=False")))

    def put_back(self, v: str) -> str:
        """A statistic without its dims, with ones in their place."""
        frame = self.frame
        rank, reduced = len(frame.dims), frame.reduced
        kept = self.sizes(frame.kept)
        index = ", ".join("None" if d in reduced else ":" for d in range(rank))
        options = [f"{v}.view({kept})", f"{v}.reshape({kept})", f"{v}[{index}]"]
        if len(reduced) == 1:
            options += [
                f"{v}.unsqueeze({reduced[0]})",
                f"torch.unsqueeze({v}, {reduced[0] - rank})",
            ]
        if reduced == (rank - 1,):
            options += [f"{v}[..., None]"]
        if reduced == tuple(range(len(reduced))) and (self.vectors or self.where == frame):
            options += [v, v]  # broadcasts as it is
        made = self.pick(*options)
        made = v if made == v else self.let(made)
        self.bare[made] = v
        return made

    def vector(self, v: str) -> str:
        """A kept statistic without the dims it was taken over."""
        if v in self.bare:
            return self.bare[v]
        reduced, shape = self.frame.reduced, self.frame.shape
        rest = [s for d, s in enumerate(shape) if d not in reduced]
        options = [f"{v}.reshape({rest})"]
        if all(s != 1 for s in rest):
            options.append(f"{v}.squeeze()")
            if reduced[0] != 0:  # one over the first dims may broadcast without them
                options.append(f"{v}.squeeze({reduced})")
        if len(rest) == 1:
            options += [f"{v}.flatten()", f"{v}.view(-1)"]
        return self.let(self.pick(*options))

    def average(self, a: str) -> str:
        """E[a] over the dims."""
        n, dims = self.norm.n, self.dims()
        if self.is_mutation("wrong-n"):
            n = self.pick(n + 1, n - 1)
        if self.is_mutation("n-of-another-dim"):
            total = self.keep(lambda k: f"{a}.sum({dims}, {k})")
            return self.let(f"{total} / x.shape[0]")
        if self.is_mutation("n-rounded-to-float32"):
            inverse = struct.unpack("f", struct.pack("f", 1 / n))[0]
            return self.mul(self.keep(lambda k: f"{a}.sum({dims}, {k})"), repr(inverse))
        if self.is_mutation("window-mean", "cumulative-mean"):
            return self._mean_of_neighbours(a)
        if self.is_mutation("sum-of-means"):
            return self._in_steps(a, wrong=True)
        forms = ["sum/n", "sum*1/n", "sum of a/n"] if self.counted else []
        if not self.is_mutation("wrong-n"):
            forms += ["mean", "mean", "mean", "torch.mean", "-mean(-a)"]
            if len(self.frame.reduced) > 1 and not self.mutation:
                forms += ["steps", "steps"]
            forms += self._pools()
        form = self.pick(*forms)
        if form == "mean":
            return self.keep(lambda k: f"{a}.mean({dims}, {k})")
        if form == "torch.mean":
            return self.keep(lambda k: f"torch.mean({a}, dim={dims}, {k})")
        if form == "-mean(-a)":
            return self.let("-" + self.keep(lambda k: f"(-{a}).mean({dims}, {k})"))
        if form.startswith("F."):
            return self.let(form.format(a))
        if form == "steps":
            return self._in_steps(a)
        if form == "sum of a/n":
            return self.keep(lambda k: f"({a} * {1 / n!r}).sum({dims}, {k})")
        total = self.keep(lambda k: f"{a}.sum({dims}, {k})")
        return self._over_n(total, n) if form == "sum/n" else self.mul(total, repr(1 / n))

    def _over_n(self, total: str, n: int) -> str:
        return self.let(
            self.pick(
                f"{total} / {n}",
                f"torch.div({total}, {float(n)})",
                f"torch.true_divide({total}, {n})",
            )
        )

    def _pools(self) -> list[str]:
        """Poolings to size one that are the mean."""
        rank, reduced = len(self.frame.dims), self.frame.reduced
        if self.norm.prefix or self.is_mutation("no-keepdim"):
            return []
        if rank in (3, 4) and reduced == (rank - 2, rank - 1):
            return ["F.adaptive_avg_pool2d({}, 1)"]
        return ["F.adaptive_avg_pool1d({}, 1)"] if rank in (2, 3) and reduced == (rank - 1,) else []

    def _in_steps(self, a: str, *, wrong: bool = False) -> str:
        """The mean over some of the dims, and of that the mean over the others."""
        reduced = list(self.frame.reduced)
        if self.pick(True, False):
            reduced.reverse()
        cut = self.pick(*range(1, len(reduced)))
        for step, dims in enumerate((reduced[:cut], reduced[cut:])):
            n = math.prod(self.frame.shape[d] for d in dims)
            if self.norm.prefix and self.frame.reduced[-1] in dims:
                n = n * self.norm.prefix // self.frame.shape[self.frame.reduced[-1]]
            text = self.dims(tuple(dims))
            if wrong and step == 1:
                a = self.let(f"{a}.sum({text}, keepdim=True)")
            elif self.counted and self.pick(True, False, False):
                a = self._over_n(self.let(f"{a}.sum({text}, keepdim=True)"), n)
            elif step == 1 and self.pick(True, False):
                a = self.let(f"{a}.mean({text}, keepdim=True)")
            else:
                a = self.let(f"{a}.mean({text}, True)")
        return a

    def _mean_of_neighbours(self, a: str) -> str:
        """A mean over a part of the last dim, another one for each element."""
        if self.is_mutation("window-mean"):
            return self.let(f"F.avg_pool1d({a}, 3, 1, 1)")
        n = self.frame.shape[-1]
        return self.let(f"{a}.cumsum(-1) / torch.arange(1, {n + 1})")

    def mean(self, h: str) -> str:
        """E[h], once or each time anew."""
        if ("mean", h) in self.cache and not self.recompute:
            return self.cache["mean", h]
        dims = self.dims()
        odd = self.is_mutation("wrong-n", "n-rounded-to-float32", "no-keepdim", "sum-of-means")
        odd = odd or self.is_mutation("n-of-another-dim", "window-mean", "cumulative-mean")
        if self.rarely() and not odd:
            form = self.pick("var_mean", "std_mean")
            # an unbiased variance has no law for a count that is a symbol; its value is not read
            correction = self.pick(0, 1) if self.counted else 0
            t = self.let(f"torch.{form}({h}, {dims}, correction={correction}, keepdim=True)")
            made = self.let(f"{t}[1]")
        else:
            made = self.average(h)
        made = self.touch(made)
        fixed = self.is_mutation(
            "wrong-axis-mean", "statistic-of-half", "no-keepdim", "prefix-as-well"
        )
        fixed = fixed or self.vectors or self.where != self.frame or self.norm.prefix
        if self.rarely() and not fixed:
            full = self.sizes(self.frame, inferred=False)
            made = self.let(self.pick(f"{made}.expand_as({h})", f"{made}.expand({full})"))
        self.cache["mean", h] = made
        return made

    # squares

    def sum_of_squares(self, a: str) -> str:
        """The sum of a*a, as a product with itself or as the square of a norm."""
        dims = self.dims()
        form = self.pick("sum", "norm", "product") if not self.mutation else "sum"
        if form == "norm":
            return self.square(self.vector_norm(a))
        if form == "product":
            return self._product(a)
        square = self.square(a)
        return self.keep(lambda k: f"{square}.sum({dims}, {k})")

    def _product(self, a: str) -> str:
        """The sum of a*a as a contraction."""
        shape, reduced = self.frame.shape, self.frame.reduced
        rank = len(shape)
        letters = "abcdefg"[:rank]
        kept = "".join(c for d, c in enumerate(letters) if d not in reduced)
        forms = [f"torch.einsum('{letters},{letters}->{kept}', {a}, {a})"] * 2
        forms.append(f"torch.einsum('{letters}, {letters} -> {kept}', [{a}, {a}])")
        if rank == 1:
            forms += [f"torch.dot({a}, {a})", f"{a}.dot({a})", f"{a} @ {a}"]
            forms += [f"torch.inner({a}, {a})", f"torch.vdot({a}, {a})"]
        if len(reduced) == 1:
            d = self.pick(reduced[0], reduced[0] - rank)
            forms.append(f"torch.linalg.vecdot({a}, {a}, dim={d})")
        if reduced == (rank - 1,):
            forms.append(f"torch.einsum('...n,...n->...', {a}, {a})")
            forms.append(f"({a}[..., None, :] @ {a}[..., None])[..., 0, 0]")
        if reduced != (rank - 1,) or rank not in (2, 3):
            return self.put_back(self.let(self.pick(*forms)))
        n = shape[-1] if not self.norm.prefix else self.norm.prefix
        rows, columns = f"{a}.reshape(-1, 1, {n})", f"{a}.reshape(-1, {n}, 1)"
        if rank == 2:
            rows, columns = self.pick((rows, columns), (f"{a}[:, None]", f"{a}.unsqueeze(-1)"))
        elif self.pick(True, False):
            rows, columns = f"{a}.flatten(0, 1)[:, None, :]", f"{a}.flatten(0, 1)[..., None]"
        back = self.sizes(self.frame.kept)
        forms += [f"torch.bmm({rows}, {columns}).reshape({back})"] * 2
        made = self.pick(*forms)
        return self.let(made) if "bmm" in made else self.put_back(self.let(made))

    def vector_norm(self, a: str) -> str:
        dims = self.dims()
        if self.is_mutation("l1-norm"):
            order = self.pick("1", "3", "float('inf')", "0.5")
            return self.keep(lambda k: f"torch.linalg.vector_norm({a}, {order}, {dims}, {k})")
        form = self.pick("linalg", "method", "torch")
        if form == "linalg":
            return self.keep(lambda k: f"torch.linalg.vector_norm({a}, 2, {dims}, {k})")
        if form == "method":
            return self.keep(lambda k: f"{a}.norm(2, {dims}, {k})")
        return self.keep(lambda k: f"torch.norm({a}, p=2, dim={dims}, {k})")

    def mean_square(self, h: str) -> str:
        if self.is_mutation("l1-norm"):
            return self.let(f"{self.vector_norm(h)} ** 2 / {self.norm.n}")
        if self.is_mutation("einsum-with-another", "matrix-of-products"):
            return self._other_product(h)
        odd = self.is_mutation(
            "cubed", "fourth", "first-absolute", "wrong-n", "n-rounded-to-float32"
        )
        odd = odd or self.is_mutation("sum-of-means", "n-of-another-dim", "no-keepdim")
        odd = odd or self.is_mutation("window-mean", "cumulative-mean")
        forms = ["plain"] if odd else ["plain", "plain", "plain", "var+mean"]
        if not odd and self.counted:
            forms += ["sum/n", "sum/n"]
        form = self.pick(*forms)
        if form == "sum/n":
            return self._over_n(self.sum_of_squares(h), self.norm.n)
        if form == "var+mean":
            dims = self.dims()
            v = self.keep(lambda k: f"{h}.var({dims}, unbiased=False, {k})")
            return self.add(v, self.square(self.average(h)))
        return self.average(self.square(h))

    def _other_product(self, h: str) -> str:
        """Products of the rows of x with others, where a mean square should be."""
        rank = len(self.frame.dims)
        a, b = "abcd"[:rank], "abcd"[: rank - 1] + "e"
        if self.is_mutation("einsum-with-another"):
            v = self.let(f"torch.einsum('{a},{a}->{a[:-1]}', {h}, {self.full('z')}.to({h}.dtype))")
        elif self.pick(True, False):  # of squares: a row with all others
            other = b[:-2] + "e" + a[-1]
            v = self.let(f"torch.einsum('{a},{other}->{a[:-1]}', {h}, {h})")
        else:  # the transpose
            v = self.let(f"torch.einsum('{a},{a[:-2] + a[-1] + a[-2]}->{a[:-1]}', {h}, {h})")
        return self.let(f"{v}[..., None].abs() / {self.norm.n}")

    def variance(self, h: str) -> str:
        """The variance with the norm's correction."""
        norm = self.norm
        n, c = norm.n, norm.correction
        if self.is_mutation("other-correction"):
            c = 1 - c
        odd = {
            "cubed": "centred",
            "fourth": "centred",
            "first-absolute": "centred",
            "wrong-n": "centred",
            "n-of-another-dim": "centred",
            "sum-of-means": "centred",
            "window-mean": "moments",
            "cumulative-mean": "moments",
            "n-rounded-to-float32": "moments",
            "variance-plus-mean-squared": "moments",
            "variance-half-mean-squared": "moments",
            "variance-minus-mean": "moments",
            "variance-around-bias": "centred",
            "statistic-over-another-dim": "var",
            "statistic-over-all": "var",
        }
        forms = [
            "var",
            "torch.var",
            "std2",
            "var_mean",
            "std_mean",
            "centred",
            "centred",
            "moments",
            "moments",
            "half",
        ]
        if self.is_mutation("no-keepdim"):
            forms = ["var", "torch.var", "std2"]
        elif self.counted:
            forms += ["product", "sums"]
        form = odd.get(self.mutation) or self.pick(*forms)
        if self.is_mutation("mean-of-variances"):
            return self._mean_of_variances(h)
        dims = self.dims()
        if form in ("var", "torch.var", "std2"):
            how = self.pick(f"correction={c}", f"unbiased={c == 1}")
            if c == 1 and self.pick(True, False):
                how = ""
            call = {
                "var": f"{h}.var({dims}, ",
                "torch.var": f"torch.var({h}, {dims}, ",
                "std2": f"{h}.std({dims}, ",
            }
            made = self.keep(lambda k: call[form] + (how + ", " if how else "") + k + ")")
            return self.square(made) if form == "std2" else made
        if form in ("var_mean", "std_mean"):
            t = self.let(f"torch.{form}({h}, {dims}, correction={c}, keepdim=True)")
            v = self.let(f"{t}[0]")
            return self.square(v) if form == "std_mean" else v
        m = self.mean(h)
        if form == "centred":
            if self.is_mutation("variance-around-bias"):
                m = self.operands["b"]
            if self.mutation or self.pick(0, 0, 1) == 0:
                d = self.pick(self.sub(h, m), self.sub(m, h)) if self.mutation else self.sub(h, m)
                self.cache.setdefault(("centred", h), d)
                v = self.average(self.square(d))
            else:
                v = self.average(self.mul(self.sub(h, m), self.sub(h, m)))
        elif form == "half":  # E[(x - m) x]
            v = self.average(self.mul(self.sub(h, m), h))
        elif form == "product":
            total = self.sum_of_squares(self.sub(h, m))
            if c and self.pick(True, False):
                return self.let(f"{total} / {n - c}")
            v = self._over_n(total, n)
        elif form == "sums":
            s1 = self.keep(lambda k: f"{h}.sum({dims}, {k})")
            s2 = self.sum_of_squares(h)
            if c:
                return self.let(f"({s2} - {s1} * {s1} / {n}) / {n - c}")
            v = self.let(
                self.pick(f"({s2} - {s1} ** 2 / {n}) / {n}", f"{s2} / {n} - ({s1} / {n}) ** 2")
            )
        else:
            v = self._variance_of_moments(h, m)
        return self.let(self.pick(f"{v} * {n / (n - c)!r}", f"{v} * {n} / {n - c}")) if c else v

    def _variance_of_moments(self, h: str, m: str) -> str:
        """E[x^2] - E[x]^2."""
        m2, ms = self.average(self.square(h)), self.square(m)
        if self.is_mutation("variance-plus-mean-squared"):
            return self.add(m2, ms)
        if self.is_mutation("variance-half-mean-squared"):
            return self.let(f"{m2} - 0.5 * {ms}")
        if self.is_mutation("variance-minus-mean"):
            return self.let(f"({m2} - {m}).abs()")
        if self.is_mutation("window-mean", "cumulative-mean"):
            return self.let(f"({m2} - {ms}).abs()")
        if self.rarely():
            return self.let(f"torch.addcmul({m2}, {m}, {m}, value=-1)")
        v = self.sub(m2, ms)
        if not self.rarely():
            return v
        return self.let(
            self.pick(
                f"{v}.clamp_min(0)",
                f"{v}.clamp(min=0.0)",
                f"{v}.clip(0)",
                f"{v}.abs()",
            )
        )

    def _mean_of_variances(self, h: str) -> str:
        """Of each row its variance, and then the mean of those."""
        *first, last = self.frame.reduced
        v = self.let(f"{h}.var({last}, unbiased=False, keepdim=True)")
        return self.let(f"{v}.mean({first}, keepdim=True)")

    def compressed(self, h: str) -> str:
        """The mean square of n + 1 numbers with the sum zero, of which x are n."""
        n, dims = self.norm.n, self.dims()
        if not self.mutation and len(self.frame.reduced) == 1 and self.counted:
            d = self.frame.reduced[0]
            text = f"torch.cat([{h}, -{h}.sum({d}, keepdim=True)], {d})"
            if "compressed-cat" not in GAPS and self.rarely():
                return self.let(f"{self.square(self.let(text))}.mean({d}, keepdim=True)")
        if self.is_mutation("compressed-wrong-n"):
            s1 = self.keep(lambda k: f"{h}.sum({dims}, {k})")
            total = self.pick(f"{s1}.square() / {n}", f"0.5 * {s1} ** 2", f"2 * {s1} ** 2")
            return self.let(f"({self.sum_of_squares(h)} + {total}) / {n + 1}")
        if self.pick(True, False, False):
            m, m2 = self.average(h), self.mean_square(h)
            return self.let(f"({m2} + {n} * {self.square(m)}) * {n / (n + 1)!r}")
        if self.rarely():  # the variance has the square of the mean once already
            v = self.keep(lambda k: f"{h}.var({dims}, unbiased=False, {k})")
            m = self.average(h)
            return self.let(f"({n} * {v} + {n + n * n} * {m} ** 2) / {n + 1}")
        s1 = self.keep(lambda k: f"{h}.sum({dims}, {k})")
        total = self.add(self.sum_of_squares(h), self.square(s1))
        return self._over_n(total, n + 1)

    def statistic(self, h: str) -> str:
        norm = self.norm
        key = ("statistic", h)
        if key in self.cache and not self.recompute:
            return self.cache[key]
        if norm.statistic == "variance":
            made = self.variance(h)
        elif norm.statistic == "mean-square":
            made = self.mean_square(h)
        elif norm.statistic == "compressed":
            made = self.compressed(h)
        elif self.mutation or self.pick(True, False, False):
            made = self.let(f"{norm.n} * {self.mean_square(h)}")
        else:
            made = self.sum_of_squares(h)
        if self.vectors:
            made = self.vector(made)
        made = self.touch(made)
        self.cache[key] = made
        return made

    # eps

    def eps(self) -> str:
        """The eps as an expression."""
        norm = self.norm
        e = norm.eps
        form = norm.eps_form
        if form == "float":
            return repr(e)
        if form == "float32":
            return repr(norm.eps_value)
        if form in ("tensor32", "tensor64"):
            dtype = torch.float32 if form == "tensor32" else torch.float64
            self.namespace["EPS"] = torch.tensor(e, dtype=dtype)
            return "EPS"
        if form == "full":
            return self.pick(
                f"torch.full((), {e!r})",
                f"h.new_full((), {e!r})",
                f"torch.full([], {e!r}, dtype=torch.float64)",
            )
        self.input("e", () if form == "buffer" else (1,), torch.float32)
        return "e"

    def add_eps(self, s: str) -> str:
        if self.norm.eps == 0:
            return s
        e = self.eps()
        if self.is_mutation("eps-doubled"):
            e = f"(2 * {e})"
        if self.is_mutation("eps-subtracted"):
            return self.let(f"({s} - {e}).abs()")
        if self.is_mutation("eps-multiplied"):
            return self.let(self.pick(f"{s} * (1 + {e})", f"{s} * {e}", f"{s} + {s} * {e}"))
        if e[0].isdigit():
            return self.let(
                self.pick(
                    f"{s} + {e}",
                    f"{e} + {s}",
                    f"{s}.add({e})",
                    f"torch.add({s}, {e})",
                    f"{s} - (-{e})",
                )
            )
        forms = [f"{s} + {e}", f"{e} + {s}", f"torch.add({s}, {e})"]
        if self.norm.eps_form != "full":  # new_full reads x, and so its number does not stand alone
            forms.append(f"{s} - (-{e})")
        return self.let(self.pick(*forms))

    def floor(self, s: str) -> str:
        e = self.eps()
        if self.is_mutation("eps-doubled"):
            e = f"({e} * 2)"
        if self.is_mutation("eps-ceiling"):
            return self.let(f"{s}.clamp(max={e})")
        if self.is_mutation("eps-multiplied"):
            return self.let(f"{s} * {e}")
        if e[0].isdigit() or e[0] == "(":
            return self.let(
                self.pick(
                    f"{s}.clamp_min({e})",
                    f"{s}.clamp(min={e})",
                    f"{s}.clip({e})",
                    f"torch.clip({s}, min={e})",
                    f"torch.clamp({s}, {e})",
                )
            )
        t = self.let(f"{e}.to({s}.dtype)") if self.pick(True, False) else e
        return self.let(
            self.pick(
                f"torch.maximum({s}, {t})",
                f"torch.maximum({t}, {s})",
                f"torch.clamp_min({s}, {t})",
                f"{s}.clamp(min={t})",
                f"{s}.clip(min={t})",
            )
        )

    # roots

    def root(self, h: str) -> tuple[str, str]:
        """The denominator, or its inverse: ("root" or "inverse", name)."""
        norm = self.norm
        place = norm.eps_place
        if self.is_mutation("eps-moved"):
            place = self.pick(*sorted({"inside", "outside", "floor"} - {place}))
        if self.is_mutation("eps-in-both-places"):
            q = self.add_eps(self.statistic(h))
            return "root", self.let(f"{q}.sqrt() + {norm.eps!r}")
        if self.is_mutation("mean-of-roots"):
            return "root", self._mean_of_roots(h)
        if place in ("inside", "floor-inside"):
            s = self.statistic(h)
            if self.is_mutation("weight-inside-root"):
                s = self.let(f"{s} * {self.operands['w']}.square()")
            q = self.add_eps(s) if place == "inside" else self.floor(s)
            fresh = q != s
            touched = self.touch(q)
            return self.inverse_root(touched, fresh=fresh and touched == q)
        direct = norm.statistic == "variance" and not norm.correction and not self.mutation
        if direct and self.pick(True, False):
            dims = self.dims()
            root = self.keep(lambda k: f"{h}.std({dims}, unbiased=False, {k})")
            root = self.vector(root) if self.vectors else root
        elif norm.statistic == "sum-square" and not self.mutation and self.pick(True, True, False):
            root = self.vector_norm(h)
            root = self.vector(root) if self.vectors else root
        else:
            root = self.square_root(self.statistic(h))
        root = self.add_eps(root) if place == "outside" else self.floor(root)
        if self.is_mutation("no-root"):
            root = self.let(f"{root} ** 2")
        if self.is_mutation("fourth-root", "root-of-root"):
            root = self.let(f"{root}.sqrt()")
        return self.pick(
            ("root", root),
            ("root", root),
            (
                "inverse",
                self.let(self.pick(f"1 / {root}", f"{root}.reciprocal()", f"{root} ** -1")),
            ),
        )

    def _mean_of_roots(self, h: str) -> str:
        """Of each row its root, and then the mean of those."""
        *first, last = self.frame.reduced
        s = self.let(f"{self.square(h)}.mean({last}, keepdim=True)")
        return self.let(f"{self.add_eps(s)}.sqrt().mean({first}, keepdim=True)")

    def square_root(self, q: str, *, fresh: bool = False) -> str:
        if fresh and self.in_place and self.pick(True, True, False):
            return self.let(f"{q}.sqrt_()")
        return self.let(
            self.pick(f"torch.sqrt({q})", f"{q}.sqrt()", f"{q} ** 0.5", f"torch.pow({q}, 0.5)")
        )

    def inverse_root(self, q: str, *, fresh: bool = False) -> tuple[str, str]:
        if self.is_mutation("no-root"):
            return self.pick(("root", q), ("inverse", self.let(f"1 / {q}")))
        if self.is_mutation("fourth-root"):
            return "inverse", self.let(
                self.pick(f"{q} ** -0.25", f"{q}.sqrt().sqrt().reciprocal()")
            )
        if self.is_mutation("root-of-root"):
            return "inverse", self.let(f"torch.rsqrt(torch.rsqrt({q}))")
        if fresh and self.in_place and self.pick(True, False):
            if self.pick(True, False):
                return "root", self.square_root(q, fresh=True)
            forms = [f"{q}.rsqrt_()", f"{q}.pow_(-0.5)"]
            if not self.grad:  # autograd needs the root
                forms.append(f"{q}.sqrt_().reciprocal_()")
            return "inverse", self.let(self.pick(*forms))
        form = self.pick(
            "rsqrt",
            "rsqrt",
            "1/sqrt",
            "pow",
            "reciprocal",
            "root",
            "root",
            "q^-1 sqrt",
            "sqrt(1/q)",
        )
        if form == "root":
            return "root", self.square_root(q)
        made = {
            "rsqrt": self.pick(f"torch.rsqrt({q})", f"{q}.rsqrt()"),
            "1/sqrt": f"1.0 / {q}.sqrt()",
            "pow": self.pick(f"{q} ** -0.5", f"torch.pow({q}, -0.5)"),
            "reciprocal": self.pick(
                f"torch.reciprocal(torch.sqrt({q}))",
                f"{q}.sqrt().reciprocal()",
                f"{q}.sqrt() ** -1",
            ),
            "sqrt(1/q)": self.pick(f"(1 / {q}).sqrt()", f"{q}.reciprocal().sqrt()"),
            "q^-1 sqrt": f"{q}.sqrt() / {q}",
        }[form]
        return "inverse", self.let(made)

    # other tensors

    def full(self, name: str, frame: Frame | None = None) -> str:
        """Another input as large as x, in the layout that is being worked in."""
        key = ("full", name)
        if key not in self.cache:
            self.cache[key] = self.move(name, self.home, frame or self.frame)
        return self.cache[key]
