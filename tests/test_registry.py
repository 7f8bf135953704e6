"""Whatever has a name has its texts and its tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import normfx
from normfx.passes import RULES
from normfx.record import REFUSALS, Refusal

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = Path(normfx.__file__).parent


def text_of(folder: Path, *but: str) -> str:
    return "\n".join(
        path.read_text() for path in sorted(folder.rglob("*.py")) if path.name not in but
    )


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.value)
def test_a_refusal_is_explained(refusal):
    explanation = REFUSALS[refusal]
    assert explanation.meaning.endswith(".")
    assert explanation.hint.endswith(".")
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", refusal.value)


def test_no_two_refusals_share_a_meaning():
    assert len({entry.meaning for entry in REFUSALS.values()}) == len(Refusal)


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.value)
def test_a_refusal_is_given_somewhere(refusal):
    assert f"Refusal.{refusal.name}" in text_of(PACKAGE, "record.py")


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.value)
def test_a_refusal_that_is_given_is_tested(refusal):
    if f"Refusal.{refusal.name}" in text_of(PACKAGE, "record.py"):
        assert f'"{refusal.value}"' in text_of(TESTS)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_tested_and_documented(rule):
    assert f'"{rule}"' in text_of(TESTS)
    page = ROOT / "docs" / "rules.md"
    if page.exists():
        assert rule in page.read_text()


def test_public_names_exist():
    for name in normfx.__all__:
        assert getattr(normfx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        normfx.nothing  # noqa: B018
