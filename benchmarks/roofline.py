"""Writes docs/roofline.md: bytes, flops and launches before and after, and the floor of a time.

    python -m benchmarks.roofline            # print the page
    python -m benchmarks.roofline --write    # write it

Kernels are counted by paper and pencil (benchmarks/work.py). Whole models are counted by the cost
model of normfx (normfx/cost.py) on the captured graph and on the rewritten one, of one layer and of
two, so that deeper models follow on a line; weights are on no device, and nothing is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from benchmarks.devices import DEVICES
from benchmarks.gpu.networks import LLAMA_1B, MEDIUM, gpt2, images, llama, tokens, vit
from benchmarks.work import KERNELS, Pair, Work

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
SHOWN = ("H200", "A100")

HEAD = """\
# Roofline

<!-- Written by python -m benchmarks.roofline --write. -->

What each kernel and each model has to move, compute and launch, from shapes alone: nothing on this
page was measured. The floor is the larger of bytes over peak bandwidth and flops over peak dense
bfloat16 rate, with no launch counted; `python -m benchmarks.gpu` prints what was measured over what
the data sheet of its device allows. All tensors are bfloat16.

| device | bandwidth | dense bfloat16 | source |
|---|--:|--:|---|
{devices}

## Kernels

Before: what the same takes without the kernel, with everything fused that Inductor fuses. After:
with it. The assumptions of each line are in `benchmarks/work.py`. A LayerNorm alone is the same on
both sides: a kernel of ours can only be a better copy of Inductor's there.

{kernels}

## Models

One forward pass, counted by the cost model that the rules of normfx decide by (`normfx/cost.py`):
products and attention are kernels of their own, and what is elementwise or a reduction over one
space is one kernel. So launches are those of a model of fusion, and not of a profiler. "Exact" is
the rewritten graph; "UN" is the model with every norm turned into a Unified Norm, after the fold.
A decode step is one token without a cache of keys.

{models}

The bytes of a decode step are those of the weights. Launches do not fall in this model where a
residual is added in the kernel of the norm behind it: what remains of that kernel is the addition.
The head of a language model gets a bias where a shift is folded into it. Swin is not in this table:
its stages differ in width, so that one layer says nothing about the next.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A model of some depth, and a call.

    Attributes:
        name: of the row.
        make: the model with so many layers.
        layers: how many it has.
        inputs: of the call.
    """

    name: str
    make: Callable[[int], nn.Module]
    layers: int
    inputs: Callable[[], dict[str, torch.Tensor]]


def _gpt2(size: dict[str, int], layers: int) -> nn.Module:
    return gpt2({**size, "n_layer": layers})


def _vit(layers: int) -> nn.Module:
    return vit({"num_hidden_layers": layers})


def _llama(layers: int) -> nn.Module:
    return llama({**LLAMA_1B, "num_hidden_layers": layers})


CASES = (
    Case("GPT-2 small, decode, batch 1", partial(_gpt2, {}), 12, partial(tokens, 1, 1)),
    Case("GPT-2 small, decode, batch 8", partial(_gpt2, {}), 12, partial(tokens, 8, 1)),
    Case("GPT-2 small, prefill 1 x 1024", partial(_gpt2, {}), 12, partial(tokens, 1, 1024)),
    Case("GPT-2 medium, decode, batch 1", partial(_gpt2, MEDIUM), 24, partial(tokens, 1, 1)),
    Case("GPT-2 medium, prefill 1 x 1024", partial(_gpt2, MEDIUM), 24, partial(tokens, 1, 1024)),
    Case("ViT-B/16, 1 image", _vit, 12, partial(images, 1, 224)),
    Case("ViT-B/16, 64 images", _vit, 12, partial(images, 64, 224)),
    Case("Llama-1B-shaped, decode, batch 1", _llama, 16, partial(tokens, 1, 1)),
    Case("Llama-1B-shaped, prefill 1 x 2048", _llama, 16, partial(tokens, 1, 2048)),
)


def kernel_table() -> str:
    """One line for each kernel and size."""
    lines = [_header("kernel | sizes")]
    for name, (work, sizes) in KERNELS.items():
        for size in sizes:
            pair: Pair = work(*size)
            shape = " x ".join(map(str, size))
            lines.append(f"| {name} | {shape} {_sides(pair.before, pair.after)}")
    return "\n".join(lines)


def model_table() -> str:
    """Two lines for each call: exact, and with Unified Norms."""
    lines = [_header("model | form")]
    for case in CASES:
        before, exact = counted(case, is_unified=False)
        _, unified = counted(case, is_unified=True)
        lines.append(f"| {case.name} | exact {_sides(before, exact)}")
        lines.append(f"| | UN {_sides(before, unified)}")
    return "\n".join(lines)


def _header(first: str) -> str:
    floors = " | ".join(f"floor on {name}, us" for name in SHOWN)
    columns = f"| {first} | MB before | MB after | GFLOP | launches before | after | {floors} |"
    return f"{columns}\n|---|---|{'--:|' * (5 + len(SHOWN))}"


def _sides(before: Work, after: Work) -> str:
    floors = " | ".join(
        f"{DEVICES[name].floor_us(before.bytes, before.flops):.1f} to "
        f"{DEVICES[name].floor_us(after.bytes, after.flops):.1f}"
        for name in SHOWN
    )
    numbers = f"{before.bytes / 1e6:.2f} | {after.bytes / 1e6:.2f} | {after.flops / 1e9:.3f}"
    return f"| {numbers} | {before.launches} | {after.launches} | {floors} |"


def counted(case: Case, *, is_unified: bool) -> tuple[Work, Work]:
    """The work of one call before and after normfx, of all layers."""
    one, two = (_layers(case, depth, is_unified=is_unified) for depth in (1, 2))
    return tuple(  # pyright: ignore[reportReturnType]
        Work(*(a + (case.layers - 1) * (b - a) for a, b in zip(first, second, strict=True)))
        for first, second in zip(one, two, strict=True)
    )


def _layers(case: Case, depth: int, *, is_unified: bool) -> list[tuple[int, int, int]]:
    """(bytes, flops, launches) of a model cut to some layers, before and after."""
    import normfx
    from normfx.cost import cost_of
    from normfx.options import Options
    from normfx.pipeline import rewrite
    from normfx.record import Journal

    torch._dynamo.reset()
    with torch.device("meta"):
        model = case.make(depth).to(torch.bfloat16).eval()
        inputs = case.inputs()
    inputs = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in inputs.items()}
    if is_unified:
        normfx.convert(model, "unified")
    found = {"recognise": [0, 0, 0], "hoist": [0, 0, 0]}

    def observe(stage: str, module: fx.GraphModule) -> None:
        if stage in found:
            cost = cost_of(_computed(module))
            for i, part in enumerate((cost.bytes, cost.flops, cost.kernels)):
                found[stage][i] += part

    def backend(gm: fx.GraphModule, given: list[Any]) -> Any:
        rewrite(gm, Options(strict=True), Journal(), inputs=given, observe=observe)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return [tuple(found["recognise"]), tuple(found["hoist"])]  # pyright: ignore


def _computed(module: fx.GraphModule) -> Iterator[fx.Node]:
    """What a call computes: not what is made of parameters alone, which is made once."""
    from normfx import graph as g

    constant = g.parameter_only(module.graph)
    return (node for node in module.graph.nodes if node not in constant)


def page() -> str:
    """The whole page."""
    devices = "\n".join(
        f"| {d.name} | {d.bandwidth / 1e12:.2f} TB/s | {d.flops / 1e12:.0f} TFLOP/s | {d.source} |"
        for d in DEVICES.values()
    )
    return HEAD.format(devices=devices, kernels=kernel_table(), models=model_table())


def main() -> None:
    """Prints or writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    text = page()
    if asked.write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
