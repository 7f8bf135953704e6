"""Which norms of a trained sentence encoder can become constants, and what that costs.

    python examples/calibrate_sentences.py
    python examples/calibrate_sentences.py --save statistics.safetensors --plot damage.svg

Half of the sentences of `sentences.txt` calibrate MiniLM; the other half measures the damage of
each static norm, and of the largest sets of them that keep a mean cosine of 0.999 and of 0.99. Then
the model is compiled with the larger set, and its embeddings are compared with the model's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from workloads import WORKLOADS

import normfx

BUDGETS = (0.999, 0.99)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", metavar="PATH", help="write the statistics to this file")
    parser.add_argument(
        "--plot", metavar="PATH", help="plot damage against saved bytes (.png, .svg)"
    )
    parser.add_argument("--form", choices=("fitted", "unified"), default="fitted")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit status: 0 if the compiled model does what was measured."""
    options = parse_arguments(arguments)
    start = time.perf_counter()
    workload = WORKLOADS["minilm"]()
    calibration, held_out = list(workload.batches[0::2]), list(workload.batches[1::2])
    statistics = normfx.calibrate(
        workload.model, calibration, mask="attention_mask", form=options.form
    )
    print(statistics)
    print()
    found = normfx.sensitivity(workload.model, held_out, statistics)
    print(found)
    print()
    for least in BUDGETS:
        choice = found.choose(1 - least)
        print(
            f"cosine >= {least}: {len(choice.sites)} of {len(found.rows)} sites, together "
            f"{choice.damage.cosine:.5f} (worst sentence {choice.damage.worst:.5f})"
        )
    statistics = statistics.using(choice.sites)
    if options.save:
        statistics.save(options.save)
    if options.plot:
        found.plot(options.plot)

    # The rewritten graph as it is, without the seconds that Inductor takes.
    settings = {"statistics": statistics, "lowering": "eager", "strict": True}
    fast = torch.compile(workload.model, backend="normfx", options=settings)
    with torch.no_grad():
        pairs = [(fast(**batch), workload.model(**batch)) for batch in held_out]
    cosine = torch.cat([torch.cosine_similarity(a, b) for a, b in pairs]).mean().item()
    agrees = abs(cosine - choice.damage.cosine) <= 1e-5
    print(f"compiled with these: {cosine:.5f}, {'as' if agrees else 'NOT as'} measured")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
