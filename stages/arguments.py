"""argparse with errors in one sentence, for the verbs."""

import argparse
from typing import NoReturn

from models.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print with a usage dump; options are not abbreviated."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
