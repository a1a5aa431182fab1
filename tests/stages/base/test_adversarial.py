"""GAN training of any generator: 2D and 3D, with and without a discriminator, frozen parts, regularisers."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from models.camera import Rig
from models.errors import UserError
from models.generators.base import ParameterGroup
from models.generators.discriminator import ImageDiscriminator
from models.generators.gram import GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from stages.base.adversarial import AdversarialLoss, AdversarialStage, Optimization
from stages.base.ranks import IndependentRanks
from stages.base.seeds import step_generator
from tests.stages import tiny
from tests.stages.processes import HalfOnCpu

SIZE = 8


class Gan(AdversarialStage):
    """Nothing but what all share."""

    name = "gan"

    def __init__(self, generator, discriminator=None, total_images=16, adversarial=None, optimization=None, seed=0):
        adversarial = AdversarialLoss(**{"r1_every": 2} | (adversarial or {}))
        super().__init__(total_images, adversarial, Optimization(warmup_images=1, **optimization or {}), False, seed)
        self.adopt(generator, discriminator)
        self.logged: list[dict[str, torch.Tensor]] = []

    def log_dict(self, values, **options):
        self.logged.append({name.removeprefix("gan/"): value for name, value in values.items()})


class Pictures(pl.LightningDataModule):
    """Four pictures a batch, with cameras or without."""

    def __init__(self, labels: bool = True) -> None:
        super().__init__()
        self.labels = labels

    def train_dataloader(self):
        draws = torch.Generator().manual_seed(0)
        batch = {"image": torch.rand(4, 1, 3, SIZE, SIZE, generator=draws) * 2 - 1}
        if self.labels:
            batch["label"] = Rig().random(4, draws).label()[:, None]
        return torch.utils.data.DataLoader([batch], batch_size=None)


def flat():
    torch.manual_seed(0)
    return StyleGAN2Generator([6, 4], style_dim=5, mapping_layers=2, mapping_lr=1.0)


def solid():
    torch.manual_seed(0)
    return ManifoldGenerator(
        4, resolution=SIZE, w_dim=8, channels=[8, 6], start=4, mapping_hidden=8, background_channels=[6, 4],
        samples=16, predictor={"hidden": 4, "grid": 16}, field="triplane", triplane={"features": 4, "hidden": 8},
    )  # fmt: skip


def critic(pose="none"):
    torch.manual_seed(1)
    return ImageDiscriminator([6, 8], pose=pose)


def fit(stage, out, data=None, **options):
    tiny.trainer(out, max_epochs=-1, callbacks=[], **options).fit(stage, datamodule=data or Pictures())
    assert all(parameter.isfinite().all() for parameter in stage.parameters())
    return stage


def moved(network, fresh):
    """Names of the parameters that training has changed."""
    before = dict(fresh.named_parameters())
    return {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("pose", ["none", "regress"])
def test_a_2d_generator_learns_from_pictures_alone(tmp_path, pose):
    stage = fit(Gan(flat(), critic(pose)), tmp_path, Pictures(labels=False))
    assert int(stage.images_seen) == 16 and int(stage.steps_done) == 4
    assert moved(stage.generator, flat()) and moved(stage.discriminator, critic(pose))
    assert [{"r1"} <= terms.keys() for terms in stage.logged] == [True, False, True, False]


def test_a_camera_reaches_the_discriminator_that_wants_one(tmp_path):
    stage = fit(Gan(solid(), critic("condition")), tmp_path)
    assert "embed.weight" in moved(stage.discriminator, critic("condition"))


def test_missing_cameras_are_refused(tmp_path):
    with pytest.raises(UserError, match="judges pictures with their cameras"):
        fit(Gan(flat(), critic("condition")), tmp_path)
    with pytest.raises(UserError, match="which a 3D generator needs"):
        fit(Gan(solid(), critic()), tmp_path, Pictures(labels=False))


def test_what_is_frozen_stays_as_it_is(tmp_path):
    """FreezeG and FreezeD: a mapping network, a discriminator's stem."""
    generator, discriminator = flat(), critic()
    generator.map_network.requires_grad_(False)
    discriminator.stem.requires_grad_(False)
    weights = {"path_length_weight": 2.0, "path_length_every": 1}
    stage = fit(Gan(generator, discriminator, adversarial=weights), tmp_path)
    for network, fresh, part in ((stage.generator, flat(), "map_network"), (stage.discriminator, critic(), "stem")):
        found = moved(network, fresh)
        assert found and not any(name.startswith(part) for name in found)
        assert all(p.requires_grad != name.startswith(part) for name, p in network.named_parameters())


def test_a_loss_of_ones_own_needs_no_discriminator(tmp_path):
    class Darker(Gan):
        def generator_terms(self, batch, fakes):
            brightness = fakes.rendering.image.mean()
            return brightness, {"brightness": brightness}

    def brightness(stage):
        with torch.no_grad():
            return float(stage.generator.synthesis(stage.generator.mapping(torch.ones(1, 5))).image.mean())

    stage = fit(Darker(flat()), tmp_path)
    assert brightness(stage) < brightness(Gan(flat())) and "adversarial" not in stage.logged[0]
    with pytest.raises(UserError, match="nothing tells the generator"):
        fit(Gan(flat()), tmp_path)


def test_fakes_say_what_they_were_made_of():
    """For terms that ask another generator, or this one, for the same pictures: same codes, cameras, noise and taps."""
    stage = Gan(flat(), critic())
    nn.init.ones_(stage.generator.backbone.blocks[1].conv1.noise_strength)
    stage.fake_taps = ("block4",)
    batch = next(iter(Pictures().train_dataloader()))
    fakes = stage.sample_fakes(batch, step_generator(0, 0))
    again = stage.generator.synthesis(fakes.latents, fakes.camera, randomness=fakes.randomness(), taps=["block4"])
    assert torch.equal(again.image, fakes.rendering.image)
    assert torch.equal(again.taps["block4"], fakes.rendering.taps["block4"])
    silent = stage.generator.synthesis(fakes.latents, fakes.camera).image
    assert (silent - fakes.rendering.image).abs().max() > 0.01


def test_real_and_generated_pictures_are_augmented_alike(tmp_path):
    class Augmented(Gan):
        def augment(self, image, draws):
            self.seen.append((len(image), float(torch.rand((), generator=draws)), image.requires_grad))
            return image.flip(-1)

    runs = []
    for out in ("one", "other"):
        stage = Augmented(flat(), critic(), total_images=4)
        stage.seen = []
        runs.append(fit(stage, tmp_path / out))
    generated, real, doubted, r1 = runs[0].seen
    assert generated[2] and not doubted[2], "the generator learns through the augmentation"
    assert real[1] == r1[1], "R1 is of the very picture that was judged"
    assert len({generated[1], real[1], doubted[1]}) == 3
    assert runs[1].seen == runs[0].seen
    assert torch.equal(runs[0].generator.backbone.blocks[0].const, runs[1].generator.backbone.blocks[0].const)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_the_discriminator_judges(tmp_path, fresh):
    """The generator's own pictures, or others of the same step (GRAM's loop)."""

    class Watched(Gan):
        def judge(self, image, camera, purpose):
            self.seen.setdefault(purpose, image.detach())
            return super().judge(image, camera, purpose)

    stage = Watched(solid(), critic(), total_images=4, adversarial={"fresh": fresh})
    stage.seen = {}
    fit(stage, tmp_path)
    generated, doubted = stage.seen["generated"], stage.seen["doubted"]
    assert torch.equal(generated, doubted) is not fresh and (generated - doubted).abs().max() < 2


def test_the_discriminators_gradient_is_clipped(tmp_path):
    lengths = []
    for clip in (None, 1e-3):
        stage = Gan(flat(), critic(), total_images=4, optimization={"discriminator_clip": clip})
        fit(stage, tmp_path / str(clip), Pictures(labels=False))
        gradients = [p.grad for p in stage.discriminator.parameters() if p.grad is not None]
        lengths.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
    assert lengths[0] > 2e-3 and lengths[1] == pytest.approx(1e-3, rel=1e-2)


def test_path_length_regularisation(tmp_path):
    """It draws the lengths of the generator's Jacobian together, on its own steps, and its mean is resumed."""

    def stage(weight=10.0):
        return Gan(flat(), critic(), 64, {"path_length_weight": weight, "path_length_every": 2, "weight": 1e-3})

    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    whole = stage()
    run = tiny.trainer(tmp_path, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
    run.fit(whole, datamodule=Pictures())
    terms = [float(logged["path_length"]) for logged in whole.logged[::2]]
    assert not any("path_length" in logged for logged in whole.logged[1::2])
    assert float(whole.path_length) > 0
    assert "path_length" not in Gan(flat(), critic()).state_dict()
    free = fit(stage(weight=1e-9), tmp_path / "free")
    assert terms[-1] < float(free.logged[-2]["path_length"])
    checkpoint = next(tmp_path.glob("kept/*step=16.ckpt"))
    resumed = stage()
    run = tiny.trainer(tmp_path / "rest", max_epochs=-1, callbacks=[])
    run.fit(resumed, datamodule=Pictures(), ckpt_path=checkpoint, weights_only=True)
    assert torch.equal(resumed.path_length, whole.path_length)
    assert moved(resumed.generator, whole.generator) == set()


def test_ranks_stay_equal(tmp_path):
    """Path lengths and gradients are averaged; each rank draws its own subjects and noise."""

    def rank(index):
        weights = {"path_length_weight": 1.0, "path_length_every": 1}
        stage = Gan(flat(), critic(), 32, weights)
        fit(stage, tmp_path, devices=2, strategy=IndependentRanks(), use_distributed_sampler=False)
        torch.save([stage.state_dict(), stage.logged[0]["path_length"]], tmp_path / f"{index}.pt")

    tiny.ranks(rank, 2)
    (first, length), (second, other) = (torch.load(tmp_path / f"{index}.pt") for index in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first) and "path_length" in first
    assert length != other and int(first["images_seen"]) == 32


def test_half_precision_leaves_penalties_in_full(tmp_path):
    weights = {"path_length_weight": 1.0, "path_length_every": 1, "r1_every": 1}
    found = []
    for plugins in ([], [HalfOnCpu()]):
        stage = fit(Gan(flat(), critic(), adversarial=weights), tmp_path / f"{len(plugins)}", plugins=plugins)
        assert moved(stage.generator, flat())
        found.append([float(stage.logged[0][term]) for term in ("path_length", "r1")])
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_rates_of_groups():
    generator = solid()
    stage = Gan(generator, optimization={"learning_rate": 2.0, "lr_scales": {"style": 3.0}})
    (optimizer,) = stage.configure_optimizers()
    rates = {id(p): 2.0 * group["scale"] for group in optimizer.param_groups for p in group["params"]}
    style = {id(p) for p in generator.parameter_groups()["style"].parameters}
    for parameter in generator.parameters():
        if id(parameter) in rates:
            assert rates[id(parameter)] == (6.0 if id(parameter) in style else 2.0)
    with pytest.raises(UserError, match="no group 'hair', there are main, style"):
        Gan(generator, optimization={"lr_scales": {"hair": 1.0}}).configure_optimizers()


def stylesdf():
    torch.manual_seed(0)
    return StyleSDF(
        z_dim=4, width=8, depth=2, mapping_layers=2, raw_resolution=4, samples=4,
        decoder={"channels": (8, 4), "w_dim": 6, "mapping_layers": 2},
    )  # fmt: skip


def gram():
    torch.manual_seed(0)
    return GRAMGenerator(4, resolution=SIZE, width=8, layers=4, mapping_width=8, predictor_width=8)


@pytest.mark.parametrize("make", [stylesdf, gram, solid, flat])
def test_the_mean_code_is_that_of_the_trained_mapping(tmp_path, make):
    stage = fit(Gan(make(), critic(), total_images=4), tmp_path)
    for generator in (stage.generator, stage.export().modules["generator"]):
        codes = generator.mapping(generator.sample_z(10_000, torch.Generator().manual_seed(0))).mean()
        for name, mean in generator.mean_latents.groups.items():
            torch.testing.assert_close(mean, codes.groups[name], atol=1e-4, rtol=1e-4)
            assert mean.abs().max() > 0


def test_checkpoints_of_before_go_on(tmp_path):
    """Their average was a network of the stage itself."""
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    whole = Gan(flat(), critic())
    run = tiny.trainer(tmp_path, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
    run.fit(whole, datamodule=Pictures())
    path = next(tmp_path.glob("kept/*step=4.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.replace("average.module.", "average."): value for name, value in state.items()}
    assert checkpoint["state_dict"].keys() != state.keys()
    torch.save(checkpoint, path)
    resumed = Gan(flat(), critic())
    run = tiny.trainer(tmp_path / "rest", max_epochs=-1, callbacks=[])
    run.fit(resumed, datamodule=Pictures(), ckpt_path=path, weights_only=True)
    assert moved(resumed, whole) == set()


def test_what_no_group_names_is_not_trained(tmp_path):
    """Nor do its gradients, which no step takes, pile up in the norm that is clipped."""

    class Some(Gan):
        def parameter_groups(self):
            return {"styles": ParameterGroup([p for name, p in self.generator.named_parameters() if "affine" in name])}

    stage = Some(flat(), critic(), total_images=80)
    before = {name: parameter.clone() for name, parameter in stage.generator.named_parameters()}
    fit(stage, tmp_path, Pictures(labels=False))
    for name, parameter in stage.generator.named_parameters():
        assert torch.equal(parameter, before[name]) == ("affine" not in name)
        assert (parameter.grad is None) == ("affine" not in name)


def test_losses_of_a_subclass_see_all_that_the_discriminator_says(tmp_path):
    class Hinge(Gan):
        def adversarial_terms(self, output, fakes, batch):
            assert len(output.features) > 0 and len(fakes.latents) == len(output.logits) == 4
            return -output.logits.mean(), {"features": output.features[0].mean()}

        def discriminator_terms(self, real, fake, fakes, batch):
            loss = torch.relu(1 - real.logits).mean() + torch.relu(1 + fake.logits).mean()
            return loss, {"hinge": loss}

    stage = Hinge(flat(), critic())
    fit(stage, tmp_path, Pictures(labels=False))
    assert {"features", "hinge", "r1"} <= stage.logged[0].keys() and "discriminator" not in stage.logged[0]
