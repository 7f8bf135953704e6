"""The documents: generated pages are fresh, links lead somewhere, and the examples print what they say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path

import pytest
import torch

from normfx import Options, Refusal
from normfx.cli import main
from normfx.passes import RULES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

# A fence, and right after it the fence with its output, if the page shows one.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```\n)?", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```\n", re.M | re.S)


def generator() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_generated_pages_are_fresh():
    assert generator().stale() == [], "run `make docs`"


def test_check_writes_nothing_and_fails_on_a_stale_page(tmp_path, monkeypatch, capsys):
    module = generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    (tmp_path / "rules.md").write_text("old")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert module.main() == 1
    assert "docs/rules.md is stale: run `make docs`" in capsys.readouterr().err
    assert (tmp_path / "rules.md").read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert module.main() == 0
    assert (tmp_path / "rules.md").read_text() == (DOCS / "rules.md").read_text()
    assert module.stale() == []


@pytest.mark.parametrize("code", [refusal.value for refusal in Refusal])
def test_every_refusal_is_on_the_page_of_rules(code):
    assert f"\n| `{code}` | " in (DOCS / "rules.md").read_text(encoding="utf-8")


def test_every_refusal_has_a_stage():
    assert set(generator().refusing_stages()) == {refusal.name for refusal in Refusal}


def test_every_refusal_of_recognition_is_explained():
    stages = generator().refusing_stages()
    page = (DOCS / "recognition.md").read_text(encoding="utf-8")
    given = [r.value for r in Refusal if "recognise" in stages.get(r.name, ())]
    assert given
    assert [code for code in given if f"`{code}`" not in page] == []


def test_every_rule_and_option_has_its_line():
    rules = (DOCS / "rules.md").read_text(encoding="utf-8")
    options = (DOCS / "options.md").read_text(encoding="utf-8")
    assert [rule for rule in RULES if f"\n| `{rule}` | " not in rules] == []
    assert [f.name for f in fields(Options) if f"\n| `{f.name}` | " not in options] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from their text."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if EXAMPLE.search(p.read_text(encoding="utf-8"))], ids=relative
)
def test_examples_run_and_print_what_the_page_shows(page, monkeypatch):
    module = types.ModuleType("example")  # importable, since dynamo looks globals up by module
    monkeypatch.setitem(sys.modules, "example", module)
    torch.manual_seed(0)
    for source, shown in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(source, "example.py", "exec"), module.__dict__)
        assert trimmed(printed.getvalue()) == trimmed(shown), source


# Commands, each with the output that the page shows under it, if any. A comment in front marks those
# that take minutes. A Python fence that the page gives a file name is a file for them.
COMMANDS = re.compile(r"^(<!-- expensive -->\n)?```console\n(.*?)^```\n", re.M | re.S)
FILE = re.compile(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```\n", re.M | re.S)


def sessions(page: Path, expensive: bool) -> list[list[str]]:
    """The commands of a page, each as its lines."""
    found = []
    for marked, session in COMMANDS.findall(page.read_text(encoding="utf-8")):
        if bool(marked) == expensive:
            found += [part.splitlines() for part in re.split(r"^\$ ", session, flags=re.M)[1:]]
    return [lines for lines in found if lines[0].split()[0] == "normfx"]


def run_sessions(page: Path, expensive: bool) -> None:
    for name, source in FILE.findall(page.read_text(encoding="utf-8")):
        Path(name).write_text(source, encoding="utf-8")
    for line, *shown in sessions(page, expensive):
        command, _, target = line.partition(" > ")
        printed, said = StringIO(), StringIO()
        with redirect_stdout(printed), redirect_stderr(said):
            status = main(shlex.split(command)[1:])
        assert status == 0, (line, said.getvalue())
        if target:
            Path(target).write_text(printed.getvalue(), encoding="utf-8")
        if shown:
            text = printed.getvalue() + said.getvalue()
            assert trimmed(text) == trimmed("\n".join(shown)), line


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("page", [p for p in PAGES if sessions(p, False)], ids=relative)
def test_commands_run_and_print_what_the_page_shows(page, empty_folder):
    run_sessions(page, expensive=False)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if sessions(p, True)], ids=relative)
def test_expensive_commands_run(page, empty_folder):
    run_sessions(page, expensive=True)


def trimmed(text: str) -> str:
    """Text without the spaces that fill table cells at the ends of lines, and without blank ends."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()
