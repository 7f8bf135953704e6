"""What normfx adds to the time that Inductor takes to compile, for GPT-2 of several depths.

    python -m benchmarks.compile_time --layers 6,12,24,48 --inductor-layers 12

Both are measured in this process on the same graph: seconds of every normfx stage, and seconds of
Inductor on the rewritten graph with its caches off. Inductor is only asked at the depths of
`--inductor-layers`, since it takes minutes for deep models. Each depth runs in a process of its
own, so that none profits from another's caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch


def measure(layers: int, *, with_inductor: bool) -> dict[str, float]:
    """Seconds of each stage (and of Inductor) for one GPT-2 of this depth."""
    from time import perf_counter

    from transformers import GPT2Config, GPT2Model

    from normfx.options import Options
    from normfx.pipeline import rewrite
    from normfx.record import Journal
    from normfx.torch_internals import compile_with_inductor, fakes_for_aot

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=layers, use_cache=False)).eval()
    ids = torch.randint(0, 1000, (1, 64))
    row: dict[str, float] = {"layers": layers}

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        journal = Journal()
        rewritten = rewrite(gm, Options(), journal)
        row.update(nodes=journal.nodes, norms=len(journal.sites))
        row.update({f"{name}_ms": 1e3 * seconds for name, seconds in journal.stages.items()})
        row["normfx_s"] = sum(journal.stages.values())
        if with_inductor:
            start = perf_counter()
            hoisted = rewritten.hoisted.values if rewritten.hoisted is not None else ()
            given = [*inputs, *fakes_for_aot(hoisted)]
            compile_with_inductor(rewritten.module, given, {"fx_graph_cache": False})
            row["inductor_s"] = perf_counter() - start
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(ids)
    return row


def main() -> None:
    """Measures every depth and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", default="6,12,24,48")
    parser.add_argument("--inductor-layers", default="12")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with_inductor = {int(n) for n in asked.inductor_layers.split(",") if n}
    if asked.one:
        print(json.dumps(measure(asked.one, with_inductor=asked.one in with_inductor)))
        return
    from benchmarks.machine import machine

    print(machine())
    print("layers  nodes  norms  capture  recognise   rewrite    fold   hoist   lower", end="")
    print("  normfx  ms/layer  inductor  share")
    for layers in map(int, asked.layers.split(",")):
        command = [sys.executable, "-m", "benchmarks.compile_time", "--one", str(layers)]
        command += ["--inductor-layers", asked.inductor_layers]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        stages = "  ".join(
            f"{row[f'{stage}_ms']:{width}.0f}"
            for stage, width in (
                ("capture", 7),
                ("recognise", 9),
                ("rewrite", 8),
                ("fold", 6),
                ("hoist", 6),
                ("lower", 6),
            )
        )
        inductor = row.get("inductor_s")
        share = "-" if inductor is None else f"{row['normfx_s'] / inductor:.1%}"
        shown = "-" if inductor is None else f"{inductor:.1f} s"
        print(
            f"{layers:6d}  {row['nodes']:5.0f}  {row['norms']:5.0f}  {stages}"
            f"  {row['normfx_s']:5.2f}s"
            f"  {1e3 * row['normfx_s'] / layers:8.1f}  {shown:>8}  {share:>5}"
        )


if __name__ == "__main__":
    main()
