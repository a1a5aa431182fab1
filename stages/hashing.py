"""The step hash: equal when running a step again would give the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.artifact import MANIFEST, manifest_id, read_manifest
from models.files import os_errors, resolve, sha256

# Where, how visibly and how fast a step runs; not what comes out.
_NOT_HASHED = frozenset(
    "out wandb threads step_hash config ckpt_path weights_only verbose return_predictions logger callbacks devices "
    "accelerator num_nodes strategy default_root_dir enable_progress_bar enable_model_summary log_every_n_steps "
    "num_workers save_every profiler plugins detect_anomaly barebones enable_checkpointing inference_mode".split()
)


def step_hash(stage: str, command: str, config: Mapping[str, Any]) -> str:
    """Hash of a step.

    Covers the stage, its command, the version of the code and the configuration, in which the path of an
    existing file or folder counts by its content and an artifact by its id; not devices, loggers or output.

    Raises:
        UserError: when an input cannot be read.
    """
    content = {"code": code_version(), "stage": stage, "command": command, "config": _content(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def code_version() -> str:
    """The version string of this package, in ``models/version.py``."""
    from models.version import VERSION

    return VERSION


def _content(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _content(v) for k, v in value.items() if k not in _NOT_HASHED}
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    if isinstance(value, str | Path) and value != "":
        path = resolve(value)
        with os_errors(path, "read"):
            if path.exists():
                return path_hash(path)
    return value


def path_hash(path: Path) -> str:
    """Hash of what a path holds: a file's bytes, an artifact's id, or all names and files of a folder."""
    if path.is_file():
        return sha256(path)
    for folder in (path, path / "artifact"):
        if (folder / MANIFEST).exists():
            return manifest_id(read_manifest(folder))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    content = [[p.relative_to(path).as_posix(), sha256(p)] for p in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
