"""Rows of the table, and the sections that make them within a budget of seconds."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Row:
    """One measurement.

    Attributes:
        section: which part of the benchmark.
        case: what was computed.
        candidate: by whom.
        us: median microseconds, or None.
        floor_us: the least by the device's data sheet, or None.
        note: what else there is to say: an error, a rate, megabytes.
        more: further numbers, for the JSON.
    """

    section: str
    case: str
    candidate: str
    us: float | None = None
    floor_us: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


class Table:
    """All rows, and the time that is left for more.

    Args:
        budget_s: seconds from now.
    """

    def __init__(self, budget_s: float) -> None:
        self.rows: list[Row] = []
        self.start = time.monotonic()
        self.budget_s = budget_s
        self.section, self.ends = "", self.start + budget_s

    @contextmanager
    def part(self, section: str, share_s: float) -> Iterator[None]:
        """A section that has so many seconds, and no more than what is left of the whole."""
        now = time.monotonic()
        self.section, self.ends = section, min(now + share_s, self.start + self.budget_s)
        print(f"# {section}: up to {max(0.0, self.ends - now):.0f} s", flush=True)
        try:
            yield
        except Exception as error:  # a section that fails leaves the others theirs
            self.add("", "", note=_failure(error))

    def left_s(self) -> float:
        """Seconds that the section still has."""
        return self.ends - time.monotonic()

    def add(self, case: str, candidate: str, **values: Any) -> Row:
        """One more row, printed at once."""
        row = Row(self.section, case, candidate, **values)
        self.rows.append(row)
        print(_line(row, None), flush=True)
        return row

    def attempt(self, case: str, candidate: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or None and a row that says why not."""
        if self.left_s() <= 0:
            self.add(case, candidate, note="not run: out of time")
            return None
        try:
            return make()
        except Exception as error:
            self.add(case, candidate, note=_failure(error))
            return None

    def text(self) -> str:
        """The table, with the ratio of each row to the fastest of its case."""
        best: dict[tuple[str, str], float] = {}
        for row in self.rows:
            if row.us is not None:
                key = (row.section, row.case)
                best[key] = min(row.us, best.get(key, row.us))
        head = f"{'section':12} {'case':34} {'candidate':26}"
        lines = [f"{head} {'us':>10} {'x best':>7} {'x floor':>8}  note"]
        lines += [_line(row, best.get((row.section, row.case))) for row in self.rows]
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        """The rows, plain."""
        return [asdict(row) for row in self.rows]


def _line(row: Row, best: float | None) -> str:
    us = "" if row.us is None else f"{row.us:.1f}"
    ratio = "" if row.us is None or not best else f"{row.us / best:.2f}"
    floor = "" if row.us is None or not row.floor_us else f"{row.us / row.floor_us:.2f}"
    head = f"{row.section:12} {row.case:34} {row.candidate:26}"
    return f"{head} {us:>10} {ratio:>7} {floor:>8}  {row.note}".rstrip()


def _failure(error: BaseException) -> str:
    """What an error says first (a compiler's begins with whose it is), and where it came from."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].lineno})" if where else ""
    said = " ".join(str(error).strip().splitlines()[:2])
    return f"failed: {type(error).__name__}: {said[:200]}{place}"
