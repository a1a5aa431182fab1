"""Training an encoder on samples of its generator: real command lines, with generators of every form."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import default_collate

from datamodules.samples import PointRecipe, SampleDataModule
from models import artifact
from models.batches import some_views
from models.configurable import class_named
from models.encoders.e3dge import GlobalEncoder
from models.encoders.pyramid import Encoder4Editing
from models.errors import UserError
from models.files import ROOT
from models.generators.geometry import field_geometry
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import ToImage
from models.heads.subjects import Subjects
from models.image import write_image
from models.losses.geometry import GeometryLoss
from models.losses.inversion import ReconstructionLoss
from models.metrics.records import read_records
from stages import cli
from stages.commands import zoo
from stages.directions import DirectionsStage
from stages.pipeline import run as pipeline
from stages.selftrain import SelftrainStage
from tests.models.generators.protocol import awaken, seeded
from tests.models.generators.test_stylesdf import ball, small
from tests.models.heads.test_pixel_aligned import Reference
from tests.models.zoo import test_e3dge, test_stylesdf
from tests.stages import inversions, tiny
from tests.stages import small as lines
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea

DECODER = {"channels": [12, 8], "w_dim": 10, "mapping_layers": 2}
GLOBAL = {
    "geometry": 2, "texture": 1, "w_dim": 16, "geometry_side": 4, "texture_side": 4, "decoder_ws": 4, "decoder_dim": 10,
    "decoder_side": 16, "resolution": 32, "widths": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "reduction": 1,
}  # fmt: skip


def networks(alignment, aligner=True):
    """Those of details, as a configuration names them."""

    def part(name, **options):
        return {"class_path": f"models.encoders.{name}", "init_args": options}

    return {
        "class_path": "models.heads.pixel_aligned.LocalNetworks",
        "init_args": {
            "local_encoder": part("e3dge.LocalEncoder", stem=4, features=6, channels=128, stacks=1, depth=1),
            "texture_fusion": part("e3dge.TextureFusion", width=16, channels=6, frequencies=2),
            "aligner": part("alignment.ResidualAligner", widths=[4, 6, 8, 8]) if aligner else None,
            "alignment_fusion": part("e3dge.AlignmentFusion", channels=6) if alignment == "hybrid" else None,
            "alignment": alignment, "resolution": 32,
        },
    }  # fmt: skip


PRIOR = {"manifold": "manifolds", "paper": "balls", "released": "balls"}
"""Generators by what is trained: opacities on manifolds; distances, with all codes or the renderer's alone."""


def encoder_for(kind):
    if kind == "manifold":
        return {"class_path": "models.encoders.pyramid.Encoder4Editing", "init_args": inversions.ENCODER}
    heads = {"decoder_heads": 0 if kind == "released" else 1}
    return {"class_path": "models.encoders.e3dge.GlobalEncoder", "init_args": {**GLOBAL, **heads}}


def line(folder, kind="paper", **model):
    """Options of four steps of two samples."""
    path = str(folder / PRIOR[kind])
    samples = {"train_samples": 8, "val_samples": 5, "test_samples": 5, "points": {"count": 20}, "batch_size": 2}
    shared = {"perceptual": inversions.network("EmbeddedLPIPS"), "identity": inversions.network("EmbeddedIdentity")}
    given = {
        "prior": {"path": path, "module": "generator"}, "encoder": encoder_for(kind), "protocol": inversions.PROTOCOL,
        "schedule": {"learning_rate": 1e-3, "final": 1e-4, "drop_at": 3},
        "start": {"path": str(folder / "earlier")},
    }  # fmt: skip
    data = {"class_path": "datamodules.samples.SampleDataModule", "init_args": {"path": path, **samples}}
    trainer = {
        "max_steps": 4, "callbacks": [lines.CHECKPOINT], "check_val_every_n_epoch": 1, "val_check_interval": None,
    }  # fmt: skip
    config = {"base": [], "model": {**shared, **given, **model}, "data": data, "trainer": trainer}
    file = folder / f"selftrain-{kind}-{'-'.join(sorted(model))}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["selftrain", "fit", f"--config={file}", *lines.TRAINER]


def prepare(folder, count=0, **options):
    """A StyleSDF whose heads are balls, with pictures within [-1, 1]."""
    torch.manual_seed(0)
    generator = awaken(small(decoder=DECODER, **options)).eval()
    generator.load_state_dict(ball(), strict=False)
    generator.update_mean(256)
    with torch.no_grad():
        for module in generator.decoder.modules():
            if isinstance(module, ToImage):
                module.weight.mul_(0.2)
    prior = artifact.save(folder / "balls", stage="prior", modules={"generator": generator})
    encoder = GlobalEncoder(**GLOBAL)
    encoder.start(generator.mean_latents)
    local = instance(networks("3d"))
    artifact.save(
        folder / "earlier",
        stage="selftrain",
        modules={"generator": generator, "encoder": encoder.eval(), "local": local.eval()},
        parents={"prior": prior},
        delta_of={"generator": (prior, "generator")},
    )


def instance(described):
    """What a configuration names."""
    if isinstance(described, dict) and "class_path" in described:
        return class_named(described["class_path"])(**{k: instance(v) for k, v in described["init_args"].items()})
    return described


def manifolds(folder):
    """A radiance-manifold generator whose heads are opaque in places."""
    torch.manual_seed(0)
    generator = awaken(ManifoldGenerator(**tiny.OPTIONS)).eval()
    with torch.no_grad():
        for out in generator.backbone.outs:
            out.weight.normal_()
    generator.update_mean(256)
    artifact.save(folder / "manifolds", stage="prior", modules={"generator": generator})


DETAILED = {
    phase: {
        "model.phase": phase.split()[0], "model.local": json.dumps(networks(alignment)),
        "data.init_args.views": 2, "data.init_args.points.count": 1, **more,
    }
    for phase, alignment, more in (
        ("align", "3d", {"model.aligner.distortion": 1.0}),
        ("local", "3d", {"model.curriculum.kind": "scale_pose_sd", "model.curriculum.steps": "[0,2]",
                         "model.curriculum.values": "[0.5,1]"}),
        ("local in 2D", "2d", {"model.aligner.rate": 2.0}),
        ("hybrid", "hybrid", {"model.curriculum.kind": "scale_view_gap", "model.curriculum.steps": "[0,1,3]",
                              "model.curriculum.values": "[0,0.5,1]"}),
    )
}  # fmt: skip

CASE = StageCase(
    line,
    prepare,
    commands={
        # Gradients of some biases are nothing but rounding, as a normalisation follows: Adam makes whole steps of them.
        "fit": Command(batch=6, options={"data.init_args.train_samples": 24}, tolerance=3e-2),
        "test": Command(),
        "predict": Command(options={"data.init_args.batch_size": 1}),
        # As of "fit"; and of 1e-5 of E1's weights, whose gradients are near 0, Adam's first step goes the other way.
        **{
            f"fit, {phase}": Command(batch=6, options={"data.init_args.train_samples": 24, **words}, tolerance=0.1)
            for phase, words in DETAILED.items()
        },
    },
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the generators, and of an uninterrupted result."""
    folder = tmp_path_factory.mktemp("work")
    prepare(folder)
    manifolds(folder)
    galatea(*line(folder), f"--out={folder / 'selftrain'}")
    return folder


def run(words, out, *more):
    """In this process, which keeps errors as they are."""
    cli.run(words[0], SelftrainStage, [*words[1:], f"--out={out}", *more])


def logged(out):
    """By key the values of the CSV log."""
    with open(next(out.glob("logs/*/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def test_the_result_is_whole(work):
    found = artifact.load(work / "selftrain")
    assert set(found.manifest["modules"]) == {"generator", "encoder"} and found.extra["geometry"] == "sdf"
    before = artifact.load(work / "balls").module("generator").state_dict()
    after = found.module("generator").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    shape = {"val/surface", "val/normal", "val/space", "val/eikonal"}
    assert {"val/psnr", "val/code"} | shape < found.metrics.keys()
    assert all(found.metrics[name] > 0 for name in shape)


def test_opacities(work, tmp_path):
    """Of a field that is no distance."""
    run(line(work, "manifold"), tmp_path)
    found = artifact.load(tmp_path)
    assert found.extra["geometry"] == "occupancy" and "val/eikonal" not in found.metrics
    assert all(found.metrics[f"val/{name}"] > 0 for name in ("surface", "normal", "space"))
    mean = artifact.load(work / "manifolds").module("generator").mean_latents
    assert found.module("encoder").mean_latents.ws.sub(mean.ws).abs().max() < 1e-2  # in half precision


@pytest.mark.parametrize("kind", ["paper", "released"])
def test_a_signed_distance(work, tmp_path, kind):
    """Fit, test against the samples' own truth, and predict; the released encoder tells the renderer's codes only."""
    words = line(work, kind)
    run(words, tmp_path / "out")
    found = artifact.load(tmp_path / "out")
    assert found.extra["geometry"] == "sdf" and "val/eikonal" in found.metrics
    generator, encoder = found.module("generator"), found.module("encoder")
    told = encoder.codes(torch.zeros(1, 3, 32, 32), generator.mean_latents)
    assert list(told.groups) == (["renderer"] if kind == "released" else ["renderer", "decoder"])
    tested = [f"--model.tested.path={tmp_path / 'out'}", "--model.prior=null", "--model.encoder=null"]
    run([words[0], "test", *words[2:]], tmp_path / "test", *tested)
    records = read_records(tmp_path / "test")
    assert {record.item for record in records} >= {f"test{i:07d}" for i in range(5)}
    assert {"psnr", "depth_mae", "normal_error", "psnr@near", "fid"} <= {record.metric for record in records}
    run([words[0], "predict", *words[2:]], tmp_path / "heads", *tested)
    heads = Subjects(artifact.load(tmp_path / "heads"))
    assert len(heads.ids) == 5
    codes = heads["test0000001"].latents
    assert {n: t.shape for n, t in codes.groups.items()} == {
        n: t.shape for n, t in generator.mean_latents.groups.items()
    }
    if kind == "released":
        own = codes.groups["renderer"].mean(1)
        torch.testing.assert_close(codes.groups["decoder"][:, 0], generator.decoder.map_network(own))


def stage(work, kind="paper", **options):
    """A stage in the middle of its training, and a batch of pairs."""
    torch.manual_seed(0)
    path = work / PRIOR[kind]
    described = encoder_for(kind)
    encoder = (Encoder4Editing if kind == "manifold" else GlobalEncoder)(**described["init_args"])
    made = SelftrainStage(inversions.ref(path), encoder, perceptual=tiny.network("perceptual"), **options)
    made.build_model()
    data = SampleDataModule(str(path), views=2, train_samples=3, points=PointRecipe(30))
    data.setup("fit")
    return made.eval(), data.render(default_collate([data.datasets["train"][row] for row in range(3)]))


@pytest.mark.parametrize("kind", ["manifold", "paper", "released"])
def test_the_loss_is_the_sum_of_its_terms(work, kind):
    """Each term of each picture computed apart."""
    loss = ReconstructionLoss(1.0, 0.8, 0.1)
    made, batch = stage(
        work, kind, geometry=GeometryLoss(0.5, 0.25, 2.0, 0.3, smooth=False), code_weight=0.7, full_weight=0.6,
        thumb_weight=1.5, reconstruction=loss, identity=tiny.network("identity"),
    )  # fmt: skip
    image, camera = made.pictures(batch)
    terms = made.losses(image, camera, batch)
    ws, _ = made.invert(image)
    truth = made.generator.mapping(batch["z"])
    told = ["ws"] if kind == "manifold" else ["renderer", "decoder"] if kind == "paper" else ["renderer"]
    for row in range(6):
        numbers = [(ws.groups[name][row] - truth.groups[name][row // 2]).flatten() for name in told]
        assert float(terms["code"][row]) == pytest.approx(float(torch.cat(numbers).square().mean()), rel=1e-4)
    shape = {name: batch[name].flatten(0, 1) for name in batch if name.startswith(("surface", "space"))}
    found = field_geometry(made.generator, ws, shape["surface"])
    mask = shape["surface_mask"][..., 0].double()
    wanted = shape["surface_value"] if kind == "manifold" else 0
    value = (found.value - wanted).abs()[..., 0].double()
    torch.testing.assert_close(
        terms["surface"].double(), (value * mask).sum(1) / mask.sum(1).clamp_min(1), atol=1e-6, rtol=1e-4
    )
    rendering = made.generator.synthesis(ws, camera)
    networks = made.perceptual, made.identity
    full = loss(rendering.image, image, *networks)["reconstruction"]
    if kind == "manifold":
        recovery = 1.5 * full
    else:
        recovery = 0.6 * full + 1.5 * loss(rendering.raw, batch["raw"].flatten(0, 1), *networks)["reconstruction"]
    weights = {"surface": 0.5, "normal": 0.25, "space": 2.0, "eikonal": 0.3, "code": 0.7}
    expected = recovery + sum(weight * terms[name] for name, weight in weights.items() if name in terms)
    assert ("eikonal" in terms) == (kind != "manifold")
    torch.testing.assert_close(terms["loss"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["manifold", "paper", "released"])
@pytest.mark.parametrize("tested", [False, True])
def test_validation_measures_what_training_minimises(work, tmp_path, kind, tested):
    """Of the codes that the encoder tells, of which it is asked once."""
    made, batch = stage(work, kind)
    with torch.no_grad():
        expected = made.losses(*made.pictures(batch), batch)
    if tested:
        modules = {"generator": made.generator, "encoder": made.encoder}
        artifact.save(tmp_path / "made", stage="selftrain", modules=modules)
        networks = {"perceptual": tiny.network("perceptual")}
        made = SelftrainStage(tested=inversions.ref(tmp_path / "made"), **networks)
        made.build_model()
        made.eval()
    asked = []
    invert = made.encoder.invert
    made.encoder.invert = lambda *arguments: asked.append(1) or invert(*arguments)
    with torch.no_grad():
        made.validation_step(batch, 0)
    (found,) = made._scored
    assert len(asked) == 1 and made._shown is batch
    assert {"psnr", "ssim", "lpips", "surface", "normal", "space", "code", "geometry"} <= found.keys()
    for name in found.keys() & expected.keys():
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
        assert not found[name].requires_grad


def test_the_released_loss_sees_the_small_picture_only(work):
    made, batch = stage(work, "released", full_weight=0.0)
    terms = made.losses(*made.pictures(batch), batch)
    assert "thumb_pixel" in terms and "pixel" not in terms


@pytest.mark.parametrize("kind", ["manifold", "paper"])
def test_true_codes_cost_nothing(work, kind):
    """What the right answer costs: pictures, codes and, of sample targets, shapes."""
    made, batch = stage(work, kind, geometry=GeometryLoss(target="sample", eikonal=0))
    truth = made.generator.mapping(batch["z"]).repeat_interleave(2)
    made.invert = lambda image: (truth, None)
    terms = made.losses(*made.pictures(batch), batch)
    assert terms["code"].max() < 1e-9 and terms["geometry"].max() < 1e-4 and terms["recovery"].max() < 1e-3


def test_training_reduces_every_term(work, tmp_path):
    """Of a signed distance, on samples seen again and again."""
    words = line(work, "paper", schedule={"learning_rate": 5e-3, "final": 5e-3, "drop_at": None})
    more = ["--trainer.max_steps=40", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
    run(words, tmp_path, *more, "--data.init_args.train_samples=4", "--data.init_args.batch_size=4")
    found = logged(tmp_path)
    for name in ("loss", "geometry", "code", "reconstruction", "thumb_reconstruction"):
        losses = found[f"selftrain/{name}"]
        assert len(losses) == 40 and sum(losses[-8:]) < 0.9 * sum(losses[:8]), name


@pytest.mark.parametrize("kill", [Kill("last.ckpt", 2), Kill("artifact")], ids=["second step", "export"])
def test_a_killed_run_continues_exactly(work, tmp_path, kill):
    words = [*line(work), f"--out={tmp_path}"]
    galatea(*words, kill=kill)
    galatea(*words, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}")
    assert artifact.load(tmp_path).id == artifact.load(work / "selftrain").id


def test_pictures_of_others_are_inverted_too(work, tmp_path):
    """Validate and test know no shapes then."""
    generator = artifact.load(work / "balls").module("generator")
    inversions.portraits(work / "portraits", generator)
    words = line(work)
    data = ["--data=datamodules.portraits.PortraitDataModule", f"--data.path={work / 'portraits'}", "--data.size=32"]
    data += ["--data.val_fraction=0.2", "--data.test_fraction=0.2", f"--model.tested.path={work / 'selftrain'}"]
    distant = shutil.copytree(work / "portraits", tmp_path / "distant")
    content = json.loads((distant / "dataset.json").read_text())
    for _, label in content["labels"]:
        label[3:12:4] = [20 * number for number in label[3:12:4]]
    (distant / "dataset.json").write_text(json.dumps(content))
    for command in ("validate", "test"):
        run([words[0], command, *words[2:]], tmp_path / command, *data)
        with pytest.raises(UserError, match="where the generator sees from"):
            run([words[0], command, *words[2:]], tmp_path / "far", *data, f"--data.path={distant}")
        with pytest.raises(UserError, match="but what learns is trained for another generator"):
            samples = [f"--model.tested.path={work / 'selftrain'}", f"--data.init_args.path={work / 'manifolds'}"]
            run([words[0], command, *words[2:]], tmp_path / "others", *samples)
    assert {"psnr", "id"} <= {record.metric for record in read_records(tmp_path / "test")}


def test_what_does_not_fit_is_refused(work, tmp_path):
    words = line(work)
    with pytest.raises(UserError, match="phase is 'third': take one of global, align, local, hybrid"):
        run(words, tmp_path, "--model.phase=third")
    with pytest.raises(UserError, match="trained for another generator"):
        run(words, tmp_path, f"--data.init_args.path={work / 'manifolds'}")
    with pytest.raises(UserError, match=r"gives 7 codes of 16 \(ws\), the generator takes 3 codes of 16 \(renderer\)"):
        run(line(work, encoder=encoder_for("manifold")), tmp_path)
    with pytest.raises(UserError, match="samples are neutral"):
        run(line(work, "manifold"), tmp_path, "--model.encoder.init_args.expressions=2")
    with pytest.raises(UserError, match="there is nothing to train"):
        run(words, tmp_path, f"--model.tested.path={work / 'selftrain'}")
    for missing in ("prior", "encoder"):
        with pytest.raises(UserError, match="give both"):
            run(words, tmp_path, f"--model.{missing}=null")
    data = ["--data=datamodules.portraits.PortraitDataModule", f"--data.path={work / 'portraits'}", "--data.size=32"]
    with pytest.raises(UserError, match="does not know the codes behind its pictures"):
        run(words, tmp_path, *data, "--data.val_fraction=0.2")
    assert not (tmp_path / "artifact").exists()


def test_views_of_a_subject_are_pictures_of_their_own(work):
    made, batch = stage(work)
    both = made.losses(*made.pictures(batch), batch)
    first = some_views(batch, slice(1))
    alone = made.losses(*made.pictures(first), first)
    torch.testing.assert_close(both["loss"][::2], alone["loss"], atol=1e-4, rtol=1e-3)


# -- official files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "heads"),
    [(test_stylesdf.DECODER, 0), ({**test_stylesdf.DECODER, "channels": (8, 6, 4, 4, 4)}, 10)],
    ids=["the released 9 codes", "with the decoder's 10"],
)
def test_official_files_make_heads_by_the_users_command(tmp_path, decoder, heads):
    """Imported, then photo -> head, edited too: pictures are what float64 loops make of parts that have fixtures."""
    encoder = {"geometry": 3, "texture": 0, "w_dim": 8, "decoder_heads": heads, "decoder_dim": 10}
    files = {
        "e3dge": test_e3dge.official(encoder=encoder, fusion={"width": 8}),
        "stylesdf": test_stylesdf.official(decoder=decoder),
    }
    for name, file in files.items():
        torch.save(dict(file.states), tmp_path / f"{name}.pt")
    photo = F.interpolate(torch.rand(1, 3, 12, 12, generator=seeded(3)) - 0.5, (256, 256), mode="bicubic")
    write_image(tmp_path / "photo.png", photo[0])
    words = [str(tmp_path / f"{name}.pt") for name in files]
    zoo.main(["import", *words, "--set", "samples=5", "--out", str(tmp_path / "model")])
    np.save(tmp_path / "smile.npy", torch.randn(1, 8, generator=seeded(4)).numpy())
    line = {
        "model": {
            "prior": {"path": str(tmp_path / "model"), "module": "generator"},
            "names": [],
            "attributes": None,
            "boundaries": {"smile": str(tmp_path / "smile.npy")},
            "perceptual": {"class_path": "tests.stages.test_directions.Difference"},
            "calibration": {"codes": 3, "steps": 3, "distance": 0.02},
            "heads": 1,
            "tile": 32,
        },
        "data": {
            "class_path": "datamodules.latents.LatentDataModule",
            "init_args": {"samples": 8, "test_samples": 4, "block": 4},
        },
    }
    file = lines.write(tmp_path / "directions.yaml", line)
    cli.run(
        "directions", DirectionsStage, ["fit", f"--config={file}", *lines.TRAINER, f"--out={tmp_path / 'directions'}"]
    )
    camera = ["--yaw_deg=10", "--pitch_deg=-5", "--crop=none"]
    given = [f"--image={tmp_path / 'photo.png'}", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
    edit = [f"--directions={tmp_path / 'directions'}", "--edit=smile=0.8"]
    pipeline.main([str(ROOT / "configs" / "pipelines" / "e3dge.yaml"), *given, *camera, *edit, "--device=cpu"])
    assert (tmp_path / "out" / "present" / "artifact").is_dir()

    subject = Subjects(artifact.load(tmp_path / "out" / "invert"))["photo"]
    head = subject.generator.double()
    seen, query = head.photo.image, head.rig.camera(torch.tensor([math.radians(-20)]), 0.1)
    torch.testing.assert_close(seen, photo.double(), atol=0.02, rtol=0)
    with torch.no_grad():
        edited = artifact.load(tmp_path / "directions").module("directions").apply(subject.latents, {"smile": 0.8})
        model = artifact.load(tmp_path / "model")
        generator, local, encoder = (model.module(name).double() for name in ("generator", "local", "encoder"))
        offset = encoder(seen).groups
        own = subject.latents.groups["renderer"][0].double()
        codes = generator.mean_latents.groups["renderer"][0] + offset["renderer"][0]
        torch.testing.assert_close(own, codes, atol=1e-4, rtol=1e-4)
        made = generator.decoder.map_network(own.mean(0, keepdim=True)).expand(generator.decoder.num_ws, -1)
        codes = generator.mean_latents.groups["decoder"][0] + offset["decoder"][0] if heads else made
        torch.testing.assert_close(subject.latents.groups["decoder"][0].double(), codes, atol=1e-4, rtol=1e-4)
        reference, pictures = Reference(generator, local), []
        photographed, query = subject.camera.to(own), query.to(own)
        for latents in (subject.latents, edited):
            shown = latents.map(torch.Tensor.double)
            found = head.synthesis(shown, query).image[0]
            codes = {name: codes[0] for name, codes in shown.groups.items()}
            expected, _ = reference(seen, own, photographed, codes["renderer"], query, codes["decoder"])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            pictures.append(found)
    assert pictures[0].std() > 0.05 and (pictures[1] - pictures[0]).abs().mean() > 0.004
