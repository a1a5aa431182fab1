"""Every command of the README and of docs/ runs as written, with a few steps instead of many."""

import os
import re
import shlex
import subprocess

import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from models.files import ROOT
from models.generators.stylegan2 import StyleGAN2Generator
from models.zoo.parity import Fixture
from models.zoo.stylegan2 import FAMILY as stylegan2
from stages import __main__ as galatea
from stages.pipeline.process import PROGRAM, start
from tests.models.zoo.fixtures import fixture_folder

TINY = ["--trainer.enable_model_summary", "false"]
FIT = ["--model.steps", "2", *TINY]
TOY_WORLD = [
    "--data.train_subjects", "4", "--data.val_subjects", "2", "--data.test_subjects", "2", "--data.compiled", "false",
    "--data.draw_workers", "0", "--data.supersample", "1",
]  # fmt: skip
QUICK_PRESENT = [
    "--set", "present.model.frames=4", "--set", "present.model.mesh_size=32", "--set", "present.model.scale=1",
]  # fmt: skip
QUICK_TWINS = [
    part
    for step in ("photo", "cartoon")
    for key, value in {"prior": 2, "first": "[1,0,1]", "later": "[1,0,1]", "samples": 2, "batch": 2}.items()
    for part in ("--set", f"{step}.model.recipe.{key}={value}")
]
TOY_INVERTER = [
    part
    for step in ("invert", "tune", "detail")
    for key, value in {
        "trainer.max_steps": 2, "trainer.limit_val_batches": 0, "data.init_args.train_subjects": 8,
        "data.init_args.val_subjects": 2, "data.init_args.test_subjects": 2, "data.init_args.compiled": "false",
        "data.init_args.draw_workers": 0, "data.init_args.supersample": 1, "data.init_args.batch_size": 2,
    }.items()
    for part in ("--set", f"{step}.{key}={value}")
]  # fmt: skip
TOY_E3DGE = [
    part
    for step in ("global", "align", "local", "hybrid")
    for key, value in {"trainer.max_steps": 2, "trainer.limit_val_batches": 0, "data.init_args.batch_size": 1}.items()
    for part in ("--set", f"{step}.{key}={value}")
]
TOY_BASELINES = [
    part
    for step in ("one_pass", "sg2", "pti")
    for key, value in {
        "model.protocol.init_args.frames": 2, "data.init_args.train_subjects": 1, "data.init_args.val_subjects": 1,
        "data.init_args.test_subjects": 1, "data.init_args.compiled": "false", "data.init_args.draw_workers": 0,
        "data.init_args.supersample": 1, **({} if step == "one_pass" else {"model.search.steps": 2}),
        **({"model.tuning.steps": 2} if step == "pti" else {}),
    }.items()
    for part in ("--set", f"{step}.{key}={value}")
]  # fmt: skip
PRESENT = ["--model.frames", "4", "--model.mesh_size", "32", "--model.scale", "1", "--model.samples", "1"]

# In the order of the README: later commands use what earlier ones wrote. The value is appended to the command.
EXTRA = {
    # Six days, or weights that are not here; tests/configs runs them dry.
    "galatea run configs/pipelines/paper_artform.yaml --image artworks --model runs/anifacegan"
    " --out runs/paper_artform": None,
    "galatea run configs/pipelines/paper_inverter.yaml --images ffhq256.zip --test_images celebahq256.zip"
    " --out runs/paper_inverter": None,
    "galatea table runs/paper_inverter --baseline tuned": None,
    "galatea stylize test --config configs/paper/artmator/stylize.yaml --model.tested.paper runs/paper_artform/stylize"
    " --data.path runs/paper_artform/anchor --out runs/paper_artform_test": None,
    "galatea prior test --config configs/paper/graminverter/prior_test.yaml --model.tested.path runs/efficient_gram"
    " --data.test_path ffhq256.zip --out runs/efficient_gram_test": None,
    "galatea view runs/demo/stylize": None,  # serves until it is stopped; tests/stages/test_view.py
    "galatea run configs/pipelines/artform.yaml --image assets/artworks/toon-1100003.png --out runs/toon": [
        "--set", "anchor.model.steps=2", "--set", "stylize.model.recipe.steps=2", *QUICK_PRESENT,
    ],
    "galatea run configs/pipelines/artform.yaml --image assets/artworks --out runs/all --dry_run": [],
    "galatea status runs/toon": [],
    "galatea align me.jpg --out runs/me": ["--size", "64"],
    "galatea align runs/me": [],
    "galatea run configs/pipelines/artform.yaml --image runs/me --out runs/me_head": ["--dry_run"],
    "galatea align photos --for eg3d --out runs/photos.zip --first 200": ["--size", "32"],
    "galatea align photos --for ffhq --out runs/aligned": ["--size", "32"],
    "galatea align runs/aligned --for gram --out runs/aligned_gram": ["--size", "32"],
    "galatea align group.jpg --face 2 --out runs/second": ["--size", "32"],
    'galatea align drawing.jpg --points "203,102 248,104 222,131 202,139 246,142" --out runs/drawing': [
        "--size", "32",
    ],
    "galatea align photos --for eg3d --out runs/photos.zip": None,  # as with --first
    "galatea lineage runs/toon": [],
    "galatea run configs/pipelines/inverter.yaml --image assets/artworks/watercolour-1100013.png"
    " --out runs/photo": QUICK_PRESENT,
    "galatea run configs/pipelines/inverter_train.yaml --out runs/inverter": TOY_INVERTER,
    "galatea run configs/pipelines/inversion_test.yaml --general runs/inverter/invert --tuned runs/inverter/tune"
    " --detail runs/inverter/detail --out runs/inversion_test": ["--dry_run"],
    "galatea run configs/pipelines/inversion_test.yaml --out runs/inversion_test": None,  # the same with other folders
    "galatea detail test --config configs/stages/selftrain_test.yaml --model.tested.path assets/inverter"
    " --out runs/e3dge_test": [
        *TOY_WORLD, "--model.protocol.init_args.frames", "2",
    ],
    "galatea prior fit --config configs/stages/prior_sdf.yaml --out runs/prior_sdf": [
        *TOY_WORLD, "--model.total_images", "8", "--model.adversarial.start", "6", "--model.field.alone", "4",
        "--data.batch_size", "2",
    ],
    "galatea prior test --config configs/stages/prior_sdf.yaml --model.tested.path assets/sdf_prior"
    " --out runs/prior_sdf_test": [*TOY_WORLD, "--model.fit_subjects", "0", "--model.meshes", "0"],
    "galatea selftrain fit --config configs/stages/selftrain_manifolds.yaml --out runs/manifold_codes": [
        "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--data.init_args.batch_size", "1",
    ],
    "galatea selftrain test --config configs/stages/selftrain_samples_test.yaml --data.init_args.path assets/prior"
    " --model.tested.path runs/manifold_codes --out runs/samples_test": [
        "--data.init_args.test_samples", "1", "--model.protocol.init_args.frames", "3",
    ],
    "galatea run configs/pipelines/e3dge.yaml --image assets/artworks/toon-1100003.png --edit glasses=1.0"
    " --out runs/glasses": QUICK_PRESENT,
    "galatea run configs/pipelines/e3dge.yaml --image assets/artworks/toon-1100003.png"
    " --out runs/person": QUICK_PRESENT,
    "galatea run configs/pipelines/e3dge.yaml --image assets/artworks/toon-1100003.png --edit mouth_open=1.0"
    " --out runs/open": QUICK_PRESENT,
    "galatea run configs/pipelines/e3dge_train.yaml --out runs/e3dge_train": TOY_E3DGE,
    "galatea run configs/pipelines/e3dge_train.yaml --out runs/e3dge_long --set global.trainer.max_steps=2500"
    " --set global.data.init_args.batch_size=8 --set align.trainer.max_steps=400"
    " --set align.data.init_args.batch_size=4 --set local.trainer.max_steps=900"
    ' --set "local.model.curriculum.steps=[0, 100, 150, 200, 250, 300]" --set hybrid.trainer.max_steps=300': [
        "--dry_run",
    ],
    "galatea run configs/pipelines/e3dge.yaml --model runs/e3dge_train/hybrid"
    " --image assets/artworks/toon-1100003.png --out runs/again": QUICK_PRESENT,
    "galatea selftrain test --config configs/stages/selftrain_test.yaml --model.tested.path assets/e3dge"
    " --data.init_args.test_subjects 40 --model.protocol.init_args.frames 12 --out runs/hybrid_test": [
        *TOY_WORLD, "--data.init_args.test_subjects", "2", "--model.protocol.init_args.frames", "2",
    ],
    "galatea optimise test --config configs/stages/optimise_test.yaml --out runs/sg2_test": [
        *TOY_WORLD, "--model.protocol.init_args.frames", "2", "--model.search.steps", "2",
    ],
    "galatea optimise test --config configs/stages/optimise_test_pti.yaml --out runs/pti_test": [
        *TOY_WORLD, "--model.protocol.init_args.frames", "2", "--model.search.steps", "2", "--model.tuning.steps", "2",
    ],
    "galatea run configs/pipelines/e3dge_baselines_test.yaml --out runs/e3dge_baselines_test": TOY_BASELINES,
    "galatea table runs/e3dge_baselines_test --baseline one_pass": [],
    "galatea table runs/e3dge_baselines_test/one_pass/seconds.csv runs/e3dge_baselines_test/pti/seconds.csv": [],
    "galatea selftrain test --config configs/paper/e3dge/selftrain_test.yaml --model.tested.path runs/e3dge"
    " --data.init_args.path celebahq256.zip --data.init_args.test_path celebahq256.zip --out runs/celebahq_test": None,
    "galatea selftrain test --config configs/paper/e3dge/selftrain_samples_test.yaml --model.tested.path runs/e3dge"
    " --data.init_args.path runs/e3dge --out runs/paper_samples_test": None,  # of official weights
    "galatea align iphone_pictures --for stylesdf --out now.zip": None,  # NoW's: tests/datamodules/test_now.py
    "galatea selftrain test --config configs/paper/e3dge/selftrain_test.yaml --model.tested.path runs/e3dge"
    " --model.protocol.init_args.keypoints models.features.landmarks.FaceLandmarks --data datamodules.now.NoWDataModule"
    " --data.init_args.scans NoW_Evaluation/dataset --data.init_args.path now.zip --data.init_args.test_path now.zip"
    " --out runs/now_test": None,
    "galatea directions fit --config configs/stages/directions.yaml --out runs/e3dge_directions": [
        "--data.init_args.samples", "200", "--model.calibration.steps", "1",
    ],
    "galatea run configs/pipelines/e3dge.yaml --image assets/artworks/toon-1100003.png"
    " --directions runs/e3dge_directions --edit smile=1.0 --edit glasses=-0.5 --out runs/smiling": QUICK_PRESENT,
    "galatea selftrain test --config configs/stages/selftrain_edits_test.yaml --model.tested.path assets/e3dge"
    " --out runs/edits_test": [
        "--data.test_subjects", "1", "--data.compiled", "false", "--data.draw_workers", "0",
        "--model.protocol.init_args.frames", "2",
    ],
    "galatea run configs/pipelines/e3dge_edits_test.yaml --out runs/e3dge_edits_test": [
        "--aligned_3d", "runs/e3dge_train/local", "--hybrid", "runs/e3dge_train/hybrid", "--dry_run",
    ],
    "galatea table runs/e3dge_edits_test --baseline hybrid": None,  # after a quarter of an hour
    "galatea run configs/pipelines/shape_test.yaml --out runs/shape_test": ["--dry_run"],
    "galatea table runs/shape_test --baseline full": None,  # after an hour
    "galatea run configs/pipelines/cartoon_styles_test.yaml --style toon --out runs/cartoon_styles_test": ["--dry_run"],
    "galatea run configs/pipelines/expressions_test.yaml --style runs/cartoon_styles_test/structure"
    " --out runs/expressions_test": ["--style", "assets/prior2d", "--dry_run"],
    "galatea run configs/pipelines/e3dge_shape_test.yaml --out runs/e3dge_shape_test": ["--dry_run"],
    "galatea run configs/pipelines/e3dge_details_test.yaml --out runs/e3dge_details_test": ["--dry_run"],
    "galatea run configs/pipelines/e3dge_ablations_test.yaml --out runs/e3dge_ablations_test": ["--dry_run"],
    "galatea table runs/e3dge_shape_test --baseline psp": None,  # after an hour and more
    "galatea table runs/e3dge_details_test --baseline aligned_3d_longer": None,  # the same
    "galatea table runs/e3dge_details_test runs/e3dge_ablations_test --baseline aligned_3d": None,  # the same
    "galatea zoo import ffhq1024x1024.pt --set samples=16 --out runs/stylesdf": None,  # as other official files
    "galatea run configs/pipelines/paper_e3dge.yaml --model runs/stylesdf --out runs/paper_e3dge": None,  # two days
    # tests/stages/test_graminverter.py trains a few steps of the paper's settings on a few portraits.
    "galatea prior fit --config configs/paper/graminverter/prior.yaml --data.path ffhq256.zip"
    " --out runs/efficient_gram": None,
    "galatea table runs/inversion_test docs/graminverter --baseline tuned": None,  # after half an hour
    "galatea world --style toon --count 40 --out styles/toon": ["--count", "20"],
    "galatea world --style plain --count 8 --out heads": ["--count", "2"],
    "galatea run configs/pipelines/pseudo_pairs.yaml --style styles/toon --photos heads --out runs/toon": [
        "--set", "adapt.model.total_images=8", "--set", "paired.model.total_images=8", "--set", "pairs.model.steps=2",
        "--set", "adapt_test.model.scored=8", "--set", "paired_test.model.scored=8",
    ],
    "galatea run configs/pipelines/restyle.yaml --image heads --style runs/toon/paired --out runs/me": [],
    "galatea run configs/pipelines/cartoon.yaml --image heads --style runs/toon/paired --out runs/twins": [
        "--set", "expressions.model.offsets.steps=2", *QUICK_TWINS, *QUICK_PRESENT,
    ],
    "galatea view runs/twins/cartoon": None,  # serves until it is stopped
    # A quarter of an hour and more each; tests/configs resolves their steps.
    "galatea run configs/pipelines/pseudo_pairs_test.yaml --style toon --seed 0 --out runs/pseudo_pairs_test": [
        "--dry_run",
    ],
    "galatea table runs/pseudo_pairs_test --baseline adapt": None,
    "galatea run configs/pipelines/pseudo_pairs_levels_test.yaml --out runs/pseudo_pairs_levels_test": [
        "--adapted", "assets/prior2d", "--pairs", "assets/prior2d", "--dry_run",
    ],
    "galatea run configs/pipelines/pseudo_pairs_weights_test.yaml --out runs/pseudo_pairs_weights_test": [
        "--pairs", "assets/prior2d", "--dry_run",
    ],
    "galatea world --style toon --count 1 --out runs/reference": [],
    "galatea run configs/pipelines/pseudo_pairs_photos_test.yaml --reference runs/reference/toon-50000.png"
    " --out runs/pseudo_pairs_photos_test": [
        "--artifact", "assets/prior2d", "--adapted", "assets/prior2d", "--dry_run",
    ],
    "galatea run configs/pipelines/pseudo_pairs_sdf_test.yaml --out runs/pseudo_pairs_sdf_test": ["--dry_run"],
    "galatea features fit --config configs/stages/features_judges.yaml --out runs/judges": None,  # as with the other
    "galatea prior fit --config configs/stages/prior_2d.yaml --trainer.accelerator cpu --trainer.devices 2"
    " --trainer.strategy ddp --data.init_args.batch_size 8 --out runs/prior2d": None,  # half an hour of two cores
    "galatea prior test --config configs/stages/prior_2d.yaml --model.tested.path assets/prior2d"
    " --data.init_args.test_subjects 2000 --out runs/prior2d_test": [
        *TOY_WORLD, "--data.init_args.test_subjects", "4", "--model.fit_subjects", "1", "--model.neighbours", "2",
    ],
    **{
        f"galatea invert fit --config configs/stages/invert_2d{name}.yaml --model.prior.path runs/prior2d"
        f" --out runs/to_{out}": [
            *TOY_WORLD, "--model.prior.path", "assets/prior2d", "--trainer.max_steps", "2",
            "--trainer.limit_val_batches", "0", "--data.batch_size", "4", "--model.rendered", "2",
        ]
        for name, out in (("", "w"), ("_wplus", "wplus"), ("_zplus", "zplus"))
    },
    "galatea invert test --config configs/stages/invert_2d.yaml --model.tested.path assets/encoders2d/w"
    " --out runs/to_w_test": TOY_WORLD,
    "galatea --help": [],
    "galatea anchor fit --data.init_args.path assets/artworks --out runs/anchor": FIT,
    "galatea stylize fit --model.anchor.path runs/anchor --data.init_args.path runs/anchor --out runs/stylize": [
        "--model.recipe.steps", "2", *TINY,
    ],
    "galatea present predict --model.result.path runs/stylize --out runs/present": [
        *PRESENT, "--model.items", "[toon-1100003]",
    ],
    "galatea stylize fit --print_config": [],
    "galatea world --out runs/world.png": ["--size", "16"],
    "galatea features fit --out runs/features": None,  # tests/stages/test_features.py trains a few steps
    "galatea prior fit --out runs/prior": [
        *TOY_WORLD, "--model.total_images", "8", "--model.adversarial.start", "4", "--model.fit_manifolds", "false",
    ],
    "galatea prior test --model.tested.path assets/prior --out runs/prior_test": [
        *TOY_WORLD, "--model.fit_subjects", "0",
    ],
    "galatea run configs/pipelines/artform_test.yaml --out runs/artform_test": ["--dry_run"],
    "galatea run configs/pipelines/portraits_test.yaml --image photos --out runs/portraits": ["--dry_run"],
    "galatea run configs/pipelines/artform_paper_test.yaml --out runs/artform_paper_test": ["--dry_run"],
    "galatea run configs/pipelines/artform_pose_test.yaml --out runs/artform_pose_test": ["--dry_run"],
    "galatea run configs/pipelines/artform_exaggeration_test.yaml --strength 0.5"
    " --out runs/artform_exaggeration_test": ["--dry_run"],
    "galatea run configs/pipelines/inversion_terms_test.yaml --tuned runs/inverter/tune"
    " --out runs/inversion_terms_test": ["--dry_run"],
    "galatea run configs/pipelines/artform_adapted_test.yaml --style impasto --out runs/artform_adapted_test": [
        "--dry_run",
    ],
    "galatea table runs/artform_adapted_test --baseline pti": None,  # likewise
    "galatea table runs/artform_paper_test --baseline pti": None,  # after hours; tests/stages/test_results.py
    "galatea table runs/artform_pose_test --baseline fixed": None,  # likewise
    "galatea table runs/artform_exaggeration_test --baseline landmarks": None,  # likewise
    "galatea table runs/inversion_terms_test --baseline detail": None,  # likewise
    "galatea table runs/portraits --baseline full": None,  # after minutes a picture; tests/stages/test_faces.py
    "galatea table runs/artform_test --baseline full": None,  # after hours; tests/stages/test_results.py
    "galatea present predict --model.result.path runs/demo/stylize --out runs/gallery": None,  # as runs/present
    "galatea directions fit --model.prior.path assets/prior --model.names '[glasses, beard, hair_light]'"
    " --out runs/directions": ["--data.init_args.samples", "200", "--model.calibration.steps", "1"],
    "galatea directions test --model.tested.path runs/directions --out runs/directions_test": [
        "--data.init_args.test_samples", "4",
    ],
    "galatea present predict --model.result.path assets/prior --model.directions runs/directions"
    " --model.edits '{beard: 1.0}' --out runs/edited": PRESENT,
    "galatea view assets/prior --directions runs/directions": None,  # serves until it is stopped
    "galatea directions fit --config configs/stages/directions_sefa.yaml --out runs/directions_sefa": [
        "--data.init_args.samples", "100", "--model.calibration.steps", "1", "--model.method.init_args.named_by", "4",
    ],
    "galatea directions predict --config configs/stages/directions_sefa.yaml --model.tested.path runs/directions_sefa"
    " --out runs/offsets": ["--model.heads", "1", "--model.offsets.steps", "2"],
    "galatea directions test --config configs/stages/directions_sefa.yaml --model.tested.path runs/directions_sefa"
    " --out runs/offsets_test": ["--data.init_args.test_samples", "4", "--model.offsets.steps", "2"],
    "galatea directions fit --config configs/stages/directions_sefa_3d.yaml --out runs/directions_sefa_3d": [
        "--data.init_args.samples", "100", "--model.calibration.steps", "1", "--model.method.init_args.named_by", "4",
        "--model.method.init_args.count", "2",
    ],
    "galatea view assets/prior --directions runs/directions_sefa_3d": None,  # serves until it is stopped
    "galatea shape fit --config configs/stages/shape.yaml --out runs/shape": [
        "--data.init_args.subjects", "1", "--model.recipe.prior", "2", "--model.recipe.first", "[1, 0, 1]",
        "--model.recipe.later", "[1, 0, 1]", "--model.recipe.samples", "2", "--model.recipe.batch", "2",
    ],
    "galatea shape test --config configs/stages/shape.yaml --model.tested.path runs/shape --out runs/shape_test": [
        "--data.init_args.subjects", "1",
    ],
    "galatea shape predict --config configs/stages/shape.yaml --model.tested.path runs/shape --out runs/shape_shown": [
        "--data.init_args.subjects", "1",
    ],
    "galatea zoo list": [],
    "galatea zoo list gram": [],
    "galatea zoo import stylegan2-ffhq-config-f.pt --out runs/stylegan2": [],
    "galatea zoo import gram generator.pth ema.pth --set preset=cats img_size=64 --out runs/gram": [],
    # The packages are not here; tests/models/zoo/test_faces.py reads made-up ones.
    "galatea zoo import faces *.whl mediapipe-face_mesh-*.tgz --out runs/faces": None,
    "galatea zoo import faces vladmandic-face-api-1.7.15.tgz --out runs/face_identity": None,
    "galatea zoo verify runs/stylegan2": [],
    "galatea zoo export runs/stylegan2 --out stylegan2.pt": [],
    # An imported EG3D through the whole pipeline: tests/stages/test_zoo_stages.py.
    "galatea zoo import ffhq512-128.pkl --out runs/eg3d": None,
    "galatea run configs/pipelines/artform.yaml --model runs/eg3d --image portrait.jpg --out runs/portrait": None,
    "galatea view runs/portrait/stylize": None,
    # docs/real_weights.md: the official files are not here. What presets choose: tests/stages/pipeline/test_presets.py;
    # training on a folder of photos: tests/stages/test_graminverter.py.
    "galatea zoo import checkpoints/ffhq512-128.pkl --out runs/eg3d": None,
    "galatea zoo verify runs/eg3d": None,
    "galatea run configs/pipelines/artform.yaml --model runs/eg3d --image me.jpg --out runs/me --dry_run": None,
    "galatea run configs/pipelines/artform.yaml --model runs/eg3d --image me.jpg --out runs/me": None,
    "galatea view runs/me/stylize": None,
    "galatea anchor fit --config configs/presets/eg3d/anchor.yaml --model.prior.path runs/eg3d"
    " --data.init_args.path me.jpg": None,
    "galatea zoo import checkpoints/ffhq1024x1024.pt --out runs/stylesdf": None,
    "galatea zoo import gram checkpoints/gram/generator.pth checkpoints/gram/ema.pth --set preset=ffhq"
    " --out runs/gram": None,
    "galatea zoo import anifacegan checkpoints/anifacegan/generator.pth checkpoints/anifacegan/dif.pth"
    " checkpoints/anifacegan/identity/vae.pth checkpoints/anifacegan/expression/vae.pth checkpoints/anifacegan/ema.pth"
    " --out runs/anifacegan": None,
    "galatea zoo import checkpoints/stylegan2-ffhq-config-f.pt --out runs/stylegan2": None,
    "galatea zoo import checkpoints/psp_ffhq_encode.pt --out runs/psp": None,
    "galatea zoo import checkpoints/e4e_ffhq_encode.pt --out runs/e4e": None,
    # Small files of the same layout: tests/stages/test_selftrain.py.
    "galatea zoo import checkpoints/E3DGE_Full_Runner.pt checkpoints/ffhq1024x1024.pt --out runs/e3dge": None,
    "galatea run configs/pipelines/e3dge.yaml --model runs/e3dge --image me.jpg --out runs/me": None,
    "galatea zoo import checkpoints/model_ir_se50.pth --out runs/identity": None,
    "galatea align my_photos --for eg3d --out data/portraits.zip": None,
    "galatea prior fit --config configs/stages/prior_portraits.yaml --data.init_args.path data/portraits.zip"
    " --out runs/own": None,
    "galatea run configs/pipelines/artform.yaml --model runs/own --image me.jpg --out runs/me": None,
    "galatea zoo parity tests/fixtures/parity/gram_face_like tests/fixtures/parity/stylesdf_t32_s64": [],
}  # fmt: skip


def commands(prefix: str) -> list[str]:
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()  # what a backslash continues
            found += [line.split("#")[0].strip() for line in lines if line.startswith(prefix)]
    return list(dict.fromkeys(found))


def test_every_command_is_known():
    assert set(commands("galatea")) == set(EXTRA)


def test_make_targets_exist():
    for command in commands("make"):
        done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_galatea_commands_run(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    write_official_files(tmp_path)
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command, extra in EXTRA.items():
        if extra is not None:
            status, output = ran([*shlex.split(command)[1:], *extra], tmp_path)
            assert status == 0, f"{command}\n{output[-4000:]}"
    assert (tmp_path / "runs/toon/present/artifact/media/index.html").exists()
    assert (tmp_path / "runs/world.png").stat().st_size > 1000


def write_official_files(folder):
    generator = StyleGAN2Generator(channels=(8, 8), style_dim=8)
    torch.save(stylegan2.export({"generator": generator}), folder / "stylegan2-ffhq-config-f.pt")
    fixture = Fixture.load(fixture_folder("gram_face_like"))
    torch.save(fixture.checkpoint("generator_pth"), folder / "generator.pth")
    torch.save(fixture.checkpoint("ema_pth"), folder / "ema.pth")


def write_pictures(folder):
    (folder / "photos").mkdir()
    person = Image.fromarray(astronaut())
    for name in ("me.jpg", "drawing.jpg", "photos/ann.jpg", "photos/bea.png"):
        person.save(folder / name)
    group = Image.new("RGB", (1024, 512), "grey")
    group.paste(person, (0, 0))
    group.paste(person.resize((400, 400)), (560, 60))
    group.save(folder / "group.jpg")


def ran(arguments, folder):
    """Exit status and output of a command, forked as a pipeline's steps are: torch is imported once for all."""
    log = folder / "output"
    with log.open("wb") as output, open(os.devnull, "rb") as unread:
        variables = {"GALATEA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        status = start([*PROGRAM, *arguments], output.fileno(), unread.fileno(), **variables).wait()
    return status, log.read_text()


def test_python_snippet_of_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["image"].shape) == (7, 3, 64, 64)


def test_help_names_every_stage(capsys):
    galatea.dispatch(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("features", "prior", "anchor", "stylize", "present", "run", "view", "zoo"))
