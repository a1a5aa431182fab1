"""``galatea zoo``: official checkpoint files to artifacts and back, and parity with official networks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models.documents import parse_json
from models.errors import UserError, one_line, printable
from stages.arguments import Parser

if TYPE_CHECKING:
    from torch import nn

    from models.artifact import Artifact
    from models.configurable import Configurable
    from models.generators.base import Generator


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea zoo``.

    Raises:
        UserError: for a wrong option, a file that is not what it should be, or when a check fails.
    """
    parser = Parser("galatea zoo", "Official checkpoint files to artifacts and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Any, text: str) -> Parser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    command = add("list", _list, "the families of official files and their licences; of one family, its settings")
    command.add_argument("family", nargs="?")
    command = add("import", _import, "official files to an artifact; nothing in them is run")
    command.add_argument(
        "words", nargs="+", metavar="[FAMILY] FILE", help="files of one model, after their family (default: auto)"
    )
    command.add_argument("--out", type=Path, required=True, help="the artifact folder to write")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="what files cannot tell: list FAMILY",
    )
    command = add("verify", _verify, "check an artifact's hashes, rebuild its modules and run its generator once")
    command.add_argument("artifact", type=Path, metavar="DIR")
    command = add("export", _export, "an imported artifact back to the official file")
    command.add_argument("artifact", type=Path, metavar="DIR")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the torch file to write")
    command = add("parity", _parity, "compare our networks with numbers recorded from the official ones")
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="fixture folders")
    options = parser.parse_args(list(arguments))
    options.run(options)


def _list(options: Namespace) -> None:
    from models.zoo import FAMILIES, family

    if options.family is None:
        families = map(family, FAMILIES)
        _print(("family", "files", "from", "licence"), ([f.name, f.files, f.origin, f.licence] for f in families))
    elif settings := family(options.family).settings:
        _print(("--set", "meaning"), settings.items())
    else:
        print(f"{options.family} has no settings: its files tell everything")


def _import(options: Namespace) -> None:
    from models import artifact
    from models.files import sha256
    from models.zoo import FAMILIES, ZooError, family, recognise
    from models.zoo.reading import read

    first, *rest = options.words
    named = first in (*FAMILIES, "auto")
    if not named and not Path(first).exists():
        raise UserError(f"{first!r} is neither a file nor a family ({', '.join(FAMILIES)})")
    files = [Path(word) for word in (rest if named else options.words)]
    if not files:
        raise UserError(f"name the files after the family {first!r}")
    settings = _settings(options.set)
    chosen = family(first) if first in FAMILIES else None
    official = ((chosen and chosen.read) or read)(*files)
    chosen = chosen or recognise(official)
    try:
        converted = chosen.convert(official, settings)
    except UserError:
        raise
    except Exception as error:  # the file's own numbers may break anything that is built from them
        names = ", ".join(map(str, files))
        raise ZooError(f"{names} cannot be read as {chosen.name}: {type(error).__name__}: {one_line(error)}") from error
    for name, module in converted.modules.items():
        for key, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise ZooError(f"{chosen.name}: the {name}'s {key!r} has numbers that are not finite")
    written = artifact.save(
        options.out,
        stage="zoo",
        modules=converted.modules,
        licences=converted.licences
        or [
            {"name": file.name, "licence": chosen.licence, "origin": chosen.origin, "sha256": sha256(file)}
            for file in files
        ],
        extra={"family": chosen.name, "found": converted.found, "settings": settings, **converted.extra},
        dtype=converted.dtype,
    )
    print(printable(f"{chosen.name}: {converted.found}"))
    _print_modules(written, converted.modules)
    print(f"licence: {chosen.licence} ({chosen.origin})\nwrote {options.out}")


def _settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``["fov=12", "centre=[0, 0, -1.5]"]``: values are JSON where they can be, text otherwise."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UserError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            settings[name] = parse_json(value, name)
        except UserError:
            settings[name] = value
    return settings


def _verify(options: Namespace) -> None:
    from models import artifact
    from models.generators.base import Generator

    loaded = artifact.load(options.artifact)
    modules = {name: loaded.module(name) for name in loaded.manifest["modules"]}
    _print_modules(loaded, modules)
    for name, module in modules.items():
        if isinstance(module, Generator):
            print(f"{name}: {_forward(module)}")
    print(f"ok: {options.artifact}, {loaded.id[:12]}")


def _forward(generator: Generator) -> str:
    """Render one head, small where the generator allows it, and describe the picture."""
    import torch

    draws = torch.Generator().manual_seed(0)
    camera = generator.rig.camera(0.0) if generator.is_3d else None
    with torch.no_grad():
        latents = generator.mapping(generator.sample_z(1, draws))
        side = 16 if generator.free_resolution else None
        image = generator.synthesis(latents, camera, resolution=side).image
    if not image.isfinite().all():
        raise UserError("the generator renders numbers that are not finite")
    return f"renders {image.shape[-1]} px, mean {float(image.mean()):.4f}, deviation {float(image.std()):.4f}"


def _export(options: Namespace) -> None:
    import torch

    from models import artifact
    from models.files import atomic_write
    from models.zoo import family

    loaded = artifact.load(options.artifact)
    if loaded.stage != "zoo":
        raise UserError(f"{options.artifact} was not imported: stage {loaded.stage} wrote it")
    chosen = family(str(loaded.extra.get("family")))
    if Path(options.out).suffix == ".pkl":
        raise UserError(
            f"{options.out}: a .pkl of EG3D's is a network with its source text, which its own loader runs; what is "
            "written here is a torch file of numbers: name it .pt"
        )
    if chosen.export is None:
        raise UserError(f"{chosen.name}: there is no way back to official files")
    content = chosen.export({name: cast("Configurable", loaded.module(name)) for name in loaded.manifest["modules"]})
    with atomic_write(options.out) as temporary, open(temporary, "wb") as stream:
        torch.save(content, stream)
    print(printable(f"wrote {options.out}: {chosen.name}, {loaded.extra.get('found')}"))
    print(printable(f"licence: {loaded.licence}"))


def _parity(options: Namespace) -> None:
    from models.zoo.parity import Report, reports

    def result(found: Report) -> str:
        return found.left_out or ("pass" if found.passed else f"FAIL {found.failure}".strip())

    rows, failed = [], []
    for found in (found for folder in options.folders for found in reports(folder)):
        worst = found.worst
        if not found.passed:
            failed.append(found.name)
        rows.append(
            [
                found.name,
                f"{sum(c.passed for c in found.comparisons)}/{len(found.comparisons)}",
                f"{worst.worst:.3g}" if worst else "",
                f"{worst.name} {worst.reason}".strip() if worst else "",
                result(found),
            ]
        )
    _print(("fixture", "arrays", "worst error / tolerance", "of", "result"), rows)
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} fixtures fail: {', '.join(failed)}")


def _print_modules(written: Artifact, modules: dict[str, Any]) -> None:
    def row(name: str, module: nn.Module) -> list[str]:
        parameters = sum(p.numel() for p in module.parameters())
        return [name, type(module).__name__, f"{parameters:,}", written.manifest["modules"][name]["file"]]

    _print(("module", "class", "parameters", "file"), (row(name, module) for name, module in modules.items()))


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width: never wrap there
        console = Console(width=240)
    console.print(table)
