"""`functrain`: reads the commands, prints their answers."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from functrain import __version__
from functrain.cli.answer import Answer, plain, strict
from functrain.cli.place import forget
from functrain.errors import FunctrainError

_CODES = "exit codes: 0 as asked, 1 {one}, 2 trouble, which is told on standard error"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: what is behind `functrain`; by default that of this process.
    """
    arguments = _parser().parse_args(argv)
    try:
        answer: Answer = import_module(f"functrain.cli.{arguments.command}").run(arguments)
    except (FunctrainError, OSError) as error:
        told = re.sub(r"\s*\n\s*", " ", str(error))
        print(plain(f"functrain {arguments.command}: {told}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        forget()
    for note in answer.notes:
        print(plain(f"functrain {arguments.command}: {note}"), file=sys.stderr)
    _print(json.dumps(strict(answer.data), allow_nan=False) if arguments.json else plain(answer.text))
    return answer.exit_code


def _print(text: str) -> None:
    """Prints in whatever encoding there is; a reader that has enough is no trouble."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "functrain",
        description="Looks into what runs of functrain leave. Nothing that a file contains is executed.",
        epilog="example: functrain show runs/digits",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"functrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = "the folder or the address (s3://...) of a run, or of its checkpoints"
    show = _command(commands, "show", "shows a run: what was trained, how far it came, results, curves, checkpoints",
                    "functrain show runs/digits")  # fmt: skip
    show.add_argument("run", metavar="RUN", help=run)
    show.add_argument("--all", action="store_true", help="every number of the log as a curve: rates, norms, speed")
    writes = "writes the report of a run, or one that compares several"
    report = _command(commands, "report", writes,
                      "functrain report runs/digits\n  functrain report runs/digits runs/other --out both")  # fmt: skip
    report.add_argument("runs", metavar="RUN", nargs="+", help=run)
    report.add_argument("--out", metavar="DIR", help="where to write; by default in the run, of several in comparison")
    lists = "lists checkpoints: when, bytes by part, results, sound or not"
    checkpoints = _command(commands, "checkpoints", lists, "functrain checkpoints runs/digits")
    checkpoints.add_argument("run", metavar="DIR", help=run)
    verify = _command(commands, "verify", "compares every file of every checkpoint with its checksum",
                      "functrain verify runs/digits && ./train_on.sh", one="damage or no checksums")  # fmt: skip
    verify.add_argument("run", metavar="DIR", help=run)
    one = "a checkpoint, or a run, of which it is the newest sound one"
    diff = _command(commands, "diff", "compares two checkpoints by part and leaf: norms of the differences",
                    "functrain diff runs/digits/12 runs/digits/16", one="they differ")  # fmt: skip
    diff.add_argument("a", metavar="A", help=one)
    diff.add_argument("b", metavar="B", help=one)
    diff.add_argument("--all", action="store_true", help="optimizer states, model state and averages too")
    export = _command(commands, "export", "writes the parameters of a checkpoint as safetensors, by their paths",
                      "functrain export runs/digits body.safetensors --part body")  # fmt: skip
    export.add_argument("checkpoint", metavar="CKPT", help=one)
    export.add_argument("out", metavar="OUT", help="the file to write")
    export.add_argument("--part", action="append", help="this part alone; may be given several times")
    export.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


def _command(commands: Any, name: str, does: str, example: str, one: str = "") -> argparse.ArgumentParser:
    codes = _CODES.format(one=one) if one else _CODES.replace(" 1 {one},", "")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=f"example:\n  {example}\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="for programs: JSON on standard output")
    return parser
