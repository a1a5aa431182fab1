"""Errors meant for the user."""


class UserError(Exception):
    """Something the user can put right: shown as one sentence without a traceback, exit code 2."""


def one_line(error: object) -> str:
    """``str(error)`` with every run of white space, line breaks included, turned into one space.

    Of an error that a loader's worker process reports with its traceback, only what was wrong.
    """
    text = str(error)
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition(f"{UserError.__name__}: ")[2]
    return " ".join(text.split())
