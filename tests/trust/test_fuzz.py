"""What a stranger may send: some hundred mutations of each kind of file, in one process, each answered in one sentence.

Seeded: a failure names its seed. Whatever a reader answers, it is a result or a UserError; it takes no longer, and no
more memory, than reading the whole file would; and nothing appears outside of the folder that it works in.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.artworks import read_artworks
from datamodules.portraits import PortraitDataModule
from models import artifact
from models.camera import Rig
from models.documents import parse_json, parse_yaml
from models.errors import UserError, one_line
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.codes import HeadCode, HeadCodes
from models.image import read_image
from models.zoo import recognise
from models.zoo.reading import read
from models.zoo.stylegan2 import official_generator
from stages.pipeline.run import read_pipeline
from stages.pipeline.slurm import read_cluster
from tests.stages import tiny

SEEDS = range(150)
SECONDS, MEGABYTES = 5.0, 1500

POISON = [
    None, True, -1, 0, 1e308, 10**400, "", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "\u202e", "x" * 10_000,
    [], {}, [[[[]]]],
    {"class_path": "os.system", "init_args": {}}, {"a": {"a": {"a": {}}}}, float("nan"), float("-inf"),
]  # fmt: skip


def flip(content: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, doubled or moved."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 8)):
        place = dice.randrange(max(len(data), 1))
        match dice.randrange(5):
            case 0:
                data[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[place : place + dice.randint(1, 64)]
            case 2:
                data[place:place] = data[place : place + dice.randint(1, 64)]
            case 3:
                data[place : place + 8] = dice.choice([b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")])
            case _:
                data = data[: max(place, 1)]
    return bytes(data)


def replace(value: Any, dice: random.Random) -> Any:
    """A value with one of its parts replaced by poison, renamed or left out."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key = dice.choice(sorted(value))
        match dice.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                name = dice.choice([text for text in POISON if isinstance(text, str)])
                return {**value, name: value[key]}
            case _:
                return {**value, key: replace(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        index = dice.randrange(len(value))
        return [*value[:index], replace(value[index], dice), *value[index + 1 :]]
    return dice.choice(POISON)


def text_of(value: Any) -> str:
    """As JSON, with what JSON cannot say."""
    return json.dumps(value, default=str)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    prior = tiny.prior(folder / "prior")
    generator = prior.module("generator")
    ws = generator.mapping(generator.sample_z(1, torch.Generator().manual_seed(0)))
    head = HeadCode(ws, None, torch.zeros(1, len(generator.expressions)), generator.rig.camera(0.0).label())
    anchors = HeadCodes.pack({"ann": head}, generator)
    artifact.save(folder / "anchored", stage="anchor", modules={"anchors": anchors}, parents={"prior": prior})
    torch.manual_seed(0)
    weights = official_generator(StyleGAN2Generator(channels=(8, 8), style_dim=8))
    torch.save({"g_ema": {key: tensor.clone() for key, tensor in weights.items()}}, folder / "weights.pt")
    torch.save({"g_ema": {"x": torch.ones(3)}}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "art").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), (name == "a" and "red") or "blue").save(folder / "art" / f"{name}.png")
    labels = [[f"{name}.png", Rig().camera(0.1).label()[0].tolist()] for name in ("a", "b")]
    (folder / "labels.json").write_text(json.dumps({"labels": labels}))
    (folder / "list.json").write_text(json.dumps({"items": [{"file": "a.png", "yaw_deg": 3, "crop": [0, 0, 20, 20]}]}))
    for name in ("pipelines/artform.yaml", "cluster/example.yaml"):
        shutil.copy(Path("configs") / name, folder)
    return folder


def artifacts(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    shutil.copytree(sound / "anchored", work / "anchored")
    shutil.copytree(sound / "prior", work / "prior")
    place = work / dice.choice(["anchored", "prior"])
    file = place / dice.choice(["manifest.json", "manifest.json", "run.json"])
    if dice.random() < 0.7:
        file.write_text(text_of(replace(json.loads(file.read_text()), dice)))
    else:
        file = dice.choice(sorted(p for p in place.iterdir() if p.is_file()))
        file.write_bytes(flip(file.read_bytes(), dice))

    def use() -> None:
        found = artifact.load(place)
        for name in found.manifest["modules"]:
            found.module(name)
        assert found.licence and found.ancestors is not None

    return use


def weights(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    file = work / "weights.pt"
    file.write_bytes(flip((sound / dice.choice(["weights.pt", "old.pt"])).read_bytes(), dice))

    def use() -> None:
        official = read(file)
        recognise(official).convert(official, {})

    return use


def documents(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    kind = dice.choice(["artform", "example"])
    content = (sound / f"{kind}.yaml").read_bytes()
    file = work / f"{kind}.yaml"
    if dice.random() < 0.5:
        file.write_bytes(flip(content, dice))
    else:
        file.write_text(text_of(replace(parse_yaml(content, kind), dice)))
    if kind == "artform":
        return lambda: read_pipeline(file)
    return lambda: read_cluster(file).resources("anchor", "anchor")


def lists(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    shutil.copytree(sound / "art", work / "art")
    kind = dice.choice(["labels", "list"])
    content = (sound / f"{kind}.json").read_bytes()
    changed = flip(content, dice) if dice.random() < 0.4 else text_of(replace(parse_json(content, kind), dice)).encode()
    (work / "art" / {"labels": "dataset.json", "list": "artworks.json"}[kind]).write_bytes(changed)

    def use() -> None:
        read_artworks(str(work / "art"), size=16)
        if kind == "labels":
            PortraitDataModule(str(work / "art"), size=16, val_fraction=0.5, test_fraction=0).setup("fit")

    return use


def archives(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    with zipfile.ZipFile(work / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in (sound / "art").iterdir():
            file.write(path, path.name)
        file.write(sound / "labels.json", "dataset.json")
    (work / "x.zip").write_bytes(flip((work / "x.zip").read_bytes(), dice))

    def use() -> None:
        data = PortraitDataModule(str(work / "x.zip"), size=16, val_fraction=0.5, test_fraction=0)
        data.setup("fit")
        for item in data.datasets["train"]:
            assert item["image"].isfinite().all()

    return use


def pictures(sound: Path, work: Path, dice: random.Random) -> Callable[[], Any]:
    suffix = dice.choice(["png", "jpg", "webp", "tif", "gif", "bmp", "avif", "jp2", "ppm", "tga"])
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(work / f"x.{suffix}")
    file = work / "x.png"  # whatever it is
    file.write_bytes(flip((work / f"x.{suffix}").read_bytes(), dice))
    return lambda: read_image(file)


@pytest.mark.parametrize(
    "kind", [artifacts, weights, documents, lists, archives, pictures], ids=lambda kind: kind.__name__
)
def test_strangers(sound, tmp_path, kind):
    (tmp_path / "x").mkdir()  # where ../x leads
    (tmp_path / "x" / "precious.txt").touch()
    refused = 0
    for seed in SEEDS:
        dice = random.Random(f"{kind.__name__}-{seed}")
        work = tmp_path / str(seed)
        work.mkdir()
        use = kind(sound, work, dice)
        before = sorted(work.rglob("*"))
        memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                use()
            except UserError as error:
                refused += 1
                text = one_line(error)
                assert text.isprintable() and len(text) < 4000, seed
        assert time.process_time() - begin < SECONDS, seed
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES, seed
        assert sorted(work.rglob("*")) == before, seed
        shutil.rmtree(work)
    assert refused > len(SEEDS) / 4  # the mutations do damage
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["x", "precious.txt"]
