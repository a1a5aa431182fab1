"""How many more pictures two processes train on than one, on this machine, with the shipped configurations."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from callbacks.progress import batches_done
from stages import cli, invert, prior  # noqa: F401  # once here, and not in every process
from stages.base.ranks import gather
from tests.stages.processes import galatea

STAGES = ("prior", "invert")
WARM_UP = 2  # steps that are not counted


class Clock(pl.Callback):
    """Writes ``OUT/clock.json``: of each rank the pictures, seconds and CPU seconds of all steps after the first."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.images = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batches_done(trainer) > WARM_UP:
            self.images += pl_module.images_in(batch)
        else:
            self.begin = time.perf_counter(), time.process_time()
        self.end = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        seconds, cpu_seconds = (end - begin for begin, end in zip(self.begin, self.end, strict=True))
        ranks = gather([{"images": self.images, "seconds": seconds, "cpu_seconds": cpu_seconds}])
        if trainer.is_global_zero:
            (pl_module.out / "clock.json").write_text(json.dumps(ranks))


def measure(stage: str, ranks: int, steps: int, *options: str) -> dict[str, float]:
    """Pictures per second, and per CPU second of a process, of so many ``ranks`` of one thread each."""
    batches = WARM_UP + steps
    given = {
        "threads": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": batches,
        "trainer.limit_val_batches": 0,
        "trainer.val_check_interval": "null",
        "trainer.enable_model_summary": "false",
        "trainer.callbacks+": f"{__name__}.Clock",
        "data.init_args.train_subjects": batches * 8 * 2,  # enough for two ranks
        "data.init_args.val_subjects": 1,
        "data.init_args.test_subjects": 1,
        "data.init_args.compiled": "false",
        **({"model.fit_manifolds": "false"} if stage == "prior" else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        line = [f"--{name}={value}" for name, value in given.items()]
        galatea(stage, "fit", *line, *options, f"--out={folder}/out", ranks=ranks)
        found = json.loads((Path(folder) / "out" / "clock.json").read_text())
    images = sum(rank["images"] for rank in found)
    return {
        "per_second": images / max(rank["seconds"] for rank in found),
        "per_cpu_second": images / sum(rank["cpu_seconds"] for rank in found),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tests.benchmarks scaling``."""
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--ranks", type=int, default=2, help="processes beside one (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured (default 10)")


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    many = arguments.ranks
    columns = ["stage", "pictures/s, 1 process", f"{many} processes", "efficiency", "the same by CPU time"]
    table = Table(*columns, title="Training steps, a thread and the configured batch for each process")
    for stage in arguments.stages:
        one, more = (measure(stage, ranks, arguments.steps) for ranks in (1, many))
        speeds = [f"{found['per_second']:.2f}" for found in (one, more)]
        wall = more["per_second"] / one["per_second"] / many
        cpu = more["per_cpu_second"] / one["per_cpu_second"]
        table.add_row(stage, *speeds, f"{100 * wall:.0f} %", f"{100 * cpu:.0f} %")
    Console(width=100).print(table)
