"""`rim-dist train` that takes an owner for lost after two seconds."""

from __future__ import annotations

import sys

from rim_dist.cli import main
from rim_dist.training import lease

if __name__ == "__main__":
    lease.STALE_SECONDS, lease._TOUCH_SECONDS, lease._LOOK_SECONDS = 2.0, 0.2, 0.1
    sys.exit(main(["train", *sys.argv[1:]]))
