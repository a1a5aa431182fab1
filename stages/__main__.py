"""The ``galatea`` command: finds a stage by name and imports only that one."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from models.errors import UserError, one_line
from stages.table import STAGES, VERBS

COMMANDS = ("fit", "validate", "test", "predict")
DEBUG = "GALATEA_DEBUG"  # set: what nobody has thought of is shown as Python tells it


def usage() -> str:
    """The text of ``galatea --help``."""
    lines = [f"usage: galatea STAGE {{{','.join(COMMANDS)}}} [options]", "       galatea VERB [options]", ""]
    for title, table in (("stages", STAGES), ("verbs", VERBS)):
        lines += [f"{title}:", *(f"  {name:<10} {text}" for name, (_, text) in table.items()), ""]
    lines.append("galatea STAGE COMMAND --help and galatea VERB --help list the options.")
    return "\n".join([*lines, "--debug, anywhere, shows an error that is not yours with all that led to it."])


def find(target: str, name: str) -> Any:
    """Import ``module:attribute``.

    Raises:
        UserError: when this version does not have the module.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UserError(f"'galatea {name}' is not part of this version") from error


def dispatch(arguments: Sequence[str]) -> None:
    """Run one command line, without the program's name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    if name in VERBS:
        find(VERBS[name][0], name)(rest)
    elif name in STAGES:
        if not rest:
            raise UserError(f"galatea {name} needs a command: {', '.join(COMMANDS)}; or --help")
        if rest[0] not in (*COMMANDS, "-h", "--help"):
            raise UserError(f"unknown command {rest[0]!r} of stage {name}, it has: {', '.join(COMMANDS)}")
        run_stage: Callable[..., None] = find("stages.cli:run", name)
        run_stage(name, find(STAGES[name][0], name), rest)
    else:
        raise UserError(f"unknown stage or verb {name!r}, there are: {', '.join((*STAGES, *VERBS))}")


def main() -> int:
    """Entry point. ``sys.argv`` stays whole: ranks of a distributed run start again from it."""
    open_streams()
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        os.environ[DEBUG] = "1"  # for the steps of a pipeline, and other ranks, too
    try:
        dispatch(arguments)
    except UserError as error:
        print(f"galatea: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("galatea: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough, as in `galatea --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail as well
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"galatea: error: {one_line(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:  # ours, or something that nobody has thought of
        if os.environ.get(DEBUG):
            raise
        what = one_line(error)[:300] or "no more is known"
        print(f"galatea: error: {type(error).__name__}: {what}; --debug shows where", file=sys.stderr)
        return 1
    return 0


def open_streams() -> None:
    """Standard streams that take anything: none may be missing, as under cron, or know no letters but Latin ones."""
    for number in range(3):  # the next file that is opened must not become one of them
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as we run
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
