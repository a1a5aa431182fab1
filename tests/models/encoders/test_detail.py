"""Details from a photo onto the manifolds, at a small size."""

import math

import pytest
import torch

from models import artifact
from models.camera import Camera, Rig
from models.encoders.detail import DetailEncoder, DetailReconstructor, ManifoldUpsampler, trilinear
from models.generators.manifold import ManifoldGenerator
from models.heads.codes import HeadCode
from models.heads.detailed import DetailedGenerator
from models.heads.photos import PhotoSet
from tests.models.generators.protocol import awaken, seeded

ENCODER = {"resolution": 16, "voxel": (4, 8, 8), "features": 5, "widths": (6, 8), "unet": (4, 6), "blocks": 1}
RECONSTRUCTOR = {
    "features": 4, "resolution": 16, "voxel": [4, 8, 8], "voxel_features": 5, "widths": [6, 8], "unet": [4, 6],
    "blocks": 1, "atlas": 6, "upsampler": [6, 5],
}  # fmt: skip
GENERATOR = {
    "z_dim": 8, "w_dim": 16, "resolution": 16, "channels": [16, 12, 8], "start": 4, "mapping_hidden": 16,
    "background_channels": [8, 8], "ambient": 5, "samples": 48, "predictor": {"hidden": 8, "grid": 40},
}  # fmt: skip


def reconstructor(**changes):
    torch.manual_seed(0)
    return awaken(DetailReconstructor(**RECONSTRUCTOR | changes)).eval()


def generator(**changes):
    torch.manual_seed(0)
    return awaken(ManifoldGenerator(**GENERATOR | changes)).eval()


def photos(generator, count=1):
    """Renderings, a little redder than the generator can make them."""
    ws = generator.mapping(generator.sample_z(count, seeded(5))).detach()
    camera = generator.rig.camera(torch.linspace(-0.3, 0.3, count))
    with torch.no_grad():
        image = generator.synthesis(ws, camera).image + torch.tensor([0.3, 0.0, 0.0])[:, None, None]
    neutral = torch.zeros(1, len(generator.expressions))
    label = camera.label()
    anchors = {f"p{i}": HeadCode(ws[i], None, neutral, label[i : i + 1]) for i in range(count)}
    return PhotoSet.collect(anchors, {f"p{i}": image[i] for i in range(count)}, generator)


def test_lookup_against_a_loop_in_float64():
    """Eq. 5: to camera axes, division by depth, and the eight voxels around."""
    encoder = DetailEncoder(**ENCODER).double()
    rig = Rig(near=5.6, far=8.4)
    camera = rig.camera(torch.tensor([0.4, -0.7]), torch.tensor([0.1, -0.2])).to(torch.float64)
    voxel = torch.randn(2, 5, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    points = torch.randn(2, 30, 3, generator=seeded(1), dtype=torch.float64) * 0.7
    found = encoder.lookup(voxel, points, camera, rig)
    inside = 0
    for b in range(2):
        world2cam = torch.linalg.inv(camera.cam2world[b])
        for p in range(30):
            x, y, z = (world2cam[:3, :3] @ points[b, p] + world2cam[:3, 3]).tolist()
            focal = float(camera.intrinsics[b, 0, 0])
            # In voxels, from the centre of the first: columns and rows span the picture, slices near to far.
            place = [
                (x / z * focal + 0.5) * 8 - 0.5,
                (y / z * focal + 0.5) * 8 - 0.5,
                (z - 5.6) / (8.4 - 5.6) * 4 - 0.5,
            ]
            low = [math.floor(v) for v in place]
            expected = torch.zeros(5, dtype=torch.float64)
            for corner in range(8):
                at = [low[a] + (corner >> a & 1) for a in range(3)]
                share = math.prod(1 - abs(place[a] - at[a]) for a in range(3))
                if all(0 <= at[a] < (8, 8, 4)[a] for a in range(3)):
                    expected += share * voxel[b, :, at[2], at[1], at[0]]
                    inside += 1
            torch.testing.assert_close(found[b, p], expected, atol=1e-5, rtol=1e-5)  # the camera is of fp32
    assert inside > 200


def test_the_frustum_is_bounded_by_the_outermost_rays():
    encoder, rig = DetailEncoder(**ENCODER), Rig(near=5.6, far=8.4)
    camera = rig.camera(0.5, 0.2)
    origins, directions = camera.rays_at(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]]))
    depth = torch.tensor([5.6, 8.4, 7.0])[:, None]
    corners = encoder.place(origins + depth * directions, camera, rig)
    torch.testing.assert_close(corners, torch.tensor([[[-1.0, -1, -1], [1, 1, 1], [0, 0, 0]]]), atol=1e-5, rtol=0)


def test_world_space_is_that_of_a_frontal_camera():
    """At the pivot's depth both agree, and turning the camera changes nothing."""
    rig = Rig(near=5.6, far=8.4)
    flat = torch.tensor([[[0.3, 0.2, 0.0], [-0.5, -0.4, 0.0]]]) + torch.tensor(rig.pivot)
    camera, world = DetailEncoder(**ENCODER), DetailEncoder(**ENCODER, space="world")
    ours, theirs = world.place(flat, rig.camera(0.0), rig), camera.place(flat, rig.camera(0.0), rig)
    torch.testing.assert_close(ours[..., :2] * rig.far / rig.radius, theirs[..., :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[..., 2], theirs[..., 2], atol=1e-5, rtol=0)
    assert torch.equal(ours, world.place(flat, rig.camera(0.9), rig))
    assert ours[0, 0, 0] > 0 and ours[0, 0, 1] < 0  # right is +x, up is -y


def test_upsampler_treats_all_manifolds_alike():
    torch.manual_seed(0)
    upsampler = awaken(ManifoldUpsampler(5, 3, (6, 4)))
    f_lr = torch.randn(2, 4, 5, 6, 6)
    f_hr = upsampler(f_lr)
    assert f_hr.shape == (2, 4, 3, 24, 24) and upsampler.scale == 4
    torch.testing.assert_close(upsampler(f_lr.flip(1)), f_hr.flip(1))


@pytest.mark.parametrize("super_resolution", [True, False])
def test_training_starts_at_the_coarse_result(super_resolution):
    prior = generator()
    fresh = DetailReconstructor(**RECONSTRUCTOR, super_resolution=super_resolution)
    photo = photos(prior)
    head = DetailedGenerator(prior, fresh, photo)
    anchor = photo["p0"]
    with torch.no_grad():
        coarse = prior.synthesis(anchor.latents, anchor.camera).image
        assert torch.equal(head.synthesis(anchor.latents, anchor.camera).image, coarse)
        awaken(fresh)
        assert (head.synthesis(anchor.latents, anchor.camera).image - coarse).abs().max() > 1e-3


@pytest.mark.parametrize("super_resolution", [True, False])
def test_every_parameter_learns(super_resolution):
    prior, network = generator(), reconstructor(super_resolution=super_resolution)
    photo = photos(prior, 2)
    anchor = photo["p0"]
    details = network(photo.image, photo.image * 0.9, Camera.from_label(photo.label), prior)
    ws = prior.mapping(prior.sample_z(2, seeded(5)))
    image = prior.synthesis(ws, anchor.camera.repeat_interleave(4), edit=details.edit).image  # two views each
    image.square().mean().backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_the_paper_has_four_convolutions_in_u():
    """A.2: two blocks of two, and no more."""
    torch.manual_seed(0)
    upsampler = ManifoldUpsampler(5, 3, (6, 4), project=False)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in upsampler.modules()) == 4
    f_lr = torch.randn(2, 4, 5, 6, 6)
    assert upsampler.scale == 4 and not upsampler(f_lr).any(), "training starts at the coarse result"
    assert awaken(upsampler)(f_lr).shape == (2, 4, 3, 24, 24)


SHARED = {
    "field": "triplane", "background": "shared", "triplane": {"features": 4, "hidden": 8, "extent": 0.9},
    "flattening": "frontal",
}  # fmt: skip


@pytest.mark.parametrize("super_resolution", [True, False])
def test_details_on_the_plane_behind_the_head(super_resolution):
    """Sec. 3.3: all surfaces have details, of which GRAM's last is the plane."""
    prior = generator(**SHARED)
    network = reconstructor(background=True, super_resolution=super_resolution)
    network.check(prior)
    photo = photos(prior)
    anchor = photo["p0"]
    details = network(photo.image, photo.image * 0.9, anchor.camera, prior)
    assert details.behind is not None
    with torch.no_grad():
        plain = prior.synthesis(anchor.latents, anchor.camera)
        head = prior.synthesis(anchor.latents, anchor.camera, edit=details.edit)
        both = prior.synthesis(anchor.latents, anchor.camera, **details.edits)
    clear = head.alpha < 0.5
    assert clear.any() and torch.equal(both.depth, head.depth)
    empty = plain.alpha == 0
    assert torch.equal(head.image * empty, plain.image * empty), "the foreground's details leave the plane alone"
    assert ((both.image - head.image).abs().amax(1, keepdim=True) * clear).max() > 1e-3
    # What the plane's grid says at its own texels is what is added there.
    if super_resolution:
        size = details.behind.volume.shape[-1]
        texels = details.behind(prior.plane_grid(size).reshape(1, -1, 3))
        torch.testing.assert_close(texels.mT.unflatten(2, (size, size)), details.behind.volume[:, :, 0])
    # From the side the plane is beyond the frustum's far end: it has the last slice.
    side = prior.rig.camera(0.6)
    corner = torch.tensor([[[0.2, 0.1, float(prior.middle[2]) - 3.0]]])
    deep, beyond = (network.encoder.place(corner, side, prior.rig, behind=behind)[0, 0] for behind in (True, False))
    assert beyond[2] > 1 and float(deep[2]) == pytest.approx(1 - 1 / 4) and torch.equal(deep[:2], beyond[:2])
    with pytest.raises(ValueError, match=r"detail\.background needs a generator with a plane"):
        reconstructor(background=True).check(generator())


def test_the_plane_is_where_rays_meet_it():
    prior = generator(**SHARED)
    camera = prior.rig.camera(torch.tensor([0.0, 0.4]), torch.tensor([0.1, 0.0]))
    depth, points = prior.behind(camera, 16)
    origins, directions = camera.rays(16)
    met = origins + depth[..., None] * directions
    x, y, z = prior.middle.tolist()
    torch.testing.assert_close(met[..., 2], torch.full_like(depth, z - 0.9), atol=1e-4, rtol=0)
    inside = ((met - prior.middle).abs() < 0.9)[..., :2].all(-1)
    torch.testing.assert_close(points[inside], met[inside])
    assert (points - prior.middle).abs().max() <= 0.9 + 1e-5
    grid = prior.plane_grid(8)
    torch.testing.assert_close(grid[0, 0], torch.tensor([x - 0.9 * 7 / 8, y + 0.9 * 7 / 8, z - 0.9]))
    torch.testing.assert_close(prior.on_plane(grid)[0, 0], torch.tensor([-7 / 8, -7 / 8, 0.0]))


def test_details_lie_on_the_surface_whatever_the_view():
    """What a point gets does not depend on who looks, nor on which other photos are in the batch."""
    prior, network = generator(), reconstructor()
    both = photos(prior, 2)
    points = torch.randn(2, 7, 3, generator=seeded(2)) * 0.5
    with torch.no_grad():
        camera = Camera.from_label(both.label)
        details = network(both.image, both.image * 0.9, camera, prior)
        alone = network(both.image[1:], both.image[1:] * 0.9, camera[1], prior)
        torch.testing.assert_close(details(points)[1:], alone(points[1:]), atol=1e-5, rtol=1e-4)
        twice = details(points.repeat_interleave(2, 0))
        torch.testing.assert_close(twice[::2], details(points), atol=1e-6, rtol=1e-5)


def test_triplane_fields_take_details():
    prior = generator(field="triplane", triplane={"features": 8, "hidden": 8})
    head = DetailedGenerator(prior, reconstructor(features=8), photos(prior))
    anchor = head.photo["p0"]
    with torch.no_grad():
        change = (
            head.synthesis(anchor.latents, anchor.camera).image - prior.synthesis(anchor.latents, anchor.camera).image
        )
    assert change.abs().max() > 1e-4


def test_an_artifact_keeps_photos(tmp_path):
    prior = generator(expressions=["smile"])
    kept = photos(prior, 3)
    loaded = artifact.save(tmp_path / "artifact", stage="test", modules={"anchors": kept}).module("anchors")
    assert isinstance(loaded, PhotoSet) and loaded.ids == ("p0", "p1", "p2")
    one = loaded.only("p1")
    assert one.ids == ("p1",) and torch.equal(one.image[0], kept.image[1])
    assert torch.equal(one["p1"].latents.ws, kept["p1"].latents.ws)
    with pytest.raises(KeyError):
        loaded.only("p7")


def test_trilinear_keeps_full_precision_under_autocast():
    volume, place = torch.randn(1, 2, 3, 3, 3).bfloat16(), torch.rand(1, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = trilinear(volume, place, "border")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, trilinear(volume.float(), place, "border"))


def test_refusals():
    with pytest.raises(ValueError, match=r"detail.space must be one of .*got 'screen'"):
        DetailEncoder(**ENCODER, space="screen")
    with pytest.raises(ValueError, match="3 2D blocks lead from 16 to 4 pixels, not to the voxel's 8 x 8"):
        DetailEncoder(**ENCODER | {"widths": (4, 4, 4)})
    with pytest.raises(ValueError, match=r"photos must be \(B, 3, 16, 16\)"):
        DetailEncoder(**ENCODER)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    prior = generator()
    with pytest.raises(ValueError, match=r"detail\.features is 6, the generator's field has 4 channels"):
        DetailedGenerator(prior, reconstructor(features=6), photos(prior))
    with pytest.raises(ValueError, match=r"detail\.resolution is 32, the generator renders 16 px"):
        DetailedGenerator(prior, reconstructor(resolution=32, voxel=[4, 16, 16]), photos(prior))
    with pytest.raises(ValueError, match="shows one photo, got 2"):
        DetailedGenerator(prior, reconstructor(), photos(prior, 2))
