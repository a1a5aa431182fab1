"""The training of the prior: a few of its steps on a tiny embedded world."""

import contextlib
import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision

from callbacks.guard import FiniteGuard
from datamodules.mannequins import CODE_DIM, EXPRESSIONS, Z_DIM, MannequinDataModule
from models import artifact
from models.camera import Camera, Rig
from models.errors import UserError
from models.generators.discriminator import ImageDiscriminator
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.generators.stylesdf import RIG, StyleSDF
from models.heads.projector import fit_latents
from models.losses.field import FieldLoss
from models.losses.rendering import RenderingLoss
from models.metrics.distribution import Distribution, EmbeddedDistribution
from models.metrics.image import psnr
from models.metrics.records import read_records
from models.rendering.output import Rendering
from stages.base.adversarial import AdversarialLoss, Optimization
from stages.prior import PriorStage
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill


def small_config(folder):
    """Eight steps of two subjects with two views, adversarial from the fifth."""
    generator = {
        "resolution": 16,
        "w_dim": 16,
        "channels": [16, 12, 8],
        "start": 4,
        "mapping_hidden": 16,
        "background_channels": [8, 8],
        "predictor": {"hidden": 8, "grid": 32},
    }
    model = {
        "generator": {"class_path": "models.generators.manifold.ManifoldGenerator", "init_args": generator},
        "discriminator": {
            "class_path": "models.generators.discriminator.ImageDiscriminator",
            "init_args": {"channels": [8, 12, 16]},
        },
        "total_images": 32,
        "adversarial": {"start": 16, "r1_every": 2},
        "optimization": {"warmup_images": 1},
        "fit_manifolds": False,
    }
    data = {
        "train_subjects": 6,
        "val_subjects": 2,
        "test_subjects": 2,
        "size": 16,
        "views_per_subject": 2,
        "batch_size": 2,
        "supersample": 1,
        "draw_workers": 0,
        "compiled": False,
        "cache_dir": str(folder / "cache"),
    }
    data = {"class_path": "datamodules.mannequins.MannequinDataModule", "init_args": data}
    return {"model": model, "data": data, "trainer": {"callbacks": [small.CHECKPOINT]}}


def line(folder):
    return ["prior", "fit", f"--config={small.write(folder / 'prior.yaml', small_config(folder))}", *small.TRAINER]


# Twelve subjects to train on; five each in validation and in test, which neither two nor three ranks divide.
_FIVES = {f"data.init_args.{split}_subjects": count for split, count in (("train", 12), ("val", 5), ("test", 5))}
_LONGER = {
    **_FIVES,
    "model.total_images": 48,
    # Of the minibatch standard deviation each rank has its own, as in StyleGAN.
    "model.discriminator.init_args.minibatch_group": 0,
}
_GAN = {"model.reconstruction.weight": 0, "model.adversarial.start": 0}
# A field that learns from points alone at first, then from pictures too.
_SDF = {
    "model.generator": {
        "class_path": "models.generators.stylesdf.StyleSDF",
        "init_args": {
            "z_dim": 51, "width": 8, "depth": 1, "mapping_layers": 1, "raw_resolution": 8, "samples": 6,
            "decoder": {"channels": [8, 8], "w_dim": 8, "mapping_layers": 1},
            "rig": {"radius": 7.0, "focal": 2.4038, "near": 5.8, "far": 7.8},
        },
    },
    "model.field": {"alone": 12, "pixels": 8, "near": 8, "uniform": 8},
    "model.optimization.lr_scales": {"decoder": 5.0},
    "data.init_args.coded": True,
}  # fmt: skip
_SCORES = {"model.fit_subjects": 2, "model.neighbours": 2, "model.kid_features": "EmbeddedDistribution"}
CASE = StageCase(
    line,
    small.tiny_prior,
    commands={
        "fit": Command(batch=6, options={**_LONGER, "model.adversarial.start": 24}, tolerance=5e-3),
        "fit, plain GAN": Command(batch=6, options={**_LONGER, **_GAN}, tolerance=5e-3),
        "fit, distances": Command(batch=6, options={**_LONGER, **_SDF, "model.adversarial.start": 24}, tolerance=5e-3),
        "test": Command(options={**_LONGER, **_SCORES}),
    },
    kills=[Kill("last.ckpt"), Kill("last.ckpt", 5), Kill("artifact")],
)

SIZE = 16
DATA = {
    "train_subjects": 6, "val_subjects": 2, "test_subjects": 2, "size": SIZE, "views_per_subject": 2,
    "batch_size": 2, "supersample": 1, "draw_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(cache):
    return MannequinDataModule(**DATA, cache_dir=cache)


def stage(adversarial=None, optimization=None, **options):
    """Options of the two dataclasses differ from the embedded world's."""
    torch.manual_seed(0)
    generator = ManifoldGenerator(
        Z_DIM, resolution=SIZE, w_dim=16, channels=[16, 12, 8], start=4, mapping_hidden=16, octaves=1,
        background_channels=[8, 8], ambient=4, samples=32, predictor={"hidden": 8, "grid": 32}, normalize_z=False,
        detail_maps=True, expressions=list(EXPRESSIONS),
    )  # fmt: skip
    discriminator = ImageDiscriminator([8, 12, 16])
    options = {"total_images": 80} | options
    terms = AdversarialLoss(**{"weight": 0.02, "start": 16, "r1_every": 2} | (adversarial or {}))
    training = {"learning_rate": 6e-3, "betas": (0.9, 0.99), "schedule": "cosine", "warmup_images": 1}
    training = Optimization(**training | (optimization or {}))
    return PriorStage(generator, discriminator, adversarial=terms, optimization=training, **options)


def trainer(out, **options):
    return pl.Trainer(**{
        "default_root_dir": out, "accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "inference_mode": False, "limit_val_batches": 0, **options,
    })  # fmt: skip


def weights(stage):
    return torch.cat([p.detach().flatten() for p in (*stage.average.parameters(), *stage.discriminator.parameters())])


@pytest.fixture(autouse=True)
def quick_manifolds(monkeypatch):
    """Fitting the average head takes seconds and is not what is tested here."""
    points = torch.randn(64, 3)
    monkeypatch.setattr(MannequinDataModule, "manifold_field", lambda self: (points, points.norm(dim=-1) - 0.9))
    monkeypatch.setattr("stages.prior.fit_predictor", lambda *_, **__: 0.0)


def test_reconstruction_falls_and_the_artifact_loads(tmp_path, data):
    torch.set_num_threads(1)
    module = stage({"start": 200}, {"learning_rate": 1e-2, "lr_scales": {"style": 4.0}}, total_images=240)
    data.prepare_data()
    data.setup("fit")
    batch = torch.utils.data.default_collate([data.datasets["train"][i] for i in range(6)])

    def error() -> float:
        with torch.no_grad():
            fake = module.render(module.generator, batch).rendering
        return float(module.reconstruction(fake, batch)["reconstruction"])

    before = error()
    trainer(tmp_path).fit(module, datamodule=data)
    assert error() < 0.6 * before
    assert int(module.images_seen) == 240
    artifact.save(tmp_path / "artifact", stage="prior", **vars(module.export()))
    loaded = artifact.load(tmp_path).module("generator")
    z = torch.randn(1, Z_DIM, generator=torch.Generator().manual_seed(0))
    camera = loaded.rig.camera(0.2)
    with torch.no_grad():
        ours, theirs = (g.synthesis(g.mapping(z), camera).image for g in (module.average.module, loaded))
    assert (ours - theirs).abs().max() < 0.05  # stored in half precision


def test_interrupted_training_continues_exactly(tmp_path, data):
    """From a checkpoint within an epoch: every batch, draw, optimiser and average is restored."""
    torch.set_num_threads(1)
    whole = stage()
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path / "whole", callbacks=[keep], enable_checkpointing=True).fit(whole, datamodule=data)
    # Two optimisers: step 18 is early in the adversarial part, and not at the end of an epoch of three batches.
    (checkpoint,) = (tmp_path / "kept").glob("*step=18.ckpt")
    resumed = stage()
    fresh = MannequinDataModule(**DATA | {"cache_dir": data.cache_dir})
    trainer(tmp_path / "rest").fit(resumed, datamodule=fresh, ckpt_path=checkpoint, weights_only=True)
    assert int(resumed.images_seen) == int(whole.images_seen) == 80
    assert torch.equal(weights(resumed), weights(whole))


def test_depth_term_punishes_fog(data):
    """Half of the light from either side of the true depth has the right mean and is wrong all the same."""
    shape = (1, 1, 2, 2)
    batch = {
        "image": torch.zeros(1, 1, 3, 2, 2), "mask": torch.ones(1, *shape), "depth": torch.full((1, *shape), 7.0),
    }  # fmt: skip
    crisp = Rendering(torch.zeros(1, 3, 2, 2), depth=torch.full(shape, 7.0), alpha=torch.ones(shape))
    fog = crisp.replace(spread=torch.full(shape, 0.04))
    term = stage().reconstruction
    assert term(crisp.replace(spread=torch.zeros(shape)), batch)["depth"] < 0.002
    assert term(fog, batch)["depth"] == pytest.approx(0.2, abs=0.001)


def test_plain_gan_needs_no_latents(tmp_path, data):
    module = stage({"start": 0}, reconstruction=RenderingLoss(weight=0.0), total_images=16)
    before = weights(module)
    trainer(tmp_path).fit(module, datamodule=data)
    assert weights(module).isfinite().all()
    assert not torch.equal(weights(module), before)


class Pictures(pl.LightningDataModule):
    """As portraits come: pictures with cameras and names, and nothing else."""

    def train_dataloader(self):
        draws = torch.Generator().manual_seed(0)
        image = torch.rand(4, 1, 3, SIZE, SIZE, generator=draws) * 2 - 1
        label = Rig().random(4, draws).label()[:, None]
        return torch.utils.data.DataLoader([{"image": image, "label": label, "name": list("abcd")}], batch_size=None)

    test_dataloader = train_dataloader


def test_portraits_train_a_plain_gan(tmp_path):
    module = stage({"start": 0}, total_images=8, views_per_step=2, fit_manifolds=False)
    before = weights(module)
    trainer(tmp_path).fit(module, datamodule=Pictures())
    assert weights(module).isfinite().all() and not torch.equal(weights(module), before)


def test_portraits_are_measured_by_their_distribution(tmp_path):
    """Samples from the cameras of the pictures; their codes are not known."""
    module = stage(kid_features=EmbeddedDistribution(weights=None))
    trainer(tmp_path).test(module, datamodule=Pictures(), verbose=False)
    records = read_records(tmp_path / "metrics.csv")
    assert {(r.variant, r.metric) for r in records} == {
        (kind, metric) for kind in ("samples", "real halves") for metric in ("fid", "kid")
    }
    labels = next(iter(Pictures().train_dataloader()))["label"][:2, 0]
    average = module.average.module
    z = average.sample_z(2, torch.Generator().manual_seed(module.seed))
    with torch.no_grad():
        expected = average.synthesis(average.mapping(z), Camera.from_label(labels)).image.clamp(-1, 1)
    torch.testing.assert_close(torch.cat(list(module._samples(labels))), expected)


class Counts(Distribution):
    """A network with weights, as Inception has."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, image):
        return image.float().mean((2, 3)) * self.scale


def test_the_measuring_network_is_no_part_of_checkpoints(tmp_path):
    plain, module = stage(), stage(kid_features=Counts())
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    trainer(tmp_path).test(module, datamodule=Pictures(), verbose=False)
    assert {r.metric for r in read_records(tmp_path / "metrics.csv")} == {"fid", "kid"}


class Unlabelled(Pictures):
    """Pictures alone."""

    def train_dataloader(self):
        (batch,) = super().train_dataloader()
        return torch.utils.data.DataLoader([{"image": batch["image"]}], batch_size=None)

    test_dataloader = val_dataloader = train_dataloader


def test_a_2d_prior_needs_no_cameras(tmp_path):
    generator = StyleGAN2Generator([8, 6, 4], style_dim=8, mapping_layers=2)
    options = {"adversarial": AdversarialLoss(), "total_images": 8, "kid_features": Counts()}
    module = PriorStage(generator, StyleGAN2Discriminator([4, 6, 8]), **options)
    trainer(tmp_path, limit_val_batches=1).fit(module, datamodule=Unlabelled())
    assert int(module.steps_done) == 2 and module.panels()["pairs"].shape == (3, SIZE + 2, 8 * (SIZE + 2))
    trainer(tmp_path).test(module, datamodule=Unlabelled(), verbose=False)
    assert {r.variant for r in read_records(tmp_path / "metrics.csv")} == {"samples", "real halves"}


class Codes(Pictures):
    """Pictures whose codes are known, and whose expressions are not."""

    def train_dataloader(self):
        (batch,) = super().train_dataloader()
        batch["z"] = torch.randn(4, Z_DIM, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader([batch], batch_size=None)


def test_codes_without_expressions_are_neutral(tmp_path):
    module = stage({"start": 8}, total_images=16, fit_manifolds=False)
    assert module.generator.expressions
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(module, Codes().train_dataloader(), Codes().train_dataloader())
    assert run.callback_metrics["val/psnr"].isfinite()


def test_portraits_are_shown_beside_samples(tmp_path):
    module = stage({"start": 0}, total_images=8, fit_manifolds=False)
    trainer(tmp_path, limit_val_batches=1).fit(module, Pictures().train_dataloader(), Pictures().train_dataloader())
    picture = module.panels()["pairs"]
    assert picture.shape == (3, SIZE + 2, 8 * (SIZE + 2))
    real = next(iter(Pictures().train_dataloader()))["image"][:, 0]
    shown = picture.unflatten(2, (8, SIZE + 2))[:, 1:-1, :, 1:-1].permute(2, 0, 1, 3)
    assert torch.equal(shown[::2], real) and not torch.equal(shown[1::2], real)


class Scaled(MixedPrecision):
    """16-mixed's scaling of losses without its half precision: the gradients are exact."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def forward_context(self):
        return contextlib.nullcontext()


CLIP = 1e-3


def clipped(tmp_path, weight=1.0, **options) -> tuple[PriorStage, float]:
    """A plain GAN, clipped at each of its steps, and the last norm that was logged."""
    module = stage({"start": 0, "weight": weight}, {"clip": CLIP}, total_images=16, fit_manifolds=False)
    run = trainer(tmp_path, callbacks=[FiniteGuard(1)], **options)
    run.fit(module, datamodule=Pictures())
    return module, float(run.callback_metrics["prior/gradient_norm"])


def test_scaled_gradients_are_clipped_at_their_true_size(tmp_path):
    plain, norm = clipped(tmp_path)
    scaled, same = clipped(tmp_path, plugins=[Scaled(2.0**12)])
    assert norm > CLIP and same == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(weights(scaled), weights(plain))


def test_overflowing_gradients_are_left_out(tmp_path):
    """The scaler leaves the steps out, which is no reason to stop; four of them are too few to come down from there."""
    module, norm = clipped(tmp_path, weight=1e4, plugins=[Scaled(2.0**127)])
    assert norm == 0 and int(module.images_seen) == 16
    assert all(
        torch.equal(a, b) for a, b in zip(module.generator.parameters(), stage().generator.parameters(), strict=True)
    )


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("cosine", 0.01)])
def test_schedules(schedule, end):
    module = stage(optimization={"schedule": schedule, "warmup_images": 10}, total_images=100)
    rates = [(module.images_seen.fill_(seen), module._schedule())[1] for seen in (0, 9, 100)]
    assert rates[0] == pytest.approx(0.1) and rates[1] > 0.95 and rates[2] == pytest.approx(end)


def test_a_rate_that_is_held_falls_afterwards():
    module = stage(optimization={"schedule": "cosine", "hold": 0.6, "warmup_images": 1}, total_images=100)
    rates = [(module.images_seen.fill_(seen), module._schedule())[1] for seen in (10, 60, 80, 100, 120)]
    assert rates == pytest.approx([1.0, 1.0, 0.505, 0.01, 0.01])
    with pytest.raises(UserError, match=r"optimization\.hold is 1: it must be at least 0 and less than 1"):
        stage(optimization={"hold": 1})


def test_parts_learn_at_their_own_rates():
    generator = ManifoldGenerator(4, resolution=SIZE, channels=[8, 8, 8], start=4, bake_predictor=False)
    optimizer, *_ = PriorStage(generator, optimization=Optimization(2.5e-3)).configure_optimizers()
    rates = {id(p): 2.5e-3 * group["scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in generator.named_parameters():
        assert rates[id(parameter)] == pytest.approx(2e-5 if name.startswith("predictor.") else 2.5e-3)


def test_r1_at_every_step_leaves_the_optimiser_as_it_is():
    _, optimizer = stage({"r1_every": 1}, {"discriminator_lr": 1e-3}).configure_optimizers()
    assert optimizer.defaults["lr"] == 1e-3 and optimizer.defaults["betas"] == (0.0, 0.99)


def test_what_portraits_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="fit_manifolds false"):
        trainer(tmp_path).fit(stage({"start": 0}), datamodule=Pictures())
    with pytest.raises(UserError, match=r"adversarial\.start 0"):
        trainer(tmp_path).fit(stage(fit_manifolds=False), datamodule=Pictures())
    with pytest.raises(UserError, match="kid_features"):
        trainer(tmp_path).test(stage(), datamodule=Pictures(), verbose=False)


class TestDistances:
    """A small StyleSDF on coded mannequins."""

    @staticmethod
    def stage(**options):
        torch.manual_seed(0)
        generator = StyleSDF(
            CODE_DIM, width=24, depth=2, mapping_layers=1, raw_resolution=8, samples=12,
            decoder={"channels": [8, 8], "w_dim": 8, "mapping_layers": 1}, rig=Rig(near=5.8, far=7.8),
        )  # fmt: skip
        field = FieldLoss(**{"alone": 120, "pixels": 32, "near": 32, "uniform": 16} | options.pop("field", {}))
        training = Optimization(2e-3, betas=(0.9, 0.99), warmup_images=1, lr_scales={"decoder": 5.0})
        return PriorStage(
            generator, None, 160, AdversarialLoss(start=1000), field=field, optimization=training, **options
        )

    @pytest.fixture
    def data(self, cache):
        return MannequinDataModule(**DATA, cache_dir=cache, coded=True)

    def test_points_alone_then_pictures(self, tmp_path, data, monkeypatch):
        torch.set_num_threads(1)
        module, rendered = self.stage(jitter=True), []
        render = StyleSDF.synthesis

        def counted(self, *args, **options):
            if torch.is_grad_enabled():
                rendered.append(int(module.images_seen))
            return render(self, *args, **options)

        monkeypatch.setattr(StyleSDF, "synthesis", counted)
        data.prepare_data()
        data.setup("fit")
        batch = torch.utils.data.default_collate([data.datasets["train"][i] for i in range(6)])
        camera = Camera.from_label(batch["label"].flatten(0, 1))

        def error():
            drawn = module.field.draw(6, 2, torch.Generator().manual_seed(1))
            ws = module.generator.mapping(batch["z"])
            terms = module.field(module.generator, ws, camera, batch, data.distances, drawn)
            return float(terms["distance"]), float(terms["colour"])

        before = error()
        trainer(tmp_path).fit(module, datamodule=data)
        assert min(rendered) == 120 and max(rendered) == 156 and len(rendered) == 10
        after = error()
        assert after[0] < 0.75 * before[0] and after[1] < 0.95 * before[1], (before, after)

    def test_some_heads_are_points_alone(self, tmp_path, data, monkeypatch):
        """Pictures of the first head of a batch, points of both."""
        module, seen, taught = self.stage(rendered=1), [], []
        render, learn = StyleSDF.synthesis, FieldLoss.__call__

        def counted(self, ws, camera, **options):
            if torch.is_grad_enabled():
                seen.append((len(ws), len(camera)))
            return render(self, ws, camera, **options)

        def noted(self, generator, ws, camera, batch, *others):
            taught.append((len(ws), len(camera)))
            return learn(self, generator, ws, camera, batch, *others)

        monkeypatch.setattr(StyleSDF, "synthesis", counted)
        monkeypatch.setattr(FieldLoss, "__call__", noted)
        trainer(tmp_path).fit(module, datamodule=data)
        assert set(taught) == {(2, 4)} and set(seen) == {(1, 2)}
        assert len(taught) * 2 == int(module.images_seen) == 160
        with pytest.raises(UserError, match=r"model\.rendered leaves heads to model.field, and there is none"):
            stage(rendered=2)

    def test_shape_is_measured(self, tmp_path, data):
        module = self.stage(fit_subjects=1, meshes=2)
        trainer(tmp_path).test(module, datamodule=data, verbose=False)
        records = read_records(tmp_path / "metrics.csv")
        found = {(r.variant, r.metric) for r in records}
        assert {
            ("fitted", "slope"),
            ("known z", "slope"),
            ("known z", "depth_mae"),
            ("samples", "mesh_closed"),
        } <= found
        assert {r.value for r in records if r.metric == "mesh_closed"} <= {0.0, 1.0}
        generator, z = module.average.module, data.datasets["test"][0]["z"][None]
        slope = next(r for r in records if (r.variant, r.metric, r.view) == ("known z", "slope", "yaw+24"))
        with torch.no_grad():
            ws, camera = generator.mapping(z), generator.rig.camera(math.radians(24))
            seen = generator.synthesis(ws, camera)
        origins, directions = (t[0] for t in camera.rays(8))
        lengths = []
        for ray in range(64):
            if float(seen.alpha.flatten()[ray]) > 0.9:
                x = (origins[ray] + float(seen.depth.flatten()[ray]) * directions[ray])[None, None].requires_grad_()
                (gradient,) = torch.autograd.grad(generator.surface(ws, x).sum(), x)
                lengths.append(float(gradient.norm()))
        assert slope.value == pytest.approx(sum(lengths) / len(lengths), rel=1e-3)

    def test_half_precision(self, tmp_path, data):
        module = self.stage()
        trainer(tmp_path, precision="bf16-mixed").fit(module, datamodule=data)
        assert all(bool(p.isfinite().all()) for p in module.parameters())

    def test_what_does_not_fit_is_refused(self, tmp_path, data):
        with pytest.raises(UserError, match=r"model\.field teaches a signed distance, which ManifoldGenerator is not"):
            stage(field=FieldLoss())
        with pytest.raises(UserError, match="a StyleSDF of densities is not"):
            PriorStage(StyleSDF(Z_DIM, width=8, depth=1, signed_distance=False), field=FieldLoss())
        with pytest.raises(UserError, match="the generator's rig: its camera is 1 from the head"):
            module = self.stage()
            module.generator.rig = RIG.replace(near=5.8, far=7.8)  # of a StyleSDF, whose radius is 1
            trainer(tmp_path).fit(module, datamodule=data)
        with pytest.raises(UserError, match="no surfaces to teach a distance by"):
            module = PriorStage(StyleSDF(Z_DIM, width=8, depth=1, raw_resolution=SIZE, rig=Rig()), field=FieldLoss())
            trainer(tmp_path).fit(module, datamodule=Codes())
        with pytest.raises(UserError, match="before image 120"):
            PriorStage(self.stage().generator, ImageDiscriminator([8, 12, 16]), 160, AdversarialLoss(start=0),
                       field=FieldLoss(alone=120))  # fmt: skip


def test_protocol_writes_every_score(tmp_path, data):
    torch.manual_seed(0)
    module = stage(fit_subjects=1, kid_features=EmbeddedDistribution(weights=None), neighbours=3)
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    records = read_records(tmp_path / "metrics.csv")
    metrics = {(r.variant, r.metric) for r in records}
    for name in EXPRESSIONS:
        assert ("fitted", f"expression_{name}") in metrics
    assert {("fitted", "psnr"), ("fitted", "psnr_60"), ("known z", "depth_mae"), ("samples", "kid")} <= metrics
    assert len({r.item for r in records if r.metric == "psnr"}) == 1
    near = {
        v: [r.value for r in records if r.variant == v and r.metric == "psnr_to_nearest_training"]
        for v in ("samples", "held out")
    }
    assert [len(values) for values in near.values()] == [3, 3]
    training = torch.cat([data.datasets["train"][i]["image"] for i in range(len(data.datasets["train"]))])
    real = data.datasets["test"][0]["image"][:1]
    assert near["held out"][0] == pytest.approx(float(psnr(training, real.expand_as(training)).max()), abs=1e-3)
    assert (tmp_path / "neighbours.png").exists()


def test_fit_latents_recovers_a_sample():
    torch.set_num_threads(1)
    generator = stage().generator
    with torch.no_grad():
        generator.backbone.out_bias[6::4] = 2.0
        z = torch.randn(2, Z_DIM, generator=torch.Generator().manual_seed(3))
        camera = generator.rig.camera(torch.tensor([0.1, -0.2]))
        image = generator.synthesis(generator.mapping(z), camera).image
    found = fit_latents(generator, image, camera, z_steps=30, ws_steps=30)
    with torch.no_grad():
        again = generator.synthesis(found, camera).image
        start = generator.synthesis(generator.mapping(torch.zeros_like(z)), camera).image
    assert (again - image).square().mean() < 0.1 * (start - image).square().mean()
    assert all(p.requires_grad for p in generator.parameters())
