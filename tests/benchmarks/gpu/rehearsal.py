"""``make gpu``: what only a GPU can show, in at most three minutes, as ``OUT/gpu.json`` and a table.

Each part is a process of its own, forked before anything has touched the GPU: it fails alone, and needs no imports.
docs/performance.md says what the figures mean. ``--device cpu --small`` runs everything at toy sizes, to show that the
rehearsal itself works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.errors import one_line
from models.files import ROOT, atomic_write
from models.version import VERSION
from tests.benchmarks.gpu import networks, training
from tests.benchmarks.gpu.parts import Case, Part, Row, Setting, rows

BUDGET = 160.0  # seconds of all parts: three minutes with the imports before, and what the last part may be late
GRACE = 8.0  # that a part may be late with a case, before it is ended
FOLDERS = ("tests/models/generators", "tests/models/faces", "tests/models/rendering", "tests/stages/test_gpu.py")
"""Where the tests marked ``gpu`` are: collecting all others would take longer than running these."""


def environment(setting: Setting) -> Iterator[Case]:
    """The card, and all versions."""

    def machine() -> Row:
        found: Row = {
            "galatea": VERSION,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "card": None,
            "cores": len(os.sched_getaffinity(0)),
        }
        if setting.device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("torch finds no CUDA device")
            card = torch.cuda.get_device_properties(setting.device)
            found |= {"card": card.name, "capability": f"{card.major}.{card.minor}"}
            found |= {"memory_gib": card.total_memory / 2**30, "cudnn": torch.backends.cudnn.version()}
            found["driver"] = driver()
        return found

    yield Case("machine", machine)


def driver() -> str | None:
    """Version of NVIDIA's driver, where its tool is there to tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=10).splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def tests(setting: Setting) -> Iterator[Case]:
    """The tests marked ``gpu``."""
    yield Case("pytest", lambda: run_tests(setting, [str(ROOT / folder) for folder in FOLDERS]), 15)


class Outcomes:
    """A plugin of pytest that keeps what became of each test, and leaves the rest out when time is over."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.found = setting, {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []
        self.reasons: set[str] = set()

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if self.setting.left < 0:
            pytest.skip("no time was left")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid.rpartition("/")[2])
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons.add(report.longrepr[2].removeprefix("Skipped: "))


def run_tests(setting: Setting, places: list[str]) -> Row:
    """Counts of outcomes."""
    import pytest

    outcomes = Outcomes(setting)
    options = ["-m", "gpu", f"--device={setting.device.type}", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    options += [f"--rootdir={ROOT}", f"--basetemp={setting.folder / 'pytest'}"]
    code = pytest.main([*options, *places], plugins=[outcomes])
    found: Row = {"passed": outcomes.found["passed"], "left_out": outcomes.found["skipped"]}
    if outcomes.reasons:
        found["reasons"] = sorted(outcomes.reasons)
    if outcomes.failures:
        named = ", ".join(outcomes.failures[:5])
        found["failed"] = f"{len(outcomes.failures)} of {sum(outcomes.found.values())} tests: {named}"
    elif code != pytest.ExitCode.OK or not found["passed"]:
        found["failed"] = f"no test has passed; pytest ended with exit code {int(code)}"
    return found


MODULES = ("pytest", "lpips", "open_clip")
"""What parts import when they need it."""

# Seconds of each on a GPU, about. What one leaves, later ones may use: the last has most cases to do without.
PARTS: dict[str, tuple[Part, float]] = {
    "environment": (environment, 6),
    "tests": (tests, 30),
    "free view": (networks.free_view, 10),
    "artwork": (training.artwork, 40),
    "memory": (training.memory, 24),
    "precision": (training.precision, 20),
    "speed": (networks.speed, 30),
}


def perform(pipe: Connection, part: Part, setting: Setting, log: Path) -> None:
    """The process of one part: sends its rows, then None, or why it ended."""
    os.setsid()
    words = open(log, "w", buffering=1)  # noqa: SIM115 - of this process, to its end: the screen is the table's
    for number in (1, 2):
        os.dup2(words.fileno(), number)
    sys.stdout = sys.stderr = words
    if setting.device.type == "cpu":
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    # Its pool of compiling processes would have to import everything first.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    os.chdir(setting.folder)
    try:
        for row in rows(part, setting):
            pipe.send(row)
        pipe.send(None)
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {one_line(error)[:300]}")
    finally:
        words.flush()
        os._exit(0)  # nothing of the parent's is to be cleaned up here


def carry_out(part: Part, setting: Setting, log: Path) -> Row:
    """Run one part in its process, for at most ``GRACE`` seconds after its end; what it says goes to ``log``."""
    begin, cases, failure = time.monotonic(), [], None
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=perform, args=(theirs, part, setting, log))
    process.start()
    theirs.close()
    try:
        while pipe.poll(max(setting.left + GRACE, 0)):
            answer = pipe.recv()
            if not isinstance(answer, dict):
                failure = answer
                break
            cases.append(answer)
        else:
            failure = f"ended after {time.monotonic() - begin:.0f} s, in what follows these cases"
    except EOFError:
        process.join()
        failure = f"its process died with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            except ProcessLookupError:
                process.kill()
        process.join()
    failed = failure is not None or any("failed" in case for case in cases)
    status = "failed" if failed else "skipped" if cases and all("skipped" in case for case in cases) else "passed"
    found = {"status": status, "seconds": time.monotonic() - begin}
    return {**found, **({"failure": failure} if failure is not None else {}), "cases": cases}


def rehearse(device: torch.device, small: bool, out: Path, budget: float = BUDGET) -> Row:
    """Run all parts; writes ``out/gpu.json``, and returns what is in it.

    Raises:
        SystemExit: where the device is not there.
    """
    begin, end, found = time.monotonic(), time.monotonic(), {}
    share = budget / sum(seconds for _, seconds in PARTS.values())
    logs = out.absolute() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, (part, seconds) in PARTS.items():
        end += share * seconds
        if time.monotonic() >= end:
            found[name] = {"status": "skipped", "seconds": 0.0, "failure": "no time was left", "cases": []}
            continue
        with tempfile.TemporaryDirectory(dir=out, ignore_cleanup_errors=True) as folder:
            setting = Setting(device, small, Path(folder).absolute(), end)
            found[name] = carry_out(part, setting, logs / f"{name.replace(' ', '_')}.txt")
        if name == "environment" and found[name]["status"] == "failed" and device.type == "cuda":
            what = found[name].get("failure") or found[name]["cases"][0]["failed"].partition(": ")[2]
            raise SystemExit(f"there is no GPU to rehearse on: {what}; --device cpu --small shows that all parts work")
        if name == "environment":  # what all others need, once: their processes are forked from this one
            for module in MODULES:
                importlib.import_module(module)
    result = {
        "format": 1,
        "device": device.type,
        "small": small,
        "seconds": time.monotonic() - begin,
        "budget_s": budget,
        "failed": [name for name, part in found.items() if part["status"] == "failed"],
        "parts": found,
    }
    with atomic_write(out / "gpu.json") as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(result: Row) -> Table:
    """Every case in a line."""
    machine = result["parts"].get("environment", {}).get("cases") or [{}]
    card, size = machine[0].get("card") or "CPU", "toy sizes, which say nothing about speed" if result["small"] else ""
    title = ", ".join(filter(None, (f"{card}: {result['seconds']:.0f} s", f"torch {machine[0].get('torch')}", size)))
    shown = Table("part", "case", "found", title=title)
    for name, part in result["parts"].items():
        for case in part["cases"]:
            shown.add_row(name, case["case"], figures(case))
        if "failure" in part:
            shown.add_row(name, "", f"[bold]{part['status']}[/bold]: {part['failure']}")
        shown.add_section()
    return shown


def figures(case: Row) -> str:
    """What a case has found, on one line."""
    words = []
    for name, value in case.items():
        if name == "case" or value is None:
            continue
        text = f"{value:.4g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else value
        words.append(f"[bold]{name}[/bold]: {text}" if name == "failed" else f"{name} {text}")
    return "; ".join(words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tests.benchmarks gpu``."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="at toy sizes, to try the rehearsal itself")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json (default runs/gpu)")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all parts (default {BUDGET:.0f})")


def main(arguments: argparse.Namespace) -> None:
    """Rehearse and print; exit code 1 when a part has failed."""
    if arguments.device == "cpu" and not arguments.small:
        raise SystemExit("at full size this takes a GPU: add --small to try the rehearsal on a CPU")
    result = rehearse(torch.device(arguments.device), arguments.small, arguments.out, arguments.budget)
    Console(width=160 if not sys.stdout.isatty() else None).print(table(result))
    print(f"{arguments.out / 'gpu.json'}")
    if result["failed"]:
        raise SystemExit(f"failed: {', '.join(result['failed'])}; what each part has said is in {arguments.out}/logs")
