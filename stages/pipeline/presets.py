"""What suits a generator: ``configs/presets/KIND/STAGE.yaml``, chosen by what its artifact says it is.

A pipeline names the parameter that gives the generator's artifact: ``preset: model``. KIND is the file of
``models/generators`` that the generator's class is in; a generator of the embedded world, whatever its class, has none,
for the stages are set for it (:func:`stages.base.foreign.is_foreign`). Where a kind has no file of its own for a stage,
``configs/presets/STAGE.yaml`` suits all kinds; a kind without a folder takes the stages as they are. A step reads these
below its own configurations, so that all that a user sets wins, and its hash covers them.

Presets name real feature networks. Where the weights of one are not on this machine, the embedded one stands in for it
(``configs/presets/embedded``), and one sentence says what to fetch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

from models.files import ROOT, resolve
from models.manifest import MANIFEST, read_manifest
from stages.base.foreign import is_foreign
from stages.configs import read_config, read_yaml

if TYPE_CHECKING:
    from models.features.weights import MissingWeightsError

PRESETS = "configs/presets"
STAND_INS = f"{PRESETS}/embedded"


def kind(artifact: str) -> str | None:
    """Whose presets suit the generator of an artifact; None where there are none of its kind.

    Raises:
        ArtifactError: when there is no artifact.
    """
    folder = resolve(artifact)
    manifest = read_manifest(folder if (folder / MANIFEST).exists() else folder / "artifact")
    entry = manifest["modules"].get("generator", {"class_path": None, "init_args": {}})
    match = re.fullmatch(r"models\.generators\.([a-z0-9_]+)\.[A-Za-z0-9]+", str(entry["class_path"]))
    if match is None or not (ROOT / PRESETS / match[1]).is_dir():
        return None
    return match[1] if is_foreign(entry["class_path"], entry["init_args"]) else None


def configs(kind: str, stage: str) -> list[str]:
    """The configuration that suits a kind of generator in a stage; none where the stage's own does."""
    names = (f"{PRESETS}/{kind}/{stage}.yaml", f"{PRESETS}/{stage}.yaml")
    return [name for name in names if (ROOT / name).exists()][:1]


def stand_ins(stage: str, configs: Sequence[str], given: Set[str]) -> Iterator[tuple[str, str, MissingWeightsError]]:
    """Of the networks that presets name, those whose weights are not here.

    Args:
        configs: the presets.
        given: options of the user, ``model.style.init_args.weights``: a network that they name is left to them.

    Yields:
        the option that names the network, the configuration of what stands in for it, and what is missing.
    """
    for name, network in read_config(stage, configs).get("model", {}).items() if configs else ():
        option, stand_in = f"model.{name}", f"{STAND_INS}/{name}.yaml"
        if not (ROOT / stand_in).exists() or any(f"{key}.".startswith(f"{option}.") for key in given):
            continue
        if (missing := _missing(network)) is not None:
            yield option, stand_in, missing


def told(command: Sequence[str]) -> list[str]:
    """Names of the classes that stand in for networks in a step's command, of which the pipeline has told."""
    files = [word.removeprefix("--config=") for word in command]
    networks = [read_yaml(ROOT / file)["model"] for file in files if file.startswith(f"{STAND_INS}/")]
    return [entry["class_path"].rpartition(".")[2] for network in networks for entry in network.values()]


def _missing(network: dict[str, Any]) -> MissingWeightsError | None:
    from models.features.weights import NeedsWeights  # here: heavy, as networks are

    module, _, name = network["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return found.missing(**network.get("init_args", {})) if isinstance(found, NeedsWeights) else None
