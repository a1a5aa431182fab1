"""Whole command lines in forked processes, which need no imports: several ranks, and sudden death."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from stages import __main__


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a process and its children when the ``count``-th file or folder of this name is about to be complete.

    All its bytes are there then, under a temporary name, and none under its own.
    """

    name: str
    count: int = 1

    def arm(self) -> None:
        """In this process and those it forks."""
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event == "os.rename" and fnmatch.fnmatch(Path(arguments[1]).name, self.name):
                seen += 1
                if seen == self.count:
                    os.killpg(0, signal.SIGKILL)

        sys.addaudithook(hook)


def galatea(*arguments: str, kill: Kill | None = None, ranks: int = 1) -> str:
    """Run ``galatea ARGUMENTS`` in ``ranks`` processes; they must succeed, or end by ``kill``.

    Returns:
        what all ranks printed.
    """
    environment = {}
    if ranks > 1:  # as torchrun sets it; the strategy then launches nothing itself
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
        arguments = (*arguments, f"--trainer.devices={ranks}")
    with tempfile.TemporaryFile() as output:

        def run(rank: int) -> None:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
            os.environ |= environment | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {})
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            if kill is not None:
                kill.arm()
            sys.argv = ["galatea", *arguments]
            sys.exit(__main__.main())

        processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        output.seek(0)
        text = output.read().decode()
    expected = 0 if kill is None else -signal.SIGKILL
    assert codes == [expected] * ranks, f"galatea {' '.join(arguments)}: exit codes {codes}\n{text[-4000:]}"
    return text


class InStep(pl.Callback):
    """Says at the end of a fit that all ranks hold the same weights, which differ from those they began with.

    Both are written to ``OUT/way.pt``: (2, N).
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = self._weights(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = self._weights(pl_module)
        assert not torch.equal(weights, self.before)
        if trainer.world_size > 1:
            first, *others = [torch.empty_like(weights) for _ in range(trainer.world_size)]
            torch.distributed.all_gather([first, *others], weights)
            assert all(torch.equal(first, other) for other in others), "the ranks have drifted apart"
        if trainer.is_global_zero:
            torch.save(torch.stack([self.before, weights]), Path(trainer.default_root_dir) / "way.pt")
            print(f"{trainer.world_size} ranks are equal")

    @staticmethod
    def _weights(module: pl.LightningModule) -> torch.Tensor:
        return torch.cat([parameter.detach().float().flatten() for parameter in module.parameters()])


class HalfOnCpu(MixedPrecision):
    """What ``16-mixed`` is on GPUs: float16 where autocast sees fit, and losses that are scaled."""

    def __init__(self) -> None:
        # Not from 2^16 on: a test's few steps must not all go into the search for a scale.
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
