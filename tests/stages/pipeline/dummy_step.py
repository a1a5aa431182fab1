"""Stands in for ``python -m stages`` in the orchestrator's tests: light, and it obeys its options.

``--work N`` writes N marks, one at a time, continuing after those of an earlier process; ``--die_at K`` kills it
before mark K, once; ``--fail 1`` fails; ``--print_hash`` tells its hash. The artifact's ``extra`` is what the step saw.
"""

import json
import os
import signal
import sys
from pathlib import Path

from stages.pipeline.hashing import step_hash

stage, command, *rest = sys.argv[1:]
options = dict(text.removeprefix("--").split("=", 1) for text in rest if text != "--print_hash")
if "--print_hash" in rest:
    config = {section: {} for section in ("trainer", "data")}
    for key, value in options.items():
        section, _, name = key.rpartition(".")
        config.setdefault(section, {})[name] = value
    print(step_hash(stage, command, config.pop("", {}) | config))
    sys.exit()
out = Path(options["out"])
if options.get("fail"):
    print(f"galatea: error: {stage} does not feel well")
    sys.exit(2)
marks = out / "marks.txt"
done = len(marks.read_text().split()) if marks.exists() else 0
for mark in range(done, int(options.get("work", 1))):
    if str(mark) == options.get("die_at") and not (out / "died").exists():
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with open(marks, "a") as file:
        file.write(f"{os.getpid()}\n")
    print("mark", mark, flush=True)
seen = {k: Path(v).joinpath("manifest.json").read_text() if k.startswith("input") else v for k, v in options.items()}
extra = {k: v for k, v in seen.items() if k not in ("out", "die_at")}
manifest = {"format": 1, "stage": stage, "modules": {}, "files": {}, "parents": {}, "licences": [], "metrics": {}}
manifest |= {"step_hash": None, "extra": extra}
(out / "artifact").mkdir(exist_ok=True)
(out / "artifact" / "manifest.json").write_text(json.dumps(manifest))
