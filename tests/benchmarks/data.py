"""How much of a training step on the embedded world is spent waiting for data, with the shipped configurations."""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stages import cli
from stages.__main__ import find
from stages.table import STAGES

INPUTS: dict[str, dict[str, Any]] = {
    "prior": {"model.fit_manifolds": False},
    "invert": {},
    "tune": {"model.inverter.path": "assets/inverter"},
    "detail": {"model.inverter.path": "assets/inverter"},
}


def measure(stage: str, steps: int, out: Path, **options: Any) -> dict[str, float]:
    """What the monitor says of ``steps`` training steps, after two that are not counted.

    Args:
        stage: its configuration is ``configs/stages/STAGE.yaml``.
        out: folder of the run.
        options: of its command line, with ``__`` for a dot.
    """
    given = {
        **INPUTS[stage],
        "out": out,
        "trainer.max_steps": 2 + steps,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_train_batches": 2 + steps,
        "trainer.val_check_interval": None,
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_model_summary": False,
        **{name.replace("__", "."): value for name, value in options.items()},
    }
    words = [f"--{name}={'null' if value is None else value}" for name, value in given.items()]
    cli.run(stage, find(STAGES[stage][0], stage), ["fit", *words])
    with open(next(out.glob("logs/*/metrics.csv")), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["speed/steps_per_s"]][2:]
    seconds = [1 / float(row["speed/steps_per_s"]) for row in rows]
    waited = [float(row["speed/data_wait"]) * took for row, took in zip(rows, seconds, strict=True)]
    images = [float(row["speed/images_per_s"]) * took for row, took in zip(rows, seconds, strict=True)]
    return {
        "images": sum(images) / len(rows),
        "step": sum(seconds) / len(rows),
        "wait": sum(waited) / len(rows),
        "share": sum(waited) / sum(seconds),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tests.benchmarks data``."""
    parser.add_argument("stages", nargs="*", default=list(INPUTS), metavar="STAGE", help=f"of {', '.join(INPUTS)}")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured (default 10)")
    parser.add_argument("--subjects", type=int, help="training subjects, drawn when missing (default: as configured)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    table = Table("stage", "pictures", "step, ms", "wait, ms", "share", title="Waiting for data")
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            options = {"data__init_args__workers": arguments.workers}
            if arguments.subjects is not None:
                options["data__init_args__train_subjects"] = arguments.subjects
            found = measure(stage, arguments.steps, Path(folder) / stage, **options)
        step, wait = (f"{1000 * found[name]:.1f}" for name in ("step", "wait"))
        table.add_row(stage, f"{found['images']:.0f}", step, wait, f"{100 * found['share']:.2f} %")
    Console(width=100).print(table)
