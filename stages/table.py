"""The commands of ``galatea``. A new stage is one line here."""

STAGES = {
    "features": ("stages.features:FeaturesStage", "train the embedded feature networks on the embedded world"),
    "prior": ("stages.prior:PriorStage", "train a 3D-aware generator"),
    "finetune": ("stages.finetune:FinetuneStage", "adapt a generator to a set of pictures in one style"),
    "pairs": ("stages.pairs:PairsStage", "photographs of the people whom pictures in a style show"),
    "restyle": ("stages.restyle:RestyleStage", "photos in a style, in one pass each"),
    "anchor": ("stages.anchor:AnchorStage", "fit the generator to one artwork"),
    "stylize": ("stages.stylize:StylizeStage", "carry the artwork's style to every view"),
    "invert": ("stages.invert:InvertStage", "train an encoder that inverts a generator in one pass"),
    "tune": ("stages.tune:TuneStage", "tune the generator to all pictures that its encoder inverts"),
    "detail": ("stages.detail:DetailStage", "train details on manifolds; predict: photos to heads in one pass"),
    "selftrain": ("stages.selftrain:SelftrainStage", "train an encoder on samples of its generator, shapes included"),
    "optimise": ("stages.optimise:OptimiseStage", "invert pictures one by one, by optimisation: codes, or weights too"),
    "directions": ("stages.directions:DirectionsStage", "find directions of a latent space, by which heads are edited"),
    "shape": ("stages.shape:ShapeStage", "shape, albedo and light of heads, from a 2D generator's pictures alone"),
    "present": ("stages.present:PresentStage", "render turntables, views and meshes of the result"),
}

VERBS = {
    "run": ("stages.pipeline.run:main", "run a pipeline: galatea run configs/pipelines/artform.yaml"),
    "status": ("stages.commands.status:main", "what each step of a pipeline is doing, here or on a cluster"),
    "step": ("stages.pipeline.slurm:step", "one step of a pipeline, as batch scripts run it"),
    "lineage": ("stages.commands.lineage:main", "from an artifact back to everything it was made of"),
    "view": ("stages.commands.view:main", "look at an artifact live in the browser"),
    "table": ("stages.commands.table:main", "join metrics.csv files: means, paired differences, intervals"),
    "claims": ("stages.commands.claims:main", "what became of the papers' claims: docs/claims.md from finished runs"),
    "zoo": ("stages.commands.zoo:main", "official checkpoint files to artifacts and back"),
    "align": ("stages.commands.align:main", "frame pictures of faces as a generator knows them, with cameras"),
    "world": ("stages.commands.world:main", "render samples of the embedded world"),
}
