"""The encoder's source against its version, without which tokenised data of an earlier encoder would be used again.

python tests/test_encoder_version.py --write    # record the source of the version there is
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from rim_dist.data.encoding import ENCODER_VERSION

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("encoder_version.json")
# What decides the token ids of a row, or whether it is left out. A method's own file is part of the key of tokenised data.
SOURCES = (
    "rim_dist/tokens.py",
    "rim_dist/data/encoding.py",
    "rim_dist/data/samples.py",
    "rim_dist/data/sources.py",
    "rim_dist/data/formats/*.py",
    "rim_dist/methods/base.py",
)
TO_DO = """
If any row could get other token ids, or be left out where it was not before (or the other way round):
    raise ENCODER_VERSION in rim_dist/data/encoding.py, so that nobody trains on tokens of the earlier encoder.
Then, and also if no row could (a docstring, a name, a file that was split):
    python tests/test_encoder_version.py --write"""


def state() -> dict:
    files = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    digests = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    return {"version": ENCODER_VERSION, "sources": digests}


def test_the_encoder_has_not_changed_without_its_version() -> None:
    recorded, now = json.loads(RECORD.read_text(encoding="utf-8")), state()
    names = sorted(recorded["sources"].keys() | now["sources"].keys())
    changed = [name for name in names if recorded["sources"].get(name) != now["sources"].get(name)]
    assert not changed, f"changed since version {recorded['version']} was recorded: {', '.join(changed)}{TO_DO}"
    assert recorded["version"] == now["version"], TO_DO


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        RECORD.write_text(json.dumps(state(), indent=1) + "\n", encoding="utf-8")
    else:
        print(__doc__)
