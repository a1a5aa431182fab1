"""What every generator and discriminator must do, as test classes to subclass.

    class TestMine(GeneratorContract):
        def make(self): return MyGenerator(z_dim=8, resolution=16)

``make`` returns a small model (16 px renders in milliseconds); weights are redrawn here, seeded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from kornia.geometry.depth import depth_to_normals
from torch import Tensor, nn
from torch.testing import assert_close

from models import artifact
from models.camera import Camera, Rig
from models.configurable import build, spec
from models.generators.base import Discriminator, Generator, RadianceGenerator
from models.latents import Latents
from models.rendering.output import Rendering

YAWS, PITCHES = (-0.35, 0.0, 0.15, 0.4), (0.1, 0.0, -0.12, 0.05)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def code_rows(latents: Latents) -> list[Tensor]:
    """The codes (B, w_dim) in order, whatever the widths of the groups."""
    return [code for group in latents.groups.values() for code in group.unbind(1)]


def awaken(module: nn.Module) -> nn.Module:
    """Move every parameter a little, so that layers which start at zero take part. Buffers of codes too."""
    noise = seeded(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    return module


def maps(rendering: Rendering) -> dict[str, Tensor]:
    """All image-like fields that are there."""
    names = ("image", "raw", "depth", "alpha", "normals", "features")
    return {name: getattr(rendering, name) for name in names if getattr(rendering, name) is not None}


def assert_same(one: Rendering, other: Rendering, atol: float) -> None:
    """Equal fields; depth and normals only where there is something to see."""
    ours, theirs = maps(one), maps(other)
    assert ours.keys() == theirs.keys()
    seen = None if one.alpha is None else one.alpha > 0.05
    for name, value in ours.items():
        if name in ("depth", "normals") and seen is not None:
            value, expected = value * seen, theirs[name] * seen
        else:
            expected = theirs[name]
        # Depth maps jump at silhouettes, and normals differentiate them.
        loose = {"depth": 10, "normals": 1000}.get(name, 1)
        assert_close(value, expected, atol=atol * loose, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def assert_near(one: Rendering, other: Rendering, share: float = 0.01, tolerance: float = 1e-3) -> None:
    """Fields of two devices: all but a share of the numbers differ by less than ``tolerance`` of the field's spread."""
    ours, theirs = maps(one), maps(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Normals differentiate depth.
        most = tolerance * (10 if name == "normals" else 1) * float(theirs[name].std().clamp_min(1e-3))
        off = ((value.cpu() - theirs[name]).abs() > most).float().mean()
        assert off <= share, f"{name}: {100 * off:.1f} % differ by more than {most:.1e}"


def dead_parameters(module: nn.Module, excused: tuple[str, ...] = ()) -> list[str]:
    """Names of parameters that got no gradient or a zero one."""
    return [
        name
        for name, parameter in module.named_parameters()
        if not name.startswith(excused or ("\0",)) and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]


def check_rebuild(module: nn.Module, tmp_path: Any) -> nn.Module:
    """Rebuild ``module`` from its JSON spec, and through an artifact; return the latter."""
    rebuilt = build(json.loads(json.dumps(spec(module))))
    assert type(rebuilt) is type(module)
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    assert spec(rebuilt) == spec(module)
    artifact.save(tmp_path / "artifact", stage="test", modules={"model": module})
    return artifact.load(tmp_path / "artifact").module("model")


class GeneratorContract:
    """Holds a generator to the protocol of ``models.generators.base``."""

    random: ClassVar[bool] = False  # randomness changes the image
    free_resolution: ClassVar[bool] = True
    bounded: ClassVar[bool] = True  # images stay within [-1, 1] whatever the weights
    excused: ClassVar[tuple[str, ...]] = ()  # prefixes of parameters that rendering leaves alone on purpose
    atol: ClassVar[float] = 2e-5
    field_tolerance: ClassVar[float] = 0.05  # of the features' spread
    field_agreement: ClassVar[float] = 0.99  # share of rendered points at which features() gives that

    def make(self) -> Generator:
        """A small generator, animatable if its class can be."""
        raise NotImplementedError

    def make_still(self) -> Generator | None:
        """The same without expressions; None where there is no such thing."""
        return None

    @pytest.fixture
    def generator(self) -> Iterator[Generator]:
        torch.manual_seed(0)
        generator = awaken(self.make()).eval()
        generator.update_mean(64)
        yield generator  # type: ignore[misc]

    def latents(self, generator: Generator, count: int = 2, seed: int = 0) -> Latents:
        return generator.mapping(generator.sample_z(count, seeded(seed)))

    def camera(self, generator: Generator, count: int = 2) -> Camera | None:
        if not generator.is_3d:
            return None
        return generator.rig.camera(torch.tensor(YAWS[:count]), torch.tensor(PITCHES[:count]))

    def expression(self, generator: Generator, count: int = 2) -> Tensor | None:
        size = len(generator.expressions)
        return torch.rand(count, size, generator=seeded(3)) * 2 - 1 if size else None

    # -- what comes out ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_fields(self, generator: Generator) -> None:
        camera, side = self.camera(generator), generator.resolution
        rendering = generator.synthesis(self.latents(generator), camera, expression=self.expression(generator))
        for name, value in maps(rendering).items():
            assert value.dtype == torch.float32, f"{name} is {value.dtype}"
            assert value.isfinite().all(), f"{name} is not finite"
            assert len(value) == 2 and value.ndim == 4 and value.shape[2] == value.shape[3], f"{name} {value.shape}"
        assert rendering.image.shape == (2, 3, side, side)
        assert rendering.image.abs().max() <= 1.05 or not self.bounded
        assert rendering.image.std() > 1e-3, "a blank image"
        assert rendering.taps == {}
        if rendering.raw is not None:
            assert rendering.raw.shape[1] == 3
        if generator.is_3d:
            assert rendering.depth is not None and rendering.alpha is not None and rendering.normals is not None

    @torch.no_grad()
    def test_geometry(self, generator: Generator) -> None:
        if not generator.is_3d:
            pytest.skip("2D")
        camera = self.camera(generator)
        rendering = generator.synthesis(self.latents(generator), camera)
        depth, alpha, normals = rendering.depth, rendering.alpha, rendering.normals
        assert depth.shape[1:2] == alpha.shape[1:2] == (1,) and normals.shape[1] == 3
        assert depth.shape[2:] == alpha.shape[2:] == normals.shape[2:]
        assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-5
        seen = alpha > 1e-3
        assert seen.any(), "nothing is seen"
        margin = 0.01 * generator.rig.far
        assert depth[seen].min() >= generator.rig.near - margin and depth[seen].max() <= generator.rig.far + margin
        norms = normals.norm(dim=1, keepdim=True)
        assert_close(norms[seen], torch.ones_like(norms[seen]), atol=1e-3, rtol=0)
        assert (norms[alpha == 0] == 0).all()
        side = depth.shape[-1]
        rays = camera.rays(side)[1].mT.unflatten(2, (side, side))
        assert ((normals * rays).sum(1, keepdim=True)[seen] <= 1e-4).all(), "normals must face the camera"

    @torch.no_grad()
    def test_normals_agree_with_depth_where_smooth(self, generator: Generator) -> None:
        if not generator.is_3d:
            pytest.skip("2D")
        camera = self.camera(generator)
        rendering = generator.synthesis(self.latents(generator), camera)
        depth, side = rendering.depth, rendering.depth.shape[-1]
        pixels = camera.intrinsics.clone()
        pixels[:, :2] *= side
        pixels[:, :2, 2] -= 0.5  # kornia counts from pixel centres
        reference = -depth_to_normals(depth, pixels)  # kornia's face away from the camera
        reference = (camera.cam2world[:, :3, :3] @ reference.flatten(2)).unflatten(2, (side, side))
        cosine = (reference * rendering.normals).sum(1)[:, 2:-2, 2:-2]
        bend = sum((depth.roll(s, axis) + depth.roll(-s, axis) - 2 * depth).abs() for s in (1, 2) for axis in (2, 3))
        solid = -torch.nn.functional.max_pool2d(-rendering.alpha, 5, 1, 2) > 0.5
        bend = torch.where(solid, bend, torch.inf)[:, 0, 2:-2, 2:-2]
        smooth = bend <= bend.flatten().sort().values[bend.numel() // 5]
        smooth &= bend.isfinite()
        if smooth.sum() < 8:
            pytest.skip("hardly a solid pixel")
        assert cosine[smooth].median() > 0.9

    # -- views, batches, repeatability -----------------------------------------------------------------------------

    @torch.no_grad()
    def test_views_of_one_code(self, generator: Generator) -> None:
        if not generator.is_3d:
            pytest.skip("2D")
        ws, camera, expression = self.latents(generator), self.camera(generator, 4), self.expression(generator)
        together = generator.synthesis(ws, camera, expression=expression)
        for view in range(4):
            code = view // 2
            own = None if expression is None else expression[code : code + 1]
            alone = generator.synthesis(ws[code], camera[view], expression=own)
            assert_same(Rendering(**{k: v[view : view + 1] for k, v in maps(together).items()}), alone, self.atol)

    @torch.no_grad()
    def test_expression_per_view(self, generator: Generator) -> None:
        if not (generator.is_3d and generator.expressions):
            pytest.skip("needs views and expressions")
        ws, camera, expression = self.latents(generator), self.camera(generator, 4), self.expression(generator, 4)
        together = generator.synthesis(ws, camera, expression=expression)
        for view in range(4):
            alone = generator.synthesis(ws[view // 2], camera[view], expression=expression[view : view + 1])
            assert_same(Rendering(**{k: v[view : view + 1] for k, v in maps(together).items()}), alone, self.atol)

    @torch.no_grad()
    def test_batch_equals_singles(self, generator: Generator) -> None:
        ws, camera, expression = self.latents(generator), self.camera(generator), self.expression(generator)
        together = generator.synthesis(ws, camera, expression=expression)
        for item in range(2):
            alone = generator.synthesis(
                ws[item],
                None if camera is None else camera[item],
                expression=None if expression is None else expression[item : item + 1],
            )
            assert_same(Rendering(**{k: v[item : item + 1] for k, v in maps(together).items()}), alone, self.atol)

    @torch.no_grad()
    def test_deterministic_without_randomness(self, generator: Generator) -> None:
        ws, camera = self.latents(generator), self.camera(generator)
        before = torch.get_rng_state()
        first, second = generator.synthesis(ws, camera), generator.train().synthesis(ws, camera)
        assert torch.equal(torch.get_rng_state(), before), "synthesis drew from the global generator"
        for name, value in maps(first).items():
            assert torch.equal(value, maps(second)[name]), name

    @torch.no_grad()
    def test_randomness_is_the_callers(self, generator: Generator) -> None:
        ws, camera = self.latents(generator), self.camera(generator)
        before = torch.get_rng_state()
        images = [generator.synthesis(ws, camera, randomness=seeded(seed)).image for seed in (5, 5, 6)]
        assert torch.equal(torch.get_rng_state(), before), "synthesis drew from the global generator"
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2]) != self.random

    @torch.no_grad()
    def test_code_and_camera_matter(self, generator: Generator) -> None:
        ws, camera = self.latents(generator), self.camera(generator)
        image = generator.synthesis(ws, camera).image
        assert (image - generator.synthesis(self.latents(generator, seed=9), camera).image).abs().mean() > 1e-3
        if camera is not None:
            moved = generator.rig.camera(camera.yaw + 0.3, camera.pitch)
            assert (image - generator.synthesis(ws, moved).image).abs().mean() > 1e-4

    @torch.no_grad()
    def test_mirrored_camera(self, generator: Generator) -> None:
        if not generator.is_3d:
            pytest.skip("2D")
        ws, camera = self.latents(generator), self.camera(generator)
        mirrored = generator.rig.camera(-torch.tensor(YAWS[:2]), torch.tensor(PITCHES[:2]))
        assert_same(generator.synthesis(ws, camera.mirror()), generator.synthesis(ws, mirrored), 1e-3)

    def test_camera_is_required_or_refused(self, generator: Generator) -> None:
        ws = self.latents(generator)
        if not generator.is_3d:
            with pytest.raises(ValueError, match="camera"):
                generator.synthesis(ws, Camera(torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)))
            return
        with pytest.raises(ValueError, match="camera"):
            generator.synthesis(ws)
        with pytest.raises(ValueError, match="cameras"):
            generator.synthesis(ws, self.camera(generator, 3))

    @torch.no_grad()
    def test_resolution(self, generator: Generator) -> None:
        ws, camera, side = self.latents(generator), self.camera(generator), generator.resolution
        assert generator.free_resolution == self.free_resolution
        if not self.free_resolution:
            with pytest.raises(ValueError, match="resolution"):
                generator.synthesis(ws, camera, resolution=2 * side)
            return
        native = generator.synthesis(ws, camera)
        finer = generator.synthesis(ws, camera, resolution=2 * side)
        assert finer.image.shape == (2, 3, 2 * side, 2 * side)
        pooled = torch.nn.functional.avg_pool2d(finer.image, 2)
        contrast = (native.image - native.image.mean((2, 3), keepdim=True)).abs().mean()
        assert (pooled - native.image).abs().mean() < 0.5 * contrast

    # -- codes -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_mapping(self, generator: Generator) -> None:
        z = generator.sample_z(2, seeded())
        assert z.shape == (2, generator.z_dim) and torch.equal(z, generator.sample_z(2, seeded()))
        ws = generator.mapping(z)
        assert len(ws) == 2
        assert sum(t.shape[1] for t in ws.groups.values()) == generator.num_ws
        if len(ws.groups) == 1:
            assert ws.ws.shape == (2, generator.num_ws, generator.w_dim)
        assert {name: t.shape[1:] for name, t in generator.mean_latents.groups.items()} == {
            name: t.shape[1:] for name, t in ws.groups.items()
        }
        assert len(generator.mean_latents) == 1

    def test_parameter_groups_share_nothing(self, generator: Generator) -> None:
        grouped = [id(p) for group in generator.parameter_groups().values() for p in group.parameters]
        assert len(grouped) == len(set(grouped)) and set(grouped) <= {id(p) for p in generator.parameters()}

    @torch.no_grad()
    def test_forward_is_mapping_then_synthesis(self, generator: Generator) -> None:
        z, camera = generator.sample_z(2, seeded()), self.camera(generator)
        expected = generator.synthesis(generator.mapping(z), camera).image
        assert torch.equal(generator(z, camera).image, expected)

    @torch.no_grad()
    def test_z_plus(self, generator: Generator) -> None:
        z = generator.sample_z(2, seeded())
        layers = z[:, None].repeat(1, generator.num_ws, 1)
        flat = code_rows(generator.mapping(layers))
        assert_close(flat, code_rows(generator.mapping(z)))
        layers[:, 1] = generator.sample_z(2, seeded(1))
        changed = code_rows(generator.mapping(layers))
        different = [(a - b).abs().max() > 1e-6 for a, b in zip(flat, changed, strict=True)]
        assert [i for i, differs in enumerate(different) if differs] == [1]

    @torch.no_grad()
    def test_truncation(self, generator: Generator) -> None:
        z, mean = generator.sample_z(2, seeded()), generator.mean_latents
        full, none = generator.mapping(z), generator.mapping(z, truncation=0.0)
        half = generator.mapping(z, truncation=0.5)
        cut = generator.mapping(z, truncation=0.0, cutoff=1)
        start = 0
        for name, value in full.groups.items():
            centre = mean.groups[name].expand_as(value)
            assert_close(none.groups[name], centre)
            assert_close(half.groups[name], (centre + value) / 2)
            keep = max(1 - start, 0)
            assert_close(cut.groups[name], torch.cat([centre[:, :keep], value[:, keep:]], 1))
            start += value.shape[1]

    # -- edits, taps, expressions ------------------------------------------------------------------------------------

    def test_edit(self, generator: Generator) -> None:
        ws, camera = self.latents(generator), self.camera(generator)
        if not isinstance(generator, RadianceGenerator):
            with pytest.raises(ValueError, match="edit"):
                generator.synthesis(ws, camera, edit=lambda points, features: features)
            return
        plain = generator.synthesis(ws, camera).image
        calls = []
        amount = torch.zeros((), requires_grad=True)

        def edit(points: Tensor, features: Tensor) -> Tensor:
            calls.append((points.shape, features.shape))
            return features + amount

        image = generator.synthesis(ws, camera, edit=edit).image
        assert_close(image, plain, atol=self.atol, rtol=0)
        assert calls
        for points, features in calls:
            assert len(points) == len(features) == 3
            assert points[:2] == features[:2] and points[2] == 3
        image.square().mean().backward()
        assert amount.grad is not None and amount.grad.abs() > 0
        with torch.no_grad():
            amount += 1.0
            assert (generator.synthesis(ws, camera, edit=edit).image - plain).abs().mean() > 1e-3

    @torch.no_grad()
    def test_edit_sees_all_views_of_a_code(self, generator: Generator) -> None:
        if not isinstance(generator, RadianceGenerator):
            pytest.skip("no radiance field")
        rows = []
        generator.synthesis(
            self.latents(generator), self.camera(generator, 4), edit=lambda p, f: rows.append(len(p)) or f
        )
        assert set(rows) == {2}

    @torch.no_grad()
    def test_features_are_what_is_rendered(self, generator: Generator) -> None:
        if not isinstance(generator, RadianceGenerator):
            pytest.skip("no radiance field")
        ws, camera, expression = self.latents(generator), self.camera(generator), self.expression(generator)
        seen = []
        generator.synthesis(ws, camera, expression=expression, edit=lambda p, f: seen.append((p, f)) or f)
        for points, rendered in seen:
            asked = generator.features(ws, points, expression)
            assert asked.shape == rendered.shape
            inside = camera.project(points)[1] < generator.rig.far * 0.999
            error = (asked - rendered).abs().amax(-1)[inside]
            scale = rendered[inside].std()
            assert (error < self.field_tolerance * scale).float().mean() >= self.field_agreement

    @torch.no_grad()
    def test_decode(self, generator: Generator) -> None:
        if not isinstance(generator, RadianceGenerator):
            pytest.skip("no radiance field")
        points = (torch.rand(2, 50, 3, generator=seeded()) - 0.5) * generator.rig.radius * 0.2
        points = points + torch.tensor(generator.rig.pivot)
        directions = torch.nn.functional.normalize(torch.randn(2, 50, 3, generator=seeded(1)), dim=-1)
        sample = generator.decode(generator.features(self.latents(generator), points), directions)
        assert sample.colour.shape == (2, 50, 3) and sample.colour.abs().max() <= 1.05
        given = [v for v in (sample.density, sample.sdf, sample.occupancy) if v is not None]
        assert given and all(v.shape == (2, 50, 1) and v.isfinite().all() for v in given)
        assert sample.density is None or sample.density.min() >= 0
        assert sample.occupancy is None or (sample.occupancy.min() >= 0 and sample.occupancy.max() <= 1)

    def test_taps(self, generator: Generator) -> None:
        ws, camera, names = self.latents(generator), self.camera(generator), generator.tap_names
        with pytest.raises(ValueError, match="nonsense"):
            generator.synthesis(ws, camera, taps=["nonsense"])
        ws = Latents({name: t.detach().requires_grad_() for name, t in ws.groups.items()})
        for name in names:
            taps = generator.synthesis(ws, camera, taps=[name]).taps
            assert list(taps) == [name]
            assert taps[name].ndim == 4 and len(taps[name]) == 2 and taps[name].requires_grad
        assert set(generator.synthesis(ws, camera, taps=names).taps) == set(names)

    @torch.no_grad()
    def test_expressions(self, generator: Generator) -> None:
        ws, camera, size = self.latents(generator), self.camera(generator), len(generator.expressions)
        if not size:
            with pytest.raises(ValueError, match="cannot animate"):
                generator.synthesis(ws, camera, expression=torch.zeros(2, 1))
            return
        neutral = generator.synthesis(ws, camera)
        assert_same(generator.synthesis(ws, camera, expression=torch.zeros(2, size)), neutral, self.atol)
        for index in range(size):
            code = torch.zeros(2, size)
            code[:, index] = 1.0
            change = (generator.synthesis(ws, camera, expression=code).image - neutral.image).abs().mean()
            assert change > 1e-6, f"{generator.expressions[index]} changes nothing"
        for wrong in (torch.zeros(2, size + 1), torch.zeros(3, size), torch.zeros(size)):
            with pytest.raises(ValueError, match="expression must be"):
                generator.synthesis(ws, camera, expression=wrong)
        if isinstance(generator, RadianceGenerator):
            points = torch.zeros(2, 1, 3)
            with pytest.raises(ValueError, match="expression must be"):
                generator.features(ws, points, torch.zeros(2, size + 1))

    def test_still_generator_refuses_expressions(self) -> None:
        generator = self.make_still()
        if generator is None:
            pytest.skip("no still variant")
        assert generator.expressions == ()
        with pytest.raises(ValueError, match="cannot animate"):
            generator.synthesis(self.latents(generator), self.camera(generator), expression=torch.zeros(2, 1))
        with torch.no_grad():
            assert generator.synthesis(self.latents(generator), self.camera(generator)).image.isfinite().all()

    def test_affine_weights(self, generator: Generator) -> None:
        try:
            weights = generator.affine_weights()
        except NotImplementedError:
            pytest.skip("no style affines")
        assert weights.ndim == 2 and weights.shape[1] == generator.w_dim
        first = generator.affine_weights([0])
        assert_close(first, weights[: len(first)])
        both = generator.affine_weights([0, 1])
        assert len(first) < len(both) <= len(weights)
        assert_close(both, weights[: len(both)])

    # -- training ----------------------------------------------------------------------------------------------------

    def test_no_parameter_is_dead(self, generator: Generator) -> None:
        generator.train()
        image = generator(
            generator.sample_z(2, seeded()), self.camera(generator), expression=self.expression(generator)
        ).image
        (image * torch.randn(image.shape, generator=seeded(1))).sum().backward()
        assert dead_parameters(generator, self.excused) == []

    def test_autocast(self, generator: Generator) -> None:
        ws, camera = self.latents(generator).detach(), self.camera(generator)
        expected = generator.synthesis(ws, camera)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = generator.synthesis(ws, camera)
        for name, value in maps(found).items():
            assert value.dtype == torch.float32, f"{name} is {value.dtype} under autocast"
            assert value.isfinite().all(), name
        assert (found.image - expected.image).abs().mean() < 0.05
        if found.depth is not None:
            seen = (found.alpha > 0.05) & (expected.alpha > 0.05)
            gap = (found.depth - expected.depth).abs()[seen].mean()
            assert gap < 0.05 * (generator.rig.far - generator.rig.near)
        found.image.mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in generator.parameters())

    def test_path_length_double_backward(self, generator: Generator) -> None:
        ws = Latents({n: t.detach().requires_grad_() for n, t in self.latents(generator).groups.items()})
        image = generator.synthesis(ws, self.camera(generator)).image
        noise = torch.randn(image.shape, generator=seeded(1)) / generator.resolution
        jacobian = torch.autograd.grad((image * noise).sum(), list(ws.groups.values()), create_graph=True)
        length = sum(j.square().sum() for j in jacobian)
        length.backward()
        grads = [p.grad for p in generator.parameters() if p.grad is not None]
        assert length > 0 and grads and all(g.isfinite().all() for g in grads)
        assert sum(g.abs().sum() for g in grads) > 0

    # -- storage -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_rebuild_and_artifact(self, generator: Generator, tmp_path: Any) -> None:
        ws, camera, expression = self.latents(generator), self.camera(generator), self.expression(generator)
        expected = generator.synthesis(ws, camera, expression=expression)
        again = check_rebuild(generator, tmp_path)
        assert_same(again.synthesis(ws, camera, expression=expression), expected, 1e-6)
        assert again.rig == generator.rig and again.expressions == generator.expressions

    @pytest.mark.gpu
    @torch.no_grad()
    def test_a_gpu_renders_what_a_cpu_does(self, generator: Generator, device: torch.device) -> None:
        """From the same draws, in fp32: 1 % of the pixels may differ, where a ray just meets a surface or misses it."""
        latents, camera, expression = self.latents(generator), self.camera(generator), self.expression(generator)
        expected = generator.synthesis(latents, camera, expression=expression, randomness=seeded(5))
        z = generator.sample_z(2, seeded())  # on the CPU
        moved = copy.deepcopy(generator).to(device)
        camera, expression = camera and camera.to(device), None if expression is None else expression.to(device)
        found = moved.synthesis(moved.mapping(z.to(device)), camera, expression=expression, randomness=seeded(5))
        assert_near(found, expected)

    @pytest.mark.gpu
    @torch.no_grad()
    def test_a_gpu_bakes_what_a_cpu_does(self, generator: Generator, device: torch.device) -> None:
        latents, camera = self.latents(generator, 1), self.camera(generator, 1)
        head, moved = generator.bake(latents, 32), copy.deepcopy(generator).to(device)
        found = moved.bake(latents.to(device), 32)
        assert (found is None) == (head is None)
        if head is not None and found is not None and camera is not None:
            assert_near(found.show(camera.to(device)), head.show(camera))


class DiscriminatorContract:
    """Holds a discriminator to the protocol of ``models.generators.base``."""

    conditional: ClassVar[bool] = False
    pose: ClassVar[bool] = False
    batch_free: ClassVar[bool] = True  # a verdict does not depend on the rest of the batch

    def make(self) -> Discriminator:
        """A small discriminator."""
        raise NotImplementedError

    @pytest.fixture
    def discriminator(self) -> Discriminator:
        torch.manual_seed(0)
        return awaken(self.make())  # type: ignore[return-value]

    def images(self, discriminator: Discriminator, count: int = 4) -> Tensor:
        side = discriminator.resolution
        return torch.rand(count, 3, side, side, generator=seeded(2)) * 2 - 1

    def camera(self, count: int = 4) -> Camera | None:
        return Rig().camera(torch.tensor(YAWS[:count]), torch.tensor(PITCHES[:count])) if self.conditional else None

    def test_verdict(self, discriminator: Discriminator) -> None:
        verdict = discriminator(self.images(discriminator), self.camera())
        assert verdict.logits.shape == (4, 1) and verdict.logits.dtype == torch.float32
        assert (verdict.pose is not None) == self.pose
        assert verdict.pose is None or verdict.pose.shape == (4, 2)
        sides = [f.shape[-1] for f in verdict.features]
        assert sides and sides == sorted(sides, reverse=True), "features run from fine to coarse"
        assert verdict.logits.std() > 0

    def test_camera_is_used_or_refused(self, discriminator: Discriminator) -> None:
        images, camera = self.images(discriminator), Rig().camera(torch.tensor(YAWS), torch.tensor(PITCHES))
        assert discriminator.camera_conditioned == self.conditional
        if not self.conditional:
            with pytest.raises(ValueError, match="camera"):
                discriminator(images, camera)
            return
        with pytest.raises(ValueError, match="camera"):
            discriminator(images)
        one, other = discriminator(images, camera).logits, discriminator(images, camera.mirror()).logits
        assert (one - other).abs().max() > 1e-3

    def test_wrong_size_is_refused(self, discriminator: Discriminator) -> None:
        side = discriminator.resolution * 2
        with pytest.raises(ValueError, match="images must be"):
            discriminator(torch.zeros(4, 3, side, side), self.camera())

    def test_batch(self, discriminator: Discriminator) -> None:
        images, camera = self.images(discriminator), self.camera()
        together = discriminator(images, camera).logits
        alone = torch.cat([discriminator(images[i : i + 1], camera and camera[i]).logits for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-4) == self.batch_free

    def test_no_parameter_is_dead(self, discriminator: Discriminator) -> None:
        verdict = discriminator(self.images(discriminator), self.camera())
        loss = torch.nn.functional.softplus(verdict.logits).mean()
        if verdict.pose is not None:
            loss = loss + verdict.pose.square().mean()
        loss.backward()
        assert dead_parameters(discriminator) == []

    def test_r1_double_backward(self, discriminator: Discriminator) -> None:
        images = self.images(discriminator).requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(images, self.camera()).logits.sum(), images, create_graph=True)
        penalty = gradient.square().sum((1, 2, 3)).mean()
        penalty.backward()
        grads = {n: p.grad for n, p in discriminator.named_parameters() if p.grad is not None}
        assert penalty > 0 and all(g.isfinite().all() for g in grads.values())
        weights = [n for n, p in discriminator.named_parameters() if p.ndim == 4]
        assert [n for n in weights if n not in grads or not grads[n].abs().max() > 0] == []

    def test_autocast(self, discriminator: Discriminator) -> None:
        images, camera = self.images(discriminator), self.camera()
        expected = discriminator(images, camera).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = discriminator(images, camera).logits
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 0.1 * expected.abs().max().clamp_min(1)

    def test_rebuild_and_artifact(self, discriminator: Discriminator, tmp_path: Any) -> None:
        images, camera = self.images(discriminator), self.camera()
        expected = discriminator(images, camera).logits
        assert_close(check_rebuild(discriminator, tmp_path)(images, camera).logits, expected)

    @pytest.mark.gpu
    @torch.no_grad()
    def test_a_gpu_judges_as_a_cpu_does(self, discriminator: Discriminator, device: torch.device) -> None:
        images, camera = self.images(discriminator), self.camera()
        expected = discriminator(images, camera)
        found = copy.deepcopy(discriminator).to(device)(images.to(device), camera and camera.to(device))
        assert_close(found.logits.cpu(), expected.logits, atol=1e-4, rtol=1e-3)
        if expected.pose is not None and found.pose is not None:
            assert_close(found.pose.cpu(), expected.pose, atol=1e-4, rtol=1e-3)
