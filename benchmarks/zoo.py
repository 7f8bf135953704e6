"""Runs normfx on a zoo of model families and writes the tables of docs/zoo.md.

    python -m benchmarks.zoo --zoo ../shared/zoo            # all families, outputs beside eager's
    python -m benchmarks.zoo --zoo ../shared/zoo --check    # each norm beside what it replaced
    python -m benchmarks.zoo --zoo ../shared/zoo --lowering inductor --families gpt2,vit

A zoo is a folder with `zoo.py` (models and inputs), `run_zoo.py` (the comparison with eager and
float64), `families.json` and `zoo_truth.json` (the norm calls that eager executes). Each family
runs in a process of its own, with `strict`, so that a stage that fails counts as a crash.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


def run_family(family: str, lowering: str, nested: bool) -> dict[str, Any]:
    """One family's row of the zoo's own comparison, with what normfx reports."""
    import torch
    from torch._inductor import config as inductor_config

    import normfx

    compare = importlib.import_module("run_zoo")
    torch._dynamo.config.nested_graph_breaks = nested
    if lowering == "inductor":  # random numbers as eager draws them
        inductor_config.fallback_random = True
    options = {"lowering": lowering, "strict": True}
    row = compare.run_family(
        family, "normfx", "normfx.reports:recognised", options=options, contract=True
    )
    row["report"] = json.loads(normfx.report().to_json())
    if row.get("contract") == "kept" and row["eager_error64"] > FAR and row["status"] == "wrong":
        row["status"] = "far"  # two roundings of a model that amplifies them
    return row


# An eager model that is this far from its own float64 run says nothing of another's distance to it.
FAR = 1e-4


def check_family(family: str) -> dict[str, Any]:
    """Each norm of a family against the region it replaced, in float64 on random inputs."""
    import torch

    from normfx import graph as g
    from normfx.check import RegionCheck
    from normfx.options import Options
    from normfx.pipeline import rewrite
    from normfx.record import Journal

    zoo = importlib.import_module("zoo")
    checks: list[RegionCheck] = []
    journals: list[Journal] = []
    found: list[tuple[str, list[str]]] = []
    refused: list[tuple[str, list[str]]] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        check, journal = RegionCheck(), Journal()
        checks.append(check)
        journals.append(journal)

        made_in: dict[str, list[str]] = {}

        def observe(stage: str, module: torch.fx.GraphModule) -> None:
            check(stage, module)
            if stage == "capture":
                made_in.update((g.module_path(n) or n.name, classes(n)) for n in module.graph.nodes)

        rewrite(gm, Options(), journal, observe=observe)
        found.extend((site.kind, made_in.get(site.name, [])) for site in journal.sites)
        refused.extend((m.code.value, made_in.get(m.name, [])) for m in journal.near_misses)
        return gm.forward

    model, inputs = zoo.build(family)
    zoo.call(torch.compile(model, backend=backend), inputs)
    results = [result for check in checks for result in check.results]
    errors = [result.error for result in results if result.error is not None]
    return {
        "status": "ok" if all(error <= EXACT for error in errors) else "wrong",
        "regions": len(results),
        "recognised": sum(len(journal.sites) for journal in journals),
        "found": found,
        "refused": refused,
        "worst": max(errors, default=0.0),
        "not run": [f"{r.kind} {r.node}: {r.reason}" for r in results if r.error is None],
    }


# Both sides of an identity in float64: a few hundred roundings of 2^-53 apart, for inputs of order
# one.
EXACT = 1e-12


# What a rule that was applied to a norm did to it.
DONE = {
    "recentre": "recentred",
    "fold-affine-into-linear": "folded",
    "fold-statistics-into-previous": "vanished",
    "fold-statistics-into-next": "vanished",
    "telescope": "vanished",
    "drop-unread": "vanished",
    "hoist": "vanished",
    "norm-of-norm": "merged",
    "defer-scale": "deferred",
}
_WHAT = tuple(dict.fromkeys(DONE.values()))


def by_kind(rows: dict[str, Any]) -> list[str]:
    """The table of norms by kind: how many, how spelled, what was done and why not."""
    calls: Counter[str] = Counter()
    spelled: Counter[str] = Counter()
    done: defaultdict[str, Counter[str]] = defaultdict(Counter)
    refused: defaultdict[str, Counter[str]] = defaultdict(Counter)
    misses: Counter[str] = Counter()
    for row in rows.values():
        for graph in row.get("report", {"graphs": []})["graphs"]:
            misses.update(miss["code"] for miss in graph["near_misses"])
            for site in graph["sites"]:
                kind = site["kind"]
                calls[kind] += 1
                spelled[kind] += site["origin"] == "algebra"
                done[kind].update({DONE[action] for action in site["actions"] if action in DONE})
                refused[kind].update(set(site["refusals"]))
    lines = [
        f"| kind | norms | spelled out | {' | '.join(_WHAT)} | refused, by code |",
        "|---|--:|--:|" + "--:|" * len(_WHAT) + "---|",
    ]
    for kind, count in calls.most_common():
        codes = ", ".join(f"{code} {n}" for code, n in refused[kind].most_common())
        counts = " | ".join(str(done[kind][what]) for what in _WHAT)
        lines.append(f"| {kind} | {count} | {spelled[kind]} | {counts} | {codes} |")
    totals = [sum(found[what] for found in done.values()) for what in _WHAT]
    counts = " | ".join(map(str, totals))
    lines.append(f"| all | {calls.total()} | {spelled.total()} | {counts} | |")
    near = ", ".join(f"{code} {n}" for code, n in misses.most_common())
    return [*lines, "", f"Near misses, by code: {near or 'none'}."]


# What an oracle that edits weights of the eager models found possible, in the order of its table:
# its name for it, and the rules that do it. What nothing reads, or what only parameters go into,
# vanishes as a whole.
_WHOLE = {"drop-unread", "hoist"}
ORACLE = {
    "LayerNorms that are RMSNorms once weights are centred": ("recentrable", {"recentre"} | _WHOLE),
    "weights and biases of norms into what follows": (
        "affine_foldable",
        {"fold-affine-into-linear"} | _WHOLE,
    ),
    "given statistics into the operator before": (
        "static_foldable_back",
        {"fold-statistics-into-previous"} | _WHOLE,
    ),
    "given statistics into the operators after": (
        "static_foldable_forward",
        {"fold-statistics-into-next", "telescope"},
    ),
}


def beside_oracle(rows: dict[str, Any], oracle: dict[str, Any]) -> list[str]:
    """The oracle's counts beside what was done, and every family in which less was.

    The oracle counts calls of a family, and does not name them: of a family in which as many were
    rewritten, all that it found count as reached.
    """
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    short: list[str] = []
    for family, row in sorted(rows.items()):
        sites = [s for graph in row.get("report", {"graphs": []})["graphs"] for s in graph["sites"]]
        for what, (name, rules) in ORACLE.items():
            able = [site for site in sites if _is_of(name, site)]
            found = [site for site in able if rules & set(site["actions"])]
            legal = [s for s in able if s not in found and _is_dear(s, rules)]
            possible, done = oracle[family][name], len(found)
            reached = min(possible, done)
            dear = min(possible - reached, len(legal))
            totals[what].update(oracle=possible, normfx=done, reached=reached, dear=dear)
            if done < possible:
                short.append(f"| {family} | {what} | {possible} | {done} | {dear} |")
    lines = [
        "| | oracle | normfx | of the oracle's, reached | legal, not worth it |",
        "|---|--:|--:|--:|--:|",
    ]
    for what, count in totals.items():
        share = f"{count['reached'] / max(count['oracle'], 1):.1%}"
        lines.append(
            f"| {what} | {count['oracle']} | {count['normfx']} | {count['reached']} ({share})"
            f" | {count['dear']} |"
        )
    head = ["| family | less of | oracle | normfx | legal, not worth it |", "|---|---|--:|--:|--:|"]
    return [*lines, "", *head, *short]


def _is_of(name: str, site: dict[str, Any]) -> bool:
    """Whether the oracle counts this norm under one of its names."""
    if name == "affine_foldable":
        return site["weight"] or site["bias"]
    if name == "recentrable":  # of a parameter, a LayerNorm is called weight standardization
        return site["kind"] == "LayerNorm" or (site["on_weight"] and site["origin"] == "layer_norm")
    return site["kind"] in ("BatchNorm", "FrozenBatchNorm")


def _is_dear(site: dict[str, Any], rules: set[str]) -> bool:
    """Whether one of the rules was refused for this norm as not worth it alone."""
    return any(r["rule"] in rules and r["code"] == "not-worth-it" for r in site["records"])


def summary(rows: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """The verdicts: right and wrong answers, the numerics contract, norms found."""
    status = Counter(row.get("status", "crashed") for row in rows.values())
    contract = Counter(row.get("contract", "not run") for row in rows.values())
    found = sum(row.get("recognised") or 0 for row in rows.values())
    visible = sum(truth[f].get("visible", truth[f]["calls"]) for f in rows)
    lines = [
        f"- {len(rows)} families: " + ", ".join(f"{n} {what}" for what, n in status.most_common()),
        "- error against float64 at most twice eager's, or two units in the last place: "
        + ", ".join(f"{what} {n}" for what, n in contract.most_common()),
        f"- norms recognised: {found}; calls of norm modules in dynamo's graphs: {visible}",
    ]
    for family, row in sorted(rows.items()):
        if row.get("status") == "far":
            far = f"{row['rel']:.0e} from eager, which is {row['eager_error64']:.0e} from float64"
            lines.append(f"- {family}: {far}; normfx is {row['error64']:.0e} from it")
        elif row.get("status") != "ok":
            why = row.get("error") or f"{row.get('contract')} in {row.get('worst')}"
            lines.append(f"- {family}: {row.get('status')}: {why.splitlines()[0][:160]}")
    return lines


def per_family(rows: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """One line a family."""
    lines = [
        "| family | norms found | module calls in graphs | graphs | error / eager's | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for family, row in sorted(rows.items()):
        calls = truth[family].get("visible", truth[family]["calls"])
        ratio = "-"
        if row.get("eager_error64"):
            ratio = f"{row['error64'] / row['eager_error64']:.2f}"
        lines.append(
            f"| {family} | {row.get('recognised')} | {calls} | {row.get('graphs')} | {ratio}"
            f" | {row.get('seconds')} |"
        )
    return lines


def classes(node: Any) -> list[str]:
    """The names of the classes of the modules that a node was made in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [getattr(held, "__name__", str(held)).split(".")[-1] for _, held in stack.values()]


def by_class(row: dict[str, Any], truth: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each class of norm modules: its calls, and the kinds and codes of what is in it."""
    table: dict[str, dict[str, Any]] = {}
    for norms in truth["norms"]:
        entry = table.setdefault(
            norms["class"], {"calls": 0, "found": Counter(), "refused": Counter()}
        )
        entry["calls"] += norms["calls"]
    for what in ("found", "refused"):
        for name, stack in row.get(what, ()):
            held = next((c for c in reversed(stack) if c in table), None)
            if held is not None:
                table[held][what][name] += 1
    return table


def missed(rows: dict[str, Any], truth: dict[str, Any]) -> dict[str, int]:
    """How many calls of norm modules were neither recognised nor refused, where there are any.

    Counted for each class of modules, so that a norm of another class cannot stand in for one. A
    graph break can leave a call out of dynamo's graphs; those are not there to be found.
    """
    left = {}
    for family, row in rows.items():
        short = sum(
            max(entry["calls"] - entry["found"].total() - entry["refused"].total(), 0)
            for entry in by_class(row, truth[family]).values()
        )
        left[family] = short - truth[family]["calls"] + truth[family]["visible"]
    return {family: count for family, count in left.items() if count > 0}


def recognition(rows: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """The table by kind: calls of norm modules, recognised, refused by code; then all others."""
    calls: Counter[str] = Counter()
    recognised: Counter[str] = Counter()
    refused: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for family, row in rows.items():
        for name, entry in by_class(row, truth[family]).items():
            # A module may hold more norms than one, so it counts once for each of its calls.
            kind = entry["found"].most_common(1)[0][0] if entry["found"] else f"none: {name}"
            calls[kind] += entry["calls"]
            recognised[kind] += min(entry["found"].total(), entry["calls"])
            short = max(entry["calls"] - entry["found"].total(), 0)
            refused[kind] += Counter(dict(_first(entry["refused"], short)))
    lines = ["| kind | calls | recognised | refused, by code |", "|---|--:|--:|---|"]
    for kind, count in calls.most_common():
        codes = ", ".join(f"{code} {n}" for code, n in refused[kind].most_common())
        lines.append(f"| {kind} | {count} | {recognised[kind]} | {codes} |")
    lines.append(f"| all | {calls.total()} | {recognised.total()} | |")
    sites = Counter(kind for row in rows.values() for kind, _ in row.get("found", ()))
    near = Counter(code for row in rows.values() for code, _ in row.get("refused", ()))
    return [
        *lines,
        "",
        "Every norm found, in modules or not: " + _listed(sites) + ".",
        "",
        "Near misses, norms or not: " + (_listed(near) or "none") + ".",
    ]


def _first(codes: Counter[str], count: int) -> list[tuple[str, int]]:
    """So many of the codes, the usual ones first."""
    return list(Counter(list(codes.elements())[:count]).items())


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counted.most_common())


def print_checks(rows: dict[str, Any], truth: dict[str, Any]) -> None:
    """What came of `--check`."""
    for family, row in sorted(rows.items()):
        if row.get("status") != "ok" or row.get("not run"):
            print(f"{family}: {row.get('error') or row.get('worst')} {row.get('not run', '')}")
    regions = sum(row.get("regions", 0) for row in rows.values())
    missing = sum(len(row.get("not run", ())) for row in rows.values())
    worst = max(row.get("worst", 0.0) for row in rows.values())
    print("\n".join(recognition(rows, truth)))
    print(f"{regions} norms, {missing} not run, largest relative difference {worst:.1e}")
    print(f"norm calls neither recognised nor refused: {missed(rows, truth) or 'none'}")


def main() -> None:
    """Runs the families and prints the tables; exit status 1 if one is wrong or crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--families", help="names, with commas between; all by default")
    parser.add_argument("--lowering", default="eager", choices=("eager", "inductor"))
    parser.add_argument(
        "--nested-graph-breaks",
        action="store_true",
        help="dynamo's option: what breaks in a function that a module calls ends no graph before",
    )
    parser.add_argument("--check", action="store_true", help="compare each norm with its region")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    parser.add_argument("--page", type=Path, help="write the tables here, as Markdown")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.zoo.resolve()))
    workers, compare = importlib.import_module("workers"), importlib.import_module("run_zoo")
    truth = json.loads((asked.zoo / "zoo_truth.json").read_text())
    families = asked.families.split(",") if asked.families else list(truth)
    compare.warm_up()
    run = (
        check_family
        if asked.check
        else functools.partial(
            run_family, lowering=asked.lowering, nested=asked.nested_graph_breaks
        )
    )
    rows = workers.run_all(
        run,
        families,
        jobs=asked.jobs,
        timeout=asked.timeout,
        progress=lambda family, row: print(
            f"{row.get('status', 'crashed'):8} {family}", flush=True
        ),
    )
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1))
    if asked.check:
        print_checks(rows, truth)
        broken = any(row.get("status") != "ok" for row in rows.values())
        sys.exit(broken or bool(missed(rows, truth)))
    from benchmarks.machine import machine

    oracle = json.loads((asked.zoo / "zoo_oracle.json").read_text())
    parts = (
        summary(rows, truth),
        by_kind(rows),
        beside_oracle(rows, oracle),
        per_family(rows, truth),
    )
    page = [*(line for part in parts for line in (*part, "")), machine()]
    text = "\n".join(page)
    print(text)
    if asked.page:
        asked.page.write_text(text + "\n")
    sys.exit(any(row.get("status") not in ("ok", "far") for row in rows.values()))


if __name__ == "__main__":
    main()
