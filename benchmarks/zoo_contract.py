"""The numerics contract over the zoo, in any dtype: outputs, or the gradients of all parameters.

    python -m benchmarks.zoo_contract --zoo ../shared/zoo --dtype bfloat16
    python -m benchmarks.zoo_contract --zoo ../shared/zoo --dtype float16 --gradients
    python -m benchmarks.zoo_contract --zoo ../shared/zoo --families clipseg --draws 20

    || got - exact ||  <=  max(2 || eager - exact ||, one unit in the last place)

for each output or gradient, where `exact` is a run of the very same weights and inputs in float64,
in which casts to float32 (the statistics of a norm, a router) are casts to float64 as well. With
`--gradients` every rule that may run under them does, `recentre` too, and BatchNorms take the
statistics of the batch.

Where a family leaves the contract on the inputs of the zoo, it is run on others (`--draws`), and so
is a control: eager with every weight moved by half a unit in its last place at random. If the
model amplifies rounding (a router flips, a maximum moves to another place), the control leaves the
contract as well. It is `amplified` where the median over the draws is at most that of the control,
or eager's own error; else it is `broken`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import statistics
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
FACTOR = 2.0


class _InFloat64(TorchFunctionMode):
    """Every floating dtype that an operator is asked for is float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        args, kwargs = pytree.tree_map(
            lambda leaf: torch.float64 if leaf in _NARROW else leaf,
            (args, kwargs or {}),
            is_leaf=lambda leaf: isinstance(leaf, (Tensor, torch.dtype)),
        )
        return func(*args, **kwargs)


Tensors = dict[str, Tensor]


def run(model: Any, inputs: dict[str, Any], *, gradients: bool, owner: nn.Module) -> Tensors:
    """The outputs of a call under a fixed seed, or the gradients of all parameters."""
    zoo = importlib.import_module("zoo")
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        found = zoo.float_tensors(model(**copies))
    if not gradients:
        return found
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(found.values()):
        if output.requires_grad:  # a plain sum of a LayerNorm would be constant
            generator = torch.Generator().manual_seed(index)
            probe = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output.double() * probe).sum()
    total.backward()
    return {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}


def exact_run(model: nn.Module, inputs: dict[str, Any], *, gradients: bool) -> Tensors:
    """The same of the model in float64."""
    wide, given = importlib.import_module("run_zoo").cast(
        copy.deepcopy(model), inputs, torch.float64
    )
    if hasattr(wide, "set_experts_implementation"):  # the others have no float64 kernels
        wide.set_experts_implementation("eager")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            return run(wide, given, gradients=gradients, owner=wide)
    finally:
        torch.set_default_dtype(default)


def ratios(
    got: Tensors, eager: Tensors, exact: Tensors, *, gradients: bool
) -> dict[str, tuple[float, float, float]]:
    """For each tensor: its error, eager's, and one unit in the last place, as 2-norms.

    Of gradients that unit is relative to the largest of the model: what is in front of a norm has a
    true gradient of zero, and what eager leaves there is rounding of the size of the others.
    """
    found = {}
    largest = max((float(t.abs().max()) for t in exact.values() if t.numel()), default=0.0)
    for name, truth in exact.items():
        mine, theirs = got[name], eager[name]
        usable = torch.isfinite(theirs) & torch.isfinite(truth)
        if not torch.equal(torch.isfinite(mine), torch.isfinite(theirs)):
            mine, usable = torch.full_like(mine, torch.inf), torch.ones_like(usable)
        error, eagers = (float((t.double() - truth)[usable].norm()) for t in (mine, theirs))
        size = largest * truth.numel() ** 0.5 if gradients else float(truth[usable].norm())
        found[name] = (error, eagers, torch.finfo(theirs.dtype).eps * size)
    return found


def is_kept(error: float, eagers: float, unit: float) -> bool:
    """Whether an error is within the contract."""
    return error <= max(FACTOR * eagers, unit)


def drawn(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Other inputs of the same kind: other numbers, other tokens of the same text."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(inputs)
    for name, given in inputs.items():
        if not isinstance(given, Tensor):
            continue
        if given.is_floating_point() and given.numel() > 1 and float(given.float().std()) > 0:
            noise = torch.randn(given.shape, generator=generator)
            made[name] = (given.float().mean() + given.float().std() * noise).to(given.dtype)
        elif name.endswith("input_ids"):
            order = torch.randperm(given.shape[-1], generator=generator)
            made[name] = given[..., order]
    return made


@torch.no_grad()
def moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy with every weight half a unit in the last place away, up or down."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            up = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            step = up * (torch.finfo(parameter.dtype).eps / 2)
            parameter.copy_((parameter.double() * (1 + step)).to(parameter.dtype))
    return other


def run_family(
    family: str, *, dtype: str, gradients: bool, lowering: str, draws: int
) -> dict[str, Any]:
    """One family's row."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    zoo, compare = importlib.import_module("zoo"), importlib.import_module("run_zoo")
    from normfx.passes import RULES

    model, inputs = compare.cast(*zoo.build(family), getattr(torch, dtype))
    options: dict[str, Any] = {"lowering": lowering, "strict": True}
    if gradients:
        options["rules"] = [rule for rule in RULES if rule != "compress"]
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    row: dict[str, Any] = {"draws": []}
    for draw in range(draws + 1):
        given = inputs if draw == 0 else drawn(inputs, draw)
        row["draws"].append(_one(model, given, options, gradients=gradients, draw=draw))
        if draw == 0:
            if "error" in row["draws"][0]:
                return {"status": "not run", "error": row["draws"].pop()["error"]}
            if row["draws"][0]["kept"]:
                return {"status": "kept", **row}
    ours, control = ([d[key] for d in row["draws"]] for key in ("ratio", "control"))
    row["median"], row["control"] = statistics.median(ours), statistics.median(control)
    row["control_kept"] = all(d["control_kept"] for d in row["draws"])
    alike = row["median"] <= max(row["control"], 1.0)
    row["status"] = "amplified" if alike else "broken"
    return row


def _one(
    model: nn.Module, inputs: dict[str, Any], options: dict[str, Any], *, gradients: bool, draw: int
) -> dict[str, Any]:
    """One draw: the worst tensor, as a ratio to eager's error, and the same of the control."""

    def called(owner: nn.Module, compiled: bool = False) -> Tensors:
        target = (
            torch.compile(owner, backend="normfx", options=options, dynamic=False)
            if compiled
            else owner
        )
        return run(target, inputs, gradients=gradients, owner=owner)

    torch._dynamo.reset()
    try:
        exact = exact_run(model, inputs, gradients=gradients)
        eager = called(copy.deepcopy(model))
    except Exception as error:
        return {"error": f"eager: {type(error).__name__}: {error}"[:300]}
    rows = ratios(called(copy.deepcopy(model), compiled=True), eager, exact, gradients=gradients)
    other = ratios(called(moved(model, draw)), eager, exact, gradients=gradients)
    worst = max(rows, key=lambda name: _ratio(rows[name]))
    return {
        "kept": all(is_kept(*numbers) for numbers in rows.values()),
        "control_kept": all(is_kept(*numbers) for numbers in other.values()),
        "worst": worst,
        "ratio": _ratio(rows[worst]),
        "control": max(_ratio(numbers) for numbers in other.values()),
        "broken": sum(not is_kept(*numbers) for numbers in rows.values()),
        "tensors": len(rows),
    }


def _ratio(numbers: tuple[float, float, float]) -> float:
    """An error to what it is held to, twice over: two is the limit, or one unit alone."""
    error, eagers, unit = numbers
    allowed = max(eagers, unit / FACTOR)
    return error / allowed if allowed else float(error > 0) * torch.inf


def table(rows: dict[str, Any]) -> list[str]:
    """The verdicts, and a line for each family that left the contract on any draw."""
    status = Counter(row.get("status", "crashed") for row in rows.values())
    first = [row["draws"][0] for row in rows.values() if row.get("draws")]
    tensors, median = sum(d["tensors"] for d in first), statistics.median(d["ratio"] for d in first)
    lines = [
        f"- {len(rows)} families: " + ", ".join(f"{what} {n}" for what, n in status.most_common()),
        f"- {tensors} tensors; the worst of each family is {median:.2f} times eager's error in the"
        " median",
        "",
        "| family | out of contract | draws out | worst / eager's | median | control | verdict |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for family, row in sorted(rows.items()):
        if row.get("status") == "kept":
            continue
        if not row.get("draws"):
            lines.append(f"| {family} | - | - | - | - | - | {row.get('error', 'crashed')[:120]} |")
            continue
        out = sum(not d["kept"] for d in row["draws"])
        worst = max(d["ratio"] for d in row["draws"])
        first_draw = row["draws"][0]
        lines.append(
            f"| {family} | {first_draw['broken']} of {first_draw['tensors']},"
            f" {first_draw['worst']} | {out} of {len(row['draws'])} | {worst:.2f}"
            f" | {row['median']:.2f} | {row['control']:.2f} | {row['status']} |"
        )
    return lines


def main() -> None:
    """Runs the families and prints the table; exit status 1 if one is broken or crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--families", help="names, with commas between; all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--gradients", action="store_true", help="of all parameters, not outputs")
    parser.add_argument("--lowering", default="eager", choices=("eager", "inductor"))
    parser.add_argument("--draws", type=int, default=8, help="other inputs, where it is left")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each family")
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.zoo.resolve()))
    workers, compare = importlib.import_module("workers"), importlib.import_module("run_zoo")
    from benchmarks.machine import machine

    compare.warm_up()
    known = json.loads((asked.zoo / "zoo_truth.json").read_text())
    rows = workers.run_all(
        functools.partial(
            run_family,
            dtype=asked.dtype,
            gradients=asked.gradients,
            lowering=asked.lowering,
            draws=asked.draws,
        ),
        asked.families.split(",") if asked.families else list(known),
        jobs=asked.jobs,
        timeout=asked.timeout,
        progress=lambda family, row: print(
            f"{row.get('status', 'crashed'):9} {family}", file=sys.stderr, flush=True
        ),
    )
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1))
    print("\n".join([*table(rows), "", machine()]))
    sys.exit(any(row.get("status") not in ("kept", "amplified") for row in rows.values()))


if __name__ == "__main__":
    main()
