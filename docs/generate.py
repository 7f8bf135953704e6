"""Writes docs/rules.md, docs/options.md and the table of docs/kernels.md from the code.

`python docs/generate.py` writes the pages. With `--check` it changes nothing, and its exit status
is 1 if a page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from normfx.kernels import kernels
from normfx.options import Options
from normfx.passes import RULES, Exactness
from normfx.record import REFUSALS, Refusal

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "normfx"
NOTICE = "<!-- Written by docs/generate.py. Change the code, then run `make docs`. -->"

# The files that recognition is made of; every other file of normfx/passes is named as its stage.
RECOGNITION = frozenset(
    {
        "affine",
        "composites",
        "facts",
        "materialise",
        "present",
        "recognise",
        "shared",
        "spelled",
        "static",
    }
)

RULES_PAGE = """\
# Rules and refusals

{notice}

## Rules

In the order in which they run. The option `rules` chooses among them; see [options](options.md).
What each rule promises about rounding is in [numerics](numerics.md).

{rules}

{classes}

`tests/test_proofs.py` checks the identities with a computer algebra system. What is proved in full,
with its conditions, stands at the head of each rule's file in `normfx/passes`.

Recognition is no rule: it always runs. The report names it `recognise-OPERATOR`, where the
operator is ATen's, or `recognise-algebra` for a norm that is spelled out.

## Refusals

A refusal is not an error. The graph keeps its meaning; what was refused stays as it was. A report
shows the code, and the table below says what it means.

The stage is where the code is given.

{refusals}
"""

OPTIONS_PAGE = """\
# Options

{notice}

Options are passed to `torch.compile` or to `normfx.explain`:

```python
import torch

import normfx

model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
options = {{"lowering": "eager", "strict": True}}
fast = torch.compile(model, backend="normfx", options=options)
report = normfx.explain(model, options=options)
```

{options}

An unknown name, or a value of the wrong type, raises `normfx.OptionError`. The error names the
nearest known name. Out of a compiled call it arrives wrapped in an exception of dynamo's.

`mode=` and `dynamic=` are arguments of `torch.compile` itself. They work as with Inductor:
`mode="reduce-overhead"` and the others reach Inductor, and so does the option `inductor`, which
wins where both set the same switch.
"""


def rules_page() -> str:
    """The text of docs/rules.md."""
    stages = refusing_stages()
    rules = table(
        ("rule", "what it does", "identity", "source", "class"),
        [
            (f"`{name}`", rule.effect, f"`{rule.identity}`", rule.source, rule.exactness.name)
            for name, rule in RULES.items()
        ],
    )
    classes = table(
        ("class", "promise"), [(exactness.name, exactness.value) for exactness in Exactness]
    )
    refusals = table(
        ("code", "stage", "meaning", "what to do"),
        [
            (
                f"`{code.value}`",
                ", ".join(sorted(stages[code.name])),
                REFUSALS[code].meaning,
                REFUSALS[code].hint,
            )
            for code in Refusal
        ],
    )
    return RULES_PAGE.format(notice=NOTICE, rules=rules, classes=classes, refusals=refusals)


def refusing_stages() -> dict[str, set[str]]:
    """The stages whose files name a refusal, by the member's name."""
    found: dict[str, set[str]] = {}
    folders = (PACKAGE / "passes", PACKAGE / "calibration", PACKAGE / "conversion")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    for path in (PACKAGE / "pipeline.py", PACKAGE / "bake" / "plan.py", *files):
        stage = "recognise" if path.stem in RECOGNITION else path.stem
        if path.stem == "readers":  # whom the rules of `fold` ask
            stage = "fold"
        if path.parent.name == "bake":
            stage = "bake"
        if path.parent.name == "conversion":
            stage = "convert"
        if path.parent.name == "calibration":  # what the rule asks of a site
            stage = "calibrated"
        if stage in ("pipeline", "verdict"):  # the reasons of all rules
            stage = "fold"
        for name in re.findall(r"\bRefusal\.([A-Z_]+)\b", path.read_text(encoding="utf-8")):
            found.setdefault(name, set()).add(stage)
    return found


def options_page() -> str:
    """The text of docs/options.md."""
    effects = attributes(Options.__doc__ or "")
    hints = get_type_hints(Options)
    rows = [
        (f"`{f.name}`", shown_type(hints[f.name]), f"`{shown_default(f)}`", effects[f.name])
        for f in fields(Options)
    ]
    shown = table(("option", "type", "default", "effect"), rows)
    return OPTIONS_PAGE.format(notice=NOTICE, options=shown)


def attributes(docstring: str) -> dict[str, str]:
    """The Attributes section of a Google docstring: name to text, each on one line."""
    section = docstring.partition("Attributes:")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r" {8}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2].strip()
        elif name and line.startswith(" " * 12):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return {name: text[:1].upper() + text[1:] for name, text in found.items()}


def shown_type(hint: Any) -> str:
    """A type as a person would write it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(shown_type, arguments))
    if origin is tuple:
        return f"list of {shown_type(arguments[0])}"
    if hint is type(None):
        return "`None`"
    return f"`{(origin or hint).__name__.lower()}`"


def shown_default(field: Field[Any]) -> str:
    """A default as source text."""
    if field.default is not MISSING:
        return f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
    assert field.default_factory is not MISSING
    return repr(field.default_factory())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# The table between these lines of docs/kernels.md is written here, the rest of it by hand.
TABLE_OF_KERNELS = ("<!-- kernels: written by `make docs` -->", "<!-- end of kernels -->")


def kernels_page() -> str:
    """The text of docs/kernels.md. Without Triton there are no kernels, and it is left as it is."""
    path = DOCS / "kernels.md"
    first, last = TABLE_OF_KERNELS
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{first}\n{last}\n"
    rows = [(f"`{kernel.name}`", kernel.computes, kernel.limits) for kernel in kernels()]
    if not rows:
        return text
    before, _, rest = text.partition(first)
    after = rest.partition(last)[2]
    shown = table(("operator", "computes", "takes"), rows)
    return f"{before}{first}\n\n{shown}\n\n{last}{after}"


PAGES = {"kernels.md": kernels_page, "rules.md": rules_page, "options.md": options_page}


def stale() -> list[str]:
    """The names of the pages that differ from what the code says now."""
    paths = {name: DOCS / name for name in PAGES}
    return [
        name
        for name, page in PAGES.items()
        if not paths[name].is_file() or paths[name].read_text(encoding="utf-8") != page()
    ]


def main() -> int:
    """Writes or checks. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    asked = parser.parse_args()
    names = stale()
    for name in names:
        if asked.check:
            print(f"docs/{name} is stale: run `make docs`", file=sys.stderr)
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
            print(f"wrote docs/{name}")
    return 1 if asked.check and names else 0


if __name__ == "__main__":
    raise SystemExit(main())
