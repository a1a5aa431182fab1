"""Generators of the zoo, timed in alternation with the official ones.

Each network lives in a process of its own, so that official code meets none of ours and peak memory is its own. The
parent asks them in turn: what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.benchmarks.official import ADAPTERS, import_checkout

BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``zoo``."""
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="those of --official, or else all")
    parser.add_argument("--official", nargs="*", default=[], metavar="FAMILY=PATH", help="checkouts to compare with")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)


class Cost(NamedTuple):
    """What one pass took."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads together, which other processes hardly change."""
    peak: int
    """Bytes, since the process began."""


def serve(pipe: Connection, name: str, checkout: str | None, weights: Path | None, threads: int, batch: int) -> None:
    """Build one network, then answer requests: "forward" and "backward" with a :class:`Cost`, "image" with the image.

    Args:
        checkout: of the official repository, whose network writes ``weights``; without one it is ours, which reads
            them where given.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if checkout is None:
        network, run = ADAPTERS[name].ours(weights and torch.load(weights, weights_only=True))
    else:
        assert weights is not None
        import_checkout(checkout)
        network, run = ADAPTERS[name].official()
        torch.save(network.state_dict(), weights)
    pipe.send("ready")
    while request := pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(request == "backward"):
            image = run(batch)
            if request == "backward":
                network.zero_grad()
                image.square().mean().backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES
        pipe.send(image.numpy() if request == "image" else Cost(wall, cpu, peak))


class Worker:
    """A network in its own process."""

    def __init__(self, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies is an end of file here
        self.pipe.recv()

    def ask(self, request: str) -> Any:
        """One request, answered."""
        self.pipe.send(request)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send("")
        self.process.join()


def measure(name: str, checkout: str | None, threads: int, batch: int, repeats: int) -> Iterator[list[str]]:
    """Rows of the table for one setting, a pass each."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt" if checkout else None
        official = Worker(name, checkout, weights, threads, batch) if checkout else None
        ours = Worker(name, None, weights, threads, batch)
    workers = [ours, official] if official else [ours]
    images = [worker.ask("image") for worker in workers]  # also warms up
    for request in ("forward", "backward"):
        costs = [[worker.ask(request) for worker in workers] for _ in range(repeats)]
        row = [name, "forward" if request == "forward" else "with backward", f"{threads}", f"{batch}"]
        row.append(" / ".join(f"{median(cost.wall for cost in each):.2f}" for each in zip(*costs, strict=True)))
        if official:
            for kind in ("wall", "cpu"):
                ratios = [getattr(mine, kind) / getattr(theirs, kind) for mine, theirs in costs]
                row.append(f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        else:
            row += ["", ""]
        row.append(" / ".join(f"{cost.peak / 2**20:.0f}" for cost in costs[-1]))
        row.append(f"{abs(images[0] - images[-1]).max() / images[-1].std():.0e}" if official else "")
        yield row
    for worker in workers:
        worker.close()


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    checkouts = dict(entry.split("=", 1) for entry in arguments.official)
    if unknown := sorted({*arguments.families, *checkouts} - set(ADAPTERS)):
        raise SystemExit(f"no adapter for {', '.join(unknown)}; there are: {', '.join(ADAPTERS)}")
    columns = ("family", "pass", "threads", "batch", "seconds", "ratio", "CPU ratio", "peak MiB", "difference")
    table = Table(
        *columns, title=f"torch {torch.__version__}: ours / official, medians of {arguments.repeats}, and ranges"
    )
    for name in arguments.families or checkouts or ADAPTERS:
        for threads in arguments.threads:
            for batch in arguments.batch:
                for row in measure(name, checkouts.get(name), threads, batch, arguments.repeats):
                    table.add_row(*(escape(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
