"""The table of kernels: what it says, and that it is there only with Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normfx import kernels
from normfx.kernels.generate import RowForm
from normfx.kernels.launch import MAX_COLS, backward_launch, forward_launch
from normfx.ops import NormSpec

GPU = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]


def test_importing_normfx_does_not_import_triton():
    command = "import sys, normfx, normfx.kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_without_triton_the_table_is_empty(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert kernels.kernels.__wrapped__() == ()


@pytest.mark.usefixtures("interpreter")
def test_every_kernel_is_an_operator():
    for kernel in kernels.kernels():
        assert hasattr(torch.ops.normfx, kernel.name)
        assert kernel.computes
        assert kernel.limits
        assert f"| `{kernel.name}` |" in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("spec", "cols", "dtype", "device", "reason"),
    [
        (NormSpec("LayerNorm", (1,)), 768, torch.bfloat16, GPU, ""),
        (
            NormSpec("LayerNorm", (1,)),
            768,
            torch.bfloat16,
            torch.device("xpu"),
            "no kernel for xpu",
        ),
        (NormSpec("LayerNorm", (1,)), 768, torch.float64, GPU, "no kernel for float64"),
        (NormSpec("LayerNorm", (1,)), MAX_COLS + 1, torch.float16, GPU, "rows of 262145 columns"),
        (NormSpec("GroupNorm", (2,), groups=2), 8, torch.float32, GPU, "no kernel for GroupNorm"),
        (NormSpec("LayerNorm", (1,), eps=None), 8, torch.float32, GPU, "no kernel for LayerNorm"),
    ],
)
def test_what_a_row_kernel_supports(spec, cols, dtype, device, reason):
    row_norm = kernels.kernels()[0]
    assert row_norm.supports(spec, cols, dtype, device) == reason


@pytest.mark.usefixtures("interpreter")
def test_on_a_cpu_kernels_are_for_the_interpreter_alone(monkeypatch):
    from normfx.kernels import row_table

    given = (NormSpec("LayerNorm", (1,)), 768, torch.float32, torch.device("cpu"))
    assert row_table.supports(*given) == ""
    monkeypatch.setattr(row_table, "interpreted", lambda: False)
    assert row_table.supports(*given) == "no kernel for cpu"


def test_a_form_is_its_text():
    form = RowForm("mean-square", centre=False, eps=1e-6, activation="silu")
    assert RowForm.parse(form.text) == form
    assert RowForm().text == "{}"


def test_an_unknown_word_in_a_form_is_an_error():
    with pytest.raises(ValueError, match=r"expected one of .*'variance'.*, got 'median'"):
        RowForm.parse('{"statistic": "median"}')


@pytest.mark.parametrize("choose", [forward_launch, backward_launch])
def test_every_size_has_a_launch(choose):
    paths = []
    for cols in (1, 2, 3, 768, 1000, 8192, 8193, 16385, 65536, 65537, MAX_COLS):
        launch = choose(cols)
        paths.append(launch.path)
        assert launch.block_cols & (launch.block_cols - 1) == 0
        assert 1 <= launch.num_warps <= 16
        if launch.path == "persistent":
            assert launch.block_cols >= cols
        else:
            assert (
                (launch.splits - 1) * launch.split_cols < cols <= launch.splits * launch.split_cols
            )
    order = ["persistent", "looped", "split"]
    assert paths == sorted(paths, key=order.index)
    assert set(paths) == set(order)
