"""Tables of the demo: one for each model, the sentence neighbours, and the summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from measure import Accuracy, keeps_promise
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from workloads import Sentence

from normfx.timing import Spread, ratio, spread

# Wide enough for the widest table, and for the report, where there is no terminal to ask.
PLAIN_WIDTH = 120
NEIGHBOUR_PAIRS = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured on one model; the mappings go by version: eager, inductor, normfx.

    Attributes:
        name: Short name of the model.
        title: The model and its input.
        accuracy: Distances from eager and from float64.
        seconds: Durations of the timed calls; equal positions belong to the same round.
        norms: Normalizations normfx found.
        rewritten: How many of them it did something to.
    """

    name: str
    title: str
    accuracy: Mapping[str, Accuracy]
    seconds: Mapping[str, Sequence[float]]
    norms: int
    rewritten: int

    @property
    def passed(self) -> bool:
        """Whether normfx found a normalization and stayed within its error contract."""
        return self.norms > 0 and keeps_promise(self.accuracy["normfx"], self.accuracy["eager"])


def make_console() -> Console:
    """A console for standard output: colours and boxes on a terminal, plain ASCII elsewhere."""
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, no_color=True)


def new_table(console: Console, title: str, caption: str | None = None) -> Table:
    """An empty table in the style the console can show."""
    style = box.ROUNDED if console.is_terminal else box.ASCII
    return Table(
        title=title, caption=caption, box=style, title_justify="left", caption_justify="left"
    )


def spread_text(value: Spread, digits: int) -> str:
    """Median and half the interquartile range."""
    return f"{value.median:.{digits}f} ±{value.half_iqr:.{digits}f}"


def model_table(console: Console, outcome: Outcome) -> Table:
    """Error and latency of the three versions of one model."""
    rounds = len(outcome.seconds["eager"])
    table = new_table(
        console,
        outcome.title,
        f"Latency: median of {rounds} interleaved rounds ± half the interquartile range. Ratios "
        "are taken within a round; below 1 is faster.\nulp: error against float64, relative to the "
        "larger of the value and its row's rms.",
    )
    table.add_column("version")
    for heading in ("off eager", "off float64", "ulp", "latency ms", "x eager", "x inductor"):
        table.add_column(heading, justify="right")
    for name, accuracy in outcome.accuracy.items():
        seconds = outcome.seconds[name]
        ratios = [
            "1" if name == baseline else spread_text(ratio(seconds, outcome.seconds[baseline]), 2)
            for baseline in ("eager", "inductor")
        ]
        table.add_row(
            name,
            f"{accuracy.from_eager:.1e}",
            f"{accuracy.from_float64:.1e}",
            f"{accuracy.error_ulp:.1f}",
            spread_text(spread([1e3 * value for value in seconds]), 1),
            *ratios,
        )
    return table


def summary_table(console: Console, outcomes: Sequence[Outcome]) -> Table:
    """One line for each model, with the verdict."""
    table = new_table(
        console,
        "Summary",
        "Passed: normfx found normalizations, and its error is at most twice eager's, or 1 ulp.",
    )
    table.add_column("model")
    for heading in ("norms", "rewritten", "eager ulp", "normfx ulp", "x eager", "x inductor"):
        table.add_column(heading, justify="right")
    table.add_column("promise")
    for outcome in outcomes:
        seconds = outcome.seconds
        table.add_row(
            outcome.name,
            str(outcome.norms),
            str(outcome.rewritten),
            f"{outcome.accuracy['eager'].error_ulp:.1f}",
            f"{outcome.accuracy['normfx'].error_ulp:.1f}",
            spread_text(ratio(seconds["normfx"], seconds["eager"]), 2),
            spread_text(ratio(seconds["normfx"], seconds["inductor"]), 2),
            "[green]kept[/green]" if outcome.passed else "[bold red]BROKEN[/bold red]",
        )
    return table


def neighbour_table(
    console: Console, embeddings: Tensor, eager: Tensor, sentences: Sequence[Sentence]
) -> Table:
    """The closest pairs of sentences, and how many neighbours share a topic and agree with eager.

    Shapes: embeddings, eager: (sentences, channels), each row of unit length.
    """
    cosine = (embeddings @ embeddings.T).fill_diagonal_(-1.0)
    nearest = cosine.argmax(1).tolist()
    eager_nearest = (eager @ eager.T).fill_diagonal_(-1.0).argmax(1).tolist()
    count = len(sentences)
    same_topic = sum(sentences[i].topic == sentences[j].topic for i, j in enumerate(nearest))
    agree = sum(i == j for i, j in zip(nearest, eager_nearest, strict=True))
    table = new_table(
        console,
        f"Nearest neighbours among {count} sentences, embedded by the normfx model",
        f"{same_topic} of {count} nearest neighbours share the topic; "
        f"{agree} of {count} are the same as eager's.",
    )
    table.add_column("cosine", justify="right")
    table.add_column("sentence")
    table.add_column("its nearest neighbour")
    # A mutual pair is listed once, from the side that comes first in the file.
    pairs = {(min(i, j), max(i, j)) for i, j in enumerate(nearest)}
    closest = sorted(pairs, key=lambda pair: -cosine[pair].item())[:NEIGHBOUR_PAIRS]
    for i, j in closest:
        table.add_row(f"{cosine[i, j]:.3f}", escape(sentences[i].text), escape(sentences[j].text))
    return table
