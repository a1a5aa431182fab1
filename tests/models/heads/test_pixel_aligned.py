"""From a photo to pictures of its head with details: against loops in float64, and as a generator."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import artifact
from models.camera import Camera
from models.encoders.alignment import ResidualAligner
from models.encoders.e3dge import AlignmentFusion, LocalEncoder, TextureFusion
from models.errors import UserError
from models.generators.manifold import ManifoldGenerator
from models.generators.stylesdf import StyleSDF
from models.generators.volume import TriPlaneVolumeGenerator
from models.heads.codes import HeadCode
from models.heads.index import pixel_aligned_entry, subject_index
from models.heads.photos import PhotoSet
from models.heads.pixel_aligned import LocalNetworks, PixelAlignedGenerator, sized
from models.heads.subjects import Subjects
from models.image import resized
from models.latents import Latents
from models.losses.alignment import residual_loss
from models.losses.image import pixel_mse
from models.zoo import family
from models.zoo.family import Official
from models.zoo.parity import Fixture
from tests.models.encoders.test_detail import GENERATOR
from tests.models.generators.protocol import GeneratorContract, awaken, seeded
from tests.models.generators.test_stylesdf import DECODER, BallContract, ball, small
from tests.models.generators.test_volume import TINY
from tests.models.zoo.fixtures import fixture_folder

SIDE = 32  # of the pictures that E1 sees
CASES = [(alignment, occlusion) for alignment in ("3d", "2d", "hybrid") for occlusion in (False, True)]


def networks(alignment="3d", width=16, *, aligner=True, occlusion=False, seed=0):
    torch.manual_seed(seed)
    parts = {
        "local_encoder": LocalEncoder(stem=4, features=6, channels=128, stacks=1, depth=1),
        "texture_fusion": TextureFusion(width, 6, 2),
        "aligner": ResidualAligner([4, 6, 8, 8]) if aligner else None,
        "alignment_fusion": AlignmentFusion(6) if alignment == "hybrid" else None,
    }
    return awaken(LocalNetworks(**parts, alignment=alignment, occlusion=occlusion, resolution=SIDE)).eval()


def official_networks(alignment="hybrid"):
    """E3DGE's own sizes, with the weights of the recorded numbers."""
    fixture = Fixture.load(fixture_folder("e3dge"))
    names = {"netLocal": "local", "Fuse_sft_block": "sft_mlp"}
    parts = family("e3dge").convert(Official({k: fixture.state(v) for k, v in names.items()}), {}).modules
    torch.manual_seed(0)
    return LocalNetworks(**parts, aligner=ResidualAligner().eval(), alignment=alignment, resolution=SIDE).eval()


# -- the reference -----------------------------------------------------------------------------------------------------


def test_photos_are_resized_and_renderings_enlarged_by_pixels():
    """Photos are what E0 sees of them, renderings what the released networks know; larger ones are made in one way."""
    generator, local = small(decoder=DECODER).eval(), networks()
    ws, camera = generator.mapping(generator.sample_z(1, seeded())), generator.rig.camera(0.2)
    small_one = torch.rand(1, 1, 2, 2, generator=seeded(1))
    assert torch.equal(sized(small_one, 6), small_one.repeat_interleave(3, 2).repeat_interleave(3, 3))
    for side in (20, 48):
        photo = 2 * torch.rand(1, 3, side, side, generator=seeded(2)) - 1
        assert_close(
            local.source(generator, ws, photo, camera).residual,
            local.source(generator, ws, resized(photo, SIDE), camera).residual,
        )
    assert torch.equal(sized(photo, SIDE), resized(photo, SIDE))
    assert torch.equal(sized(resized(photo, SIDE), SIDE), resized(photo, SIDE))


class Reference:
    """The chain for one head of a StyleSDF in float64, point by point where it matters."""

    def __init__(self, generator, local):
        self.generator, self.local, self.side = generator, local, generator.raw_resolution
        self.flags = []  # of visibility

    def project(self, camera, points):
        """World points (P, 3) to columns and rows in [0, 1], and depth."""
        world2cam = torch.linalg.inv(camera.cam2world[0])
        seen = points @ world2cam[:3, :3].T + world2cam[:3, 3]
        focal = float(camera.intrinsics[0, 0, 0])
        return seen[:, :2] / seen[:, 2:] * focal + 0.5, seen[:, 2]

    def rays(self, camera):
        side, focal = self.side, float(camera.intrinsics[0, 0, 0])
        frame = [
            [((j + 0.5) / side - 0.5) / focal, ((i + 0.5) / side - 0.5) / focal, 1.0]
            for i in range(side)
            for j in range(side)
        ]
        frame = torch.tensor(frame, dtype=torch.float64)
        return camera.cam2world[0, :3, 3], frame @ camera.cam2world[0, :3, :3].T, frame

    def render(self, code, camera, local=None):
        """Colour and features (side^2, C), depth of the subject, and coverage.

        ``local`` gives f_L(x) at points, with the pixels of their rays.
        """
        g, samples = self.generator, self.generator.samples
        origin, directions, frame = self.rays(camera)
        near, far = g.rig.near, g.rig.far
        depths = torch.tensor([near + (far - near) * i / samples for i in range(samples)], dtype=torch.float64)
        points = (origin + depths[:, None] * directions[:, None]).flatten(0, 1)
        views = F.normalize(frame * torch.tensor([1.0, -1.0, -1.0]), dim=1).repeat_interleave(samples, 0)
        film = g.field.film(code[None])
        x = g.field.backbone(points[None] * 2 / (far - near), film)
        distance = g.field.distance(x)[0, :, 0].reshape(-1, samples)
        if local is not None:
            found = local(points, torch.arange(self.side**2).repeat_interleave(samples))
            gamma, beta = self.local.texture_fusion.film(found).chunk(2, -1)
            x = (1 + gamma) * x + beta
        seen = g.field.features(x, views[None], film)
        colour = torch.sigmoid(g.field.colour(seen))[0].reshape(-1, samples, 3)
        density = torch.sigmoid(-distance / g.beta) / g.beta
        step = (far - near) / samples * directions.norm(dim=1)
        left = torch.ones(len(directions), dtype=torch.float64)
        seen = seen[0].reshape(-1, samples, seen.shape[2])
        total, features, depth, alpha = 0 * colour[:, 0], 0 * seen[:, 0], 0 * left, 0 * left
        for i in range(samples):
            weight = left * (1 - torch.exp(-density[:, i] * step)) if i < samples - 1 else left
            total += weight[:, None] * colour[:, i]
            features += weight[:, None] * seen[:, i]
            if i < samples - 1:
                depth, alpha = depth + weight * depths[i], alpha + weight
            left = left - weight
        return 2 * total - 1, features, depth / alpha, alpha

    def coarse(self, code, camera):
        """The picture enlarged (1, 3, S, S), the depth enlarged and as it is, and that of the subject with coverage."""
        colour, _, depth, alpha = self.render(code, camera)
        full = alpha * depth + (1 - alpha) * self.generator.rig.far

        def enlarged(flat):
            image = flat.T.reshape(1, -1, self.side, self.side)
            scale = self.local.resolution // self.side
            return image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

        return enlarged(colour), enlarged(full[:, None]), full, depth, alpha

    def sample(self, image, uv):
        """Bilinear features of (1, C, h, w) at one place, 0 outside."""
        height, width = image.shape[2:]
        x, y = float(uv[0]) * width - 0.5, float(uv[1]) * height - 0.5
        total = torch.zeros(image.shape[1], dtype=torch.float64)
        for j in (math.floor(x), math.floor(x) + 1):
            for i in (math.floor(y), math.floor(y) + 1):
                if 0 <= i < height and 0 <= j < width:
                    total += (1 - abs(x - j)) * (1 - abs(y - i)) * image[0, :, i, j]
        return total

    def seen(self, point, camera, depth, alpha):
        """Whether the photo shows a point."""
        (uv,), (z,) = self.project(camera, point[None])
        inside = all(0 <= float(v) <= 1 for v in uv)
        if inside and self.local.occlusion:
            column, row = (min(max(math.floor(float(v) * self.side), 0), self.side - 1) for v in uv)
            front = torch.where(alpha > 0.5, depth, self.generator.rig.far).reshape(self.side, self.side)
            around = front[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            inside = float(z) < float(around.max()) + 0.06 * self.generator.rig.scale
        self.flags.append(inside)
        return inside

    def encoding(self, points):
        waves = [
            wave(2.0**k * points)
            for k in range(self.local.texture_fusion.frequencies)
            for wave in (torch.sin, torch.cos)
        ]
        return torch.cat([points, *waves], 1)

    def __call__(self, image, own, camera, code, query, decoder=None):
        """The head of ``code`` from one camera, with the details of a photo (1, 3, S, S) of ``own``.

        Also what is aligned to it; given codes of the decoder, the picture is enlarged.
        """
        local, kind = self.local, self.local.alignment
        picture, enlarged, _, depth, alpha = self.coarse(own, camera)
        residual = image - picture
        moved = residual
        if not torch.equal(own, code):
            picture, enlarged, _, depth, alpha = self.coarse(code, camera)
            moved = local.aligner(residual, picture)
        details = local.local_encoder(moved, enlarged)
        there, enlarged, surface, _, _ = self.coarse(code, query)
        aligned = local.local_encoder(local.aligner(residual, there), enlarged)
        origin, directions, _ = self.rays(query)

        def found(points, pixels):
            source_uv, query_uv = self.project(camera, points)[0], self.project(query, points)[0]
            flags = {}
            rows = []
            for point, uv, other, pixel in zip(points, source_uv, query_uv, pixels.tolist(), strict=True):
                near, far = self.sample(details, uv), self.sample(aligned, other)
                if kind == "3d" and local.occlusion and not self.seen(point, camera, depth, alpha):
                    near = 0 * near
                if kind == "hybrid":
                    if pixel not in flags:
                        at = origin + surface[pixel] * directions[pixel]
                        flags[pixel] = self.seen(at, camera, depth, alpha)
                    far = torch.cat([far, torch.tensor([float(flags[pixel])], dtype=torch.float64)])
                    fusion = local.alignment_fusion
                    both = fusion.encode(torch.cat([far, near]))
                    near = near + near * fusion.scale(both) + fusion.shift(both)
                rows.append(far if kind == "2d" else near)
            return torch.cat([torch.stack(rows), self.encoding(points)], 1)[None]

        colour, features, _, _ = self.render(code, query, found)
        if decoder is None:
            return colour.T.reshape(3, self.side, self.side), aligned
        *_, (_, large) = self.generator.decoder(features.T.reshape(1, -1, self.side, self.side), decoder[None])
        return large[0], aligned


def views_of(generator, yaw, pitch):
    """Cameras in the generator's precision: rotations are as orthonormal as that allows."""
    mean = next(iter(generator.mean_latents.groups.values()))
    rough = generator.rig.camera(yaw, pitch)
    return Camera.look_at(rough.position.to(mean), mean.new_tensor(generator.rig.pivot), generator.rig.focal)


def photographed(generator, count=2, seed=5):
    """Codes, photos with what no code says, and their cameras, in the generator's precision."""
    mean = next(iter(generator.mean_latents.groups.values()))
    ws = generator.mapping(generator.sample_z(count, seeded(seed)).to(mean)).detach()
    camera = views_of(generator, torch.linspace(-0.6, 0.5, count), torch.linspace(0.1, -0.2, count))
    image = torch.rand(count, 3, SIDE, SIDE, generator=seeded(6)) * 2 - 1
    return ws, image.to(mean), camera


def ball_head():
    generator = awaken(small(raw_resolution=8, samples=8)).eval()
    with torch.enable_grad():
        generator.load_state_dict(ball())
    return generator.double().requires_grad_(False)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("alignment", "occlusion"), CASES)
@torch.no_grad()
def test_against_loops_in_float64(alignment, occlusion, views, edited):
    """Two photos, seen by one or two cameras each, as they are or with the second one's codes changed."""
    generator, local = ball_head(), networks(alignment, occlusion=occlusion).double()
    ws, image, camera = photographed(generator)
    shown = ws
    if edited:
        change = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
        shown = ws.map(lambda t: t + change * 0.3 * torch.randn(t.shape, generator=seeded(8), dtype=t.dtype))
    cameras = views_of(generator, torch.tensor([0.3, -0.5, -0.7, 0.1])[: 2 * views], 0.15)
    source = local.edited(generator, local.source(generator, ws, image, camera), shown)
    aligned = local.edit(generator, source, cameras)
    found = aligned.synthesis(generator, cameras).image
    assert_close(generator.synthesis(shown, cameras, edit=aligned).image, found)
    reference = Reference(generator, local)
    for i in range(len(cameras)):
        b = i // views
        codes = (codes.groups["renderer"][b] for codes in (ws, shown))
        own, code = codes
        expected, details = reference(image[b : b + 1], own, camera[b], code, cameras[i])
        assert_close(found[i], expected, atol=1e-9, rtol=1e-7)
        if aligned.query is not None:
            assert_close(aligned.query.details[i], details[0])
    coarse = generator.synthesis(shown, cameras).image
    assert (found - coarse).abs().mean() > 1e-2
    if (alignment == "3d" and occlusion) or alignment == "hybrid":
        assert 0 < sum(reference.flags) < len(reference.flags), "points must be both seen and not"


@torch.no_grad()
def test_against_loops_with_official_sizes_and_weights():
    torch.manual_seed(0)
    generator = awaken(StyleSDF(raw_resolution=8, samples=4)).double()
    local = official_networks().double()
    ws, image, camera = photographed(generator, 1)
    shown = ws.map(lambda t: t + 0.3 * torch.randn(t.shape, generator=seeded(8), dtype=t.dtype))
    cameras = views_of(generator, torch.tensor([0.3, -0.5]), 0.0)
    source = local.edited(generator, local.source(generator, ws, image, camera), shown)
    found = local.edit(generator, source, cameras).synthesis(generator, cameras).image
    reference = Reference(generator, local)
    for i in range(2):
        own, code = (codes.groups["renderer"][0] for codes in (ws, shown))
        assert_close(found[i], reference(image, own, camera, code, cameras[i])[0], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("alignment", ["3d", "2d", "hybrid"])
@torch.no_grad()
def test_fusion_that_says_nothing_leaves_the_coarse_picture(alignment):
    generator, local = ball_head(), networks(alignment).double()
    for parameter in local.texture_fusion.parameters():
        parameter.zero_()
    ws, image, camera = photographed(generator)
    aligned = local.edit(generator, local.source(generator, ws, image, camera))
    plain = generator.synthesis(ws, camera, edit=lambda points, features: features)
    assert torch.equal(aligned.synthesis(generator, camera).image, plain.image)


def test_gradients_reach_the_networks_and_nothing_else():
    """As a training stage uses them: the residual is given, and generator and codes stand still."""
    generator = awaken(small(decoder=DECODER))
    local = networks("hybrid").train()
    ws, image, camera = photographed(generator)
    ws = ws.map(lambda t: t.clone().requires_grad_())
    image.requires_grad_()
    source = local.source(generator, ws, image, camera)
    assert not source.residual.requires_grad and source.details.requires_grad
    heads = local.edited(generator, source, ws.map(lambda t: t + 0.1))
    aligned = local.edit(generator, heads, generator.rig.camera(torch.tensor([0.2, -0.1])))
    loss = aligned.synthesis(generator, aligned.query.camera).image.square().mean()
    (loss + aligned.query.residual.abs().mean()).backward()
    assert [n for n, p in local.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert image.grad is None


def test_one_view_teaches_another():
    """Novel-view training (B.1): each of two views of a head is made from the other, and ADA's residual is known."""
    torch.manual_seed(0)
    generator = awaken(small(raw_resolution=8, samples=8)).requires_grad_(False)
    generator.load_state_dict(ball())
    local = networks("hybrid").train()
    ws, _, _ = photographed(generator, 1)
    camera = views_of(generator, torch.tensor([-0.2, 0.2]), 0.0)
    truth = 0.5 - 0.5 * generator.synthesis(ws, camera).image  # a head that no code has
    codes, other = ws.repeat_interleave(2), torch.tensor([1, 0])
    optimiser = torch.optim.Adam(local.parameters(), 1e-2)
    errors = []
    for _ in range(25):
        source = local.source(generator, codes, truth, camera)
        aligned = local.edit(generator, source, camera[other])
        found = aligned.synthesis(generator, aligned.query.camera).image
        error = pixel_mse(found, truth[other]).mean()
        optimiser.zero_grad()
        (error + 0.1 * residual_loss(aligned.query, truth[other]).mean()).backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]


@torch.no_grad()
def test_photos_of_own_codes_are_not_moved_by_their_neighbours():
    """Which heads are edited is told head by head."""
    generator, local = ball_head(), networks("hybrid").double()
    ws, image, camera = photographed(generator)
    source = local.source(generator, ws, image, camera)
    half = Latents({"renderer": ws.groups["renderer"] + torch.tensor([0.0, 0.2])[:, None, None].double()})
    heads = local.edited(generator, source, half)
    assert torch.equal(heads.details[0], source.details[0]) and torch.equal(heads.depth[0], source.depth[0])
    assert not torch.equal(heads.details[1], source.details[1])
    without = networks("3d", aligner=False).double()
    source = without.source(generator, ws, image, camera)
    heads = without.edited(generator, source, half)
    assert torch.equal(heads.details, source.details) and not torch.equal(heads.limit[1], source.limit[1])


def test_what_does_not_fit():
    encoder, fusion = LocalEncoder(stem=4, features=6, channels=128, stacks=1, depth=1), TextureFusion(16, 6, 2)
    aligner = ResidualAligner([4, 4, 4, 4])
    with pytest.raises(UserError, match=r"local\.alignment is '4d': take one of 3d, 2d, hybrid"):
        LocalNetworks(encoder, fusion, alignment="4d")
    with pytest.raises(UserError, match="2d needs an aligner"):
        LocalNetworks(encoder, fusion, alignment="2d")
    with pytest.raises(UserError, match="hybrid, and no other"):
        LocalNetworks(encoder, fusion, aligner, alignment="hybrid")
    with pytest.raises(UserError, match="hybrid, and no other"):
        LocalNetworks(encoder, fusion, aligner, AlignmentFusion(6), alignment="2d")
    with pytest.raises(UserError, match=r"texture_fusion takes 5 local features, local\.local_encoder makes 6"):
        LocalNetworks(encoder, TextureFusion(16, 5), resolution=64)
    with pytest.raises(UserError, match="resolution is 20: it must be a multiple of 8"):
        LocalNetworks(encoder, fusion, resolution=20)
    generator = small()
    ws, image, camera = photographed(generator)
    local = networks("2d")
    source = local.source(generator, ws, image, camera)
    with pytest.raises(ValueError, match="3 cameras for 2 photos"):
        local.edit(generator, source, generator.rig.camera(torch.zeros(3)))
    aligned = local.edit(generator, source, generator.rig.camera(torch.zeros(4)))
    with pytest.raises(ValueError, match="2 rows of 3 points"):
        aligned(torch.zeros(2, 3, 3), torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match="3 rows of 4 points"):
        aligned(torch.zeros(3, 4, 3), torch.zeros(3, 4, 16))
    with pytest.raises(ValueError, match="without an aligner"):
        networks("3d", aligner=False).query(generator, source, camera)
    with pytest.raises(ValueError, match="width is 99, the generator's field has 49"):
        PixelAlignedGenerator(generator, networks(width=99), photo_of(generator))
    with pytest.raises(ValueError, match="shows one photo, got 2"):
        PixelAlignedGenerator(generator, networks(), photo_of(generator, 2))


# -- as a generator ----------------------------------------------------------------------------------------------------


def photo_of(generator, count=1):
    ws, image, camera = photographed(generator, count)
    neutral, label = torch.zeros(1, len(generator.expressions)), camera.label()
    codes = {f"p{i}": HeadCode(ws[i], None, neutral, label[i : i + 1]) for i in range(count)}
    return PhotoSet.collect(codes, {f"p{i}": image[i] for i in range(count)}, generator)


class SDFContract(BallContract):
    """On a StyleSDF."""

    alignment = "3d"
    excused = ("local.local_encoder.", "local.aligner.")  # of pictures, which are read without gradient

    def make(self):
        coarse = awaken(small(**self.options))
        coarse.load_state_dict(ball(), strict=False)
        return PixelAlignedGenerator(coarse, networks(self.alignment), photo_of(coarse))

    @pytest.fixture
    def generator(self):
        torch.manual_seed(0)
        generator = self.make().eval()
        generator.update_mean(64)
        return generator


class TestOnSDF(SDFContract):
    pass


class ByCamera:
    """Details are aligned to the camera: points alone find those of the photo's."""

    @torch.no_grad()
    def test_features_are_what_is_rendered(self, generator):
        camera = generator.photo["p0"].camera
        ws, seen = self.latents(generator, 1), []
        expression = self.expression(generator, 1)
        generator.synthesis(ws, camera, expression=expression, edit=lambda p, f: seen.append((p, f)) or f)
        for points, rendered in seen:
            assert_close(generator.features(ws, points, expression), rendered, atol=1e-3, rtol=1e-3)


class TestHybridOnSDF(ByCamera, SDFContract):
    alignment = "hybrid"
    options = {"decoder": DECODER}
    bounded = False
    free_resolution = False
    excused = (*SDFContract.excused, "coarse.field.colour")

    @torch.no_grad()
    def test_truncation(self, generator):
        """The coarse generator's own, of both groups."""
        z = generator.sample_z(2, seeded())
        expected = generator.coarse.mapping(z, truncation=0.5, cutoff=2)
        assert_close(generator.mapping(z, truncation=0.5, cutoff=2).groups, expected.groups)
        assert_close(generator.mean_latents.groups, generator.coarse.mean_latents.groups)


class TestOnManifolds(GeneratorContract):
    excused = ("coarse.predictor.", "local.local_encoder.", "local.aligner.")
    field_tolerance = 0.2

    def make(self):
        coarse = ManifoldGenerator(**GENERATOR, expressions=["smile", "blink"])
        return PixelAlignedGenerator(coarse, networks("3d", width=4), photo_of(coarse))

    def make_still(self):
        coarse = ManifoldGenerator(**GENERATOR)
        return PixelAlignedGenerator(coarse, networks("3d", width=4), photo_of(coarse))


class TestHybridOnTriPlanes(ByCamera, GeneratorContract):
    random = True
    excused = ("local.local_encoder.", "local.aligner.")

    def make(self):
        coarse = TriPlaneVolumeGenerator(**TINY, fine=0, expressions=["smile", "blink"])
        return PixelAlignedGenerator(coarse, networks("hybrid", width=6, occlusion=True), photo_of(coarse))

    def make_still(self):
        coarse = TriPlaneVolumeGenerator(**TINY, fine=0)
        return PixelAlignedGenerator(coarse, networks("hybrid", width=6), photo_of(coarse))


def sdf_head(alignment="hybrid"):
    coarse = awaken(small(decoder=DECODER)).eval()
    return PixelAlignedGenerator(coarse, networks(alignment), photo_of(coarse)).eval()


@torch.no_grad()
def test_details_are_read_once_and_again_when_anything_has_changed():
    head, calls = sdf_head(), []
    head.local.local_encoder.register_forward_hook(lambda *_: calls.append(1))
    own, camera = head.photo["p0"], head.rig.camera(torch.tensor([0.2]))
    before = head.synthesis(own.latents, camera).image
    assert len(calls) == 2  # of the photo, and of the picture
    head.synthesis(own.latents, camera)
    assert len(calls) == 3
    other = own.latents.map(lambda t: t + 0.1)
    head.synthesis(other, camera)
    assert len(calls) == 5  # of the photo as the other head would have it
    assert torch.equal(head.synthesis(other, camera).image, head.synthesis(other, camera).image)
    assert len(calls) == 7
    head.photo.image.add_(0.5)
    after = head.synthesis(own.latents, camera).image
    assert (after - before).abs().max() > 1e-4
    head.photo.image.sub_(0.5)
    assert_close(head.synthesis(own.latents, camera).image, before, atol=1e-5, rtol=1e-4)
    for parameter in head.local.texture_fusion.parameters():
        parameter.zero_()
    assert_close(head.synthesis(other, camera).image, head.coarse.synthesis(other, camera).image)


@torch.no_grad()
def test_it_shows_what_the_networks_make():
    head = sdf_head()
    own, camera = head.photo["p0"], head.rig.camera(torch.tensor([0.2, -0.4]))
    source = head.local.source(head.coarse, own.latents, head.photo.image, own.camera)
    expected = head.local.edit(head.coarse, source, camera).synthesis(head.coarse, camera)
    assert_close(head.synthesis(own.latents, camera).image, expected.image)
    head.train()
    assert not any(module.training for module in head.local.modules()) and head.coarse.training


@torch.no_grad()
def test_an_artifact_shows_it(tmp_path):
    head = sdf_head()
    modules = {"generator": head.coarse, "local": head.local, "anchors": head.photo}
    entry = pixel_aligned_entry("p0", None)
    artifact.save(tmp_path / "a", stage="any", modules=modules, extra=subject_index([entry]))
    subject = Subjects(artifact.load(tmp_path / "a"))["p0"]
    assert isinstance(subject.generator, PixelAlignedGenerator) and subject.caption == "one pass"
    shown = subject.generator.synthesis(subject.latents, subject.camera).image
    assert_close(shown, head.synthesis(head.photo["p0"].latents, head.photo["p0"].camera).image)
    assert subject.generator.local.alignment == "hybrid"
