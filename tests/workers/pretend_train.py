"""Stands in for `rim-dist train` where a test is about what surrounds it: writes what a finished run leaves, slowly if asked.

Accuracy is 0.5 + seed / 10 for rim, 0.2 for every other method; operations are the samples, 3 each for rim.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[3:])
    folder = Path(given["run.output_dir"]) / given["run.name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.json").write_text(json.dumps(given))
    if given["run.name"] == os.environ.get("PRETEND_FAIL"):
        sys.exit(2)
    if given["run.name"] == os.environ.get("PRETEND_SLOW"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    samples = sum(int(given.get(f"curriculum.{stage}.samples", 0)) for stage in ("stage1", "stage2"))
    rim = given.get("method") == "rim"
    operations = samples * (3 if rim else 1)
    line = {"kind": "train", "step": samples // 64, "samples": samples, "operations": operations, "seconds": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    accuracy = 0.5 + int(given["run.seed"]) / 10 if rim else 0.2
    for name, content in (
        ("hf/rim_dist.json", {}),
        ("report/evaluation.json", {"accuracy": accuracy, "per_block": [accuracy], "questions": 10}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
