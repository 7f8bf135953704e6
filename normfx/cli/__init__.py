"""The command line: `normfx explain MODEL` and its kin. It parses, and calls the public functions.

Results go to standard output, errors and progress to standard error. Nothing is coloured where
standard output is no terminal.
"""

from __future__ import annotations

import argparse
import enum
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from normfx.cli.errors import ModelError, UsageError, one_line
from normfx.errors import NormfxError


class Exit(enum.IntEnum):
    """What the exit status says."""

    OK = 0
    FINDING = 1  # a stage leaves the numerics contract
    USAGE = 2  # a wrong option, a model or file that is not there
    MODEL = 3  # the model could not be built or run
    INTERRUPTED = 130


_MODEL = """\
MODEL is one of
  package.module:factory  a function that returns the model, or (model, args), or (model, args,
                          kwargs); or the model itself. The current folder is searched too.
  hf:FAMILY[:SIZE]        a model type of `transformers` (gpt2, vit, whisper) with random weights,
                          built offline; SIZE is tiny (the default), small or base.

exit status
  0  done; 1  a finding: verify saw the numerics contract violated; 2  wrong usage;
  3  the model could not be built or run; 130  interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="normfx",
        description="See, check and time what normfx does to a model.",
        epilog=_MODEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from normfx import __version__

    top.add_argument("--version", action="version", version=f"normfx {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MODEL if _model_options() else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[*parents, _general()],
        )

    model, shown = _model_options(), _shown()
    explain = command("explain", "list the norms of a model and what becomes of each", model, shown)
    explain.add_argument("--html", metavar="PATH", help="also write a page")
    diff = command("diff", "show what the stages change in the graphs of a model", model, shown)
    diff.add_argument("--html", metavar="PATH", help="also write a page of all stages")
    diff.add_argument("--before", default="capture", metavar="STAGE", help="(default capture)")
    diff.add_argument("--after", default="lower", metavar="STAGE", help="(default lower)")
    diff.add_argument("--context", type=int, default=3, metavar="LINES", help="(default 3)")
    diff.add_argument("--expand", action="store_true", help="write out layers that are alike")
    verify = command("verify", "hold every stage to the numerics contract", model, shown)
    verify.add_argument("--html", metavar="PATH", help="also write a page")
    verify.add_argument(
        "--inputs",
        choices=("given", "hard"),
        default="given",
        help="hard: also rows of other scales, with large means, and weights that change",
    )
    verify.add_argument("--compiled", action="store_true", help="also run Inductor's code")
    bench = command("bench", "time eager, Inductor and normfx side by side", model, shown)
    bench.add_argument("--rounds", type=_positive, default=50, help="at most (default 50)")
    bench.add_argument(
        "--limit", type=float, default=20.0, metavar="SECONDS", help="of timing (default 20)"
    )
    bench.add_argument("--chart", metavar="PATH", help="draw a chart (.png, .svg, .pdf)")
    calibrate = command("calibrate", "measure the norms of a model over data", model, shown)
    calibrate.add_argument(
        "data", metavar="DATA", help="package.module:factory of an iterable of batches"
    )
    calibrate.add_argument("-o", "--output", metavar="PATH", required=True, help="a .safetensors")
    calibrate.add_argument("--batches", type=_positive, help="stop after that many")
    calibrate.add_argument(
        "--budget", type=float, help="choose the norms that may go at this damage (1 - cosine)"
    )
    calibrate.add_argument("--mask", metavar="KEY", help="of the batch: which tokens are real")
    report = command("report", "print a report that was saved as JSON", shown)
    report.add_argument("--html", metavar="PATH", help="also write a page")
    report.add_argument("file", metavar="FILE", help="of `explain --json` or a journal; -: stdin")
    return top


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL")
    options.add_argument("--device", default="cpu", help="as torch names it (default cpu)")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of the model"
    )
    options.add_argument("--dynamic", action="store_true", help="with symbolic shapes")
    options.add_argument("--train", action="store_true", help="training mode, with gradients")
    options.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of normfx; VALUE is JSON, or else text. May be repeated",
    )
    options.add_argument("--rules", metavar="RULE,...", help="the exact rules that may run")
    return options


def _shown() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", action="store_true", help="print JSON")
    return options


def _general() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--traceback", action="store_true", help="show where an error is from")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status, see `Exit`.
    """
    try:
        asked = parser().parse_args(argv)
    except SystemExit as stopped:  # --help, or a usage error that argparse has shown
        return stopped.code if isinstance(stopped.code, int) else Exit.USAGE
    from normfx.cli import commands

    try:
        with _without_logs(asked):
            return Exit.OK if commands.run(asked) else Exit.FINDING
    except KeyboardInterrupt:
        return _failed(asked, "interrupted", Exit.INTERRUPTED)
    except BrokenPipeError:  # the reader (`head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except (UsageError, NormfxError) as error:
        return _failed(asked, str(error), Exit.USAGE)
    except OSError as error:
        return _failed(asked, str(error), Exit.USAGE)
    except ModelError as error:
        return _failed(asked, str(error), Exit.MODEL)
    except Exception as error:
        return _failed(asked, one_line(error), Exit.MODEL)


@contextmanager
def _without_logs(asked: argparse.Namespace) -> Iterator[None]:
    """No log lines of torch between those of a command, unless they are asked for."""
    quiet = not (asked.traceback or os.environ.get("TORCH_LOGS"))
    logging.disable(logging.CRITICAL if quiet else logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _failed(asked: argparse.Namespace, text: str, status: Exit) -> int:
    if asked.traceback:
        traceback.print_exc()
    line = " ".join(text.split())
    print(f"normfx {asked.command}: {line}", file=sys.stderr)
    return status
