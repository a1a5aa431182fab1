"""Shipped weights of the embedded world: how large they are, and that they are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from datamodules.mannequins import Scene, render
from datamodules.mannequins.datamodule import MannequinDataModule
from datamodules.mannequins.posed import posed_camera
from datamodules.mannequins.scene import CODE_DIM, POSED_DIM, subject_code
from models import artifact
from models.encoders.base import inverted
from models.files import ROOT
from models.heads.directions import directions_for
from models.heads.subjects import Subjects
from models.metrics.geometry import depth_mae
from models.metrics.image import psnr
from models.metrics.prior import closed_meshes, surface_slope

HEADS = (1_100_004, 1_100_005)  # of the test split


def megabytes(name: str) -> float:
    return sum(file.stat().st_size for file in (ROOT / "assets" / name).rglob("*") if file.is_file()) / 2**20


@pytest.fixture(scope="module")
def prior():
    return artifact.load("assets/sdf_prior").module("generator").requires_grad_(False)


def test_the_sdf_prior_is_small_and_whole(prior):
    assert megabytes("sdf_prior") <= 3
    assert prior.z_dim == CODE_DIM and prior.init_args["width"] <= 128
    assert list(prior.mean_latents.groups) == ["renderer", "decoder"]
    assert (prior.init_args["raw_resolution"], prior.resolution) == (32, 64)
    assert 0.01 < float(prior.beta) < 0.1  # neither fog nor thinner than the distance of samples can show
    assert artifact.load("assets/sdf_prior").module("discriminator").resolution == 64


@torch.no_grad()
def test_the_sdf_prior_knows_unseen_heads_by_their_codes(prior):
    camera = prior.rig.camera(torch.tensor([-0.4, 0.0, 0.4]))
    for head in HEADS:
        z = subject_code([head])
        truth = render(Scene.from_code(z).repeat_interleave(3), camera, 32)
        found = prior.synthesis(prior.mapping(z), camera)
        solid = (truth.mask > 0.99) & (found.alpha > 0.5)
        assert psnr(found.raw, truth.image).mean() > 21
        assert depth_mae(found.depth, truth.depth, solid.float()).mean() < 0.045
        slope = surface_slope(prior, prior.mapping(z), camera, found.depth, found.alpha > 0.9)
        assert slope.mean() == pytest.approx(1, abs=0.1)


def test_distances_of_the_sdf_prior_are_the_worlds(prior):
    """Signs and sizes of the field around unseen heads."""
    z = subject_code(HEADS)
    points = 1.4 * torch.rand(2, 400, 3, generator=torch.Generator().manual_seed(0)) - 0.7
    truth = MannequinDataModule(coded=True).distances(z, points)
    found = prior.surface(prior.mapping(z), points)[..., 0]
    near = truth.abs() < 0.2  # it is taught there, see FieldLoss.band
    assert (found - truth).abs()[near].mean() < 0.06
    clear = near & (truth.abs() > 0.1)
    assert (found.sign() == truth.sign())[clear].float().mean() > 0.95


def test_meshes_of_the_sdf_prior_are_closed(prior):
    assert [record.value for record in closed_meshes(prior, 1, 0)] == [1.0]


@pytest.fixture(scope="module")
def encoders():
    return artifact.load("assets/e3dge")


def test_the_encoders_are_small_and_of_the_sdf_prior(encoders, prior):
    assert megabytes("e3dge") <= 6
    assert encoders.origin("generator")[0].id == artifact.load("assets/sdf_prior").id
    assert encoders.extra["geometry"] == "sdf"
    assert set(encoders.extra["trained"]) == {"local_encoder", "texture_fusion", "aligner", "alignment_fusion"}
    local = encoders.module("local")
    assert local.alignment == "hybrid"
    local.check(prior)


@torch.no_grad()
def test_the_encoders_make_heads_of_unseen_pictures(encoders, prior):
    """Codes alone, and with details, seen from the picture's camera and from another."""
    encoder, local = (encoders.module(name).eval().requires_grad_(False) for name in ("encoder", "local"))
    found = {"codes": [], "details": []}
    for head in HEADS:
        cameras = prior.rig.camera(torch.tensor([0.2, -0.15]))
        truth = render(Scene.from_code(subject_code([head])).repeat_interleave(2), cameras, 64)
        ws, expression = inverted(truth.image[:1], encoder, prior)
        plain = prior.synthesis(ws, cameras)
        source = local.source(prior, ws, truth.image[:1], cameras[:1], expression)
        detailed = local.edit(prior, source, cameras).synthesis(prior, cameras)
        for kind, rendering in (("codes", plain), ("details", detailed)):
            found[kind].append(psnr(rendering.image.clamp(-1, 1), truth.image))
    codes, details = (torch.stack(found[kind]).mean(0) for kind in ("codes", "details"))
    assert codes.min() > 20
    assert details[0] > codes[0] + 1.5 and details[1] > codes[1] + 0.5


def test_directions_are_of_the_sdf_prior(encoders):
    directions = directions_for(artifact.load("assets/sdf_directions"), Subjects(encoders))
    assert directions.names[:4] == ("smile", "mouth_open", "glasses", "beard")
    assert megabytes("sdf_directions") < 0.1


@torch.no_grad()
def test_directions_change_what_they_are_called(prior):
    """Opened mouths are larger, more glasses are darker around the eyes; hair stays where it is."""
    directions = artifact.load("assets/sdf_directions").module("directions")
    camera = prior.rig.camera(torch.zeros(1))
    z = torch.randn(8, prior.z_dim, generator=torch.Generator().manual_seed(1))
    ws = prior.mapping(z)
    shown = {}
    for name in ("mouth_open", "glasses", "hair_light"):
        for strength in (-0.7, 0.7):
            moved = directions.apply(ws, {name: strength})
            shown[name, strength] = prior.synthesis(moved, camera.repeat_interleave(8)).image
    change = {name: (shown[name, 0.7] - shown[name, -0.7]).abs().mean(1) for name, _ in shown}
    places = {"mouth_open": (slice(38, 48), slice(26, 38)), "glasses": (slice(26, 34), slice(22, 42)),
              "hair_light": (slice(10, 20), slice(22, 42))}  # fmt: skip
    for name, (rows, columns) in places.items():
        there = {other: float(change[other][:, rows, columns].mean()) for other in places}
        assert max(there, key=there.get) == name, (name, there)


@pytest.fixture(scope="module")
def pictures():
    """Unseen heads from views of their own: codes (4, POSED_DIM), pictures (4, 3, 64, 64)."""
    heads = [*HEADS, 1_100_006, 1_100_007]
    poses = torch.tensor([[-0.8, 0.3], [0.0, 0.0], [0.5, -0.4], [1.2, 0.1]])
    codes = torch.cat([subject_code(heads), poses], 1)
    return codes, render(Scene.from_code(codes[:, :CODE_DIM]), posed_camera(codes), 64, supersample=2).image


@torch.no_grad()
def test_the_2d_prior_knows_unseen_pictures_by_their_codes(pictures):
    assert megabytes("prior2d") <= 5
    held = artifact.load("assets/prior2d")
    generator, (codes, truth) = held.module("generator"), pictures
    assert (generator.z_dim, generator.resolution) == (POSED_DIM, 64)
    assert held.module("discriminator").resolution == 64
    assert psnr(generator.synthesis(generator.mapping(codes)).image, truth).mean() > 24


@torch.no_grad()
def test_encoders_of_the_2d_prior_know_unseen_pictures(pictures):
    """W+ and Z+ hold more than W."""
    assert megabytes("encoders2d") <= 4
    generator, (_, truth) = artifact.load("assets/prior2d").module("generator"), pictures
    found = {}
    for name in ("w", "wplus", "zplus"):
        encoder = artifact.load(f"assets/encoders2d/{name}").module("encoder")
        ws, _ = inverted(truth, encoder, generator)
        assert bool((ws.ws == ws.ws[:, :1]).all()) == (name == "w")
        found[name] = float(psnr(generator.synthesis(ws).image, truth).mean())
    assert found["w"] > 20 and min(found["wplus"], found["zplus"]) > found["w"] + 0.5
