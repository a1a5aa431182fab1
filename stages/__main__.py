"""The ``galatea`` command: finds a stage by name and imports only that one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from models.errors import UserError, one_line
from stages.table import STAGES, VERBS

COMMANDS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """The text of ``galatea --help``."""
    lines = [f"usage: galatea STAGE {{{','.join(COMMANDS)}}} [options]", "       galatea VERB [options]", ""]
    for title, table in (("stages", STAGES), ("verbs", VERBS)):
        lines += [f"{title}:", *(f"  {name:<10} {text}" for name, (_, text) in table.items()), ""]
    return "\n".join([*lines, "galatea STAGE COMMAND --help and galatea VERB --help list the options."])


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
        if rest and rest[0] not in (*COMMANDS, "-h", "--help"):
            raise UserError(f"unknown command {rest[0]!r} of stage {name}, it has: {', '.join(COMMANDS)}")
        run_stage: Callable[..., None] = find("stages.cli:run", name)
        run_stage(name, find(STAGES[name][0], name), rest)
    else:
        raise UserError(f"unknown stage or verb {name!r}, there are: {', '.join((*STAGES, *VERBS))}")


def main() -> int:
    """Entry point. ``sys.argv`` stays whole: ranks of a distributed run start again from it."""
    try:
        dispatch(sys.argv[1:])
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
        print(f"galatea: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
