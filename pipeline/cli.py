"""What every `python -m <stage> RECIPE [--run DIR] [--<section>.<field> VALUE]…` has in common.

Reads the command line and the recipe, and turns errors into one line and an exit code. Each stage adds its own options
to the parser and does its own work.
"""

import argparse
import io
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.address import is_in_store
from pipeline.child import end_with_parent
from pipeline.errors import INTERRUPTED, DistillError, UsageError, file_error
from pipeline.recipe import Recipe, load_recipe
from pipeline.rundir import RunDir
from pipeline.settings_page import help_text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could move the cursor of a terminal, or worse
GO_ON = "interrupted: run the same command again to go on"

_hung_up = False


def stage_parser(stage: str, description: str, *, kinds: Iterable[str] = ()) -> argparse.ArgumentParser:
    """A parser with what all stages take. Its help ends with all recipe keys.

    `kinds`: the kinds of work, one of which is named before the recipe.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {stage}",
        description=description,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if names := list(kinds):
        parser.add_argument("kind", choices=names, help="the kind of work")
    parser.add_argument("recipe", type=Path, help="a YAML recipe, for example recipes/demo.yaml")
    parser.add_argument(
        "--run", help="the run directory (default: runs/<name of the recipe>), or s3://… or gs://… (docs/storage.md)"
    )
    return parser


def parse_stage(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[Recipe, RunDir, argparse.Namespace]:
    """Parses the command line; a flag that the parser does not know must be a recipe key.

    Raises RecipeError on a wrong recipe or an unknown flag, UsageError if --run names a file, or is a store's URL
    without its two slashes. With the URL of a store it does not return.
    """
    options, flags = parser.parse_known_args(argv)
    if is_in_store(options.run or ""):
        _run_in_store(parser.prog, sys.argv[1:] if argv is None else argv)
    options.flags = flags  # the recipe values, as given
    recipe = load_recipe(options.recipe, flags)
    run = RunDir(Path(options.run) if options.run else Path("runs") / recipe.name)
    run.check_folder()
    return recipe, run, options


def _run_in_store(command: str, argv: list[str]) -> NoReturn:
    """Becomes scale.run_in_store, which fetches the run, has the same command work on its folder, and puts it back."""
    stage = command.removeprefix("python -m ")
    os.execv(sys.executable, [sys.executable, "-m", "scale.run_in_store", stage, *argv])


def run_stage(main: Callable[[], None]) -> NoReturn:
    """Runs a stage's main and exits: one line and the code for a known error, 130 for an interrupt.

    SIGTERM, and the hangup of a terminal unless it is ignored (nohup), are treated as Ctrl-C is. A character that the
    terminal cannot show is written as its number, in an error also one that would steer it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None if it was closed
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, hang_up)
    try:
        end_with_parent()
        main()
        _flush_output()  # an error is told below; Python's own exit code for it would be 120
    except DistillError as error:
        label = "error" if isinstance(error, UsageError) or error.exit_code == 1 else "stopped"
        _print_error(f"{label}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(GO_ON, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ImportError as error:  # a target of Make sets up what its own stage needs
        _print_error(f"error: {error}; `make setup` installs the packages of all stages")
        sys.exit(UsageError.exit_code)
    except BrokenPipeError:
        _discard_output(1)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        try:
            _flush_output()
        except OSError:  # it was this
            _discard_output(1)
        _print_error(f"error: {file_error(error, 'standard output or a file')}")
        sys.exit(1)
    sys.exit(0)


def printable(text: str) -> str:
    """Text for a terminal, for what may come from others: a file's name, a column, a key, a value of a category."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _print_error(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def hang_up(signum: int, frame: FrameType | None) -> None:
    """As SIGTERM, but nothing more is said on the terminal, which is gone; a log file is written to the end."""
    global _hung_up
    if _hung_up:  # a shell and the kernel each send one
        return
    _hung_up = True
    for descriptor in (1, 2):
        with suppress(OSError):  # it was closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                _discard_output(descriptor)
    signal.raise_signal(signal.SIGTERM)  # a stage may have a handler of its own, which ends it in order


def _flush_output() -> None:
    if sys.stdout is not None:  # it was closed
        sys.stdout.flush()


def _discard_output(descriptor: int) -> None:
    """What is written there goes nowhere from now on, what waits in its buffer too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
