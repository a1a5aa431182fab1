"""E3DGE's phases after E0, on a StyleSDF whose heads are balls: what learns and what stays, views, poses, photos."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import default_collate

from datamodules.samples import PointRecipe, SampleDataModule
from models import artifact
from models.augment.perspective import random_corners, warp
from models.camera import Camera
from models.errors import UserError
from models.generators.discriminator import ImageDiscriminator
from models.generators.stylegan2 import StyleGAN2Discriminator
from models.generators.views import render_views
from models.heads.photos import PhotoSet
from models.heads.pixel_aligned import PixelAlignedGenerator, sized
from models.heads.subjects import Subjects
from models.image import read_image, write_image
from models.losses.image import pixel_mse
from models.metrics.records import read_records
from stages.base.critic import AdversarialTerm
from stages.base.inversion import RateSchedule
from stages.base.stage import ArtifactRef
from stages.selftrain import AlignerTraining, Curriculum, SelftrainStage
from tests.stages import small as lines
from tests.stages import test_selftrain as toy
from tests.stages import tiny
from tests.stages.processes import Kill, galatea

SHORT = [f"--model.{name}=32" for name in ("video_size", "tile", "mesh_size")] + ["--model.frames=4", "--model.scale=1"]
PARTS = ("local_encoder", "texture_fusion", "aligner", "alignment_fusion")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    toy.prepare(folder)
    return folder


def stage(work, phase="local", alignment="3d", start="earlier", **options):
    torch.manual_seed(0)
    local = toy.instance(toy.networks(alignment))
    networks = {"perceptual": tiny.network("perceptual"), "identity": tiny.network("identity")}
    given = {"schedule": RateSchedule(5e-3, 5e-3), "thumb_weight": 0.0, **networks, **options}
    return SelftrainStage(phase=phase, start=ArtifactRef(str(work / start)), local=local, **given)


def samples(work, views=2, path=None, **options):
    return SampleDataModule(
        str(path or work / "balls"), **{"views": views, "points": PointRecipe(1), "train_samples": 8, "val_samples": 2,
                                "test_samples": 2, "batch_size": 2, **options}
    )  # fmt: skip


def batch_of(work, rows=2, views=2):
    data = samples(work, views)
    data.setup("fit")
    return data.render(default_collate([data.datasets["train"][row] for row in range(rows)]))


def built(work, *args, **options):
    made = stage(work, *args, **options)
    made.build_model()
    return made


def wake(module):
    """Make fusions say something."""
    torch.manual_seed(4)
    with torch.no_grad():
        for network in (module.local.texture_fusion, module.local.alignment_fusion):
            for parameter in () if network is None else network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module


def states(module):
    parts = {"generator": module.generator, "encoder": module.encoder}
    parts |= {name: getattr(module.local, name) for name in PARTS if getattr(module.local, name) is not None}
    return {name: {key: t.clone() for key, t in part.state_dict().items()} for name, part in parts.items()}


# -- what learns -------------------------------------------------------------------------------------------------------

LEARN = {
    ("align", "3d"): {"aligner"},
    ("local", "3d"): {"local_encoder", "texture_fusion", "aligner"},
    ("local", "2d"): {"local_encoder", "texture_fusion", "aligner"},
    ("hybrid", "hybrid"): {"local_encoder", "texture_fusion", "alignment_fusion"},
}


@pytest.mark.parametrize(("phase", "alignment"), LEARN)
def test_the_rest_stays_to_the_bit(work, tmp_path, phase, alignment):
    module = stage(work, phase, alignment, aligner=AlignerTraining(0.1, 0.5))
    module.configure_model()
    before = states(module)
    torch.set_num_threads(1)
    tiny.fit(module, samples(work), tmp_path, max_epochs=-1, max_steps=4, limit_val_batches=1)
    after = states(module)
    changed = {name for name, state in before.items() if any(not t.equal(after[name][k]) for k, t in state.items())}
    assert changed == LEARN[phase, alignment]
    found = artifact.load(tmp_path)
    assert set(found.manifest["modules"]) == {"generator", "encoder", "local"}
    metrics = {"val/psnr", "val/psnr_nv", "val/aligned", "val/unaligned"}
    assert metrics <= found.metrics.keys() and "val/code" not in found.metrics


@pytest.mark.parametrize(
    ("phase", "alignment", "rate", "learns"),
    [("local", "3d", 0.0, False), ("local", "2d", 0.0, False), ("hybrid", "hybrid", 0.5, True)],
)
def test_the_aligner_has_a_rate_of_its_own(work, phase, alignment, rate, learns):
    module = built(work, phase, alignment, aligner=AlignerTraining(rate=rate))
    aligner = module.local.aligner
    assert aligner.training is learns and all(p.requires_grad is learns for p in aligner.parameters())
    assert module.local.local_encoder.training
    groups = module.parameter_groups([p for p in module.parameters() if p.requires_grad])
    own = {id(p) for p in aligner.parameters()}
    rates = {group.get("lr", 1.0) for group in groups if own & {id(p) for p in group["params"]}}
    assert rates == ({rate} if learns else set())
    count = sum(len(group["params"]) for group in groups)
    assert count == sum(p.requires_grad for p in module.parameters())


def test_without_a_lesson_an_aligner_of_3d_details_stays(work):
    module = built(work, aligner=AlignerTraining(residual=0.0))
    assert not module.aligner_learns and not module.local.aligner.training


def test_what_was_not_trained_is_not_handed_on(work, tmp_path):
    """Phase "align" trains one network: the others are the next fit's own, of its seed and in its sizes."""
    earlier = artifact.load(work / "earlier")
    codes = {name: earlier.module(name) for name in ("generator", "encoder")}
    artifact.save(tmp_path / "codes", stage="selftrain", modules=codes)
    module = stage(work, "align", aligner=AlignerTraining(0.1), start=tmp_path / "codes")
    tiny.fit(module, samples(work, path=tmp_path / "codes"), tmp_path, max_epochs=-1, max_steps=1, limit_val_batches=0)
    found = artifact.load(tmp_path)
    assert found.extra["trained"] == ["aligner"]
    held, made = found.module("local"), []
    for seed in (1, 2):
        module = stage(work, "local", "3d", start=tmp_path)
        torch.manual_seed(seed)
        module.local = toy.instance(toy.networks("3d"))
        module.build_model()
        made.append(module.local)
        for name, own in module.local.aligner.state_dict().items():
            torch.testing.assert_close(own, held.aligner.state_dict()[name].to(own.dtype))
    weights = [local.local_encoder.state_dict() for local in (*made, held)]
    first = next(name for name, value in weights[0].items() if value.is_floating_point() and value.dim() > 1)
    assert not torch.equal(weights[0][first], weights[1][first])
    assert not torch.equal(weights[0][first], weights[2][first].float())
    described = toy.networks("3d")
    described["init_args"]["texture_fusion"]["init_args"]["frequencies"] = None
    module = stage(work, "local", "3d", start=tmp_path)
    module.local = toy.instance(described)
    module.build_model()
    assert module._trained_names == {"local_encoder", "texture_fusion", "aligner"}


def test_training_goes_on_from_the_earlier_phase(work, tmp_path):
    tiny.fit(stage(work, aligner=AlignerTraining(0.1)), samples(work), tmp_path, max_epochs=-1, max_steps=2,
             limit_val_batches=0)  # fmt: skip
    torch.manual_seed(0)
    held = artifact.load(tmp_path).module("local")
    module = stage(work, "hybrid", "hybrid", start=tmp_path)
    module.build_model()
    for name in PARTS[:3]:
        own, earlier = getattr(module.local, name).state_dict(), getattr(held, name).state_dict()
        assert all(torch.equal(own[key], earlier[key]) for key in earlier)
    image, camera = module.pictures(batch_of(work))
    held.eval(), module.eval()  # a new fusion begins by leaving details in 3D as they are
    with torch.no_grad():
        source = held.source(module.generator, module.invert(image)[0], image, camera)
        expected = held.edit(module.generator, source).synthesis(module.generator, camera).image
        torch.testing.assert_close(module.reconstruct(image, camera)(camera).image, expected)


def test_training_improves_other_views(work, tmp_path):
    """Of samples that are seen again and again."""
    module = stage(work, aligner=AlignerTraining(0.0), schedule=RateSchedule(5e-3, 5e-3))
    module.configure_model()
    batch = batch_of(work, 4)
    before = module.losses(*module.pictures(batch), batch)["loss"].mean()
    data = samples(work, train_samples=4, batch_size=4)
    tiny.fit(module, data, tmp_path, max_epochs=-1, max_steps=30, limit_val_batches=0)
    module.train()
    after = module.losses(*module.pictures(batch), batch)["loss"].mean()
    assert after < 0.8 * before


@pytest.mark.parametrize(("phase", "alignment"), [("local", "3d"), ("local", "2d"), ("hybrid", "hybrid")])
@torch.no_grad()
def test_validation_reads_a_photo_once(work, phase, alignment):
    """Its own view, the next one, and how far residuals are off, each computed apart."""
    module = wake(built(work, phase, alignment)).eval()
    batch = batch_of(work)
    image, camera = module.pictures(batch)
    asked = []
    hook = module.encoder.register_forward_hook(lambda *_: asked.append(1))
    module.validation_step(batch, 0)
    hook.remove()
    assert len(asked) == 1
    (found,) = module._scored
    order = torch.tensor([1, 0, 3, 2])
    show = module.reconstruct(image, camera)
    expected = module.scores(show(camera).image, image)
    expected |= {f"{name}_nv": value for name, value in module.scores(show(camera[order]).image, image[order]).items()}
    source = module.read(image, camera)
    query = module.local.query(module.generator, source, camera[order])
    truth = image[order] - query.coarse
    expected["aligned"] = (query.residual - truth).abs().mean((1, 2, 3))
    expected["unaligned"] = (source.residual - truth).abs().mean((1, 2, 3))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found["psnr"], found["psnr_nv"])


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["3d", "2d"])
@pytest.mark.parametrize("silent", [True, False])
@torch.no_grad()
def test_silent_details_are_the_coarse_picture(work, alignment, silent):
    module = stage(work, alignment=alignment, start="bare", silent=silent)
    bare = artifact.load(work / "earlier")
    kept = {name: bare.module(name) for name in ("generator", "encoder")}
    artifact.save(work / "bare", stage="selftrain", modules=kept)
    module.build_model()
    module.eval()
    image, camera = module.pictures(batch_of(work))
    ws, _ = module.invert(image)
    coarse = module.generator.synthesis(ws, camera).image
    found = module.reconstruct(image, camera)(camera).image
    close = (found - coarse).abs().max() < 1e-5
    assert bool(close) is silent


@torch.no_grad()
def test_the_released_loss_sees_the_small_picture_too(work):
    """Of the other view, before super-resolution."""
    plain, module = (
        wake(built(work, aligner=AlignerTraining(0.0), thumb_weight=weight)).eval() for weight in (0.0, 0.5)
    )
    batch = batch_of(work)
    image, camera = module.pictures(batch)
    order = torch.tensor([1, 0, 3, 2])
    found = module.reconstruct(image, camera)(camera[order]).raw
    small = module.recover(found, batch["raw"].flatten(0, 1)[order])["reconstruction"]
    terms, without = (each.losses(image, camera, batch) for each in (module, plain))
    assert small.min() > 1e-3 and "thumb_pixel" not in without
    torch.testing.assert_close(terms["thumb_reconstruction"], small, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], without["loss"] + 0.5 * small, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("alignment", ["3d", "2d", "hybrid"])
@torch.no_grad()
def test_each_view_is_made_from_the_one_before_it(work, alignment, views):
    """Term by term, each pair alone."""
    phase = "hybrid" if alignment == "hybrid" else "local"
    module = wake(built(work, phase, alignment, aligner=AlignerTraining(0.3))).eval()
    batch = batch_of(work, 2, views)
    image, camera = module.pictures(batch)
    terms = module.losses(image, camera, batch)
    for row in range(2 * views):
        other = row - row % views + (row + 1) % views
        own, truth = slice(row, row + 1), slice(other, other + 1)
        found = module.reconstruct(image[own], camera[own])(camera[truth]).image
        pixel, expected = terms["pixel"][row], pixel_mse(found, image[truth])[0]
        torch.testing.assert_close(pixel, expected, atol=1e-5, rtol=1e-3)
        itself = pixel_mse(module.reconstruct(image[own], camera[own])(camera[own]).image, image[own])[0]
        assert (pixel - itself).abs() > 10 * (pixel - expected).abs()
    loss = terms["reconstruction"]
    if module.aligner_learns:
        loss = loss + 0.3 * terms["aligned"]
    torch.testing.assert_close(terms["loss"], loss)
    assert ("aligned" in terms) is (phase == "local")


@pytest.mark.parametrize("alignment", ["3d", "2d"])
@torch.no_grad()
def test_without_novel_views_each_view_is_made_from_itself(work, alignment):
    module = built(work, alignment=alignment, novel_views=False, aligner=AlignerTraining(0.0))
    wake(module).eval()
    batch = batch_of(work, 2, 1)
    image, camera = module.pictures(batch)
    found = module.reconstruct(image, camera)(camera).image
    expected = pixel_mse(found, image)
    torch.testing.assert_close(module.losses(image, camera, batch)["pixel"], expected, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_lessons_of_the_aligner(work):
    """The residual of the other view, and an undone change of perspective, each computed apart."""
    module = built(work, "align", aligner=AlignerTraining(0.3, 0.7, 0.2, 1.0)).eval()
    batch = batch_of(work)
    image, camera = module.pictures(batch)
    terms = module.losses(image, camera, batch)
    ws, _ = module.invert(image)
    seen = module.generator.synthesis(ws, camera)
    residual = image - sized(seen.raw, 32)
    order = torch.tensor([1, 0, 3, 2])
    elsewhere = sized(module.generator.synthesis(ws, camera[order]).raw, 32)
    aligned = (module.local.aligner(residual, elsewhere) - (image[order] - elsewhere)).abs().mean((1, 2, 3))
    corners = random_corners(4, module.draws(), 0.2, 1.0)
    undone = module.local.aligner(warp(residual, corners), image - residual)
    undone = (undone - residual).abs().mean((1, 2, 3))
    torch.testing.assert_close(terms["aligned"], aligned, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["undone"], undone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], 0.3 * aligned + 0.7 * undone, atol=1e-5, rtol=1e-4)


# -- poses -------------------------------------------------------------------------------------------------------------


def test_the_released_staircase():
    staircase = Curriculum("scale_pose_sd")
    steps = {0: 0.0, 9_999: 0.0, 10_000: 0.15, 13_999: 0.15, 14_000: 0.25, 18_000: 0.5, 22_000: 0.75, 25_999: 0.75,
             26_000: 1.0, 10**6: 1.0}  # fmt: skip
    assert {step: staircase.value(step) for step in steps} == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear"}, "curriculum.kind is 'linear': take one of none, scale_pose_sd, scale_view_gap"),
        ({"steps": (0, 5)}, "one for each of curriculum.values"),
        ({"steps": (1, 5), "values": (0.0, 1.0)}, "must rise from 0"),
        ({"steps": (0, 5, 5), "values": (0.0, 0.5, 1.0)}, "must rise from 0"),
        ({"steps": (), "values": ()}, "must rise from 0"),
        ({"steps": (0,), "values": (1.5,)}, "must be from 0 to 1"),
    ],
)
def test_staircases_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**options)


class Poses(pl.Callback):
    """Largest yaw of training batches, and the largest difference between the views of a sample; in validation too."""

    def __init__(self):
        self.found = {"train": [], "val": []}

    def note(self, kind, batch):
        yaw = Camera.from_label(batch["label"].flatten(0, 1)).yaw.unflatten(0, (-1, 2))
        self.found[kind].append((float(yaw.abs().max()), float(yaw.diff(dim=1).abs().max())))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note("train", batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.note("val", batch)


@pytest.mark.parametrize("kind", ["scale_pose_sd", "scale_view_gap", "none"])
def test_poses_follow_the_steps(work, tmp_path, kind):
    """Of training, from the first step of each value on; validation sees all."""
    module = stage(work, curriculum=Curriculum(kind, (0, 2, 4), (0.0, 0.5, 1.0)))
    seen, plain = Poses(), Poses()
    options = {"max_epochs": -1, "max_steps": 6, "limit_val_batches": 1, "val_check_interval": 3}
    for one, callback in ((module, seen), (stage(work), plain)):
        tiny.trainer(tmp_path, callbacks=[callback], **options).fit(one, datamodule=samples(work))
    factors = (1.0,) * 6 if kind == "none" else (0.0, 0.0, 0.5, 0.5, 1.0, 1.0)
    for factor, (yaw, gap), (whole, apart) in zip(factors, seen.found["train"], plain.found["train"], strict=True):
        assert gap == pytest.approx(factor * apart, abs=1e-5)
        if kind == "scale_pose_sd":
            assert yaw == pytest.approx(factor * whole, abs=1e-5)
        else:
            assert yaw > 0.01
    assert seen.found["val"] == plain.found["val"] and min(seen.found["val"])[1] > 0.01


@pytest.mark.parametrize(("phase", "judged"), [("local", False), ("local", True), ("hybrid", False)])
def test_a_killed_run_continues_exactly(work, judge, tmp_path, phase, judged):
    """Poses, draws and the discriminator included."""
    words = [*toy.line(work), *lines.options(toy.DETAILED[phase])]
    words += [f"--model.adversarial.path={judge}", "--model.adversarial.r1_every=2"] if judged else []
    galatea(*words, f"--out={tmp_path / 'whole'}")
    galatea(*words, f"--out={tmp_path / 'killed'}", kill=Kill("last.ckpt", 2))
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    galatea(*words, f"--out={tmp_path / 'killed'}", f"--ckpt_path={last}")
    assert artifact.load(tmp_path / "killed").id == artifact.load(tmp_path / "whole").id


def test_details_of_opacities(work, tmp_path):
    """Of a generator whose field is no distance: on its expected depth."""
    toy.manifolds(work)
    words = toy.line(work, "manifold", start=None)
    toy.run(words, tmp_path / "codes", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    local = toy.networks("3d", aligner=False)
    local["init_args"]["texture_fusion"]["init_args"]["width"] = 4
    start = {"path": str(tmp_path / "codes")}
    words = toy.line(work, "manifold", start=start, prior=None, encoder=None, phase="local", local=local,
                     aligner={"residual": 0.0})  # fmt: skip
    toy.run(words, tmp_path / "local", "--data.init_args.views=2", "--data.init_args.points.count=1")
    found = artifact.load(tmp_path / "local")
    assert found.extra["geometry"] == "occupancy" and found.extra["trained"] == ["local_encoder", "texture_fusion"]
    fusion = found.module("local").texture_fusion
    assert fusion.film.fc_1.weight.any() and "val/psnr_nv" in found.metrics  # which begin at nothing


# -- the adversarial term ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(work):
    torch.manual_seed(5)
    network = ImageDiscriminator([8, 8, 8, 8], pose="none")
    artifact.save(work / "judge", stage="prior", modules={"discriminator": network})
    return work / "judge"


def test_the_adversarial_term(work, judge):
    """The term, and a step of the discriminator, each computed apart."""
    term = AdversarialTerm(
        str(judge), weight=0.4, discriminator_weight=0.2, r1_weight=3.0, r1_every=2, learning_rate=1e-2
    )
    module = built(work, aligner=AlignerTraining(0.0), adversarial=term).eval()
    wake(module)
    plain = wake(built(work, aligner=AlignerTraining(0.0))).eval()
    batch = batch_of(work)
    image, camera = module.pictures(batch)
    order = torch.tensor([1, 0, 3, 2])
    with torch.no_grad():
        fake, real = module.reconstruct(image, camera)(camera[order]).image, image[order]
    terms = module.losses(image, camera, batch)
    network = artifact.load(judge).module("discriminator")
    expected = torch.nn.functional.softplus(-network(fake).logits)[:, 0]
    torch.testing.assert_close(terms["adversarial"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], plain.losses(image, camera, batch)["loss"] + 0.4 * expected)
    terms["loss"].mean().backward()
    assert all(p.grad is None for p in module.discriminator.parameters())
    assert any(p.grad is not None and p.grad.any() for p in module.local.texture_fusion.parameters())
    adam = torch.optim.Adam(network.parameters(), 1e-2 * 2 / 3, (0.0, 0.99 ** (2 / 3)))
    own = real.clone().requires_grad_()
    logits = network(own).logits
    (slope,) = torch.autograd.grad(logits.sum(), own, create_graph=True)
    loss = torch.log1p((-logits).exp()).mean() + torch.log1p(network(fake).logits.exp()).mean()
    (0.2 * loss + 3.0 * 2 * slope.square().sum((1, 2, 3)).mean()).backward()
    adam.step()
    found = module.critic.learn(4)
    torch.testing.assert_close(found["discriminator"], loss.detach(), atol=1e-5, rtol=1e-4)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(module.discriminator.get_parameter(name), parameter, atol=1e-4, rtol=1e-3)
    assert module.critic.learn(5) == {}, "pictures are judged once"
    module.losses(image, camera, batch)
    assert "r1" not in module.critic.learn(5)


def test_the_adversarial_term_of_codes(work, judge):
    """Also in phase "global" (B.3, Eq. 8)."""
    term = AdversarialTerm(str(judge), weight=0.4)
    networks = {"perceptual": tiny.network("perceptual"), "identity": tiny.network("identity")}
    plain, module = (
        SelftrainStage(toy.inversions.ref(work / "balls"), toy.GlobalEncoder(**toy.GLOBAL), adversarial=a, **networks)
        for a in (None, term)
    )
    for made in (plain, module):
        made.build_model()
    module.encoder.load_state_dict(plain.encoder.state_dict())
    batch = batch_of(work)
    image, camera = module.pictures(batch)
    ws, _ = module.invert(image)
    found = module.generator.synthesis(ws, camera).image
    terms = module.losses(image, camera, batch)
    expected = torch.nn.functional.softplus(-artifact.load(judge).module("discriminator")(found).logits)[:, 0]
    torch.testing.assert_close(terms["adversarial"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], plain.losses(image, camera, batch)["loss"] + 0.4 * expected)
    terms["loss"].mean().backward()
    assert all(p.grad is None for p in module.discriminator.parameters())
    assert "discriminator" in module.critic.learn(0)


def test_the_discriminator_is_handed_on(work, judge, tmp_path):
    term = AdversarialTerm(str(judge), learning_rate=1e-2)
    module = stage(work, "hybrid", "hybrid", adversarial=term)
    tiny.fit(module, samples(work), tmp_path, max_epochs=-1, max_steps=2, limit_val_batches=0)
    found, before = (artifact.load(path).module("discriminator") for path in (tmp_path, judge))
    assert not torch.equal(found.logit.weight, before.logit.weight)
    with pytest.raises(UserError, match="phase 'align' has no adversarial term"):
        stage(work, "align", adversarial=term)


def test_it_may_judge_smaller_pictures(work, tmp_path):
    """The generator's discriminator judges 256 px of 1024 in E3DGE; here 8 of 32."""
    torch.manual_seed(5)
    network = StyleGAN2Discriminator([6, 8, 8, 8])
    artifact.save(tmp_path / "judge", stage="prior", modules={"discriminator": network})
    module = built(work, aligner=AlignerTraining(0.0), adversarial=AdversarialTerm(str(tmp_path / "judge"), side=8))
    assert module.discriminator.resolution == 8
    image, camera = module.pictures(batch_of(work))
    assert module.losses(image, camera, batch_of(work))["adversarial"].isfinite().all()
    with pytest.raises(UserError, match=r"for 32 px has no layers that judge 24 px alone: see adversarial\.side"):
        built(work, aligner=AlignerTraining(0.0), adversarial=AdversarialTerm(str(tmp_path / "judge"), side=24))


# -- what comes of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    """Details that say something."""
    out = tmp_path_factory.mktemp("trained")
    module = wake(built(work, "hybrid", "hybrid"))
    modules = {"generator": module.generator, "encoder": module.encoder, "local": module.local.eval()}
    artifact.save(out / "hybrid", stage="selftrain", modules=modules)
    modules.pop("local")
    artifact.save(out / "global", stage="selftrain", modules=modules)
    return out


@pytest.fixture
def photos(work, tmp_path):
    """A photo whose camera is known, and one whose angles are."""
    image = batch_of(work)["image"].flatten(0, 1)
    write_image(tmp_path / "photos" / "a.png", image[0])
    write_image(tmp_path / "photos" / "b.png", image[2])
    items = '{"items": [{"file": "a.png", "yaw_deg": -8.0}, {"file": "b.png", "yaw_deg": 5.0, "pitch_deg": 2.0}]}'
    (tmp_path / "photos" / "artworks.json").write_text(items)
    return tmp_path / "photos"


def predict(work, result, photos, out):
    data = ["--data=datamodules.artworks.ArtworkDataModule", f"--data.path={photos}", "--data.size=32"]
    words = toy.line(work)
    given = [f"--model.tested.path={result}", "--model.prior=null", "--model.encoder=null"]
    toy.run([words[0], "predict", *words[2:]], out, *data, *given, "--data.crop=none")
    return artifact.load(out)


def test_photos_to_heads_in_one_pass(work, trained, photos, tmp_path):
    found = predict(work, trained / "hybrid", photos, tmp_path / "out")
    assert set(found.manifest["modules"]) == {"generator", "local", "anchors"}
    subjects = Subjects(found)
    assert subjects.ids == ("a", "b") and isinstance(found.module("anchors"), PhotoSet)
    for kind in ("reference", "coarse", "detailed", "views", "camera"):
        assert found.media(f"{kind}_b.png").exists()
    subject = subjects["b"]
    assert isinstance(subject.generator, PixelAlignedGenerator)
    assert torch.rad2deg(subject.camera.yaw) == pytest.approx(5, abs=1e-3)
    seen = render_views(subject.generator, subject.latents, subject.camera).image
    assert (seen.clamp(-1, 1) - read_image(found.media("detailed_b.png"))).abs().max() < 0.02
    coarse = render_views(subject.generator.coarse, subject.latents, subject.camera).image
    assert (coarse - seen).abs().max() > 0.05
    height = [read_image(found.media(f"views_{name}.png")).shape[-2] for name in ("a", "b")]
    galatea("present", "predict", f"--model.result.path={tmp_path / 'out'}", *SHORT, f"--out={tmp_path / 'shown'}")
    assert list((tmp_path / "shown").rglob("*.html")) and min(height) > 3 * 192


def test_photos_by_codes_alone(work, trained, photos, tmp_path):
    found = predict(work, trained / "global", photos, tmp_path)
    assert set(found.manifest["modules"]) == {"generator", "anchors"}
    subject = Subjects(found)["a"]
    assert subject.caption == "one pass" and not isinstance(subject.generator, PixelAlignedGenerator)
    assert not any("detailed" in name for name in found.manifest["files"])


def test_details_are_measured(work, trained, tmp_path):
    """By E3DGE's protocol, with details and without."""
    protocol = {
        "class_path": "models.metrics.e3dge.E3DGEProtocol",
        "init_args": {**{k: toy.inversions.PROTOCOL["init_args"][k] for k in ("perceptual", "identity")}, "frames": 2},
    }
    values = {}
    for kind in ("hybrid", "global"):
        words = toy.line(work, protocol=protocol)
        given = [f"--model.tested.path={trained / kind}", "--model.prior=null", "--model.encoder=null"]
        given += [f"--data.init_args.path={trained / kind}", "--data.init_args.test_samples=1"]
        toy.run([words[0], "test", *words[2:]], tmp_path / kind, *given)
        values[kind] = {(r.view, r.metric): r.value for r in read_records(tmp_path / kind)}
    assert values["hybrid"].keys() == values["global"].keys()
    key = next(key for key in values["hybrid"] if key[1] == "mae")
    assert values["hybrid"][key] != values["global"][key]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(work, tmp_path, trained):
    def fitting(*args, data=None, **options):
        module = stage(work, *args, **options)
        tiny.fit(module, data or samples(work), tmp_path, max_epochs=-1, max_steps=1, limit_val_batches=0)

    with pytest.raises(UserError, match="neither full_weight nor thumb_weight is above 0"):
        stage(work, full_weight=0.0, thumb_weight=0.0)
    with pytest.raises(UserError, match="learns from other views of a sample, the data have one each"):
        fitting(data=samples(work, 1))
    with pytest.raises(UserError, match="does not know the codes behind its pictures"):
        fitting(data=tiny.Portraits(str(work / "balls")))
    with pytest.raises(UserError, match=r"local\.alignment is 'hybrid': phase 'local' takes"):
        fitting("local", "hybrid")
    with pytest.raises(UserError, match=r"local\.alignment is '3d': phase 'hybrid' takes"):
        fitting("hybrid", "3d")
    with pytest.raises(UserError, match="goes on from details with an aligner"):
        fitting("hybrid", "hybrid", start=trained / "global")
    with pytest.raises(UserError, match="needs what E_ADA is taught"):
        fitting("align", aligner=AlignerTraining(0.0))
    with pytest.raises(UserError, match=r"aligner\.scale is 2: it must be from 0 to 1"):
        AlignerTraining(scale=2)
    for missing in ("start", "local"):
        module = stage(work)
        setattr(module, missing, None)
        with pytest.raises(UserError, match="give both"):
            module.build_model()
    module = stage(work)
    module.local = toy.instance(toy.networks("3d", aligner=False))
    module.phase = "align"
    with pytest.raises(UserError, match=r"trains local\.aligner, which is not given"):
        module.build_model()
    module = stage(work)
    described = toy.networks("3d")
    described["init_args"]["aligner"]["init_args"]["widths"] = [4, 6, 8, 10]
    module.local = toy.instance(described)
    with pytest.raises(UserError, match=r"local\.aligner is not of the sizes of"):
        module.build_model()
    described["init_args"]["texture_fusion"]["init_args"]["width"] = 2000
    module = stage(work)
    module.local = toy.instance(described)
    with pytest.raises(UserError, match=r"texture_fusion\.width is 2000"):
        module.build_model()
    module = stage(work, "global", prior=toy.inversions.ref(work / "balls"), encoder=toy.GlobalEncoder(**toy.GLOBAL))
    with pytest.raises(UserError, match="phase 'global' knows no details"):
        module.build_model()
