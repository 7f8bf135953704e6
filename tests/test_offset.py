"""Offset: which values are S * u + k * T of a norm's input, what is added to them, and who reads."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from normfx.analyses.offset import Spread, spread
from normfx.capture import capture
from normfx.ops import norm
from normfx.passes.channels import Channels
from normfx.passes.recognise import recognise
from normfx.record import Journal


class Stream(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.norm, self.linear, self.use = nn.BatchNorm1d(8), nn.Linear(8, 8), use

    def forward(self, x):
        return self.use(self, self.norm(x), x)


def walked(use) -> dict[str, str]:
    """What the walk says of each value, by the operator that makes it."""
    found: list[Spread] = []

    def backend(gm: fx.GraphModule, inputs):
        module = capture(gm)
        recognise(module, Journal(), grad=False)
        (node,) = module.graph.find_nodes(op="call_function", target=norm)
        order = {n: index for index, n in enumerate(module.graph.nodes)}
        found.append(spread(node, Channels.along(2, 1, 8), order, shifted=True))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Stream(use).eval(), backend=backend)(torch.randn(4, 8))
    (result,) = found
    said = {}
    for node, offset in list(result.values.items())[1:]:
        said[node.name] = "S u + T" if offset.shifted else "S u"
    for addend in result.addends:
        said[f"+ {addend.operand.name}"] = "y + T" if addend.offset.shifted else "y"
    for read in result.reads:
        if read.user.op != "output":
            said[f"{read.user.name}({read.source.name})"] = "read"
    return said


CASES = {
    "linear": (lambda m, y, x: m.linear(y), {"linear(norm)": "read"}),
    "an-addend-takes-the-offset": (
        lambda m, y, x: (y + x) + torch.tanh(x),
        {"add": "S u", "add_1": "S u", "+ arg0_1": "y + T", "+ tanh": "y"},
    ),
    "moves": (
        lambda m, y, x: y.t().unsqueeze(0) + 1,
        {"t": "S u + T", "unsqueeze": "S u + T", "add(unsqueeze)": "read"},
    ),
    "one-of-two-is-shifted": (
        lambda m, y, x: (y + x) + y[:],
        {
            **{"add": "S u", "slice_1": "S u + T", "add_1": "S u + T"},
            **{"+ arg0_1": "y + T"},
        },
    ),
    "both-are-shifted": (
        lambda m, y, x: y + y[:],
        {"slice_1": "S u + T", "add(norm)": "read", "add(slice_1)": "read"},
    ),
    "other-channels": (
        lambda m, y, x: y[:4] + y[:4].flip(1),
        {
            **{"slice_1": "S u + T", "slice_2": "S u + T", "flip(slice_2)": "read"},
            **{"+ flip": "y + T", "add": "S u"},
        },
    ),
    "twice-itself": (lambda m, y, x: y + y, {"add(norm)": "read"}),
    "weighted": (lambda m, y, x: torch.add(y, x, alpha=2), {"add(norm)": "read"}),
    "broadcast": (lambda m, y, x: y + x[:1], {"add(norm)": "read"}),
    "another-dtype": (lambda m, y, x: y + x.double(), {"add(norm)": "read"}),
    "a-factor-with-an-offset": (lambda m, y, x: y * 2, {"mul(norm)": "read"}),
    "a-factor-without": (
        lambda m, y, x: (y + x) * 2,
        {"add": "S u", "+ arg0_1": "y + T", "mul": "S u"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_known(name):
    use, expected = CASES[name]
    assert walked(use) == expected
