"""``make bench``: the house's own operations. ``python -m tests.benchmarks`` also takes a name:

``zoo``, generators against official ones; ``manifolds``, efficient GRAM against GRAM; ``free_view``, a head seen
through its networks and from baked manifolds; ``data``, how long training steps wait for data; ``scaling``, training in
several processes.
"""

from __future__ import annotations

import argparse

from tests.benchmarks import data, free_view, house, manifolds, scaling, zoo


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("house", help="the main operations (default)")
    zoo.add_arguments(commands.add_parser("zoo", help="generators of the zoo, beside official ones where given"))
    manifolds.add_arguments(commands.add_parser("manifolds", help="efficient GRAM beside GRAM"))
    free_view.add_arguments(commands.add_parser("free_view", help="free views: networks beside baked manifolds"))
    data.add_arguments(commands.add_parser("data", help="training steps: how long they wait for data"))
    scaling.add_arguments(commands.add_parser("scaling", help="training steps in one and in several processes"))
    arguments = parser.parse_args()
    if arguments.command == "zoo":
        zoo.main(arguments)
    elif arguments.command == "data":
        data.main(arguments)
    elif arguments.command == "scaling":
        scaling.main(arguments)
    elif arguments.command == "free_view":
        free_view.main(arguments)
    elif arguments.command == "manifolds":
        manifolds.main(arguments)
    else:
        house.main()


if __name__ == "__main__":
    main()
