"""Shipped weights of E3DGE's world: how large they are, and that they are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from datamodules.mannequins import Scene, render
from datamodules.mannequins.datamodule import MannequinDataModule
from datamodules.mannequins.scene import CODE_DIM, subject_code
from models import artifact
from models.files import ROOT
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
