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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from tests.benchmarks.official import ADAPTERS, Adapter, Run, import_checkout

BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 forgets the peak so far
ROUNDS = 3  # at least, however slow

COLUMNS = ("family", "pass", "threads", "batch", "rounds", "CPU s", "CPU ratio", "ratio", "peak MiB", "difference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``zoo``."""
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="those of --official, or else all")
    parser.add_argument("--official", nargs="*", default=[], metavar="FAMILY=PATH", help="checkouts to compare with")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7, help="passes of each network, alternating")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help=f"after which {ROUNDS} rounds do")
    parser.add_argument("--memory", type=float, default=0, metavar="GIB", help="that a network may take; 0: no limit")


class Request(NamedTuple):
    """One pass."""

    kind: Literal["forward", "with backward", "image"]
    threads: int
    batch: int


class Cost(NamedTuple):
    """What one pass took."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads together, which other processes hardly change."""
    peak: int
    """Bytes; where there is no ``RESET``, of all passes so far."""


class Case(NamedTuple):
    """One row of the table."""

    name: str
    request: Request
    ours: list[Cost]
    official: list[Cost]
    """As many, or none."""
    difference: float | None
    """Largest one between the images, in standard deviations of the official one."""
    failure: str = ""
    """Why there is nothing else."""

    def cells(self) -> list[str]:
        """As text, see ``COLUMNS``."""
        start = [self.name, self.request.kind, f"{self.request.threads}", f"{self.request.batch}"]
        if self.failure:
            return [*start, "0", self.failure, *[""] * (len(COLUMNS) - len(start) - 2)]
        both = [costs for costs in (self.ours, self.official) if costs]
        row = [*start, f"{len(self.ours)}", " / ".join(f"{median(cost.cpu for cost in costs):.2f}" for costs in both)]
        row += [self.ratio("cpu"), self.ratio("wall")]
        row.append(" / ".join(f"{max(cost.peak for cost in costs) / 2**20:.0f}" for costs in both))
        return [*row, "" if self.difference is None else f"{self.difference:.0e}"]

    def ratio(self, kind: Literal["cpu", "wall"]) -> str:
        """Median and range of ours / official, round by round."""
        if not self.official:
            return ""
        pairs = zip(self.ours, self.official, strict=True)
        ratios = [getattr(mine, kind) / getattr(theirs, kind) for mine, theirs in pairs]
        return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


Build = Callable[[], tuple[torch.nn.Module, Run]]


def build_official(adapter: Adapter, checkout: str, weights: Path) -> tuple[torch.nn.Module, Run]:
    """The network of an official repository's checkout; its weights are written."""
    import_checkout(checkout)
    network, run = adapter.official()
    torch.save(network.state_dict(), weights)
    return network, run


def build_ours(adapter: Adapter, weights: Path | None) -> tuple[torch.nn.Module, Run]:
    """Our network, of the written weights where there are any."""
    return adapter.ours(weights and torch.load(weights, weights_only=True))


def serve(pipe: Connection, build: Build, memory: int) -> None:
    """Build one network, then answer each :class:`Request`, with a :class:`Cost` or the image; errors are answers.

    Args:
        memory: bytes that it may take, 0 for all.
    """
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.manual_seed(0)
    try:
        network, run = build()
    except Exception as error:
        return pipe.send(error)
    pipe.send("ready")
    while request := pipe.recv():
        try:
            answer = perform(network, run, *request)
        except Exception as error:  # the parent's to tell
            answer = RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0])
        network.zero_grad()
        pipe.send(answer)
    return None


def perform(network: torch.nn.Module, run: Any, kind: str, threads: int, batch: int) -> Any:
    """One pass."""
    torch.set_num_threads(threads)
    if RESET.exists():
        RESET.write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.set_grad_enabled(kind == "with backward"):
        image = run(batch)
        if kind == "with backward":
            image.square().mean().backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES
    return image.numpy() if kind == "image" else Cost(wall, cpu, peak)


class Worker:
    """A network in its own process, ended with its context; of :func:`serve`."""

    def __init__(self, build: Build, memory: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, memory), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies is an end of file here
        self._answer()

    def ask(self, request: Request) -> Any:
        """One request, answered.

        Raises:
            RuntimeError: when it failed.
        """
        return self._answer(request)

    def _answer(self, request: Request | None = None) -> Any:
        try:
            if request:
                self.pipe.send(request)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("the process died") from error
        if isinstance(answer, Exception):
            raise RuntimeError(str(answer)) from answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def alternate(workers: Sequence[Worker], request: Request, rounds: int, budget: float) -> list[list[Cost]]:
    """Costs of each worker, ``rounds`` of them; fewer once ``budget`` seconds are over, but never below ``ROUNDS``."""
    costs: list[list[Cost]] = [[] for _ in workers]
    end = time.perf_counter() + budget
    for done in range(max(rounds, ROUNDS)):
        if done >= ROUNDS and time.perf_counter() > end:
            break
        for worker, own in zip(workers, costs, strict=True):
            own.append(worker.ask(request))
    return costs


def measure(
    name: str, adapter: Adapter, checkout: str | None, *, threads: Sequence[int], batches: Sequence[int],
    rounds: int, budget: float, memory: int = 0,
) -> Iterator[Case]:  # fmt: skip
    """Every case of one family, ours alone without a checkout.

    Raises:
        RuntimeError: when a network cannot be built.
    """
    with ExitStack() as stack:
        weights = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.pt" if checkout else None
        makers: list[Build] = [partial(build_ours, adapter, weights)]
        if checkout and weights:  # comes first, for it writes the weights
            makers.insert(0, partial(build_official, adapter, checkout, weights))
        workers = [stack.enter_context(Worker(make, memory)) for make in makers][::-1]
        for count in threads:
            for batch in batches:
                difference = None
                try:  # also warms up
                    image, *others = [worker.ask(Request("image", count, batch)) for worker in workers]
                    difference = float(abs(image - others[0]).max() / others[0].std()) if others else None
                except RuntimeError:
                    pass  # fails again below, and is told there
                for kind in ("forward", "with backward"):
                    request = Request(kind, count, batch)
                    try:
                        ours, *theirs = alternate(workers, request, rounds, budget)
                        yield Case(name, request, ours, theirs[0] if theirs else [], difference)
                    except RuntimeError as error:
                        yield Case(name, request, [], [], None, str(error))


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print a table in Markdown, each row when it is there."""
    checkouts = dict(entry.split("=", 1) for entry in arguments.official)
    if unknown := sorted({*arguments.families, *checkouts} - set(ADAPTERS)):
        raise SystemExit(f"no adapter for {', '.join(unknown)}; there are: {', '.join(ADAPTERS)}")
    print(f"torch {torch.__version__}; ours / official; medians, and the ranges of ratios\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for name in arguments.families or checkouts or ADAPTERS:
        for case in measure(
            name, ADAPTERS[name], checkouts.get(name), threads=arguments.threads, batches=arguments.batch,
            rounds=arguments.rounds, budget=arguments.budget, memory=int(arguments.memory * 2**30),
        ):  # fmt: skip
            print(line(case.cells()), flush=True)
