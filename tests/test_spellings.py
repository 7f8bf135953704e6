"""recognise(spell(norm)) == norm for random spellings; and a norm with one thing broken is never taken for it.

Each example is traced as capture does it, recognised, and both graphs are run in float64: whatever was recognised
has to compute what the function computes. Tracing through dynamo would cost about three times as much and adds
nothing to the algebra; that dynamo's graphs arrive here in the same form is tested elsewhere.

More examples than CI runs: `python tests/test_spellings.py 50000`.
"""

from __future__ import annotations

import collections
import math
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
    GAPS,
    GRADIENTS,
    Norm,
    Program,
    canonical,
    condition,
    distributed_spellings,
    members,
    mutants,
    reference,
    spellings,
)
from torch import fx
from torch._dynamo.source import AttrSource, LocalSource, UnspecializedNNModuleSource
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from normfx.check import in_float64
from normfx.ops import NormSpec
from normfx.ops import norm as canonical_norm
from normfx.passes.functional import functional
from normfx.passes.lower import lower
from normfx.passes.recognise import recognise
from normfx.record import Journal
from normfx.torch_internals import trace_pre_dispatch

EXAMPLES = 2000
# What is in a module: its placeholders get the source that dynamo would give them.
STATE = ("w", "b", "e", "v")
# The size that a symbolic batch has while a function is traced. It runs with another one.
HINT = 13

MODE = FakeTensorMode(allow_non_fake_inputs=True)


def traced(program: Program) -> fx.GraphModule:
    """The pre-dispatch graph of a spelling, as capture makes it."""
    mode = MODE
    if program.norm.dynamic:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        inputs = [placeholder(program, name, mode) for name in program.inputs]
        gm = trace_pre_dispatch(program.function, inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, program.inputs, strict=True):
        if name in STATE:
            module = UnspecializedNNModuleSource(LocalSource("self"))
            node._dynamo_source = AttrSource(module, name)
    functional(gm)
    return gm


def placeholder(program: Program, name: str, mode: FakeTensorMode) -> torch.Tensor:
    """A fake input, its first dim symbolic where the norm is dynamic and the input as large as x."""
    shape, dtype = program.inputs[name]
    if not program.norm.dynamic or name not in ("x", "z"):
        return torch.empty(shape, dtype=dtype)
    sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (len(shape) - 1)
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    with unset_fake_temporarily():
        real = torch.empty((HINT, *shape[1:]), dtype=dtype)
    return mode.from_tensor(real, symbolic_context=context)


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

    def function(given: list[torch.Tensor]) -> Any:
        return InFloat64(gm).run(*given)

    return values_and_gradients(function, inputs, grad=grad)


def values_and_gradients(
    function: Callable[[list[torch.Tensor]], Any], inputs: dict[str, torch.Tensor], *, grad: bool
) -> list[torch.Tensor]:
    given = [t.clone().requires_grad_(grad) for t in inputs.values()]
    leaves = given
    if grad:  # so that a leaf may be written to
        given = [t * 1.0 for t in given]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.set_grad_enabled(grad):
            returned = function(given)
    finally:
        torch.set_default_dtype(before)
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    if grad:
        # a cotangent that is no multiple of the output: for that one a norm's gradient is almost zero
        cotangent = torch.linspace(-1, 1.3, outputs[0].numel(), dtype=torch.float64).cos()
        gradients = torch.autograd.grad(
            outputs[0], leaves, cotangent.view(outputs[0].shape), allow_unused=True
        )
        for name, leaf, gradient in zip(inputs, leaves, gradients, strict=True):
            made = torch.zeros_like(leaf) if gradient is None else gradient
            # That of log(eps), which is of the size of the output: the terms of the gradient of eps
            # are 1/root^2 times larger, and cancel.
            outputs.append(made * leaf if name == "e" else made)
    return [t.detach() for t in outputs]


def assert_equal(
    got: list[torch.Tensor], wanted: list[torch.Tensor], relative: float, what: str
) -> None:
    """Equal to this much of the largest number, outputs that are not finite included.

    `got` and `wanted` are an output and perhaps gradients. A gradient may be zero because its terms
    cancel (that of w where x*w is normalized), so it is compared to the size of the output at least.
    """
    assert len(got) == len(wanted), what
    sizes = [t[t.isfinite()].abs().max().item() if t.isfinite().any() else 1.0 for t in wanted]
    for a, b, size in zip(got, wanted, sizes, strict=True):
        largest = max(size, sizes[0], 1e-30)
        bound = relative * largest
        same = (a - b).abs() <= bound
        same |= (a == b) | (a.isnan() & b.isnan())
        worst = (a - b).abs().nan_to_num(posinf=0).max().item()
        assert same.all(), f"{what}: off by {worst:.3g}, allowed {bound:.3g}"


def sites_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is canonical_norm]


def value_of(node: fx.Node, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of a node in float64."""
    pending, needed = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                pending.append(source)
    interpreter = InFloat64(node.graph.owning_module)
    given = iter(inputs.values())
    for n in node.graph.nodes:
        if n.op == "placeholder":
            interpreter.env[n] = next(given)
        elif n in needed:
            interpreter.env[n] = interpreter.run_node(n)
    return interpreter.env[node]


# silu(ONE) is one: x * silu(z) is x then.
ONE = 1.2784645427610738


def found(node: fx.Node, program: Program) -> dict[str, Any]:
    """What a canonical node says it computes, for comparison with `drawn`."""
    norm = program.norm
    spec: NormSpec = node.kwargs["spec"]
    multiple = 1.0
    if spec.statistic == "variance":
        multiple = norm.n / (norm.n - spec.correction)
    elif spec.statistic == "sum-square":
        multiple = float(norm.n)
    inputs = program.tensors(7, "plain")
    eps = spec.eps
    if isinstance(node.args[3], fx.Node):
        eps = None
        if norm.eps_form not in ("buffer", "buffer1"):
            eps = value_of(node.args[3], inputs).item()
    inputs |= {"x": positions(norm), "z": torch.full(norm.shape, ONE, dtype=torch.float64)}
    at = value_of(node.args[0], {name: inputs[name] for name in program.inputs})
    statistic, eps, place = canonical(
        statistic=spec.statistic, multiple=multiple, eps=eps, place=spec.eps_place
    )
    return {
        "over": members(at, spec.dims, spec.groups, spec.group_dim, spec.prefix),
        "beyond": members(at, spec.beyond, 0, 1, 0) if spec.beyond else set(),
        "centre": spec.centre,
        "gated": node.args[6] is not None,
        "statistic": statistic,
        "kind": spec.kind if norm.kind else None,
        "place": place,
        "eps": eps,
    }


def drawn(norm: Norm) -> dict[str, Any]:
    buffer = norm.eps_form in ("buffer", "buffer1")
    statistic, eps, place = canonical(
        statistic=norm.statistic,
        multiple=norm.multiple,
        eps=None if buffer else norm.eps_value,
        place=norm.eps_place,
    )
    at = positions(norm)
    return {
        "over": members(at, norm.dims, norm.groups, norm.group_dim, norm.prefix),
        "beyond": members(at, norm.beyond, 0, 1, 0) if norm.beyond else set(),
        "centre": norm.centre,
        "gated": norm.gate in ("swish", "silu"),
        "statistic": statistic,
        "kind": norm.kind,
        "place": place,
        "eps": eps,
    }


def positions(norm: Norm) -> torch.Tensor:
    """A number for each element of x."""
    return torch.arange(math.prod(norm.shape), dtype=torch.float64).reshape(norm.shape)


def differences(node: fx.Node, program: Program) -> dict[str, Any]:
    """What a canonical node says that is not as it was drawn, and how it was drawn."""
    got, wanted = found(node, program), drawn(program.norm)
    a, b = got["eps"], wanted["eps"]
    if a is not None and b is not None and abs(a - b) <= 1e-12 * b:
        got["eps"] = b
    return {key: (got[key], wanted[key]) for key in got if got[key] != wanted[key]}


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
    differs = differences(nodes[0], program)
    assert not differs, f"spec differs in {', '.join(differs)}: {differs}"
    lower_some(gm, program)
    for inputs, outputs in zip(batches, before, strict=True):
        bound = 1e-12 * condition(norm, inputs) ** (2 if program.grad else 1)
        assert_equal(run(gm, inputs, grad=program.grad), outputs, bound, "recognised graph differs")


def lower_some(gm: fx.GraphModule, program: Program) -> None:
    """Lowers the recognised graph of one program in eight: whatever was found has to arrive there too."""
    if len(program.source) % 8 == 0:
        lower(gm)
        gm.graph.lint()


def check_mutant(program: Program) -> None:
    norm = program.norm
    gm = traced(program)
    inputs = program.tensors(7, "plain")
    before = run(gm, inputs, grad=program.grad)
    bound = 1e-12 * condition(norm, inputs)
    assume(differs_from_original(program, inputs, before, 10 * bound))
    journal = Journal()
    recognise(gm, journal, grad=program.grad)
    lower_some(gm, program)
    gm.graph.lint()
    after = run(gm, inputs, grad=program.grad)
    assert_equal(after, before, bound, "FALSE POSITIVE: the mutated function was not kept")


def differs_from_original(
    program: Program, inputs: dict[str, torch.Tensor], got: list[torch.Tensor], bound: float
) -> bool:
    """Whether a mutation changed the output, or what it was drawn for: the gradient of x.

    By so much that `check_mutant` fails if it is taken for the norm that it was.
    """

    def function(given: list[torch.Tensor]) -> torch.Tensor:
        return reference(program.norm, dict(zip(inputs, given, strict=True)))

    grad = program.mutation in GRADIENTS
    original = values_and_gradients(function, inputs, grad=grad)
    outputs = len(got) - len(inputs) if program.grad else len(got)
    assert outputs == 1
    compared = [0, 1 + list(inputs).index("x")] if grad else [0]
    return any(
        not (got[i] - original[i]).abs().max().item() <= bound * original[i].abs().max().item()
        for i in compared
    )


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


@pytest.mark.parametrize("gap", list(GAPS))
def test_what_is_not_drawn_is_not_recognised(gap: str) -> None:
    """If this fails, a gap was closed: take it out of `spellings/gaps.py`."""
    shapes = {"x": ((4, 6), torch.float32), "w": ((6,), torch.float32)}
    arguments = GAPS[gap].partition("(")[2].partition(")")[0].split(", ")
    inputs = {name: shapes[name] for name in arguments}
    norm = Norm((4, 6), (1,), False, "mean-square", 0, 1e-5, "inside")
    gm = traced(Program(norm, GAPS[gap], inputs, {}))
    recognise(gm, Journal(), grad=False)
    assert not sites_of(gm)


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
