"""The command line of a stage: a LightningCLI with one-sentence errors and our output folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only

from callbacks.artifact import ExportArtifact
from callbacks.checkpoint import BEST, LAST, LastCheckpoint, checkpoint_to_read
from callbacks.compiler import Compile
from callbacks.dashboard import Dashboard
from callbacks.guard import FiniteGuard
from callbacks.media import MediaPanels
from callbacks.monitor import Monitor
from callbacks.preemption import Preemption
from callbacks.progress import progress
from models.documents import check_yaml
from models.errors import UserError, one_line, shown
from models.files import atomic_write, check_folder, sweep
from models.version import VERSION
from stages.base.ranks import IndependentRanks
from stages.base.stage import Stage
from stages.configs import read_config
from stages.pipeline.hashing import GIVEN, step_hash
from stages.pipeline.jobs import PLAN

PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")  # as Lightning spells the three


class Parser(LightningArgumentParser):
    """Reports a wrong option or configuration as one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _told(ex) or UserError(sentence(message)) from ex


def _told(error: BaseException | None) -> UserError | None:
    """What a constructor has said, out of the parser's reports around it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def sentence(message: str) -> str:
    """jsonargparse's indented report in one line that names the key, what is wrong and the value."""
    message = one_line(re.sub(r"\s*\n\s*-?\s*", " ", message)).removeprefix("Validation failed: ")
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    union = re.fullmatch(
        r"(\S+:) .*Does not validate against any of the Union subtypes .*? Errors: (.*) "
        r"Given value type: .*? Given value: (.*)",
        message,
    )
    if union is None:
        return message
    key, errors, value = union.groups()
    errors = re.sub(r"Expected a <class 'NoneType'>\s*", "", errors).replace("typing.Literal", "").strip()
    errors = re.sub(r"(?<!:) Expected a ", " or ", errors)
    value = re.sub(r"NestedArg\(key='(.*?)', val=(.*)\)", r"\1=\2", value)
    return f"{key} {errors}. Got value: {value}"


class SaveConfig(SaveConfigCallback):
    """Writes the parsed configuration to ``OUT/config.yaml``, atomically and over an earlier one."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Stage)
        first = pl_module.shard[0] == 0  # of several runs in the same folder
        if trainer.is_global_zero and first and not self.already_saved:
            with atomic_write(Path(trainer.default_root_dir) / "config.yaml") as file:
                self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)
            self.already_saved = True


class Profile(SimpleProfiler):
    """Prints what it writes."""

    def summary(self) -> str:
        text = super().summary()
        print(text, flush=True)
        return text


_PROFILERS = {"simple": Profile, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


class GalateaCLI(LightningCLI):
    """``galatea STAGE fit|validate|test|predict``.

    Options beyond Lightning's: ``--out``, ``--wandb``, ``--compile``, ``--threads``, ``--shard``. A CSV log, the
    artifact export, the progress display, panels, what watches speed and gradients, and the guards against NaN and
    preemption are always there.
    """

    model: Stage
    subcommand: str

    def __init__(self, name: str, stage_class: type[Stage], arguments: Sequence[str]) -> None:
        self.name = name
        arguments, self.defaults = _configured(name, arguments)
        super().__init__(
            stage_class,
            args=arguments,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            trainer_defaults={"inference_mode": False},
            parser_class=Parser,
            parser_kwargs={
                "prog": f"galatea {name}",
                "allow_abbrev": False,
                **{c: {"allow_abbrev": False} for c in self.subcommands()},
            },
            auto_configure_optimizers=False,  # stages build their own
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str, default=f"runs/{self.name}", help="output folder; the result is OUT/artifact"
        )
        parser.add_argument(
            "--wandb",
            type=bool | str,
            nargs="?",
            const=True,
            default=False,
            help="log to Weights & Biases, to this project; to files only when there is no key for its server",
        )
        parser.add_argument(
            "--compile",
            type=list[str] | str,
            default=[],
            metavar="MODULE",
            help="torch.compile this module of the stage, or several: --compile=[encoder,generator.backbone]",
        )
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads per process (null: $OMP_NUM_THREADS, or 1)"
        )
        parser.add_argument(
            "--shard",
            type=str | None,
            default=None,
            metavar="I/N",
            help="fit every N-th group of items only, from the I-th (0 is the first), and export nothing: for jobs "
            "that share a folder; the same command without it finishes",
        )
        parser.add_argument(
            "--print_hash", action="store_true", help="print the step hash of these options and inputs, and run nothing"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if {"-h", "--help"} & set(args):  # the help is the parser's, which shows only defaults
            self._subcommand_parsers[args[0]].set_defaults(self.defaults)
        self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        seed = options.get("seed_everything")
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 1 << 32:
            raise UserError(f"--seed_everything is {shown(seed)}: it must be from 0 to {(1 << 32) - 1}")
        if options.get("weights_only") is False:
            raise UserError("--weights_only false would run what a checkpoint holds: they are read as numbers only")
        options["weights_only"] = True
        if path := options.get("ckpt_path"):
            name = {"last": LAST, "best": BEST}.get(path)
            path = Path(options["out"]) / "checkpoints" / name if name else Path(path)
            options["ckpt_path"] = str(checkpoint_to_read(path))
        if options["print_hash"]:
            print(self._step_hash(), flush=True)
            sys.exit()

    def _step_hash(self) -> str:
        command = self.config.subcommand
        return step_hash(self.name, command, self.config[command].as_dict())

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's lets a checkpoint's own ``hyper_parameters`` replace options, classes among them."""

    def _option(self, key: str) -> Any:
        return self.config[self.subcommand][key]

    def instantiate_classes(self) -> None:
        check_folder(self._option("out"))
        _set_threads(self._option("threads"))
        try:
            super().instantiate_classes()
        # A constructor's refusal of what its arguments say together.
        except (ValueError, MisconfigurationException) as error:
            raise _told(error) or UserError(one_line(error)) from error
        if (shard := self._option("shard")) is not None:
            if not self.model.shardable or self.subcommand != "fit":
                raise UserError(f"--shard is for fits item by item, not for {self.name} {self.subcommand}")
            self.model.shard = _shard(shard)
        if self.trainer.is_global_zero:  # the others hear it from this one when the run begins
            self.model.step_hash = os.environ.get(GIVEN) or self._step_hash()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self.config_init[self.subcommand]["trainer"]
        self._check_trainer(given)
        out = Path(self._option("out")).absolute()
        if self._option("shard") is None:
            rank_zero_only(sweep)(out)  # no rank writes before all have met; other shards may
        kwargs |= {
            # LastCheckpoint does it; Lightning's own is for those who ask for best-of-k copies.
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in _as_list(given["callbacks"])),
            "default_root_dir": str(out),
            "logger": self._loggers(given["logger"], out),
            "callbacks": self._callbacks(given["callbacks"]),
        }
        if given["profiler"] in _PROFILERS:
            kwargs["profiler"] = _PROFILERS[given["profiler"]](dirpath=out, filename="profile")
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # Its own handler saves in the middle of a step, callbacks.preemption between two.
            kwargs["plugins"] = [*_as_list(given["plugins"]), SLURMEnvironment(auto_requeue=False)]
        if self.subcommand == "fit":
            kwargs |= self.model.fit_options
            if not self.model.wrapped:
                kwargs |= self._unwrapped(given)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        # What Lightning says of options that cannot be, in whatever way.
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError, OverflowError) as error:
            raise UserError(f"trainer: {one_line(error)[:300]}") from error
        if str(given["precision"]).startswith("16") and str(trainer.precision).startswith("bf16"):
            raise UserError("trainer.precision 16-mixed needs a GPU: on CPUs take bf16-mixed or 32-true")
        return trainer

    def _unwrapped(self, given: Any) -> dict[str, Any]:
        """The strategy of a fit whose gradients Lightning must leave alone."""
        strategy = given["strategy"]
        if isinstance(strategy, IndependentRanks):
            return {}
        if strategy not in ("auto", "ddp"):
            raise UserError(
                f"trainer.strategy is {shown(strategy)}: {self.name} brings its ranks together itself, which takes ddp "
                "or auto; options of ddp go to class_path stages.base.ranks.IndependentRanks"
            )
        several = given["num_nodes"] > 1 or _devices(given) > 1
        return {"strategy": IndependentRanks()} if several or strategy == "ddp" else {}

    def _check_trainer(self, given: Any) -> None:
        """Refuse options that Lightning takes and that cannot work here."""
        if str(given["precision"]) not in PRECISIONS:
            raise UserError(f"trainer.precision is {shown(given['precision'])}: take 32-true, bf16-mixed or 16-mixed")
        if not self.model.automatic_optimization:
            if given["accumulate_grad_batches"] != 1:
                raise UserError(
                    f"trainer.accumulate_grad_batches: {self.name} steps its optimisers itself: take a larger batch "
                    "(data.batch_size), or more devices"
                )
            if given["gradient_clip_val"] is not None or given["gradient_clip_algorithm"] is not None:
                raise UserError(
                    f"trainer.gradient_clip_val: {self.name} steps its optimisers itself, and clips as its own options "
                    "say, where it has them"
                )

    def _loggers(self, given: Any, out: Path) -> list[Logger]:
        shard = self._option("shard")
        place = out if shard is None else out / "shards" / shard.partition("/")[0]
        loggers: list[Logger] = [CSVLogger(place, name="logs")]
        if isinstance(given, Logger):
            loggers.append(given)
        elif isinstance(given, list):
            loggers += given
        if (project := self._option("wandb")) is not False:
            loggers.append(self._dashboard("galatea" if project is True else project, place))
        return loggers

    def _dashboard(self, project: str, place: Path) -> Dashboard:
        """The steps of a pipeline are a group; a run that goes on is the same one."""
        if importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb needs the package wandb, which is not installed: pip install wandb")
        out = Path(self._option("out")).absolute()
        pipeline = out.parent.name if (out.parent / PLAN).exists() else None
        resumes = self.subcommand == "fit" and (self._option("ckpt_path") or self.model.resumes_itself)
        return Dashboard(
            place,
            project,
            name="/".join(filter(None, (pipeline, out.name))),
            group=pipeline,
            job_type=self.name,
            id=_last_wandb_run(place) if resumes else None,
            config={
                **self.config[self.subcommand].as_dict(),
                "stage": self.name,
                "subcommand": self.subcommand,
                "code": VERSION,
                "argv": sys.argv,
            },
        )

    def _callbacks(self, given: Any) -> list[pl.Callback]:
        callbacks = _as_list(given)
        ours: list[pl.Callback] = [FiniteGuard(), Monitor(), progress()]
        if modules := _as_list(self._option("compile")):
            ours.append(Compile(modules))
        if self._option("shard") is None:
            ours += [ExportArtifact(), MediaPanels()]
        if not self.model.resumes_itself:
            ours.append(LastCheckpoint())
        ours.append(Preemption())  # after all that save
        # A kind that the configuration names replaces ours.
        return callbacks + [c for c in ours if not any(isinstance(g, type(c)) for g in callbacks)]


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given] if given else []


def _last_wandb_run(out: Path) -> str | None:
    """Id of the W&B run that was the last to write in ``out``."""
    names = sorted(folder.name.partition("run-")[2] for folder in out.glob("wandb/*run-*-*"))
    return names[-1].split("-")[1] if names else None  # TIME-ID, or TIME-ID-N for the N-th of one second


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard is {text!r}, write I/N with I from 0 to N - 1, as in 0/8")
    return int(match[1]), int(match[2])


def _devices(trainer: Any) -> int:
    """How many devices of a machine are asked for, in any of Lightning's ways."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 1
    if isinstance(devices, str) and "," in devices:  # their numbers
        return len([number for number in devices.split(",") if number.strip()])
    if not str(devices).isdecimal():
        raise UserError(f"trainer.devices is {shown(devices)}: write how many, or their numbers as in 0,1")
    return int(devices)


def _configured(name: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line of a stage with all its configuration files as one, and what that says; options win over it.

    The parser would keep arguments of one file's class for another file's.
    """
    files: list[str] = []
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, file = word.partition("=")
        if option in ("-c", "--config"):
            files.append(file if equals else next(words, ""))
        else:
            options.append(word)
    config = read_config(name, files) if options and options[0] in GalateaCLI.subcommands() else {}
    if config:
        options.insert(1, f"--config={yaml.dump(config, Dumper=_Quoting)}")
    return options, config


class _Quoting(yaml.SafeDumper):
    """Puts all texts in quotes: the parser takes more for numbers than YAML does, "1e5" among them."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _set_threads(threads: int | None) -> None:
    """Of this process, and of the ranks that it starts.

    Unasked, one: on a machine that has more to do, two take ten times as long for tensors as small as ours, waiting for
    each other; and results depend on their number, which must not be the machine's.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}: it must be at least 1")
    if threads is None and "OMP_NUM_THREADS" in os.environ:  # which torch has read
        return
    torch.set_num_threads(threads or 1)
    os.environ["OMP_NUM_THREADS"] = str(threads or 1)  # Lightning would take all cores for several processes


def _bounded(stream: str, **options: Any) -> Any:
    """The parser's own reading of YAML, of configurations and values alike, once it is known to be bounded."""
    check_yaml(stream, "a configuration")
    return _read_yaml(stream, **options)


_read_yaml = get_loader("yaml")
set_loader("yaml", _bounded, (yaml.YAMLError,), json_superset=True)


def commands(stage_class: type[Stage]) -> list[str]:
    """Those of fit, validate, test and predict that a stage has: it writes their step itself."""
    steps = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    return [c for c, step in steps.items() if getattr(stage_class, step) is not getattr(pl.LightningModule, step)]


def run(name: str, stage_class: type[Stage], arguments: Sequence[str]) -> None:
    """Parse ``arguments`` for the stage and run it.

    Raises:
        UserError: for anything the user can put right.
    """
    if arguments and arguments[0] in GalateaCLI.subcommands() and arguments[0] not in commands(stage_class):
        raise UserError(f"stage {name} has no command {arguments[0]!r}, it has: {', '.join(commands(stage_class))}")
    # Repeated by Lightning on every run, and nothing the user can act on.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*configure_optimizers. returned .None.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # frozen networks are meant to be
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        GalateaCLI(name, stage_class, arguments)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the checkpoint holds more than numbers and names, nothing of it was run: {one_line(error)[:200]}"
        ) from error
    except MisconfigurationException as error:  # of what only shows when a run begins
        raise UserError(f"trainer: {one_line(error)[:300]}") from error
