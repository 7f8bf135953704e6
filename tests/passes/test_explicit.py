"""Explicit sizes: what is shaped or cast like another tensor no longer reads that."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import stages_of


def captured(function, *inputs) -> str:
    with torch.no_grad():
        return stages_of(function, *inputs)[0]["capture"]


def test_sizes_and_dtypes_are_spelled_out():
    def like(x, y, z):
        return x.flatten().view_as(y), x.reshape_as(y).type_as(z), y[:1].expand_as(y)

    x, y = torch.randn(2, 3), torch.randn(3, 2)
    assert_expected_inline(
        captured(like, x, y, x.double()),
        """\
v0 = flatten(in0)
v1 = view(v0, [3, 2])
v2 = reshape(in0, [3, 2])
v3 = to(v2, float64)
v4 = slice(in1, 0, 0, 1)
v5 = expand(v4, [3, 2])
return [v1, v3, v5]
""",
    )


@pytest.mark.parametrize("method", ["view_as", "reshape_as", "expand_as"])
def test_a_symbolic_size_is_an_input_or_the_operator_stays(method):
    def known(x, y):
        return getattr(x, method)(y.relu())

    def made(x, y):
        return getattr(torch.cat([x, x]), method)(torch.cat([y, y]))

    x, y = torch.randn(6, 2), torch.randn(6, 2)
    for t in (x, y):
        torch._dynamo.mark_dynamic(t, 0)
    assert f"{method}(" not in captured(known, x, y)
    assert f"{method}(" in captured(made, x, y)  # 2 * s is no input
