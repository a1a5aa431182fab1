"""The embedded world: draws, geometry, truth maps, styles and the cache."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor
from torch.testing import assert_close

from datamodules import mannequins
from datamodules.mannequins import (
    ART_STYLES,
    EXAGGERATIONS,
    EXPRESSIONS,
    HAIR_STYLES,
    HELD_OUT_STYLE,
    IDENTITY,
    LIGHT,
    RIG,
    SEGMENTS,
    SPLITS,
    STYLES,
    SURROUNDINGS,
    Z_DIM,
    Z_NAMES,
    CacheConfig,
    MannequinImages,
    Scene,
    build_cache,
    draw_views,
    render,
    sample_expression,
    sample_z,
    subject_z,
)
from datamodules.mannequins.posed import pose_numbers, posed_camera
from datamodules.mannequins.scene import (
    CODE_DIM,
    CODE_NAMES,
    CONTINUOUS_TRAITS,
    FACE_AXES,
    POSED_DIM,
    face_expression,
    subject_code,
)
from datamodules.mannequins.shapes import distance, named
from models.camera import Camera
from models.errors import UserError

KNOWN_DRAW = [-2.3104116916656494, -0.3732508718967438, -1.0608166456222534, 0.999509334564209]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_scene(count: int = 1, **latents: float) -> Scene:
    """Average bare-eyed heads with short hair; ``latents`` sets dims of z by name."""
    z = torch.zeros(count, Z_DIM)
    z[:, Z_NAMES.index("hair_style")] = -1.0
    for name, value in latents.items():
        z[:, Z_NAMES.index(name)] = value
    return Scene.from_z(z)


def one_hot(name: str, value: float = 1.0) -> Tensor:
    return value * torch.eye(len(EXPRESSIONS))[EXPRESSIONS.index(name)][None]


class TestCodes:
    def test_draws_repeat_and_do_not_depend_on_the_batch(self) -> None:
        assert torch.equal(sample_z(5, generator(1)), sample_z(5, generator(1)))
        assert torch.equal(subject_z([7, 3])[1], subject_z([3])[0])
        assert torch.equal(sample_expression(9, generator(2)), sample_expression(9, generator(2)))

    def test_known_draw(self) -> None:
        # Bit-equal on every machine: these numbers must never change without a new WORLD_VERSION.
        expected = torch.tensor(KNOWN_DRAW)
        assert torch.equal(subject_z([0])[0, : len(expected)], expected)

    def test_splits_are_disjoint(self) -> None:
        seeds = sorted((r.start, r.stop) for r in SPLITS.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(seeds))

    def test_layout_of_z_is_complete(self) -> None:
        assert (IDENTITY.start, IDENTITY.stop, SURROUNDINGS.stop, LIGHT.stop) == (
            0,
            SURROUNDINGS.start,
            LIGHT.start,
            Z_DIM,
        )
        assert len(Z_NAMES) == Z_DIM

    def test_statistics_of_traits(self) -> None:
        scene = Scene.from_z(sample_z(4000, generator()))
        for name, (lo, hi) in CONTINUOUS_TRAITS.items():
            relative = (scene.traits[name] - lo) / (hi - lo)
            assert relative.min() >= 0 and relative.max() <= 1
            assert abs(relative.mean() - 0.5) < 0.03 and abs(relative.std() - 12**-0.5) < 0.02, name
        assert abs(scene.traits["glasses"].mean() - 0.20) < 0.03
        shares = torch.bincount(scene.hair_style, minlength=len(HAIR_STYLES)) / 4000
        assert torch.allclose(shares, torch.tensor([0.06, 0.24, 0.19, 0.10, 0.11, 0.15, 0.15]), atol=0.03)
        assert not (scene.traits["beard"] * scene.traits["long"]).any()

    def test_every_dim_of_z_matters(self) -> None:
        base = sample_z(64, generator(3))
        for k in range(Z_DIM):
            moved = base.clone()
            moved[:, k] = -moved[:, k]
            assert (Scene.from_z(base).parameters() != Scene.from_z(moved).parameters()).any(), Z_NAMES[k]

    def test_expressions_are_a_useful_mix(self) -> None:
        expression = sample_expression(2000, generator())
        active = (expression > 0).sum(1)
        assert expression.min() >= 0 and expression.max() == 1
        assert 0.10 < (active == 0).float().mean() < 0.25 and ((active == 1) | (active == 2)).float().mean() > 0.6
        assert ((expression > 0).float().mean(0) > 0.1).all() and ((expression == 1).any(0)).all()
        assert not (expression[:, 0] * expression[:, 1]).any()

    @pytest.mark.parametrize(
        ("z", "expression", "message"),
        [
            (torch.zeros(2, 3), None, r"z must be \(B, 46\)"),
            (torch.full((1, Z_DIM), torch.nan), None, "not finite"),
            (torch.zeros(1, Z_DIM), torch.zeros(2, 6), r"expression must be \(1, 6\)"),
            (torch.zeros(1, Z_DIM), torch.full((1, 6), 1.5), r"lie in \[0, 1\]"),
        ],
    )
    def test_wrong_codes_are_refused(self, z: Tensor, expression: Tensor | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Scene.from_z(z, expression)

    def test_codes_hold_latent_and_face(self) -> None:
        code = subject_code([7, 8])
        assert code.shape == (2, CODE_DIM) == (2, len(CODE_NAMES))
        assert torch.equal(code[:, :Z_DIM], subject_z([7, 8])) and torch.equal(code[1:], subject_code([8]))
        scene = Scene.from_code(code)
        assert torch.equal(scene.expression, face_expression(code[:, Z_DIM:])) and torch.equal(scene.z, code[:, :Z_DIM])
        assert not Scene.from_code(code[:, :Z_DIM]).expression.any()

    def test_faces_do_not_follow_the_latent(self) -> None:
        """Neither do their sizes, which two readings of one stream of random numbers would share."""
        code = subject_code(range(3000))
        for values in (code, code.abs()):
            related = torch.corrcoef(values.T)[Z_DIM:, :Z_DIM].abs()
            assert float(related.max()) < 0.09  # of 230 pairs, a deviation of 0.018

    def test_faces_are_normal_numbers(self) -> None:
        """Every axis does nothing in most heads; corners of the mouth go up or down; the far end is all there is."""
        face = torch.randn(20_000, len(FACE_AXES), generator=torch.Generator().manual_seed(1))
        found: dict[str, Tensor] = dict(zip(EXPRESSIONS, face_expression(face).unbind(1), strict=True))
        assert not bool(((found["smile"] > 0) & (found["frown"] > 0)).any())
        for name, expected in {"smile": 0.35, "frown": 0.2, "mouth_open": 0.35, "blink": 0.35}.items():
            assert float((found[name] > 0).float().mean()) == pytest.approx(expected, abs=0.02), name
            active = found[name][found[name] > 0]  # uniform in (0, 1]
            assert float(active.mean()) == pytest.approx(0.5, abs=0.02)
            assert float(active.var()) == pytest.approx(1 / 12, abs=0.005)
        ends = face_expression(torch.tensor([[9.0] * 5, [-9.0] * 5]))
        expected = [{n: float(n != "frown") for n in EXPRESSIONS}, {n: float(n == "frown") for n in EXPRESSIONS}]
        assert ends.tolist() == [pytest.approx([row[n] for n in EXPRESSIONS], abs=1e-6) for row in expected]

    def test_light_grows_with_its_dim_and_follows_its_side(self) -> None:
        x = LIGHT.start + 0
        z = torch.zeros(2, Z_DIM)
        z[1, x] = 2.0
        light = Scene.from_z(z).light()
        assert light.shape == (2, 9, 3)
        assert light[1, 3].mean() > light[0, 3].mean()  # band 1, x


class TestGeometry:
    def test_depth_lies_on_the_surface(self) -> None:
        scene = Scene.from_z(subject_z(range(2)), sample_expression(2, generator(1)))
        camera = RIG.camera(torch.tensor([0.9, -0.3]), torch.tensor([0.2, -0.4]))
        truth = render(scene, camera, 48, supersample=1)
        origins, directions = camera.rays(48)
        for i in range(2):
            hit = truth.mask[i].flatten() > 0
            points = (origins[i] + truth.depth[i].reshape(-1, 1) * directions[i])[hit]
            off = distance(named(scene.parameters()[i].tolist()), points.T.contiguous()).abs()
            assert off.quantile(0.98) < 2e-3 and off.max() < RIG.radius / RIG.focal / 48  # stragglers: a pixel

    def test_normals_agree_with_depth(self) -> None:
        scene, camera, size = plain_scene(), RIG.camera(0.3, 0.1), 128
        truth = render(scene, camera, size, supersample=1)
        origins, directions = camera.rays(size)
        points = (origins + truth.depth.reshape(1, -1, 1) * directions).reshape(size, size, 3)
        right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        expected = torch.nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)
        normals = truth.normals[0, :, 1:-1, 1:-1].permute(1, 2, 0)
        smooth = (right.norm(dim=-1) < 0.08) & (down.norm(dim=-1) < 0.08) & (truth.mask[0, 0, 1:-1, 1:-1] > 0)
        cosine = (normals * expected).sum(-1)[smooth]
        assert cosine.median() > 0.99 and (cosine > 0.9).float().mean() > 0.9

    def test_masks_have_no_holes(self) -> None:
        styles = torch.tensor([-1.0, -0.3, 0.1, 0.4, 0.8, 2.0])
        z = subject_z(range(6))
        z[:, Z_NAMES.index("hair_style")] = styles
        z[:, Z_NAMES.index("glasses")] = 0.0  # one may look through the rims
        camera = RIG.camera(torch.linspace(-1.04, 1.04, 6), torch.tensor([0.4, 0.3, -0.1, 0.1, -0.4, 0.35]))
        truth = render(Scene.from_z(z), camera, 96, supersample=1)
        for mask in truth.mask[:, 0].numpy() > 0.5:
            assert (binary_fill_holes(mask) == mask).all()

    def test_truth_is_consistent(self) -> None:
        truth = render(plain_scene(), RIG.camera(0.0), 64)
        assert truth.image.shape == (1, 3, 64, 64) and truth.image.min() >= -1 and truth.image.max() <= 1
        hit = truth.mask[0, 0] > 0
        assert ((truth.depth[0, 0] > 0) == hit).all()
        assert torch.allclose(truth.normals[0].norm(dim=0)[hit], torch.ones(int(hit.sum())), atol=1e-4)
        assert truth.segmentation.dtype == torch.uint8
        present = {SEGMENTS[k] for k in truth.segmentation.unique().tolist()}
        assert {"background", "skin", "eye_white", "iris", "lips", "brow", "hair", "cloth"} <= present
        assert "glasses" not in present and "beard" not in present

    def test_mirrored_camera_sees_the_mirrored_head(self) -> None:
        scene = plain_scene(hair_style=-2.0)  # bald: locks of hair are not symmetric
        camera = RIG.camera(0.5, 0.1)
        left, right = render(scene, camera, 48), render(scene, camera.mirror(), 48)
        assert torch.allclose(left.mask, right.mask.flip(-1), atol=0.26)
        assert (left.depth - right.depth.flip(-1)).abs().quantile(0.98) < 2e-3
        skin = (left.segmentation == 1) & (right.segmentation.flip(-1) == 1)
        assert (left.image - right.image.flip(-1)).abs().amax(1)[skin].quantile(0.95) < 0.1

    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_each_expression_is_visible_at_its_place(self, name: str) -> None:
        scene, camera = plain_scene(), RIG.camera(0.0)
        neutral = render(scene, camera, 64).image
        change = (render(scene.with_expression(one_hot(name)), camera, 64).image - neutral).abs().mean(1)[0]
        eyes, mouth = change[18:36, 14:50], change[36:50, 20:44]
        place = eyes if name in ("brow_raise", "blink") else mouth
        assert (place > 0.15).sum() >= 20, f"{name}: {int((place > 0.15).sum())} pixels"
        assert change[:10].max() < 0.05  # the hair stays

    def test_exaggerations_change_the_shape(self) -> None:
        scene, camera = plain_scene(), RIG.camera(0.4)
        base = render(scene, camera, 48)
        for name in EXAGGERATIONS:
            assert (render(scene.exaggerate(name), camera, 48).image - base.image).abs().amax(1).gt(0.2).sum() > 30
            same = render(scene.exaggerate(name, 0.0), camera, 48)
            assert torch.equal(same.image, base.image)
        with pytest.raises(ValueError, match="unknown exaggeration 'nose', choose from"):
            scene.exaggerate("nose")


class TestStyles:
    def test_names(self) -> None:
        assert HELD_OUT_STYLE in ART_STYLES and len(set(STYLES)) == 7

    def test_same_picture_twice_and_alone_or_in_a_batch(self) -> None:
        scene = Scene.from_z(subject_z([4, 5]))
        camera = RIG.camera(torch.tensor([0.1, -0.5]))
        both = render(scene, camera, 32, ["toon", "impasto"])
        again = render(scene[1], camera[1], 32, "impasto")
        assert torch.equal(both.image[1:], again.image)

    @pytest.mark.parametrize("style", ART_STYLES)
    def test_a_style_differs_from_plain_but_shares_the_geometry(self, style: str) -> None:
        scene, camera = plain_scene(), RIG.camera(0.2)
        plain, art = render(scene, camera, 32, supersample=1), render(scene, camera, 32, style, supersample=1)
        assert torch.equal(plain.depth, art.depth) and (plain.image - art.image).abs().mean() > 0.04

    @pytest.mark.parametrize("style", ["toon", "sketch", "ukiyoe", "impasto", "popart"])
    def test_a_point_has_the_same_colour_in_two_views(self, style: str) -> None:
        scene, size = plain_scene(), 160
        first, second = RIG.camera(0.12), RIG.camera(-0.12)
        a, b = (render(scene, c, size, style, supersample=1) for c in (first, second))
        origins, directions = first.rays(size)
        points = origins + a.depth.reshape(1, -1, 1) * directions
        uv, depth = second.project(points)
        grid = uv[:, None] * 2 - 1
        seen = torch.nn.functional.grid_sample(torch.cat([b.image, b.depth], 1), grid, align_corners=False)[:, :, 0]
        face = (a.segmentation.flatten() == 1) & ((seen[0, 3] - depth[0]).abs() < 0.01)
        error = (a.image.reshape(3, -1) - seen[0, :3]).abs().mean(0)[face]
        assert face.sum() > 2000
        assert error.median() < 0.03 and error.mean() < 0.12

    def test_wrong_requests_are_refused(self) -> None:
        scene, camera = plain_scene(2), RIG.camera(0.0)
        with pytest.raises(ValueError, match="unknown style 'cubism', choose from"):
            render(scene, camera, 8, "cubism")
        with pytest.raises(ValueError, match="2 heads need 2 styles or one, got 3"):
            render(scene, camera, 8, ["plain"] * 3)
        with pytest.raises(ValueError, match="2 heads need 2 cameras or one, got 3"):
            render(scene, RIG.camera(torch.zeros(3)), 8)
        with pytest.raises(ValueError, match="size and supersample must be at least 1"):
            render(scene, camera, 0)
        with pytest.raises(ValueError, match="holds no head"):
            render(scene[:0], camera, 8)


class TestCache:
    config = CacheConfig(split="val", subjects=2, views_per_subject=2, size=16, supersample=1, styles=("plain", "toon"))

    def build(self, root: Path) -> Path:
        return build_cache(self.config, root, workers=0, progress=False)

    def test_round_trip_and_reuse(self, tmp_path: Path) -> None:
        folder = self.build(tmp_path)
        written = (folder / "image.npy").stat().st_mtime_ns
        assert self.build(tmp_path) == folder and (folder / "image.npy").stat().st_mtime_ns == written
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]
        dataset = MannequinImages(folder)
        sample, seed = dataset[1], SPLITS["val"][1]
        camera, expression, styles = draw_views(seed, 2, self.config.styles)
        truth = render(Scene.from_z(subject_z([seed, seed]), expression), camera, 16, styles, 1)
        assert len(dataset) == 2 and int(sample["seed"]) == seed
        assert (sample["image"] - truth.image).abs().max() < 0.005
        assert (sample["depth"] - truth.depth).abs().max() < 0.005
        assert torch.equal(sample["segmentation"], truth.segmentation)
        assert torch.equal(sample["z"], subject_z([seed])[0]) and torch.equal(sample["expression"], expression)
        assert torch.allclose(Camera.from_label(sample["label"]).cam2world, camera.cam2world)
        with pytest.raises(IndexError, match="subject 2 of 2"):
            dataset[2]

    def test_damage_is_repaired(self, tmp_path: Path) -> None:
        folder = self.build(tmp_path)
        sound = (folder / "image.npy").read_bytes()
        (folder / "image.npy").write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.warns(UserWarning, match=r"damaged \(image.npy differs from its checksum\)"):
            self.build(tmp_path)
        assert (folder / "image.npy").read_bytes() == sound
        (folder / "manifest.json").unlink()
        with pytest.warns(UserWarning, match="no readable manifest"):
            self.build(tmp_path)
        assert json.loads((folder / "manifest.json").read_text())["config"]["subjects"] == 2
        for text in ("[]", "7", '{"config": {}}', "[" * 100_000, '{"config": null, "files": []}'):
            (folder / "manifest.json").write_text(text)
            with pytest.warns(UserWarning, match="damaged"):
                self.build(tmp_path)

    def test_the_key_covers_the_content(self) -> None:
        keys = {replace(self.config, **change).key for change in ({}, {"first": 1}, {"seed": 1}, {"size": 17})}
        assert len(keys) == 4

    def test_more_views_keep_the_first(self) -> None:
        few, many = draw_views(3, 2), draw_views(3, 40)
        assert torch.equal(few[0].cam2world, many[0].cam2world[:2]) and torch.equal(few[1], many[1][:2])
        assert many[0].yaw.abs().rad2deg().max() < 60.01 and many[0].pitch.abs().rad2deg().max() < 25.01
        assert not torch.equal(few[1][0], few[1][1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"split": "dev"}, "unknown split 'dev'"),
            ({"styles": ("plain", "cubism")}, r"unknown style \['cubism'\]"),
            ({"subjects": 0}, "must be at least 1"),
            ({"first": 10**9}, "split val has 100000 subjects"),
            ({"exaggerate": {"big_nose": 1.0}}, "unknown exaggeration 'big_nose'"),
        ],
    )
    def test_wrong_configs_are_refused(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(self.config, **change)

    def test_coded_subjects(self, tmp_path: Path) -> None:
        """One face in all views, in the code; the truth and the distances are those of the code."""
        data = mannequins.MannequinDataModule(
            1, 1, 1, size=16, supersample=1, views_per_subject=2, cache_dir=str(tmp_path), coded=True
        )
        data.setup("test")
        sample = data.datasets["test"][0]
        scene = Scene.from_code(subject_code([int(sample["seed"])]))
        assert sample["z"].shape == (CODE_DIM,)
        assert torch.equal(sample["expression"], scene.expression.expand(2, -1))
        camera = Camera.from_label(sample["label"])
        for truth in (data.view_truth(sample, camera), data.subject_truth(sample["z"][None], camera, 16)):
            assert torch.equal(truth.expression, scene.expression.expand(2, -1))
        blinking = torch.zeros_like(sample["expression"])
        blinking[:, EXPRESSIONS.index("blink")] = 1
        edited = data.view_truth({**sample, "expression": blinking}, camera)
        assert torch.equal(edited.expression, blinking)
        again = data.view_truth(sample, camera).image
        assert float((again - sample["image"]).abs().max()) <= 2 / 255

        solid = sample["mask"][0].flatten() == 1
        origins, directions = camera[0].rays(16)
        points = origins + sample["depth"][0].flatten()[None, :, None] * directions
        found = data.distances(sample["z"][None], points)[0]
        assert float(found[solid].abs().max()) < 0.02  # depths are stored in half precision
        centre = torch.zeros(1, 1, 3)
        assert float(data.distances(sample["z"][None], centre)) < -0.3

    def test_exaggerated_heads(self, tmp_path: Path) -> None:
        """Style sets of caricatures; caches without exaggerations are those that there were before."""
        options = {"size": 16, "supersample": 1, "views_per_subject": 1, "cache_dir": str(tmp_path), "styles": ["toon"]}
        data = mannequins.MannequinDataModule(1, 1, 1, first=5, exaggerate={"big_eyes": 1.0}, **options)
        data.setup("test")
        sample = data.datasets["test"][0]
        assert int(sample["seed"]) == SPLITS["test"][5]
        camera, scene = Camera.from_label(sample["label"]), Scene.from_z(sample["z"][None], sample["expression"])
        truth = render(scene.exaggerate("big_eyes"), camera, 16, "toon", 1).image
        assert float((truth - sample["image"]).abs().max()) < 0.01
        assert float((data.view_truth(sample, camera).image - truth).abs().max()) < 1e-6
        assert float((render(scene, camera, 16, "toon", 1).image - truth).abs().max()) > 0.05
        assert replace(self.config, exaggerate={"big_eyes": 1.0}).key != self.config.key
        assert self.config.key == "val-16px-5cf7dd5dd5963a7b"  # as of before

    def test_posed_pictures(self, tmp_path: Path) -> None:
        """Each picture is an item, and its code alone says what it shows, the pose too."""
        options = {"size": 16, "supersample": 1, "views_per_subject": 3, "cache_dir": str(tmp_path), "coded": True}
        data = mannequins.MannequinDataModule(1, 1, 2, posed=True, **options)
        data.setup("test")
        assert len(data.datasets["test"]) == 6
        sample = data.datasets["test"][4]
        assert sample["image"].shape == (1, 3, 16, 16) and sample["z"].shape == (POSED_DIM,)
        assert torch.equal(sample["z"][:CODE_DIM], subject_code([SPLITS["test"][1]])[0])
        camera, code = Camera.from_label(sample["label"]), sample["z"][None]
        assert torch.allclose(posed_camera(code).cam2world, camera.cam2world, atol=1e-4)
        drawn = (data.subject_truth(code, view, 16).image for view in (posed_camera(code), camera))
        assert_close(*drawn, atol=1e-3, rtol=0)
        opened = data.changed(sample, "mouth_open", 3.0)["expression"] - sample["expression"]
        assert float(opened[0, EXPRESSIONS.index("mouth_open")]) > 0 and data.traits[-2:] == ("yaw", "pitch")
        with pytest.raises(IndexError, match="picture 6 of 6"):
            data.datasets["test"][6]
        with pytest.raises(UserError, match="set coded true"):
            mannequins.MannequinDataModule(posed=True)

    def test_poses_are_gaussian_numbers(self) -> None:
        poses = pose_numbers(Camera.cat([draw_views(seed, 1, posed=True)[0] for seed in range(4000)]))
        codes = subject_code(range(4000))
        said = torch.cat([poses, codes, codes.square()], 1).T  # what a pose says of the subject: nothing
        assert torch.corrcoef(said)[:2, 2:].abs().max() < 0.07
        assert poses.mean(0).abs().max() < 0.05 and (poses.std(0) - 1).abs().max() < 0.05
        assert float(torch.corrcoef(poses.T)[0, 1].abs()) < 0.05
        ends = pose_numbers(RIG.camera(torch.tensor([-1.0, 0.0, 1.0]) * math.radians(60), 0.0))
        assert torch.equal(ends[1], torch.zeros(2)) and torch.allclose(ends[0, 0], -ends[2, 0]) and ends[2, 0] > 2.5

    def test_data_module(self, tmp_path: Path) -> None:
        data = mannequins.MannequinDataModule(
            train_subjects=2,
            val_subjects=1,
            test_subjects=1,
            size=16,
            views_per_subject=2,
            batch_size=2,
            supersample=1,
            draw_workers=0,
            cache_dir=str(tmp_path),
        )
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (2, 2, 3, 16, 16) and batch["label"].shape == (2, 2, 25)
        assert batch["expression"].shape == (2, 2, len(EXPRESSIONS)) and batch["z"].shape == (2, Z_DIM)
        assert int(next(iter(data.val_dataloader()))["seed"]) == SPLITS["val"][0]
