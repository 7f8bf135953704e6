"""The kernels and whole models on this machine's GPU, in one command.

    python -m benchmarks.gpu                          # within 8 minutes; the table comes last
    python -m benchmarks.gpu --minutes 60             # more of the models, and max-autotune
    python -m benchmarks.gpu --only models            # one section: see the list below
    python -m benchmarks.gpu --dry-run                # tiny sizes on a CPU: that it runs

Sections: correctness (kernels against float64), bandwidth (norms, beside the device's own copy,
Inductor, Liger and quack where they are installed), products (a norm and the linear behind it),
models, training, autotuned (models again, with Inductor's max-autotune). A row that fails says why
and the rest goes on; what the clock leaves out is named. `x best` is the ratio to the fastest of
the same case, `x floor` to what the data sheet of the device allows (docs/roofline.md).

To keep a result: commit the JSON and the printed table as docs/benchmarks/DEVICE.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import warnings
from typing import Any

import torch

from benchmarks.devices import DEVICES, device_of
from benchmarks.gpu import networks, operators
from benchmarks.gpu.rows import Table
from benchmarks.gpu.timing import Bench

SECTIONS = ("correctness", "bandwidth", "products", "models", "training", "autotuned")
# Of the whole time, at most. Compiling whole models is what takes long.
SHARES = {
    "correctness": 0.12,
    "bandwidth": 0.18,
    "products": 0.15,
    "models": 0.45,
    "training": 0.25,
    "autotuned": 1.0,
}
# More than the second-level cache of an H200 (50 MiB) or of a B200 (126 MiB).
COLD_BYTES = 256 * 2**20
PACKAGES = ("torch", "triton", "transformers", "normfx", "liger-kernel", "quack-kernels")


def facts(device: str) -> dict[str, Any]:
    """What a number must carry: the device and the versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": "CPU, tiny sizes"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        seen = torch.cuda.get_device_properties(0)
        found |= {
            "device": seen.name,
            "multiprocessors": seen.multi_processor_count,
            "memory_bytes": seen.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    """Version, power limit and clock, where the tool of the driver is there."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main() -> None:
    """Runs the sections and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--json", default="gpu.json")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    device = "cpu" if asked.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run runs tiny sizes on the CPU")
    warnings.simplefilter("ignore")  # of libraries that are only compared with
    # one function is compiled for many shapes, each for itself
    torch._dynamo.config.recompile_limit = 10000
    torch._dynamo.config.accumulated_recompile_limit = 100000
    table = Table(60 * asked.minutes)
    known = facts(device)
    print(json.dumps(known, indent=2), flush=True)
    for section in asked.only or SECTIONS:
        with table.part(section, 60 * asked.minutes * SHARES[section]):
            run(section, table, device, dry=asked.dry_run)
    with open(asked.json, "w") as file:
        json.dump({"facts": known, "rows": table.as_json()}, file, indent=1)
    print(f"\n{json.dumps(known)}\n{table.text()}")


def run(section: str, table: Table, device: str, *, dry: bool) -> None:
    """One section."""
    sizes = operators.TINY if dry else operators.FULL
    chosen = networks.TINY if dry else networks.FULL
    # on a CPU some peak, so that floors are computed; what they say there means nothing
    peak = device_of(torch.cuda.get_device_name()) if device == "cuda" else DEVICES["H200"]
    cold = Bench(device, seconds=0.01 if dry else 0.3, cold=0 if dry else COLD_BYTES)
    warm = Bench(device, seconds=0.01 if dry else 1.5)

    def compiled(function: Any, *, backend: str = "inductor", mode: str | None = None) -> Any:
        torch._dynamo.reset()
        if not dry:
            return torch.compile(function, backend=backend, mode=mode, dynamic=False)
        options = {"lowering": "eager", "strict": True} if backend == "normfx" else None
        backend = "normfx" if backend == "normfx" else "eager"
        return torch.compile(function, backend=backend, options=options, dynamic=False)

    if section == "correctness":
        operators.correctness(table, device, sizes)
    elif section == "bandwidth":
        operators.bandwidth(table, cold, sizes, peak, compiled)
    elif section == "products":
        operators.products(table, cold, sizes, peak, compiled)
    elif section == "training":
        networks.training(table, warm, chosen, compiled)
    else:
        candidates = networks.FIRST if section == "models" else networks.LAST
        chosen = chosen[:1] if dry and section == "autotuned" else chosen
        networks.models(table, warm, peak, chosen, candidates, compiled)


if __name__ == "__main__":
    main()
