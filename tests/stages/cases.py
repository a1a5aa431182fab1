"""How each stage is run small: its test module says so once, as ``CASE``, and the suites of all stages collect it.

These suites run every command line in several processes and precisions, kill it, refuse bad input to it, and run it on
a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from stages.table import STAGES
from tests.stages.processes import Kill

COUNT = 12  # pictures to invert


@dataclass(frozen=True)
class Command:
    """How much a command may depend on the number of processes.

    Attributes:
        batch: of all processes together; 0 leaves it.
        shared: options that count pictures, as the batch does, of all processes together.
        options: of the command line.
        tolerance: of the weights at equal batches, relative to how far training has moved them; 0: artifacts and tables
            are equal to the byte; None: ranks agree, but the losses compare what is in a rank's own batch.
    """

    batch: int = 0
    shared: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    tolerance: float | None = 0


@dataclass(frozen=True)
class StageCase:
    """A stage's command line on inputs so small that it takes a second or two.

    Attributes:
        line: the command line but for ``--out``, by the folder of its inputs; results of other stages are in
            ``folder/STAGE`` there.
        inputs: writes to that folder what no stage makes, for so many pictures; may be called again.
        needs: the stage whose result it takes.
        commands: by name, "fit" or "fit, what is special": what is compared between numbers of processes.
        kills: moments at which it is killed by ``test_killed``; the soak kills at any.
    """

    line: Callable[[Path], list[str]]
    inputs: Callable[[Path, int], object]
    needs: str | None = None
    commands: Mapping[str, Command] = field(default_factory=dict)
    kills: Sequence[Kill] = ()


@cache
def collect() -> dict[str, StageCase]:
    """The case of every stage, each after that whose result it takes; imported here, and not where a test forks."""
    for name in ("cli", *STAGES):
        import_module(f"stages.{name}")
    found = {name: import_module(f"tests.stages.test_{name}").CASE for name in STAGES}
    ordered: dict[str, StageCase] = {}
    while len(ordered) < len(found):
        ready = {n: c for n, c in found.items() if n not in ordered and (c.needs is None or c.needs in ordered)}
        assert ready, f"the cases of {found.keys() - ordered.keys()} wait for one another"
        ordered |= ready
    return ordered


def lines(folder: Path, count: int = COUNT) -> dict[str, list[str]]:
    """Every stage's command line but for ``--out``; what no stage makes is written to ``folder``."""
    for inputs in {case.inputs for case in collect().values()}:
        inputs(folder, count)
    return {name: case.line(folder) for name, case in collect().items()}
