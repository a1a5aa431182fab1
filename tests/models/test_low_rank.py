"""Factors of changes: exact where a change has that rank, the nearest elsewhere; refused where they do not fit."""

import pytest
import torch

from models import artifact
from models.generators.stylegan2 import StyleGAN2Generator
from models.low_rank import LEFT, RIGHT, factors, folded, unfold
from models.manifest import ArtifactError
from tests.models.generators.protocol import awaken


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_change_of_that_rank_is_kept_whole():
    before = draws(12, 4, 3, 3)
    after = before + (draws(12, 2, seed=1) @ draws(2, 36, seed=2)).view(12, 4, 3, 3)
    left, right = factors(before, after, 2)
    assert left.shape == (12, 2) and right.shape == (2, 36)
    torch.testing.assert_close(folded(before, left, right), after)
    left, right = factors(before, after, 1)
    strength = torch.linalg.svdvals((after - before).flatten(1))
    error = (folded(before, left, right) - after).flatten(1)
    torch.testing.assert_close(torch.linalg.matrix_norm(error), strength[1])  # Eckart and Young


def test_what_factors_would_not_make_smaller():
    assert factors(draws(4), draws(4, seed=1), 1) is None
    assert factors(draws(4, 4), draws(4, 4, seed=1), 2) is None
    assert factors(torch.zeros(9, 9, dtype=torch.int64), torch.ones(9, 9, dtype=torch.int64), 1) is None


def test_halves_that_are_missing_or_of_another_weight():
    base = {"w": draws(6, 6)}
    for stored in (
        {"w" + LEFT: draws(6, 1)},
        {"w" + RIGHT: draws(1, 6)},
        {"v" + LEFT: draws(6, 1), "v" + RIGHT: draws(1, 6)},
    ):
        with pytest.raises(ValueError, match="no other half"):
            unfold(stored, base)
    with pytest.raises(ValueError, match="do not make"):
        unfold({"w" + LEFT: draws(6, 1), "w" + RIGHT: draws(1, 5)}, base)
    for whole, left, right in ((torch.zeros(()), draws(1, 1), draws(1, 1)), (base["w"], draws(6, 1), draws(6))):
        with pytest.raises(ValueError, match="do not make"):  # files may say anything
            unfold({"w" + LEFT: left, "w" + RIGHT: right}, {"w": whole})


def test_an_artifact_of_factors(tmp_path):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=[16, 16, 16], style_dim=8, mapping_layers=2)).eval()
    prior = artifact.save(tmp_path / "prior", stage="prior", modules={"generator": generator})
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    options = {"stage": "finetune", "modules": {"generator": generator}, "parents": {"prior": prior}}
    options["delta_of"] = {"generator": prior}
    artifact.save(tmp_path / "whole", **options)
    artifact.save(tmp_path / "thin", **options, rank={"generator": 1}, dtype={"generator": "float16"})
    sizes = [(tmp_path / name / "generator.safetensors").stat().st_size for name in ("whole", "thin")]
    assert sizes[1] < 0.3 * sizes[0]
    thin, before = (
        artifact.load(tmp_path / "thin").module("generator").state_dict(),
        prior.module("generator").state_dict(),
    )
    for name, tensor in generator.state_dict().items():
        expected = tensor
        if (found := factors(before[name], tensor, 1)) is not None:
            expected = folded(before[name], *found)
        torch.testing.assert_close(thin[name], expected, atol=2e-3, rtol=2e-3)
    stored = (tmp_path / "thin" / "generator.safetensors").read_bytes()
    (tmp_path / "thin" / "generator.safetensors").write_bytes(stored.replace(b"//left", b"//lefd"))
    with pytest.raises(ArtifactError):
        artifact.load(tmp_path / "thin").module("generator")
