"""CLIP's image encoder, through open_clip."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.errors import UserError, one_line
from models.features.weights import MissingWeightsError, offline_reason, read_state
from models.files import resolve
from models.zoo import pickles
from models.zoo.pickles import Attributes

_COMPILED = re.compile(r"__torch__\.[\w.]+", re.ASCII)  # classes of compiled modules
_MOST_TENSORS = 100_000
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPEmbedding(Configurable):
    """Image embedding: (B, 3, H, W) in [-1, 1] -> (B, dim), not normalised.

    Pictures are resized to the encoder's square (bicubic, antialiased) and normalised as in its training; everything
    is differentiable.

    Args:
        name: an open_clip model.
        weights: one of its tags ("openai"), from open_clip's cache or downloaded; or a file of that model: a state
            dict (.pt, .safetensors) or OpenAI's own TorchScript archive.
        quick_gelu: whether the weights were trained with the sigmoid approximation of GELU, as OpenAI's were; by
            default known for a tag and for OpenAI's archive, false for other files.

    Raises:
        MissingWeightsError: when the weights are not there and cannot be downloaded.
        UserError: for an unknown model or tag, or a file that does not fit.
    """

    def __init__(self, name: str = "ViT-B-32", weights: str = "openai", quick_gelu: bool | None = None) -> None:
        super().__init__()
        found, config = _found(name, weights)
        if isinstance(found, MissingWeightsError) and not config:
            raise found
        path = found if isinstance(found, Path) else _download(name, found, config)
        import open_clip

        if name not in open_clip.list_models():
            raise UserError(f"open_clip has no model {name!r}")
        archive = _is_torchscript(path)
        if quick_gelu is None:
            quick_gelu = bool(config.get("quick_gelu", archive)) or "quickgelu" in name
        state = _read_torchscript(path) if archive else read_state(path, "CLIP")
        state = {key.removeprefix("module."): value for key, value in state.items()}
        with _quiet():  # it warns that nothing was loaded yet
            model = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick_gelu)
        visual: Any = model.visual
        self.network: torch.nn.Module = visual
        tensors = {k.removeprefix("visual."): v.float() for k, v in state.items() if k.startswith("visual.")}
        try:
            self.network.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise UserError(f"{path} does not hold the image encoder of {name}: {one_line(error)[:200]}") from error
        self.dim: int = visual.output_dim
        size = visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        for key, default in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(key, torch.tensor(config.get(key, default)).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.network.eval()

    @staticmethod
    def missing(
        name: str = "ViT-B-32", weights: str = "openai", quick_gelu: bool | None = None
    ) -> MissingWeightsError | None:
        """What would be missing with these arguments; None when it is on this machine. Nothing is downloaded."""
        found, _ = _found(name, weights)
        return found if isinstance(found, MissingWeightsError) else None

    def forward(self, image: Tensor) -> Tensor:
        x = (image + 1) / 2
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True)
        return self.network((x - self.mean) / self.std)


def _missing(name: str, file: str | os.PathLike[str], reason: str) -> MissingWeightsError:
    return MissingWeightsError(
        f"CLIPEmbedding({name})", file, "the open_clip project page", "style.init_args.weights", reason
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a compiled module, by the names of the modules around them; nothing of it is compiled or run.

    Raises:
        UserError: when the file is damaged, or holds anything but data.
    """
    try:
        with open(path, "rb") as stream:
            modules = [("", pickles.load(stream, _COMPILED))]
    except Exception as error:  # of a damaged program for a stack machine, anything can come
        raise UserError(f"{path} cannot be read as CLIP's archive: {one_line(error)[:200]}") from error
    state: dict[str, Tensor] = {}
    while modules and len(state) < _MOST_TENSORS:
        prefix, module = modules.pop()
        if not isinstance(module, Attributes):
            raise UserError(f"{path} cannot be read as CLIP's archive: {prefix or 'its root'} is not a module")
        state |= {prefix + name: value for name, value in module.items() if isinstance(value, Tensor)}
        modules += [(f"{prefix}{name}.", part) for name, part in module.items() if isinstance(part, Attributes)]
    return state


def _found(name: str, weights: str) -> tuple[Path | MissingWeightsError, dict[str, Any]]:
    """The file, or what is missing; and open_clip's description of it where it is that of a tag."""
    path = resolve(weights)
    if path.is_file():
        return path, {}
    if path.suffix or path.parent != Path():
        return _missing(name, path, "there is no"), {}
    from huggingface_hub import try_to_load_from_cache
    from open_clip import pretrained

    config: dict[str, Any] = pretrained.get_pretrained_cfg(name, weights)
    if not config:
        tags = ", ".join(pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"style.init_args.weights: {weights!r} is neither a file nor a tag of {name}, which has: {tags}"
        )
    if not config.get("hf_hub"):
        wanted = Path(config["url"]).name
        cached = Path("~/.cache/clip").expanduser() / wanted
        return (cached if cached.is_file() else _missing(name, wanted, "there is no")), config
    repository, _, file = config["hf_hub"].rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for candidate in names:
        if isinstance(found := try_to_load_from_cache(repository, candidate), str):
            return Path(found), config
    return _missing(name, f"{repository}/{names[0]}", "there is no"), config


def _download(name: str, missing: MissingWeightsError, config: Mapping[str, Any]) -> Path:
    from huggingface_hub import constants
    from open_clip import pretrained

    host = urlparse(constants.ENDPOINT if config.get("hf_hub") else config["url"]).hostname
    if reason := offline_reason(host or ""):
        raise _missing(name, missing.file, reason)
    try:
        return Path(pretrained.download_pretrained(dict(config)))
    except (OSError, RuntimeError) as error:
        raise _missing(name, missing.file, f"the download failed ({one_line(error)[:120]}), there is no") from error
