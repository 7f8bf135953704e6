"""What folded and hoisted weights take in memory: what the report says, and what a process holds.

    python -m benchmarks.folded_memory

Linux only. The rewritten graph runs without Inductor, with and without rules, and after `bake_`,
each in a process of its own; the differences are the folded weights and what their computation
needs for a moment.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys

import torch

import normfx
from benchmarks.machine import machine
from benchmarks.models import WORKLOADS, load

MIB = 2**20


def _status(field: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at most since the last reset."""
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])


def held_and_peak(name: str, rules: list[str] | None, *, baked: bool) -> dict[str, int]:
    """Resident bytes after two calls, and at most during them; what the report says."""
    workload = load(name)
    if baked:
        normfx.bake_(workload.model)(**workload.inputs)
        normfx.reset()
    options = {"lowering": "eager", "strict": True, "rules": rules}
    compiled = torch.compile(workload.model, backend="normfx", options=options)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    for _ in range(2):
        compiled(**workload.inputs)
    peak = _status("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to Linux
    reported = sum(graph.folded_bytes for graph in normfx.report().graphs)
    parameters = sum(p.numel() * p.element_size() for p in workload.model.parameters())
    return {
        "held": _status("VmRSS"),
        "peak": peak,
        "reported": reported,
        "parameters": parameters,
    }


def main() -> None:
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=";".join(WORKLOADS), help="with semicolons between")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--no-rules", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--baked", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        torch.set_num_threads(1)
        with torch.no_grad():
            rules = [] if asked.no_rules else None
            print(json.dumps(held_and_peak(asked.one, rules, baked=asked.baked)))
        return
    print(machine())
    print(
        "| model | parameters, MiB | folded, as reported | held more | at most more "
        "| baked: folded | held more |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in asked.models.split(";"):
        command = [sys.executable, "-m", "benchmarks.folded_memory", "--one", name]
        with_rules, without, baked = (
            json.loads(
                subprocess.run(
                    [*command, *further], check=True, stdout=subprocess.PIPE, text=True
                ).stdout.splitlines()[-1]
            )
            for further in ([], ["--no-rules"], ["--baked"])
        )
        cells = [with_rules["parameters"], with_rules["reported"]]
        cells += [with_rules[what] - without[what] for what in ("held", "peak")]
        cells += [baked["reported"], baked["held"] - without["held"]]
        print(f"| {name} | " + " | ".join(f"{n / MIB:.1f}" for n in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
