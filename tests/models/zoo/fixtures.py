"""Where the parity fixtures lie."""

from pathlib import Path

from models.files import ROOT

PLACES = (ROOT.parent / "shared" / "parity", ROOT / "tests" / "fixtures" / "parity")


def fixture_folder(name: str) -> Path:
    """The folder of one fixture: beside the repository where it is, the copy in it otherwise."""
    return next(place / name for place in PLACES if (place / name / "io.npz").exists())


def fixture_folders() -> list[Path]:
    """Every fixture there is, once."""
    names = {path.parent.name for place in PLACES for path in place.glob("*/io.npz")}
    return [fixture_folder(name) for name in sorted(names)]
