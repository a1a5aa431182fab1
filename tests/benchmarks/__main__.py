"""``make bench``: the house's own operations. ``python -m tests.benchmarks`` also takes a name:

``zoo``, generators against official ones; ``manifolds``, efficient GRAM against GRAM; ``free_view``, a head seen
through its networks and from baked manifolds; ``real_size``, a picture through official generators at their real sizes;
``data``, how long training steps wait for data; ``scaling``, training in several processes; ``photos``, folders of
photos in a style; ``gpu``, what only a GPU can show (``make gpu``).
"""

from __future__ import annotations

import argparse

from tests.benchmarks import data, free_view, house, manifolds, photos, real_size, scaling, zoo
from tests.benchmarks.gpu import rehearsal

BENCHMARKS = {
    "zoo": (zoo, "generators of the zoo, beside official ones where given"),
    "manifolds": (manifolds, "efficient GRAM beside GRAM"),
    "free_view": (free_view, "free views: networks beside baked manifolds"),
    "real_size": (real_size, "a picture through official generators at their real sizes"),
    "data": (data, "training steps: how long they wait for data"),
    "scaling": (scaling, "training steps in one and in several processes"),
    "photos": (photos, "folders of photos in a style: seconds and memory of each"),
    "gpu": (rehearsal, "what only a GPU can show, in three minutes"),
}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("house", help="the main operations (default)")
    for name, (benchmark, text) in BENCHMARKS.items():
        benchmark.add_arguments(commands.add_parser(name, help=text))
    arguments = parser.parse_args()
    if arguments.command in BENCHMARKS:
        BENCHMARKS[arguments.command][0].main(arguments)
    else:
        house.main()


if __name__ == "__main__":
    main()
