"""The papers' configurations hold the papers' numbers, and nothing of the embedded world."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
import torch
import yaml

from models.camera import Rig
from models.features.clip import CLIPEmbedding
from models.features.identity import ArcFaceIdentity, FaceIdentity
from models.features.perceptual import LPIPS
from models.files import ROOT
from models.generators.triplane import TriPlaneField
from models.metrics.distribution import InceptionDistribution
from models.rendering.manifolds import ManifoldPredictor
from stages import __main__, cli
from stages.configs import read_config
from stages.table import STAGES
from tests.configs.resolved import leaves, resolved, steps

PAPER = ROOT / "configs" / "paper"
GPUS = 4  # of the paper: batch sizes are one's

# By configuration: key, value, where the paper says so; "code" is the official code of what it builds on.
PYRAMID = "models.encoders.pyramid"
PSP = {
    "model.reconstruction.pixel": (1.0, "pSp's options: l2_lambda"),
    "model.reconstruction.perceptual": (0.8, "pSp's options: lpips_lambda"),
    "model.reconstruction.identity": (0.1, "pSp's options: id_lambda"),
    "model.perceptual.init_args.net": ("alex", "pSp's code"),
    "model.encoder.init_args.depths": ([3, 4, 14, 3], "pSp's code: 50 layers"),
    "model.encoder.init_args.resolution": (256, "pSp's code"),
    "model.trunk": ("checkpoints/model_ir_se50.pth", "pSp's code"),
    "model.schedule.learning_rate": (1e-4, "pSp's options"),
    "trainer.max_steps": (500_000, "pSp's options"),
    "data.init_args.batch_size": (8, "pSp's options"),
}
L_R = {
    "model.reconstruction.pixel": (1e-2, "A.4: weights of L_r's three terms"),
    "model.reconstruction.perceptual": (1.0, "A.4"),
    "model.reconstruction.identity": (4e-2, "A.4"),
    "model.perceptual.class_path": ("models.features.perceptual.LPIPS", "Eq. 6"),
    "model.perceptual.init_args.net": ("alex", "e4e's code"),
    "model.identity.class_path": ("models.features.identity.ArcFaceIdentity", "Eq. 6"),
    "model.schedule.betas": ([0.9, 0.999], "A.4: Adam"),
    "data.init_args.size": (256, "Sec. 4: FFHQ at 256 x 256"),
}
TABLE: dict[str, dict[str, tuple[Any, str]]] = {
    "artmator/anchor": {
        "model.search.space": ("z", "Eq. 3"),
        "model.search.start": ("random", "Sec. 4.1"),
        "model.search.restarts": (1, "Sec. 4.1"),
        "model.search.candidates": (0, "Sec. 4.1"),
        "model.search.refine": (0.0, "Eq. 3: z alone"),
        "model.search.learning_rate": (2e-2, "Sec. 4.1"),
        "model.search.betas": ([0.9, 0.999], "Sec. 4.1: Adam"),
        "model.search.schedule": ("constant", "Sec. 4.1"),
        "model.search.perceptual": (1.0, "Sec. 4.1: lambda_1 of Eq. 2"),
        "model.search.pixel": (1.0, "Sec. 4.1: lambda_2 of Eq. 2"),
        "model.search.prior": (0.0, "Eq. 2 has two terms"),
        "model.search.pull": (0.0, "Eq. 2 has two terms"),
        "model.search.optimize_pose": (False, "Sec. 4.5: the camera is held"),
        "model.perceptual.class_path": ("models.features.perceptual.LPIPS", "Eq. 2"),
        "data.init_args.size": (128, "Fig. 4"),
    },
    "artmator/stylize": {
        "model.recipe.learning_rate": (1e-5, "Sec. 4.1"),
        "model.recipe.schedule": ("constant", "Sec. 4.1"),
        "model.recipe.latent": ("anchor", "Sec. 3.3"),
        "model.recipe.direction": (1.0, "Sec. 4.1: lambda_3 of Eq. 9"),
        "model.recipe.spatial": (1.0, "Sec. 4.1: lambda_4 of Eq. 9"),
        "model.recipe.views": (1, "Sec. 4.1: N of Eq. 7"),
        "model.recipe.betas": ([0.9, 0.999], "Sec. 4.1: Adam"),
        "model.recipe.train": ("all", "Sec. 3.3: G_trn"),
        "model.recipe.pool": (None, "Sec. 4.1: views are drawn in each iteration"),
        "model.recipe.direction_form": ("cosine", "Eq. 7"),
        "model.recipe.augment.count": (1, "Sec. 4.1: images are augmented before they are encoded"),
        "model.recipe.rim": (1.0, "Eq. 8: LPIPS against I_ref, as it is"),
        **{
            f"model.recipe.{ours}": (0.0, "Eq. 9 has two terms")
            for ours in ("clip", "pixel", "mirror", "carry", "geometry", "locality")
        },
        "model.perceptual.class_path": ("models.features.perceptual.LPIPS", "Eq. 8"),
        "model.style.class_path": ("models.features.clip.CLIPEmbedding", "Sec. 4.1"),
        "model.diversity_pictures": (1000, "Sec. 4.4"),
        "model.diversity_pairs": (1000 * 999 // 2, "Sec. 4.4"),
    },
    "graminverter/prior": {
        "model.generator.init_args.field": ("triplane", "Sec. 3.1"),
        "model.generator.init_args.backbone": ("stylegan2", "Sec. 3.1"),
        "model.generator.init_args.resolution": (256, "A.4"),
        "model.generator.init_args.intersection_stride": (4, "A.3"),
        "model.generator.init_args.samples": (64, "GRAM's code"),
        "model.generator.init_args.background": ("shared", "GRAM's code: the last of 24 surfaces is a plane"),
        "model.generator.init_args.bake_predictor": (False, "A.4: M learns"),
        "model.generator.init_args.predictor.hidden": (128, "GRAM's code"),
        "model.generator.init_args.predictor.layers": (3, "GRAM's code"),
        "model.generator.init_args.predictor.start": ("geometric", "A.4: M is initialised as GRAM's"),
        "model.generator.init_args.predictor.centre": ([0.0, 0.0, -1.5], "GRAM's code"),
        "model.generator.init_args.levels": (
            [round(23 - 15 * i / 22, 6) for i in range(23)], "GRAM's code: evenly from 23 to 8",
        ),
        "model.generator.init_args.triplane.extent": (0.12, "GRAM's code: the plane z = -.12"),
        "model.generator.init_args.rig.radius": (1.0, "Sec. 4: as GRAM"),
        "model.generator.init_args.rig.far": (1.12, "GRAM's code"),
        "model.generator.init_args.rig.yaw_std": (0.3, "GRAM's code"),
        "model.generator.init_args.rig.pitch_std": (0.155, "GRAM's code"),
        "model.discriminator.class_path": ("models.generators.stylegan2.StyleGAN2Discriminator", "A.4"),
        "model.discriminator.init_args.pose": ("regress", "A.4: pose regularisation"),
        "model.total_images": (150_000 * 32, "A.4: 150K iterations of 32"),
        "model.adversarial.weight": (1.0, "A.4"),
        "model.adversarial.start": (0, "A.4"),
        "model.adversarial.r1_weight": (10 / 2, "A.4: 10; GRAM's code halves it"),
        "model.adversarial.r1_every": (1, "GRAM's code"),
        "model.adversarial.pose_weight": (30.0, "A.4"),
        "model.adversarial.path_length_weight": (0.0, "A.4: not among its terms"),
        "model.reconstruction.weight": (0.0, "A.4: a GAN"),
        "model.optimization.learning_rate": (2.5e-3, "A.4: Psi and m"),
        "model.optimization.lr_scales.style": (1.0, "A.4: Psi and m"),
        "model.optimization.lr_scales.predictor": (2e-5 / 2.5e-3, "A.4: M"),
        "model.optimization.discriminator_lr": (1e-3, "A.4"),
        "model.optimization.betas": ([0.0, 0.99], "A.4"),
        "model.optimization.schedule": ("constant", "A.4"),
        "model.optimization.clip": (1.0, "GRAM's code"),
        "model.optimization.discriminator_clip": (1.0, "GRAM's code"),
        "model.adversarial.fresh": (True, "GRAM's code"),
        "model.fit_manifolds": (False, "A.4: M is initialised as GRAM's"),
        "data.init_args.batch_size": (32 // GPUS, "A.4"),
        "data.init_args.size": (256, "A.4"),
    },
    "graminverter/prior_test": {
        "model.samples_scored": (20_000, "Table 1: FID20k"),
        "model.surfaces": (50, "Sec. 4.1: generated instances"),
        "model.surface_views": (30, "Sec. 4.2"),
        "model.kid_features.class_path": ("models.metrics.distribution.InceptionDistribution", "Table 1: FID"),
        "data.init_args.mirror": (False, "each picture once"),
    },
    "graminverter/invert": {
        **L_R,
        "model.encoder.class_path": ("models.encoders.pyramid.Encoder4Editing", "Sec. 3.2: e4e's"),
        "model.encoder.init_args.depths": ([3, 4, 14, 3], "e4e's code: ArcFace's IR-SE50"),
        "model.encoder.init_args.silent": (False, "e4e's code"),
        "model.schedule.learning_rate": (3e-4, "A.4"),
        "model.schedule.final": (6e-5, "A.4"),
        "model.schedule.drop_at": (100_000, "A.4"),
        "model.delta_weight": (1e-3, "A.4: L_d-reg"),
        "model.pull_weight": (1e-4, "A.4: L_w+"),
        "model.delta_from": (20_000, "e4e's code"),
        "model.delta_every": (2_000, "e4e's code"),
        "model.rendered": (None, "A.4: every picture"),
        "model.joint": (False, "A.4: the generator is fixed"),
        "model.code_weight": (0.0, "A.4: not among its terms"),
        "model.expression_weight": (0.0, "A.4: not among its terms"),
        "trainer.max_steps": (150_000, "A.4"),
        "data.init_args.batch_size": (32 // GPUS, "A.4"),
    },
    "graminverter/tune": {
        **L_R,
        "model.train": ("synthesis", "A.4: Psi and m"),
        "model.freeze": ("predictor", "A.4: M is unchanged"),
        "model.locality_weight": (0.5, "A.4: L_R"),
        "model.locality_distance": (30.0, "PTI's code"),
        "model.locality_truncation": (0.5, "PTI's code"),
        "model.schedule.learning_rate": (1e-3, "A.4"),
        "model.schedule.final": (1e-3, "A.4"),
        "trainer.max_steps": (100_000, "A.4"),
        "data.init_args.batch_size": (16 // GPUS, "A.4"),
    },
    "graminverter/detail": {
        **L_R,
        "model.regularisation.novel": (4.0, "A.4: L_nv"),
        "model.regularisation.depth": (2e-4, "A.4: L_depth"),
        "model.regularisation.plane": (True, "Eq. 10: over all N surfaces"),
        "model.regularisation.mask": ("facing", "Eq. 8"),
        "model.regularisation.normals": ("opacity", "Eq. 9"),
        "model.detail.init_args.space": ("camera", "Eq. 5"),
        "model.detail.init_args.super_resolution": (True, "Sec. 3.3"),
        "model.detail.init_args.upsampler": ([64, 64], "A.2: two blocks; the paper does not say how wide"),
        "model.detail.init_args.project": (False, "A.2: two convolutions a block"),
        "model.detail.init_args.background": (True, "Sec. 3.3: on all surfaces"),
        "model.detail.init_args.atlas": (256 // 4, "A.2: two blocks double it twice"),
        "model.marks": (0.0, "Sec. 4: plain photos"),
        "model.schedule.learning_rate": (3e-4, "A.4"),
        "model.schedule.final": (3e-4, "A.4"),
        "trainer.max_steps": (60_000, "A.4"),
        "data.init_args.batch_size": (8 // GPUS, "A.4"),
    },
    "graminverter/test": {
        "model.protocol.init_args.surfaces": (50, "Sec. 4.2: test instances"),
        "model.protocol.init_args.surface_views": (30, "Sec. 4.2: views of each"),
        "model.protocol.init_args.distribution.class_path": (
            "models.metrics.distribution.InceptionDistribution", "Table 2: FID",
        ),
        "model.protocol.init_args.identity.class_path": (
            "models.features.identity.FaceIdentity", "Sec. 4.2: another network than the loss's",
        ),
        "data.init_args.size": (256, "Sec. 4.2"),
    },
}  # fmt: skip

E3DGE = {
    "model.perceptual.class_path": ("models.features.perceptual.LPIPS", "B.3"),
    "model.perceptual.init_args.net": ("alex", "E3DGE's code"),
    "model.identity.class_path": ("models.features.identity.ArcFaceIdentity", "B.3"),
    "model.reconstruction.pixel": (1.0, "B.3: lambda_1"),
    "model.reconstruction.perceptual": (0.8, "B.3: lambda_2"),
    "model.reconstruction.identity": (0.1, "B.3: lambda_3"),
    "model.loss_side": (256, "Sec. 5"),
    "model.schedule.learning_rate": (5e-5, "Sec. 5: Adam"),
    "model.schedule.final": (5e-5, "Sec. 5"),
    "model.curriculum.steps": ([0, 10_000, 14_000, 18_000, 22_000, 26_000], "E3DGE's code"),
    "model.curriculum.values": ([0.0, 0.15, 0.25, 0.5, 0.75, 1.0], "B.1: from 0 to 1; E3DGE's code"),
    "data.class_path": ("datamodules.samples.SampleDataModule", "Sec. 4.1: the generator's own samples"),
    "trainer.max_steps": (50_000, "B.1"),
}
E3DGE_GLOBAL = {
    **E3DGE,
    "model.phase": ("global", "Sec. 4.1"),
    "model.encoder.init_args.geometry": (6, "B.2"),
    "model.encoder.init_args.texture": (3, "B.2"),
    "model.encoder.init_args.geometry_side": (32, "B.2"),
    "model.encoder.init_args.texture_side": (64, "B.2"),
    "model.geometry.surface": (1.0, "E3DGE's code"),
    "model.geometry.normal": (1 / 3, "E3DGE's code: 1 of a mean over the axes, Eq. 4 sums them"),
    "model.geometry.space": (0.2, "E3DGE's code"),
    "model.geometry.target": ("zero", "Eq. 5"),
    "model.code_weight": (1.0, "Sec. 4.1"),
    "data.init_args.views": (1, "B.1"),
    "data.init_args.points.count": (None, "B.1: all pixels"),
    "data.init_args.points.near_std": (0.25, "B.1: r / 4"),
    "data.init_args.points.uniform": (0.5, "B.1"),
}
E3DGE_DETAILS = {
    **E3DGE,
    "model.local.init_args.resolution": (256, "B.1"),
    "model.local.init_args.occlusion": (False, "Sec. 5: what the picture does not hold is left out"),
    "model.local.init_args.local_encoder.init_args.features": (256, "B.1"),
    "model.local.init_args.texture_fusion.init_args.frequencies": (7, "E3DGE's code"),
    "model.silent": (False, "E3DGE's code"),
    "model.thumb_weight": (0.0, "B.3"),
    "data.init_args.views": (2, "B.1"),
}
E3DGE_OWN_VIEW = {
    "data.init_args.views": (1, "B.1: pairs are of novel-view training"),
    "data.init_args.batch_size": (24 // GPUS, "Sec. 5"),
}
E3DGE_ADVERSARIAL = {
    "model.adversarial.module": ("discriminator", "B.3: the generator's"),
    "model.adversarial.weight": (0.01, "B.3"),
    "model.adversarial.discriminator_weight": (0.01, "B.3: lambda_D"),
    "model.adversarial.side": (256, "E3DGE's scripts"),
    "model.adversarial.r1_weight": (10 / 2, "B.3: 10, halved as in Mescheder et al."),
}
PER_GPU = 24 // GPUS, 16 // GPUS  # Sec. 5; B.1 and E3DGE's scripts
E3DGE_TEST = {
    "model.protocol.init_args.frames": (250, "B.2"),
    "model.protocol.init_args.side": (256, "Sec. 5"),
    "model.protocol.init_args.perceptual.init_args.net": ("alex", "E3DGE's code"),
}
E3DGE_PHOTOS = {
    **E3DGE_TEST,
    "data.init_args.size": (256, "Sec. 5"),
    "data.init_args.mirror": (False, "each picture once"),
}
E3DGE_OPTIMISE = {
    "model.search.space": ("w", "C: the W space"),
    "model.search.start": ("mean", "StyleGAN2's projector"),
    "model.search.steps": (450, "C"),
    "model.search.learning_rate": (5e-3, "C"),
    "model.search.betas": ([0.9, 0.999], "PTI's code: Adam"),
    "model.search.perceptual": (1.0, "StyleGAN2's projector"),
    "model.search.optimize_pose": (False, "C names codes alone"),
    "model.search.restarts": (1, "StyleGAN2's projector"),
    "model.search.refine": (0.0, "C: W alone"),
    "model.perceptual.init_args.net": ("alex", "E3DGE's and PTI's code"),
    **E3DGE_PHOTOS,
}
TABLE |= {
    "e3dge/selftrain_test": E3DGE_PHOTOS,
    "e3dge/selftrain_samples_test": {**E3DGE_TEST, "data.init_args.test_samples": (500, "B.2")},
    "e3dge/directions": {
        "data.init_args.samples": (10_000, "B.2"),
        "data.class_path": ("datamodules.latents.LatentDataModule", "codes are drawn"),
        "model.method.init_args.share": (0.02, "InterFaceGAN's code"),
        "model.method.init_args.cost": (1.0, "InterFaceGAN's code: the SVM's default"),
        "model.method.init_args.hold": (None, "one SVM for each attribute"),
        "model.method.init_args.along": ("normal", "InterFaceGAN, Eq. 5"),
        "model.held_out": (0.3, "InterFaceGAN's code: 70 % are trained on"),
        "model.perceptual.init_args.net": ("alex", "E3DGE's code"),
    },
    "e3dge/finetune": {
        "model.total_images": (4 * 400, "Fig. 8: 400 iterations; StyleSDF's code: batch 4"),
        "model.train": ("^decoder", "StyleSDF's code, second phase: the renderer is frozen"),
        "model.optimization.learning_rate": (2e-3, "StyleSDF's code"),
        "model.adversarial.r1_weight": (5.0, "StyleSDF's code: 10 of half the squared norm"),
        "model.adversarial.path_length_weight": (2.0, "StyleSDF's code"),
        "data.init_args.size": (1024, "StyleSDF's FFHQ"),
    },
    "e3dge/optimise": {**E3DGE_OPTIMISE, "model.tuning": (None, "C: SG2")},
    "e3dge/optimise_pti": {
        **E3DGE_OPTIMISE,
        "model.tuning.steps": (100, "C"),
        "model.tuning.learning_rate": (5e-5, "C"),
        "model.tuning.perceptual": (1.0, "PTI's code"),
        "model.tuning.pixel": (1.0, "PTI's code"),
    },
    "e3dge/selftrain": {
        **E3DGE_GLOBAL,
        "model.encoder.init_args.decoder_heads": (10, "B.2"),
        "model.encoder.init_args.decoder_shared": (False, "B.2; E3DGE's code reads the first alone"),
        "model.encoder.init_args.decoder_side": (128, "B.2"),
        "model.full_weight": (1.0, "B.3"),
        "model.thumb_weight": (1.0, "B.3"),
        "model.geometry.smooth": (False, "Eq. 4"),
        "model.geometry.eikonal": (0.0, "Eq. 4-6 have none"),
        "data.init_args.batch_size": (PER_GPU[0], "Sec. 5"),
    },
    "e3dge/selftrain_eg3d": {
        **{key: told for key, told in E3DGE_GLOBAL.items() if "encoder" not in key},
        "model.prior.path": ("runs/eg3d", "EG3D's generator"),
        "model.encoder.init_args.num_ws": (14, "EG3D: codes of its tri-planes"),
        "model.geometry.target": ("sample", "no distance: Eq. 5 has no 0 to reach"),
        "data.init_args.points.count": (1024, "ours: 16,384 pixels of an opacity, seven times for normals"),
    },
    "e3dge/selftrain_align": {
        **E3DGE_DETAILS,
        "model.phase": ("align", "B.1: from HFGI's"),
        "model.aligner.distortion": (1.0, "HFGI"),
        "model.aligner.scale": (0.15, "HFGI's code"),
        "model.aligner.probability": (0.8, "HFGI's code"),
        "model.aligner.residual": (0.0, "HFGI"),
        **E3DGE_OWN_VIEW,
        "trainer.max_steps": (20_000, "ours"),
    },
    "e3dge/selftrain_local": {
        **E3DGE_DETAILS,
        **E3DGE_ADVERSARIAL,
        "model.phase": ("local", "Sec. 4.2"),
        "model.local.init_args.alignment": ("3d", "Sec. 4.2"),
        "model.novel_views": (False, "Sec. 4.2"),
        "model.curriculum.kind": ("none", "Sec. 4.2"),
        **E3DGE_OWN_VIEW,
    },
    "e3dge/selftrain_hybrid": {
        **E3DGE_DETAILS,
        **E3DGE_ADVERSARIAL,
        "model.phase": ("hybrid", "Sec. 4.3"),
        "model.local.init_args.alignment": ("hybrid", "Sec. 4.3"),
        "model.novel_views": (True, "B.1"),
        "model.aligner.residual": (0.1, "B.1"),
        "model.aligner.rate": (1.0, "B.1: fine-tuned"),
        "model.curriculum.kind": ("scale_pose_sd", "B.1"),
        "data.init_args.batch_size": (PER_GPU[0] // 2, "B.1: half as many codes"),
    },
    "e3dge/selftrain_released": {
        **E3DGE_GLOBAL,
        "model.encoder.init_args.decoder_heads": (0, "E3DGE's scripts"),
        "model.encoder.init_args.geometry_side": (128, "E3DGE's scripts"),
        "model.geometry.normal": (1.0, "E3DGE's code"),
        "model.full_weight": (0.0, "E3DGE's scripts"),
        "model.thumb_weight": (1.0, "E3DGE's scripts"),
        "model.geometry.smooth": (True, "E3DGE's code"),
        "model.geometry.eikonal": (0.1, "E3DGE's code"),
        "data.init_args.batch_size": (PER_GPU[1], "E3DGE's scripts"),
    },
    "e3dge/selftrain_released_local": {
        **E3DGE_DETAILS,
        "model.phase": ("local", "E3DGE's scripts: 2.1"),
        "model.thumb_weight": (1.0, "E3DGE's scripts"),
        "model.local.init_args.alignment": ("2d", "E3DGE's scripts"),
        "model.novel_views": (True, "E3DGE's scripts"),
        "model.aligner.residual": (1.0, "E3DGE's scripts"),
        "model.aligner.rate": (1e-4 / 5e-5, "E3DGE's scripts"),
        "model.curriculum.kind": ("scale_pose_sd", "E3DGE's scripts"),
        "data.init_args.batch_size": (PER_GPU[1] // 2, "E3DGE's scripts"),
    },
    "e3dge/selftrain_released_hybrid": {
        **E3DGE_DETAILS,
        **E3DGE_ADVERSARIAL,
        "model.phase": ("hybrid", "E3DGE's scripts: 2.2"),
        "model.thumb_weight": (1.0, "E3DGE's scripts"),
        "model.local.init_args.alignment": ("hybrid", "E3DGE's scripts"),
        "model.aligner.rate": (0.0, "E3DGE's scripts: frozen"),
        "model.reconstruction.perceptual": (1.0, "E3DGE's scripts"),
        "model.curriculum.kind": ("none", "E3DGE's scripts"),
        "data.init_args.batch_size": (PER_GPU[1] // 2, "E3DGE's scripts"),
    },
    "cartoon/directions": {
        "model.method.class_path": ("models.heads.sefa.SeFa", "Eq. 6"),
        "model.method.init_args.layers": (None, "SeFa's code: all"),
        "model.offsets.steps": (10, "Sec. IV-A"),
        "model.offsets.learning_rate": (0.1, "Sec. IV-A"),
        "model.offsets.trust": (None, "Eq. 9 has two terms"),
        "model.offsets.id_on": ("photo_render", "Eq. 7: G_base"),
        "model.offset_loss.low": (0.2, "Sec. IV-A: lambda_low of Eq. 9"),
        "model.identity.class_path": ("models.features.identity.ArcFaceIdentity", "Eq. 7"),
        "model.calibration.symmetric": (True, "Fig. 8: w + dw and w - dw"),
    },
    "cartoon/shape": {
        "model.recipe.cycles": (4, "Sec. III-D: four times"),
        "model.recipe.perceptual": (0.5, "Sec. IV-A: lambda_perc of Eq. 11"),
        "model.recipe.offset": (0.01, "Sec. IV-A: lambda_E of Eq. 16"),
        "model.recipe.smooth": (0.01, "Sec. IV-A: lambda_smooth of Eq. 18"),
        "model.recipe.mirror": (1.0, "Eq. 13 and 18"),
        "model.recipe.mirror_in": ("every", "Eq. 13 and 18: steps 1 and 3 of all cycles"),
        "model.recipe.identity": (1.0, "Eq. 13 and 18"),
        "model.recipe.project": (True, "Eq. 15"),
        "model.recipe.known": (False, "Eq. 17: V and L tell it all"),
        "model.recipe.prior": (1000, "GAN2Shape's code"),
        "model.recipe.first": ([600, 600, 400], "GAN2Shape's configuration of faces"),
        "model.recipe.later": ([200, 500, 300], "GAN2Shape's configuration of faces"),
        "model.recipe.batch": (16, "GAN2Shape's configuration of faces"),
        "model.recipe.samples": (100 * 16, "GAN2Shape's configuration: 100 batches are collected"),
        "model.recipe.learning_rate": (1e-4, "GAN2Shape's configuration"),
        "model.recipe.weight_decay": (5e-4, "GAN2Shape's code"),
        "model.cap.radius": (0.4, "GAN2Shape's code"),
        "model.cap.near": (0.91, "GAN2Shape's code"),
        "model.cap.far": (1.02, "GAN2Shape's code"),
        "model.relief.fov_deg": (10.0, "GAN2Shape's configuration"),
        "model.relief.rotation_deg": (60.0, "GAN2Shape's configuration"),
        "model.networks.width": (4096 // 256, "GAN2Shape's code"),
        "model.networks.group": (2, "GAN2Shape's code: 8 groups of 16"),
        "model.sampling.yaw_scale": (1.2, "GAN2Shape's configuration: view_scale"),
        "model.sampling.dx": ([-1.0, 1.0], "GAN2Shape's configuration: rand_light"),
        "model.sampling.dy": ([-0.2, 0.8], "GAN2Shape's configuration: rand_light"),
        "model.sampling.added": ([-0.1, 0.6], "GAN2Shape's configuration: rand_light"),
        "model.sampling.dimmed": (0.6, "GAN2Shape's configuration: rand_light"),
        "model.encoder": (None, "Eq. 14: E is trained"),
        "model.identity.class_path": ("models.features.identity.ArcFaceIdentity", "Sec. III-D: as Eq. 7"),
        "model.perceptual.init_args.net": ("vgg", "Eq. 11: VGG"),
    },
    "pseudo_pairs/finetune_adapt": {
        "model.semantic": (None, "Sec. 3.2: without constraints"),
        "model.paired": (None, "Sec. 3.2"),
        "model.total_images": (4 * 1000, "6.1: 1,000 iterations of 4"),
        "data.init_args.size": (1024, "Sec. 4"),
    },
    "pseudo_pairs/finetune": {
        "model.semantic.weight": (1.0, "6.1: lambda of L_semantic"),
        "model.semantic.identity": (0.1, "Eq. 1: lambda_id"),
        "model.semantic.resolution": (256, "6.1: the losses' networks"),
        "model.paired.weight": (1.0, "6.1: lambda of L_paired"),
        "model.paired.resolution": (256, "6.1"),
        "model.paired.batch": (4, "6.1: batch size"),
        "model.paired.level": (2, "6.1: all styles but anime"),
        "model.optimization.learning_rate": (2e-2, "6.1: learning rate"),
        "model.total_images": (4 * 1000, "6.1: 1,000 iterations of 4"),
        "model.perceptual.init_args.net": ("vgg", "6.1: LPIPS by VGG"),
        "model.identity.class_path": ("models.features.identity.ArcFaceIdentity", "Eq. 1"),
        "model.truncation": (0.7, "6.1: cartoon"),
        "data.init_args.batch_size": (4, "6.1"),
        "data.init_args.size": (1024, "Sec. 4"),
    },
    "pseudo_pairs/finetune_test": {
        "model.scored": (5000, "Table 4 counts none: 5,000 samples are usual"),
        "model.metric.init_args.net": ("alex", "Sec. 4: perceptual distance"),
        "model.kid_features.class_path": ("models.metrics.distribution.InceptionDistribution", "Table 4: FID"),
        "data.init_args.size": (1024, "Sec. 4"),
    },
    "pseudo_pairs/pairs": {
        "model.steps": (1000, "6.1: iterations of the optimisation"),
        "model.group_size": (1, "6.1: batch 1"),
        "model.semantic.identity": (0.1, "Eq. 5: as Eq. 1"),
        "model.search.space": ("z+", "Eq. 5"),
        "model.search.shell": (0.0, "Eq. 5 has one term"),
        "model.search.learning_rate": (2e-2, "6.1: learning rate"),
        "model.refine_from": ("p2", "Sec. 3.2: the text"),
    },
    "pseudo_pairs/restyle": {
        "model.mix_from": ([3, 6, 9, 12], "Sec. 3.3: n"),
        "model.reference_from": ([3, 6, 9], "Sec. 3.3"),
        "model.truncation": (0.7, "6.1: cartoon"),
        "model.search.space": ("v", "6.3"),
        "model.search.steps": (1000, "UI2I's code"),
        "model.search.learning_rate": (0.1, "UI2I's code"),
        "model.search.noise": (1e5, "UI2I's code"),
    },
    "pseudo_pairs/restyle_test": {
        "model.metric.init_args.net": ("alex", "Sec. 4: perceptual distance"),
        "model.metric_identity.class_path": ("models.features.identity.ArcFaceIdentity", "Table 6: ID distance"),
        "model.metric_embedding.class_path": ("models.features.clip.CLIPEmbedding", "Table 6: CMMD"),
        "model.kid_features.class_path": ("models.metrics.distribution.InceptionDistribution", "Table 1: FID"),
        "data.init_args.size": (1024, "Sec. 4"),
    },
    "pseudo_pairs/invert": {**PSP, "model.encoder.class_path": (f"{PYRAMID}.SharedStyleEncoder", "Sec. 3.1: W")},
    "pseudo_pairs/invert_wplus": {**PSP, "model.encoder.class_path": (f"{PYRAMID}.GradualStyleEncoder", "3.1: W+")},
    "pseudo_pairs/invert_zplus": {
        **PSP,
        "model.encoder.class_path": (f"{PYRAMID}.MappedStyleEncoder", "Sec. 3.1: Z+"),
        "model.encoder.init_args.groups.z": ([18, 512], "Sec. 3.1: a code of z for each layer"),
    },
}

GIVEN = {"model.prior.path", "data.init_args.path"}  # by the user, who is asked for them
NEUTRAL = {
    "model.save_every": "how often work is saved",
    "model.tested": "an input of test",
    "model.variant": "a name in the table",
    "model.start": "an input: where to go on from",
    "model.search.refine_learning_rate": "refine is 0", "model.search.refine_pull": "refine is 0",
    "model.search.final": "the schedule is constant", "model.search.noise_regularization": "noise is held",
    "model.search.pose_learning_rate": "the camera is held", "model.search.pose_step": "the camera is held",
    "model.recipe.mirror_hidden": "mirror is 0", "model.recipe.carry_fill": "carry is 0",
    "model.recipe.locality_distance": "locality is 0",
    "model.generator.init_args.chart": "of textures and expressions",
    "model.generator.init_args.ambient": "of expressions",
    "model.generator.init_args.background_channels": "of a separate background",
    "model.generator.init_args.predictor.grid": "nothing is baked",
    **dict.fromkeys(
        [f"model.reconstruction.{term}_weight" for term in ("mask", "depth", "edge", "raw", "feature")],
        "reconstruction is 0",
    ),
}  # fmt: skip
IGNORED_BY_TEST = {  # which takes the networks from what is tested
    "prior", "encoder", "trunk", "inverter", "detail", "train", "freeze", "joint", "rendered", "regularisation",
    "marks", "pose", "schedule", "delta_weight", "pull_weight", "delta_from", "delta_every", "code_weight",
    "expression_weight", "locality_weight", "locality_samples", "locality_distance",
    "locality_truncation",
    "phase", "start", "local", "geometry", "full_weight", "thumb_weight", "loss_side", "novel_views", "aligner",
    "curriculum", "adversarial", "silent", "reconstruction", "landmarks",
}  # fmt: skip
NESTED = {"predictor": ManifoldPredictor, "triplane": TriPlaneField, "rig": Rig}  # arguments that are mappings


def case(name: str) -> tuple[str, str, list[str]]:
    """Stage, command and options of a paper's configuration."""
    stage = name.rpartition("/")[2].partition("_")[0]  # selftrain_local.yaml is of a phase
    tests = stage == "optimise" or name.endswith("_test")
    stage, command = ("tune", "test") if stage == "test" else (stage, "test" if tests else "fit")
    if name == "pseudo_pairs/restyle":  # which learns nothing
        command = "predict"
    return stage, command, [f"--config={PAPER / name}.yaml"]


def test_every_paper_configuration_is_here():
    assert set(TABLE) == {file.relative_to(PAPER).with_suffix("").as_posix() for file in PAPER.glob("*/*.yaml")}


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_numbers(name):
    stage, command, options = case(name)
    found = dict(leaves(resolved(stage, command, *options)))
    wrong = {key: (found.get(key), *told) for key, told in TABLE[name].items() if found.get(key, "") != told[0]}
    assert not wrong
    assert found["trainer.accelerator"] == "auto"


@pytest.mark.parametrize("name", TABLE)
def test_nothing_is_left_to_a_default(name):
    """Every argument of stage, networks and data is named in the file or in what it stands on."""
    stage, command, options = case(name)
    files = [option.partition("=")[2] for option in options]
    named = {key for key, _ in leaves(read_config(stage, files))}
    found = {key for key, _ in leaves(resolved(stage, command, *options)) if key.startswith(("model.", "data."))}
    silent = found - named - GIVEN - NEUTRAL.keys()
    if command == "test":
        silent = {key for key in silent if key.split(".")[1] not in IGNORED_BY_TEST}
    assert not silent
    for key in {key.rpartition(".")[0] for key in found}:  # plain mappings have no defaults to show
        if kind := NESTED.get(key.rpartition(".")[2]):
            wanted = {f"{key}.{argument}" for argument in inspect.signature(kind).parameters}
            assert not wanted - named - NEUTRAL.keys()


def foreign(values: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration belongs to the embedded world."""
    return {
        key: value
        for key, value in leaves(values)
        if re.search(r"embedded|mannequin|people|assets/|feature_pairs", str(value), re.IGNORECASE)
    }


@pytest.mark.parametrize("name", TABLE)
def test_nothing_of_the_embedded_world(name):
    stage, command, options = case(name)
    assert not foreign(resolved(stage, command, *options))


@pytest.mark.parametrize(
    "name", ["paper_artform", "paper_inverter", "paper_e3dge", "paper_e3dge_released", "paper_pseudo_pairs"]
)
def test_nothing_of_the_embedded_world_in_a_pipeline(name):
    for stage, command, *options in steps(ROOT / "configs" / "pipelines" / f"{name}.yaml").values():
        assert not foreign(resolved(stage, command, *options))


SMALL = {
    "prior": {
        "generator": {
            "z_dim": 8, "w_dim": 16, "resolution": 32, "channels": [16, 16, 12, 8], "mapping_hidden": 16,
            "triplane": {"features": 8, "hidden": 8}, "predictor": {"hidden": 8},
        },
        "discriminator": {"channels": [8, 8, 8, 8]},
    },
    "invert": {
        "encoder": {"w_dim": 16, "resolution": 32, "widths": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "reduction": 1},
    },
    "detail": {
        "detail": {
            "features": 4, "resolution": 32, "voxel": [4, 16, 16], "voxel_features": 4, "widths": [8, 8],
            "unet": [4, 6], "blocks": 1, "atlas": 8, "upsampler": [6, 6],
        },
    },
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Stand-ins for the official networks; returns which weights were asked for."""
    weights = []

    def stand_in(kind, **attributes):
        real = kind.__init__

        @functools.wraps(real)
        def init(self, *args, **kwargs):
            torch.nn.Module.__init__(self)
            weights.append(inspect.signature(real).bind(self, *args, **kwargs).arguments["weights"])
            self.network = torch.nn.Identity()
            for name, value in attributes.items():
                setattr(self, name, value)

        monkeypatch.setattr(kind, "__init__", init)

    stand_in(LPIPS)
    stand_in(CLIPEmbedding, dim=8)
    stand_in(ArcFaceIdentity, dim=8, crop="ffhq")
    stand_in(FaceIdentity, dim=8)
    stand_in(InceptionDistribution)
    return weights


@pytest.mark.parametrize("name", TABLE)
def test_builds(name, asked, tmp_path, monkeypatch):
    stage, command, options = case(name)
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(cli.GalateaCLI, "_run_subcommand", lambda self, _: built.append(self))
    small = {"model": {key: {"init_args": value} for key, value in SMALL.get(stage, {}).items()}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    given = ["--trainer.accelerator=cpu", "--config=small.yaml"]
    if stage != "directions":  # which draws codes
        given.append("--data.init_args.path=pictures")
    if stage in ("anchor", "directions", "shape"):
        given.append("--model.prior.path=prior")
    cli.run(stage, __main__.find(STAGES[stage][0], stage), [command, *options, *given])
    (found,) = built
    assert type(found.model).__name__ == f"{stage.title()}Stage" and found.datamodule is not None
    official = {"official", "openai", "dlib", "checkpoints/model_ir_se50.pth"}
    assert set(asked) <= {*official, "checkpoints/weights-inception-2015-12-05-6726825d.pth"}
    assert bool(asked) is (name != "graminverter/prior")
