"""The text of a function, and the small pieces that every spelling has: products, sums, squares."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from spellings.norms import Norm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Text:
    """Writes one function. `pick` draws; `let` adds a line and returns the name of its value."""

    def __init__(self, draw: Any, norm: Norm, mutation: str) -> None:
        self.draw, self.norm, self.mutation = draw, norm, mutation
        self.lines: list[str] = []
        self.inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.namespace: dict[str, Any] = {}
        # Writing to an operand of another dtype rounds, and what it rounds is no norm.
        self.in_place = norm.dtype != "bfloat16" and not mutation and self.pick(False, False, True)

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options)) if len(options) > 1 else options[0]

    def rarely(self) -> bool:
        return self.draw(st.integers(0, 7)) == 7

    def let(self, expression: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def is_mutation(self, *names: str) -> bool:
        return self.mutation in names

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        self.inputs[name] = (shape, dtype)
        return name

    def touch(self, v: str) -> str:
        """The same numbers, sometimes through an operator that changes nothing."""
        if not self.rarely():
            return v
        return self.let(
            self.pick(
                f"{v}.clone()",
                f"{v}.contiguous()",
                f"F.dropout({v}, 0.1, False)",
                f"{v} * 1.0",
                f"{v} + 0.0",
                f"-(-{v})",
                f"{v} / 1.0",
                f"({v} * 2.0) * 0.5",
                f"{v}.type_as({v})",
                f"{v}.expand_as({v})",
            )
        )

    def mul(self, a: str, b: str, *, fresh: bool = False) -> str:
        """The product; a fresh `a` is as large as it, and may be written to."""
        if fresh and self.in_place and self.pick(True, True, False):
            return self.let(f"{a}.mul_({b})")
        a, b = self.pick((a, b), (b, a))
        return self.let(
            self.pick(
                f"{a} * {b}", f"torch.mul({a}, {b})", f"{a} * {b}", f"torch.multiply({a}, {b})"
            )
        )

    def add(self, a: str, b: str, *, fresh: bool = False) -> str:
        if fresh and self.in_place and self.pick(True, True, False):
            return self.let(f"{a}.add_({b})")
        a, b = self.pick((a, b), (b, a))
        return self.let(
            self.pick(f"{a} + {b}", f"torch.add({a}, {b})", f"{a} - (-{b})", f"{a} + {b}")
        )

    def sub(self, a: str, b: str) -> str:
        return self.let(
            self.pick(
                f"{a} - {b}",
                f"torch.sub({a}, {b})",
                f"{a}.sub({b})",
                f"-({b} - {a})",
                f"{a} + (-{b})",
                f"torch.rsub({b}, {a})",
                f"0.5 * torch.sub(2 * {a}, {b}, alpha=2)",
                f"torch.add({a}, {b}, alpha=-1)",
            )
        )

    def square(self, a: str) -> str:
        if self.is_mutation("cubed"):
            return self.let(self.pick(f"{a} ** 3", f"{a} * {a} * {a}", f"{a}.abs() ** 3"))
        if self.is_mutation("fourth"):
            return self.let(self.pick(f"{a} ** 4", f"({a} * {a}).square()"))
        if self.is_mutation("first-absolute"):
            return self.let(f"{a}.abs()")
        forms = [
            f"{a} * {a}",
            f"{a} ** 2",
            f"{a}.pow(2)",
            f"torch.square({a})",
            f"torch.pow({a}, 2.0)",
        ]
        if self.rarely():
            forms = [
                f"{a}.abs() ** 2",
                f"{a}.abs() * {a}.abs()",
                f"(-{a}) ** 2",
                f"(-{a}) * (-{a})",
                f"{a}.abs().square()",
            ]
        return self.let(self.pick(*forms))

    def divide(self, a: str, b: str, *, fresh: bool = False) -> str:
        if fresh and self.in_place and self.pick(True, True, False):
            return self.let(f"{a}.div_({b})")
        return self.let(
            self.pick(
                f"{a} / {b}",
                f"torch.div({a}, {b})",
                f"{a} * (1 / {b})",
                f"{a} / {b}",
                f"{a}.divide({b})",
            )
        )
