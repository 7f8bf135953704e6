"""recognise(spell(norm)) == norm for random spellings; and a norm with one thing broken is never taken for it.

Each example is traced as capture does it, recognised, and both graphs are run in float64: whatever was recognised
has to compute what the function computes. Tracing through dynamo would cost about three times as much and adds
nothing to the algebra; that dynamo's graphs arrive here in the same form is tested elsewhere.

More examples than CI runs: `python tests/test_spellings.py 50000`.
"""

from __future__ import annotations

import collections
import operator
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption
from strategies import (
    Norm,
    Program,
    canonical,
    denominator,
    distributed_spellings,
    mutants,
    reference,
    spellings,
)
from torch import fx
from torch._dynamo.source import AttrSource, LocalSource, UnspecializedNNModuleSource
from torch._subclasses.fake_tensor import FakeTensorMode

from normfx.check import in_float64
from normfx.ops import NormSpec
from normfx.ops import norm as canonical_norm
from normfx.passes.recognise import recognise
from normfx.record import Journal
from normfx.torch_internals import trace_pre_dispatch

EXAMPLES = 2000
# What is in a module: its placeholders get the source that dynamo would give them.
STATE = ("w", "b", "e")

MODE = FakeTensorMode(allow_non_fake_inputs=True)


def traced(program: Program) -> fx.GraphModule:
    """The pre-dispatch graph of a spelling, as capture makes it."""
    with MODE:
        inputs = [torch.empty(s, dtype=d) for s, d in program.inputs.values()]
        gm = trace_pre_dispatch(program.function, inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, program.inputs, strict=True):
        if name in STATE:
            module = UnspecializedNNModuleSource(LocalSource("self"))
            node._dynamo_source = AttrSource(module, name)
    return gm


class InFloat64(fx.Interpreter):
    """Runs a graph with every dtype in it replaced by float64: what it computes in real arithmetic, nearly."""

    def run_node(self, n: fx.Node) -> Any:
        n_args, n_kwargs = n.args, n.kwargs
        try:
            n.args, n.kwargs = in_float64(n.args), in_float64(n.kwargs)
            return super().run_node(n)
        finally:
            n.args, n.kwargs = n_args, n_kwargs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        held = super().get_attr(target, args, kwargs)
        return held.double() if isinstance(held, torch.Tensor) else held


def run(gm: fx.GraphModule, inputs: dict[str, torch.Tensor], *, grad: bool) -> list[torch.Tensor]:
    """The outputs in float64, and with `grad` the gradients of all inputs."""
    given = [t.clone().requires_grad_(grad) for t in inputs.values()]
    leaves = given
    if grad:  # so that a leaf may be written to
        given = [t * 1.0 for t in given]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.set_grad_enabled(grad):
            returned = InFloat64(gm).run(*given)
    finally:
        torch.set_default_dtype(before)
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    if grad:
        # a cotangent that is no multiple of the output: for that one a norm's gradient is almost zero
        cotangent = torch.linspace(-1, 1.3, outputs[0].numel(), dtype=torch.float64).cos()
        gradients = torch.autograd.grad(
            outputs[0], leaves, cotangent.view(outputs[0].shape), allow_unused=True
        )
        outputs += [
            torch.zeros_like(t) if d is None else d for t, d in zip(leaves, gradients, strict=True)
        ]
    return [t.detach() for t in outputs]


def condition(norm: Norm, inputs: dict[str, torch.Tensor]) -> float:
    """E[x^2] / root^2, at least one: by how much a spelling may lose precision, whichever it is.

    A variance written as E[x^2] - E[x]^2 has an absolute error of at most 2 (n + 2) u E[x^2] (n additions, a
    product and a difference; u = 2^-53), so the root has a relative one of half of that over root^2, and
    x * r - m * r one of 2 u |x| r <= 2 u E[x^2]/root^2 + 2 u. With n <= 20 these are below 1e-14 times this number
    together, once for the original and once for the rewritten graph: 1e-12 leaves a factor of fifty. A gradient
    divides by the root once more and multiplies by another deviation: the same number, squared.
    """
    x = (
        inputs["x"] * torch.nn.functional.silu(inputs["z"])
        if norm.gate == "before"
        else inputs["x"]
    )
    return max(
        1.0, ((x * x).mean(norm.dims, keepdim=True) / denominator(norm, x) ** 2).max().item()
    )


def assert_equal(
    got: list[torch.Tensor], wanted: list[torch.Tensor], relative: float, what: str
) -> None:
    """Equal to this much of the largest number, outputs that are not finite included."""
    assert len(got) == len(wanted), what
    for a, b in zip(got, wanted, strict=True):
        finite = b[b.isfinite()].abs()
        bound = relative * max(finite.max().item() if finite.numel() else 1.0, 1e-30)
        same = (a - b).abs() <= bound
        same |= (a == b) | (a.isnan() & b.isnan())
        worst = (a - b).abs().nan_to_num(posinf=0).max().item()
        assert same.all(), f"{what}: off by {worst:.3g}, allowed {bound:.3g}"


def sites_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is canonical_norm]


def constant(node: fx.Node) -> float:
    """The number that a node without inputs makes."""
    graph, copies = fx.Graph(), {}

    def copied(n: fx.Node) -> fx.Node:
        if n not in copies:
            for source in n.all_input_nodes:
                copied(source)
            copies[n] = graph.node_copy(n, lambda source: copies[source])
        return copies[n]

    graph.output(copied(node))
    return InFloat64(fx.GraphModule(node.graph.owning_module, graph)).run().item()


def found(node: fx.Node, norm: Norm) -> tuple[Any, ...]:
    """What a canonical node says it computes, for comparison with `drawn`."""
    spec: NormSpec = node.kwargs["spec"]
    n = norm.n
    multiple = 1.0
    if spec.statistic == "variance":
        multiple = n / (n - spec.correction)
    elif spec.statistic == "sum-square":
        multiple = float(n)
    eps = spec.eps
    if isinstance(node.args[3], fx.Node):
        eps = None if norm.eps_form in ("buffer", "buffer1") else constant(node.args[3])
    form = canonical(
        variance=spec.statistic == "variance", multiple=multiple, eps=eps, place=spec.eps_place
    )
    return (spec.dims, spec.centre, *form)


def drawn(norm: Norm) -> tuple[Any, ...]:
    buffer = norm.eps_form in ("buffer", "buffer1")
    form = canonical(
        variance=norm.statistic == "variance",
        multiple=norm.multiple,
        eps=None if buffer else norm.eps_value,
        place=norm.eps_place,
    )
    return (norm.dims, norm.centre, *form)


def matches(node: fx.Node, norm: Norm) -> bool:
    *got, eps, place = found(node, norm)
    *wanted, wanted_eps, wanted_place = drawn(norm)
    if got != wanted or (eps is None) != (wanted_eps is None):
        return False
    return place == wanted_place and (eps is None or abs(eps - wanted_eps) <= 1e-12 * wanted_eps)


def kinds_of_input(program: Program) -> list[str]:
    return ["plain", "large-mean", "tiny"] if program.norm.centre else ["plain", "tiny"]


def check_spelling(program: Program) -> None:
    norm = program.norm
    gm = traced(program)
    batches = [program.tensors(7, kind) for kind in kinds_of_input(program)]
    before = [run(gm, inputs, grad=program.grad) for inputs in batches]
    for inputs, outputs in zip(batches, before, strict=True):
        bound = 1e-12 * condition(norm, inputs)
        if norm.eps_form == "full":  # a literal of the graph or its float32 rounding: both are read
            bound += 1e-7
        assert_equal(outputs[:1], [reference(norm, inputs)], bound, "the spelling is not the norm")

    journal = Journal()
    recognise(gm, journal, grad=program.grad)
    gm.graph.lint()
    nodes = sites_of(gm)
    missed = ", ".join(f"{m.code.value} at {m.node}" for m in journal.near_misses)
    assert nodes, f"not recognised: {missed}"
    assert [len(nodes), len(journal.sites)] == [1, 1], "nodes, sites"
    assert matches(nodes[0], norm), f"spec differs: {found(nodes[0], norm)} is not {drawn(norm)}"
    for inputs, outputs in zip(batches, before, strict=True):
        bound = 1e-12 * condition(norm, inputs) ** (2 if program.grad else 1)
        assert_equal(run(gm, inputs, grad=program.grad), outputs, bound, "recognised graph differs")


def check_mutant(program: Program) -> None:
    norm = program.norm
    gm = traced(program)
    inputs = program.tensors(7, "plain")
    before = run(gm, inputs, grad=program.grad)
    original = reference(norm, inputs)
    if not program.grad:
        difference = (before[0] - original).abs().max().item()
        assume(not difference <= 1e-9 * original.abs().max().item())  # this draw broke nothing
    journal = Journal()
    recognise(gm, journal, grad=program.grad)
    gm.graph.lint()
    after = run(gm, inputs, grad=program.grad)
    bound = 1e-12 * condition(norm, inputs)
    assert_equal(after, before, bound, "FALSE POSITIVE: the mutated function was not kept")


# The database and the timing checks make a run depend on the runs before it and on the machine.
CI = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


@pytest.mark.slow
@CI
@given(spellings())
def test_every_spelling_is_recognised_as_what_it_is(program: Program) -> None:
    check_spelling(program)


@settings(CI, max_examples=200, phases=(Phase.generate,))
@given(distributed_spellings())
def test_a_norm_multiplied_out_is_one_site(program: Program) -> None:
    check_spelling(program)


@pytest.mark.slow
@CI
@given(mutants())
def test_a_norm_with_one_thing_broken_is_not_taken_for_it(program: Program) -> None:
    check_mutant(program)


_BY_ROOT_ELSEWHERE = {
    "abs, outside": "q = s.sqrt() - 0.5; other = q.sqrt(); r = (1 / q).abs()",
    "abs, inside": "q = s - 0.5; other = q.sqrt(); r = (1 / q).abs().sqrt()",
    "root of the square": "q = s - 0.5; other = q.rsqrt(); r = (1 / q).square().sqrt().sqrt()",
    "floor": "q = s - 0.5; other = q.rsqrt(); r = (1 / q).clamp_min(0).sqrt()",
}


@pytest.mark.parametrize("lines", list(_BY_ROOT_ELSEWHERE.values()), ids=list(_BY_ROOT_ELSEWHERE))
def test_a_root_that_another_value_takes_says_nothing_of_a_sign(lines: str) -> None:
    norm = Norm((4, 6), (1,), False, "mean-square", 0, 0.1, "inside")
    source = "def f(x):\n    s = (x * x).mean(-1, True)\n"
    source += f"    {lines}\n    return x * r, other\n"
    program = Program(norm, source, {"x": ((4, 6), torch.float32)}, {})
    gm = traced(program)
    rows = torch.tensor([[0.1], [1.0], [2.0], [0.3]], dtype=torch.float64)
    inputs = {"x": program.tensors(0, "plain")["x"] * rows}
    before = run(gm, inputs, grad=False)
    recognise(gm, Journal(), grad=False)
    assert_equal(run(gm, inputs, grad=False), before, 1e-12, "recognised graph differs")


class _Survey:
    """Runs many examples without stopping at a failure, and sorts the failures by their message."""

    def __init__(self, check: Callable[[Program], None]) -> None:
        self.check = check
        self.ran: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, list[Program]] = collections.defaultdict(list)

    def example(self, program: Program) -> None:
        try:
            self.check(program)
            self.ran["passed"] += 1
        except UnsatisfiedAssumption:
            self.ran[f"without effect: {program.mutation}"] += 1
            raise
        except Exception as error:
            self.ran["failed"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:160]
            key = re.sub(r"_\d+|\d+(\.\d+)?(e-?\d+)?", "#", text)
            self.failures[f"{key} [{Path(last.filename).name}:{last.lineno}]"].append(program)

    def print(self) -> None:
        print(dict(self.ran))
        for key, programs in sorted(self.failures.items(), key=operator.itemgetter(0)):
            shortest = min(programs, key=lambda p: len(p.source.splitlines()))
            print(f"-- {len(programs)} x {key}{shortest!r}")


def main(count: int, start: int = 0) -> None:
    """Surveys this many spellings, a tenth as many multiplied out, and this many mutants."""
    for strategy, check, share in (
        (spellings(), check_spelling, 1),
        (distributed_spellings(), check_spelling, 10),
        (mutants(), check_mutant, 1),
    ):
        survey = _Survey(check)
        many = settings(
            CI, max_examples=max(count // share, 1), derandomize=False, phases=(Phase.generate,)
        )

        seed(start)(many(given(strategy)(survey.example)))()
        survey.print()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
