"""The row kernels in Triton's interpreter: forward and backward, against float64."""

from __future__ import annotations

import pytest
from row_cases import FORMS, KINDS, check

from normfx.kernels import kernels

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def operators(interpreter):
    kernels()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_rows_in_registers(name, kind):
    check(FORMS[name], kind, rows=37, cols=24)
