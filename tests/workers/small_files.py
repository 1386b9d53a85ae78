"""`rim-dist train` on ranks of which one (RIM_TEST_RANK) can write files of 64 KiB only, as on a full disk."""

from __future__ import annotations

import os
import resource
import sys

from rim_dist.cli import main

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == os.environ["RIM_TEST_RANK"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    sys.exit(main(["train", *sys.argv[1:]]))
