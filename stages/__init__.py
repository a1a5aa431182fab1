"""What the papers do, one LightningModule a file; stages meet only through artifacts."""

from importlib.util import find_spec
from pathlib import Path


def _check_layout() -> None:
    """Refuse a foreign top-level ``models`` package: other repositories of this field own one as well."""
    here = Path(__file__).resolve().parents[1]
    found = find_spec("models")
    if found is None or found.origin is None or Path(found.origin).resolve().parents[1] != here:
        where = "nowhere" if found is None else found.origin
        raise ImportError(f"galatea needs its own 'models' package from {here}, Python finds it {where}")


_check_layout()
