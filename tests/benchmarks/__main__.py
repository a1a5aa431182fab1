"""``make bench``: the house's own operations; ``python -m tests.benchmarks zoo``: generators against official ones."""

from __future__ import annotations

import argparse

from tests.benchmarks import house, zoo


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("house", help="the main operations (default)")
    zoo.add_arguments(commands.add_parser("zoo", help="generators of the zoo, beside official ones where given"))
    arguments = parser.parse_args()
    if arguments.command == "zoo":
        zoo.main(arguments)
    else:
        house.main()


if __name__ == "__main__":
    main()
