"""The classes that a manifest may have built: an explicit list, looked at before anything is imported.

None of them opens a file that its arguments name: a manifest may come from a stranger. Networks of ``features/`` that
read weights from a path (CLIP, LPIPS, ArcFace) are named in configurations, by their user, and never here.
"""

BUILDABLE = frozenset(
    f"models.{name}"
    for name in (
        "camera.Rig",
        "encoders.alignment.ResidualAligner",
        "encoders.detail.DetailEncoder",
        "encoders.detail.DetailReconstructor",
        "encoders.detail.ManifoldUpsampler",
        "encoders.e3dge.AlignmentFusion",
        "encoders.e3dge.GlobalEncoder",
        "encoders.e3dge.LocalEncoder",
        "encoders.e3dge.TextureFusion",
        "encoders.irse.ArcFace",
        "encoders.pyramid.Encoder4Editing",
        "encoders.pyramid.GradualStyleEncoder",
        "encoders.pyramid.MappedStyleEncoder",
        "encoders.pyramid.SharedStyleEncoder",
        "faces.finder.BlazeFace",
        "faces.finder.FullRangeFinder",
        "faces.identity.DlibIdentity",
        "faces.mask.PersonMask",
        "faces.mesh.FaceMesh",
        "faces.pose.CanonicalFace",
        "features.embedded.EmbeddedIdentity",
        "features.embedded.EmbeddedLPIPS",
        "features.embedded.EmbeddedParser",
        "features.embedded.EmbeddedPose",
        "features.embedded.EmbeddedStyle",
        "generators.anifacegan.AniFaceGANGenerator",
        "generators.baked.BakedHead",
        "generators.discriminator.ImageDiscriminator",
        "generators.eg3d.EG3DGenerator",
        "generators.fields.FrontalChart",
        "generators.fields.HeadChart",
        "generators.fields.TextureStack",
        "generators.gram.GRAMGenerator",
        "generators.manifold.ManifoldGenerator",
        "generators.stylegan2.StyleGAN2Discriminator",
        "generators.stylegan2.StyleGAN2Generator",
        "generators.stylesdf.StyleSDF",
        "generators.stylesdf.VolumeDiscriminator",
        "generators.triplane.TriPlaneField",
        "generators.volume.TriPlaneVolumeGenerator",
        "heads.codes.HeadCodes",
        "heads.detailed.DetailedGenerator",
        "heads.directions.Directions",
        "heads.photos.PhotoSet",
        "heads.pixel_aligned.LocalNetworks",
        "heads.pixel_aligned.PixelAlignedGenerator",
        "relief.shapes.ReliefShapes",
        "rendering.atlas.Chart",
        "rendering.manifolds.ManifoldPredictor",
        "rendering.relief.Relief",
    )
)

WRAPPERS = frozenset({"models.heads.detailed.DetailedGenerator", "models.heads.pixel_aligned.PixelAlignedGenerator"})
"""Generators made of other modules alone, which an index of subjects may name: they have no weights of their own."""

FILES = ("weights",)
"""Arguments of these classes that name a file: a manifest leaves them null, as its own files hold the weights."""

MOVED = {
    "models.anchors.AnchorSet": "models.heads.codes.HeadCodes",
    "models.generators.detailed.DetailedGenerator": "models.heads.detailed.DetailedGenerator",
    "models.photos.PhotoSet": "models.heads.photos.PhotoSet",
    "models.rendering.baked.BakedHead": "models.generators.baked.BakedHead",
}
"""Classes that artifacts of before call by another name."""
