"""How torch sees the operators of the row kernels: opcheck, export, dynamo, and what is traced for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from assertions import assert_within_contract
from row_cases import FORMS, eagerly, exactly, operands

from normfx.kernels import kernels
from normfx.kernels.generate import RowForm

pytestmark = pytest.mark.usefixtures("interpreter", "operators")

RMS = FORMS["rms-norm"]
TEXT = RMS.text


@pytest.fixture
def operators(interpreter):
    kernels()


def leaves(form=RMS, rows=5, cols=24):
    x, gate, weight, bias = operands(form, "plain", rows, cols, torch.float32, "cpu")
    given = [x, gate, weight, bias if form.centre else None]
    return [t if t is None else t.requires_grad_() for t in given]


@pytest.mark.parametrize("name", ["rms-norm", "layer-norm", "gate-after", "swish"])
def test_opcheck_of_the_norm(name):
    torch.library.opcheck(torch.ops.normfx.row_norm, (*leaves(FORMS[name]), FORMS[name].text))


def test_opcheck_of_the_others():
    x, _, weight, _ = leaves()
    residual = torch.randn(5, 24, requires_grad=True)
    ops = torch.ops.normfx
    torch.library.opcheck(ops.add_row_norm, (x, residual, None, weight, None, RMS.text))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    int8 = RowForm(quantise="int8", block=8).text
    torch.library.opcheck(ops.row_norm_quantised, (x, None, weight, None, int8))
    torch.library.opcheck(ops.add_row_norm_quantised, (x, residual, None, weight, None, int8))
    torch.library.opcheck(ops.add_row_scale, (x, residual, RMS.text))
    _, mean, square = ops.row_norm(x, None, weight, None, RMS.text)
    given = (x, residual, x, None, weight, None, mean, square, RMS.text)
    torch.library.opcheck(ops.row_norm_backward, given)


def test_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(24))

        def forward(self, x):
            return torch.ops.normfx.row_norm(x, None, self.weight, None, TEXT)[0]

    model, x = Model(), torch.randn(5, 24)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: rows}})
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "normfx.row_norm.default" in targets
    longer = torch.randn(9, 24)
    assert torch.equal(program.module()(longer), model(longer))


@pytest.mark.parametrize("backward", [False, True])
def test_dynamic_rows_compile_once(backward):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(x, weight):
        return torch.ops.normfx.row_norm(x * 2, None, weight, None, TEXT)[0]

    fast = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    weight = torch.randn(24, requires_grad=backward)
    for rows in (5, 7, 130):
        x = torch.randn(rows, 24, requires_grad=backward)
        got = fast(x, weight)
        eager = eagerly(RMS, x * 2, None, weight, None)
        assert_within_contract(got, eager, exactly(RMS, x * 2, None, weight, None))
        if backward:
            got.sum().backward()
            assert x.grad.shape == x.shape
    assert counter.frame_count == 1


def test_on_a_cpu_inductor_gets_the_body_in_plain_torch():
    """Traced on a CPU there is no launch in the graph, so Inductor fuses the norm with what is around it."""
    seen = []

    def backend(gm, inputs):
        seen.extend(n for n in gm.graph.nodes if n.op == "call_function")
        return gm

    from torch._dynamo.backends.common import aot_autograd

    x, _, weight, _ = leaves()
    with torch.no_grad():
        torch.compile(
            lambda x, w: torch.ops.normfx.row_norm(x, None, w, None, TEXT)[0],
            backend=aot_autograd(fw_compiler=backend, inference_compiler=backend),
        )(x, weight)
    assert seen
    assert all(n.target.namespace in ("aten", "prims") for n in seen)


TRACED_FOR_A_GPU = """
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from normfx.kernels import kernels
class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
driver.set_active(Driver())  # torch compiles each kernel to see which arguments it writes to
kernels()
def step(x, residual, weight, dy):
    y, stream, mean, square = torch.ops.normfx.add_row_norm(x, residual, None, weight, weight, "{}")
    back = torch.ops.normfx.row_norm_backward(dy, y, stream, None, weight, weight, mean, square, "{}")
    return y, *back
with FakeTensorMode(allow_non_fake_inputs=True):
    for cols in (768, 20000, 100000):
        x = torch.empty(64, cols, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(cols, device="cuda", dtype=torch.bfloat16)
        gm = aot_export_joint_simple(step, (x, x, weight, x), trace_joint=False)
        names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
        print(cols, sum("triton_kernel_wrapper_functional" in n for n in names))
"""


def test_traced_for_a_gpu_the_launches_are_in_the_graph():
    """Forward and backward, in registers, looped and split: what Inductor then generates code around."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", TRACED_FOR_A_GPU]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # two kernels; one forward and two backward; two and two
    assert "Encountered an exception" not in run.stderr, run.stderr[-2000:]
    assert run.stdout.split("\n")[:3] == ["768 2", "20000 3", "100000 4"], run.stdout
