"""On a GPU: the checks of the interpreter at real sizes, Inductor with and without CUDA graphs, a choice by real times.

`python -m pytest -m gpu`. Written without a GPU at hand: nobody has run it yet.
"""

from __future__ import annotations

import pytest
import torch
from assertions import assert_within_contract
from row_cases import FORMS, KINDS, check, check_quantised
from torch import nn

import normfx
from normfx.kernels import kernels
from normfx.kernels.generate import RowForm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def operators():
    kernels()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 24, 768, 4096, 8192, 16384, 32768, 131072])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_on_every_path(name, cols, dtype):
    if FORMS[name].correction and cols == 1:
        pytest.skip("the unbiased variance of one number is not defined")
    check(FORMS[name], "plain", rows=37, cols=cols, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [768, 32768, 131072])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows(kind, cols, dtype):
    check(FORMS["layer-norm"], kind, rows=37, cols=cols, dtype=dtype, device="cuda")
    check(FORMS["rms-norm"], kind, rows=37, cols=cols, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("cols", "block"), [(4096, 0), (4096, 128), (32768, 0), (131072, 128)])
def test_quantised(dtype, cols, block):
    if dtype == "float8_e4m3fn" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8_e4m3fn on this device")
    check_quantised(RowForm(quantise=dtype, block=block), 37, cols, "cuda")


def test_rows_past_two_to_the_31():
    """Offsets of rows are 64-bit: the last row of five thousand million bytes is as right as the first."""
    rows, cols = 2**20 + 1, 2304
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(cols, device="cuda")
    y = torch.ops.normfx.row_norm(x, None, None, None, "{}")[0]
    last = torch.ops.normfx.row_norm(x[-1:], None, None, None, "{}")[0]
    assert torch.equal(y[-1:], last)


@pytest.mark.parametrize("rows", [2, 100, 5000])
def test_a_row_does_not_depend_on_its_batch(rows):
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    whole = torch.ops.normfx.row_norm(x, None, None, None, "{}")[0]
    alone = torch.ops.normfx.row_norm(x[1:2].clone(), None, None, None, "{}")[0]
    assert torch.equal(whole[1:2], alone)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.linear = nn.Linear(768, 768)

    def forward(self, x, branch):
        stream = x + branch
        return stream, nn.functional.gelu(self.norm(stream)), self.linear(stream)


@pytest.mark.inductor
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_under_inductor(mode, grad):
    """With CUDA graphs from the second call on, so it is the third that is looked at."""
    model = Block().cuda()
    exact = Block().cuda().double()
    exact.load_state_dict(model.state_dict())
    options = {"kernels": "triton", "strict": True}
    fast = torch.compile(model, backend="normfx", mode=mode, options=options)
    x, branch = torch.randn(2, 64, 768, device="cuda")
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            got = fast(x, branch)
            if grad:
                sum(t.square().sum() for t in got).backward()
        got = [t.detach().clone() for t in got]
        eager, truth = model(x, branch), exact(x.double(), branch.double())
    for mine, theirs, reference in zip(got, eager, truth, strict=True):
        assert_within_contract(mine, theirs.detach(), reference.detach())
    assert "use-kernel" in normfx.report().sites[0].actions


@pytest.mark.inductor
def test_dynamic_rows_under_inductor():
    model = nn.LayerNorm(768).cuda()
    options = {"kernels": "triton", "strict": True}
    fast = torch.compile(model, backend="normfx", dynamic=True, options=options)
    with torch.no_grad():
        for rows in (3, 64, 4097):
            x = torch.randn(rows, 768, device="cuda")
            exact = nn.functional.layer_norm(x.double(), (768,))
            assert_within_contract(fast(x), model(x), exact)
    assert len(normfx.report().graphs) == 1


@pytest.mark.inductor
@pytest.mark.parametrize("grad", [False, True])
def test_auto_measures_and_says_so(grad, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Block().cuda()
    fast = torch.compile(model, backend="normfx", options={"strict": True})
    with torch.set_grad_enabled(grad):
        fast(*torch.randn(2, 4096, 768, device="cuda"))
    record = normfx.report().sites[0].records[-1]
    assert (record.stage, record.rule) == ("lower", "use-kernel")
    assert " us, Inductor " in record.detail
    assert list((tmp_path / "normfx-kernels").iterdir())
