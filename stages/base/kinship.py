"""Whether artifacts that a stage takes belong together: codes of one generator say nothing to another."""

from __future__ import annotations

import logging

from models.artifact import Artifact
from models.errors import UserError

log = logging.getLogger(__name__)


def check_kin(made: Artifact, of: Artifact, module: str = "generator") -> None:
    """Refuse an artifact that was made for another generator than that of ``of``, or than what that one came from.

    What was imported has no past: where one of them was, this warns. An artifact that holds no generator and names no
    parents says nothing.

    Raises:
        UserError: naming both.
    """
    source, _ = of.origin(module)
    ours = {source.id, *source.ancestors}
    if "generator" in made.manifest["modules"]:
        theirs, _ = made.origin("generator")
        recorded = (made.manifest["modules"]["generator"]["delta_of"] or {}).get("id")  # though it may not lie here
        related = theirs.id in ours or recorded in ours or source.id in theirs.ancestors
    elif made.ancestors:
        theirs, related = made, bool(ours & made.ancestors.keys())
    else:
        return
    if related:
        return
    said = f"{made.path} was made for another generator than that of {of.path}"
    stages = {manifest["stage"] for held in (theirs, source) for manifest in (held.manifest, *held.ancestors.values())}
    if "zoo" not in stages:
        raise UserError(f"{said}, whose codes mean other heads: take what belongs together")
    log.warning("warning: as far as is known, %s: their codes may mean other heads", said)
