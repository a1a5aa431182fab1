"""Errors meant for the user."""


class UserError(Exception):
    """Something the user can put right: shown as one sentence without a traceback, exit code 2."""


def one_line(error: object) -> str:
    """``str(error)`` with every run of white space, line breaks included, turned into one space."""
    return " ".join(str(error).split())
