"""Inversion by optimisation: real command lines, and what of the two steps is measured on samples of known codes."""

from dataclasses import replace

import pytest
import torch

from models import artifact
from models.errors import UserError
from models.heads.pivotal import PivotalTuning
from models.heads.subjects import Subjects
from models.losses.image import pixel_mse
from models.metrics.records import read_records
from stages import cli
from stages.optimise import CodeSearch, OptimiseStage
from tests.stages import inversions, small, tiny
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea

SEARCH = {"steps": 4, "learning_rate": 0.05}
TUNING = {"steps": 3, "learning_rate": 1e-3}
PROTOCOL = {
    "class_path": "models.metrics.e3dge.E3DGEProtocol",
    "init_args": {
        "perceptual": inversions.network("EmbeddedLPIPS"), "identity": inversions.network("EmbeddedIdentity"),
        "frames": 3,
    },
}  # fmt: skip


def line(folder, **model):
    """Options of a few steps for each of two portraits."""
    given = {
        "prior": {"path": str(folder / "tiny"), "module": "generator"}, "protocol": PROTOCOL,
        "perceptual": inversions.network("EmbeddedLPIPS"), "search": SEARCH, "tuning": TUNING, **model,
    }  # fmt: skip
    config = {"base": [], "model": given, "data": inversions.data(folder / "portraits", 32)}
    file = small.write(folder / f"optimise-{'-'.join(sorted(model))}.yaml", config)
    return ["optimise", "predict", f"--config={file}", *small.TRAINER]


RANDOM = {"model.search.start": "random", "model.search.candidates": 3, "model.tuning": "null"}
CASE = StageCase(
    line,
    inversions.prepare,
    commands={
        "predict": Command(options=inversions.FIFTHS),
        "predict, from random codes": Command(options={**inversions.FIFTHS, **RANDOM}),
        "test": Command(options=inversions.FIFTHS),
    },
    kills=[Kill("reference_*.png", 2), Kill("artifact")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the prior and its portraits."""
    return inversions.prepare(tmp_path_factory.mktemp("work"))


def run(words, out, *more):
    """In this process, which keeps errors as they are."""
    cli.run(words[0], OptimiseStage, [*words[1:], f"--out={out}", *more])


def measured(words):
    """The same command line for ``test``."""
    return [words[0], "test", *words[2:]]


def stage(work, **options):
    """With networks of random weights, and the first two samples of another seed to be inverted."""
    made = OptimiseStage(inversions.ref(work / "tiny"), tiny.network("perceptual"), **options)
    made.build_model()
    z = made.generator.sample_z(2, torch.Generator().manual_seed(9))
    camera = made.generator.rig.camera(torch.tensor([-0.2, 0.2]))
    with torch.no_grad():
        image = made.generator.synthesis(made.generator.mapping(z), camera).image.clamp(-1, 1)
    return made, image, camera


def weights(generator):
    return {name: tensor.clone() for name, tensor in generator.state_dict().items()}


@pytest.mark.parametrize("space", ["w", "w+"])
def test_the_search_lowers_the_loss_and_tuning_lowers_it_further(work, space):
    """At each picture's own view, by a loss computed apart; codes and all else that is shared stay as they are."""
    search = CodeSearch(space=space, steps=24, learning_rate=0.03, perceptual=0.7, pixel=1.5)
    tuning = PivotalTuning(steps=20, learning_rate=3e-3, perceptual=0.7, pixel=1.5)
    made, image, camera = stage(work, search=search, tuning=tuning)
    before = weights(made.generator)
    with torch.no_grad():  # as a test calls it
        mean = made.generator.synthesis(made.generator.mean_latents.repeat_interleave(2), camera).image
        fine = made.reconstruct(image, camera)(camera).image
        made.tuning = None
        coarse = made.reconstruct(image, camera)(camera).image

    def loss(found):
        return 0.7 * made.perceptual(found, image) + 1.5 * pixel_mse(found, image)

    assert (loss(coarse) < 0.8 * loss(mean)).all() and (loss(fine) < 0.7 * loss(coarse)).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.generator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in made.generator.parameters())


def test_one_code_serves_all_layers_of_a_group(work):
    made, image, camera = stage(work, search=CodeSearch(**SEARCH))
    ws = made.optimise("a", image[:1], camera[0]).ws.groups
    assert all(torch.equal(code, code[:, :1].expand_as(code)) for code in ws.values())


def test_a_step_is_adams(work):
    """The first one of both parts: each number goes its learning rate down its gradient, whose size does not count."""
    made, image, camera = stage(
        work, search=CodeSearch(space="w+", steps=1), tuning=PivotalTuning(steps=1, train="synthesis", perceptual=0.0)
    )
    generator, wanted = made.generator, image[:1]
    head = made.optimise("a", wanted, camera[0])
    codes = {name: t.clone().requires_grad_() for name, t in generator.mean_latents.groups.items()}
    found = generator.synthesis(type(head.ws)(codes), camera[0]).image
    loss = (made.perceptual(found, wanted) + (found - wanted).square().mean()).sum()
    for (name, start), slope in zip(codes.items(), torch.autograd.grad(loss, list(codes.values())), strict=True):
        clear = slope.abs() > 1e-4 * slope.abs().max()
        moved = head.ws.groups[name] - start
        torch.testing.assert_close(moved[clear], -5e-3 * slope.sign()[clear], rtol=1e-2, atol=1e-6)
    generator.requires_grad_(True)
    loss = (generator.synthesis(head.ws, camera[0]).image - wanted).square().mean()
    tuned, moving = head.weights.tensors(), dict(generator.named_parameters())
    slopes = torch.autograd.grad(loss, [moving[name] for name in tuned])
    for (name, value), slope in zip(tuned.items(), slopes, strict=True):
        clear = slope.abs() > 1e-3 * slope.abs().max()
        steps = (value - moving[name])[clear & (slope.abs() > 1e-5)]
        torch.testing.assert_close(steps, -5e-5 * slope.sign()[clear & (slope.abs() > 1e-5)], rtol=2e-2, atol=1e-7)


def test_heads_of_a_batch_are_each_picture_s_own(work):
    made, image, camera = stage(work, search=CodeSearch(**SEARCH), tuning=PivotalTuning(**TUNING))
    views = made.generator.rig.camera(torch.tensor([0.1, -0.1, 0.3]))
    both = made.reconstruct(image, camera)(type(views).cat([views, views])).image
    for row in range(2):
        alone = made.reconstruct_item(str(row), image[row : row + 1], camera[row])(views).image
        torch.testing.assert_close(both[3 * row : 3 * row + 3], alone)


def test_draws_are_of_the_item_and_the_seed(work):
    """Where a search begins at random codes; from the mean nothing is drawn."""
    random = CodeSearch(start="random", space="z", candidates=2, **SEARCH)

    def found(item, seed, search=random):
        made, image, camera = stage(work, search=search, seed=seed)
        return made.optimise(item, image[:1], camera[0]).ws.ws

    assert torch.equal(found("a", 0), found("a", 0))
    assert not torch.equal(found("a", 0), found("b", 0)) and not torch.equal(found("a", 0), found("a", 1))
    mean = replace(random, start="mean", space="w", candidates=0)
    assert torch.equal(found("a", 0, mean), found("b", 1, mean))


def test_expressions_are_fitted_where_asked(work):
    search = CodeSearch(optimize_expression=True, **SEARCH)
    made, image, camera = stage(work, search=search, tuning=PivotalTuning(**TUNING))
    head = made.optimise("a", image[:1], camera[0])
    assert head.expression.shape == (1, 2) and head.expression.any() and not head.expression.requires_grad
    made, image, camera = stage(work, search=CodeSearch(**SEARCH))
    assert made.optimise("a", image[:1], camera[0]).expression is None


def test_it_is_measured_with_its_time(work, tmp_path):
    """Scores as of any inversion; seconds beside them, since no two runs have the same."""
    run(measured(line(work)), tmp_path)
    records = read_records(tmp_path)
    items = {record.item for record in records}
    assert len(items) == 2 and {"mae", "ssim_e3dge", "id_input_nv@far"} <= {record.metric for record in records}
    assert {(record.protocol, record.variant) for record in records} == {("e3dge", "optimise")}
    took = read_records(tmp_path / "seconds.csv")
    assert {record.item for record in took} == items and len(took) == 2
    assert all(record.metric == "seconds" and record.value > 0 and record.protocol == "e3dge" for record in took)
    assert "seconds" not in {record.metric for record in records}


def test_time_is_the_inversion_s_alone(work, tmp_path, monkeypatch):
    """Each item's own; rendering frames and measuring them cost none of it."""
    moments = iter(range(1000))
    monkeypatch.setattr(OptimiseStage, "_clock", lambda self: float(next(moments)) ** 2)
    run(measured(line(work)), tmp_path)
    assert [record.value for record in read_records(tmp_path / "seconds.csv")] == [1, 5]  # 1^2 - 0^2, 3^2 - 2^2


def test_tuned_heads_are_handed_on(work, tmp_path):
    """Each with weights of its own beside the original's, shown as they were found."""
    run(line(work), tmp_path / "tuned")
    run(line(work), tmp_path / "codes", "--model.tuning=null")
    tuned, codes = (artifact.load(tmp_path / name) for name in ("tuned", "codes"))
    assert set(codes.manifest["modules"]) == {"generator", "anchors"}
    heads, plain = Subjects(tuned), Subjects(codes)
    assert heads.ids == plain.ids and len(heads.ids) == 2
    prior = artifact.load(work / "tiny").module("generator").state_dict()
    for identity in heads.ids:
        head = heads[identity]
        assert torch.equal(head.latents.ws, plain[identity].latents.ws) and head.artwork is not None
        own = head.generator.state_dict()
        moved = {
            name: (own[name] - prior[name]).abs().max() for name in prior if not torch.equal(own[name], prior[name])
        }
        assert moved and max(moved.values()) < 1e-2
        original = head.original.state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in prior.items())
        assert all(torch.equal(t, prior[name]) for name, t in plain[identity].generator.state_dict().items())
    made, _, _ = stage(work, search=CodeSearch(**SEARCH), tuning=PivotalTuning(**TUNING))
    assert tuned.extra["tuning"]["learning_rate"] == made.tuning.learning_rate


def test_a_2d_generator(work, tmp_path):
    """Its pictures have no camera, and its scores one view."""
    from tests.models.generators.test_stylegan2 import small as flat

    torch.manual_seed(0)
    generator = flat().eval()
    generator.update_mean(64)
    artifact.save(tmp_path / "flat", stage="prior", modules={"generator": generator})
    words = [*line(work), f"--model.prior.path={tmp_path / 'flat'}"]
    run(measured(words), tmp_path / "test")
    assert {"psnr", "lpips"} <= {record.metric for record in read_records(tmp_path / "test")}
    assert len(read_records(tmp_path / "test" / "seconds.csv")) == 2
    run(words, tmp_path / "heads")
    assert len(Subjects(artifact.load(tmp_path / "heads")).ids) == 2


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_there_is_nothing_to_train(work, tmp_path, command):
    words = line(work)
    with pytest.raises(UserError, match=f"stage optimise has no command '{command}', it has: test, predict"):
        run([words[0], command, *words[2:]], tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("search.steps=0", "search.steps is 0: it must be a number above 0"),
        ("search.learning_rate=-1", "search.learning_rate is -1.0: it must be a number above 0"),
        ("search={pixel: 0, perceptual: 0}", "search: neither perceptual nor pixel has a weight"),
        ("search.optimize_pose=true", "search.optimize_pose: a head is a code here"),
        ("search.optimize_noise=true", "search.optimize_noise: a head is a code here"),
        ("search.space=v", "search.space"),
        ("search.space=z", "z starts at random codes"),
        ("search.layers={other: [0, 1]}", r"search.layers: other: \[0, 1\] is not among ManifoldGenerator's"),
        ("tuning.steps=0", "tuning.steps is 0: it must be a number above 0"),
        ("tuning={pixel: 0, perceptual: 0}", "tuning: neither perceptual nor pixel has a weight"),
        ("tuning.train=nothing", "tuning.train, tuning.freeze: 'nothing' leaves no parameter"),
        ("tuning.train=(", "tuning.train, tuning.freeze: .* nor a regular expression"),
        ("prior.path=nowhere", "there is no artifact in nowhere"),
        ("protocol=null", "test needs what it measures, model.protocol"),
    ],
)
def test_what_cannot_be_is_refused(work, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        run(measured(line(work)), tmp_path / "out", f"--model.{option}")
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_pictures_without_cameras_are_refused(work, tmp_path):
    generator = artifact.load(work / "tiny").module("generator")
    (tmp_path / "bare").mkdir()
    inversions.portraits(tmp_path / "bare", generator, labels=False)
    with pytest.raises(UserError, match="a 3D generator needs the cameras of the pictures"):
        run(measured(line(work)), tmp_path / "out", f"--data.path={tmp_path / 'bare'}", "--data.labels=false")


def test_one_and_two_processes_agree(work, tmp_path):
    """Of five portraits, which two do not divide."""
    words = [
        *measured(line(work)),
        *small.options(inversions.FIFTHS),
        "--data.test_fraction=0.25",
        "--data.batch_size=1",
    ]
    galatea(*words, f"--out={tmp_path / 'one'}")
    galatea(*words, "--trainer.strategy=ddp", f"--out={tmp_path / 'two'}", ranks=2)
    one, two = (read_records(tmp_path / name) for name in ("one", "two"))
    assert one == two and len({record.item for record in one}) == 3
    items = [[r.item for r in read_records(tmp_path / name / "seconds.csv")] for name in ("one", "two")]
    assert items[0] == items[1] and len(items[0]) == 3
