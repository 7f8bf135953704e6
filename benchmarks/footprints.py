"""What every kernel takes on every target: registers, spilled bytes, shared memory. Needs no GPU.

    python -m benchmarks.footprints                       # compile all, write the golden table
    python -m benchmarks.footprints --check               # compile all, exit 1 where it differs
    python -m benchmarks.footprints --check --sample      # one configuration of each kernel

The golden table is tests/kernels/footprints.json; a change of Triton or of a kernel that moves a
number beyond its tolerance needs a look at the difference of that file. It takes some twenty
minutes of processor time; --kernels NAME,... compiles a part and keeps the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "footprints.json"

# Another ptxas or LLVM schedules otherwise: a quarter more registers may still be the same code.
REGISTERS_TOLERANCE = 0.25
# Shared memory is laid out by Triton from the tiles: it moves in whole buffers where it moves.
SHARED_TOLERANCE = 0.25
SHARED_SLACK_BYTES = 1024

# The configurations of the sample, of the widths of GPT-2 and Llama-3-8B: what most calls run.
SAMPLE = {
    "row_norm": "forward_persistent layer-norm 768",
    "add_row_norm": "forward_persistent rms-norm 4096",
    "row_norm_quantised": "forward_persistent rms-norm 4096 int8",
    "add_row_norm_quantised": "forward_persistent rms-norm 4096 int8",
    "add_row_scale": "forward_persistent rms-norm 4096",
    "row_norm_backward": "backward_persistent layer-norm 768",
    "norm_linear": "linear_with_norm rms-norm bfloat16 decode",
    "channel_moments": "channel_moments tokens, 1 region",
    "channel_sums": "channel_sums tokens",
    "channel_affine": "channel_affine tokens, forward",
}


def footprints(only: set[str], sample: bool) -> Iterator[tuple[str, str, str, list[int]]]:
    """(kernel, configuration, target, [registers, spills, shared bytes]) of what is asked for."""
    from normfx.kernels import kernels
    from normfx.kernels.offline import build

    for kernel in kernels():
        if only and kernel.name not in only:
            continue
        for what in kernel.builds():
            if sample and what.label != SAMPLE[kernel.name]:
                continue
            for target in what.targets:
                found = build(what, target)
                yield (
                    kernel.name,
                    what.label,
                    target,
                    [found.registers, found.spills, found.shared_bytes],
                )


def difference(name: str, found: list[int], known: list[int] | None) -> str:
    """What is wrong with a footprint beside the golden one, or ""."""
    if found[1]:
        return f"{name}: spills {found[1]} bytes"
    if known is None:
        return f"{name}: not in the table; run python -m benchmarks.footprints"
    if abs(found[0] - known[0]) > REGISTERS_TOLERANCE * known[0]:
        return f"{name}: {found[0]} registers, {known[0]} in the table"
    if abs(found[2] - known[2]) > SHARED_TOLERANCE * known[2] + SHARED_SLACK_BYTES:
        return f"{name}: {found[2]} bytes of shared memory, {known[2]} in the table"
    return ""


def written(table: dict[str, Any]) -> str:
    """The golden table as text: one configuration a line, so that a difference can be read."""
    kernels = []
    for name, rows in table["kernels"].items():
        lines = (f"      {json.dumps(row)}: {json.dumps(found)}" for row, found in rows.items())
        kernels.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }")
    body = ",\n".join(kernels)
    return (
        f'{{\n  "triton": {json.dumps(table["triton"])},\n  "columns": '
        f'{json.dumps(table["columns"])},\n  "kernels": {{\n{body}\n  }}\n}}\n'
    )


def main() -> None:
    """Compiles, and writes or checks the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--kernels", default="")
    asked = parser.parse_args()
    import triton

    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"kernels": {}}
    only = {name for name in asked.kernels.split(",") if name}
    known, table = golden["kernels"], {}
    wrong = []
    for kernel, label, target, found in footprints(only, asked.sample):
        name = f"{kernel}: {label}, {target}"
        print(f"{name}: {found[0]} registers, {found[1]} spills, {found[2]} bytes", flush=True)
        table.setdefault(kernel, {}).setdefault(label, {})[target] = found
        wrong.append(difference(name, found, known.get(kernel, {}).get(label, {}).get(target)))
    if not asked.check:
        kept = {} if not only and not asked.sample else known
        columns = ["registers", "spilled bytes", "shared bytes"]
        made = {"triton": triton.__version__, "columns": columns, "kernels": {**kept, **table}}
        GOLDEN.write_text(written(made))
        wrong = [line for line in wrong if "spills" in line]
    wrong = [line for line in wrong if line]
    print("\n".join(wrong) or "all as in the table, nothing spilled")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
