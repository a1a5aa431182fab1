"""Heads as codes: drawn, found, and those of the embedded world with their surfaces."""

import pytest
import torch

from datamodules.heads import DrawnHeads, FoundHeads, Head
from datamodules.mannequin_heads import MannequinHeads
from datamodules.mannequins.posed import posed_camera
from datamodules.mannequins.render import RIG
from datamodules.mannequins.scene import CODE_NAMES, POSED_DIM
from datamodules.truth import KnowsSurface
from models import artifact
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.codes import HeadCode, HeadCodes


def generator(z_dim=5, style_dim=6):
    torch.manual_seed(0)
    return StyleGAN2Generator(channels=[4, 4, 4], style_dim=style_dim, z_dim=z_dim, mapping_layers=1)


@torch.no_grad()
def test_a_head_hangs_on_its_number_alone():
    many, few = DrawnHeads(3).items, DrawnHeads(1, first=2).items
    assert [head.id for head in many] == ["00000000", "00000001", "00000002"]
    own = generator()
    torch.testing.assert_close(many[2].codes(own).ws, few[0].codes(own).ws)
    assert not torch.equal(many[1].codes(own).ws, few[0].codes(own).ws)
    assert not torch.equal(DrawnHeads(1, first=2, seed=1).items[0].codes(own).ws, few[0].codes(own).ws)


@torch.no_grad()
def test_heads_of_an_artifact(tmp_path):
    own = generator()
    codes = {name: HeadCode(own.mapping(torch.randn(1, 5)), None, torch.zeros(1, 0), None) for name in ("b", "a")}
    artifact.save(tmp_path / "found", stage="optimise", modules={"anchors": HeadCodes.pack(codes, own)})
    items = FoundHeads(str(tmp_path / "found")).items
    assert [head.id for head in items] == ["a", "b"]
    torch.testing.assert_close(items[0].codes(own).ws, codes["a"].latents.ws)
    with pytest.raises(
        UserError, match=r"a has codes of the shapes .*\(1, 6, 6\).* this generator's are .*\(1, 6, 4\)"
    ):
        items[0].codes(generator(style_dim=4))
    artifact.save(tmp_path / "other", stage="prior", modules={"anchors": own})
    with pytest.raises(UserError, match="holds no codes of heads, but StyleGAN2Generator"):
        FoundHeads(str(tmp_path / "other")).items


def test_the_world_knows_its_surfaces():
    """Codes say the poses; depth, albedo and light are of the pictures' cameras."""
    data = MannequinHeads("test", subjects=2, first=5, size=24, supersample=1)
    assert isinstance(data, KnowsSurface) and data.split == "test"
    one = data.items[0]
    assert one.id == "head-1100005" and one.z.shape == (1, POSED_DIM)
    truth = data.surface(one.id)
    yaw, pitch = RIG.angles(truth.camera)
    assert abs(float(yaw)) <= 0.35 and abs(float(pitch)) <= 0.14
    assert truth.depth.shape == truth.mask.shape == truth.face.shape == (1, 1, 24, 24)
    assert bool((truth.face <= truth.mask).all()) and 0.05 < float(truth.face.mean()) < 0.6
    inside = truth.depth[truth.face > 0]
    assert RIG.radius - 2 < float(inside.min()) < float(inside.max()) < RIG.radius + 1
    assert float(truth.towards.norm()) == pytest.approx(1) and float(truth.towards[0, 2]) < 0
    found = torch.cat([torch.stack(RIG.angles(posed_camera(item.z)), 1) for item in data.items])
    wanted = torch.cat([torch.stack(RIG.angles(data.surface(item.id).camera), 1) for item in data.items])
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)


def test_light_from_the_side():
    """The code says so and the truth has it; the rest stays."""
    asked = {"subjects": 1, "size": 24, "supersample": 1}
    plain, lit = MannequinHeads("test", **asked), MannequinHeads("test", **asked, traits={"light_x": 2.0})
    changed = (plain.items[0].z != lit.items[0].z)[0].nonzero().flatten().tolist()
    assert changed == [CODE_NAMES.index("light_x")]
    one, other = (data.surface("head-1100000") for data in (plain, lit))
    assert torch.equal(one.depth, other.depth) and torch.equal(one.albedo, other.albedo)
    assert float(other.towards[0, 0].abs()) > 0.4 and not torch.equal(one.towards, other.towards)


def test_what_cannot_be():
    with pytest.raises(UserError, match="heads must be at least 1"):
        DrawnHeads(0)
    with pytest.raises(UserError, match="there are no subjects 0 to 0 in split"):
        MannequinHeads(subjects=0)
    with pytest.raises(UserError, match="no number of a code is called 'side_light', there are: head_width"):
        MannequinHeads(traits={"side_light": 2.0})
    with pytest.raises(UserError, match=r"it has a code of 7 numbers, this generator takes 5"):
        Head("it", z=torch.zeros(1, 7)).codes(generator())
