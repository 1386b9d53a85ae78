"""`rim-dist` with the attention kernels of one more folder: RIM_TEST_KERNELS=FOLDER."""

from __future__ import annotations

import os
import sys

import rim_dist.attention.kernels
from rim_dist.cli import main

if __name__ == "__main__":
    rim_dist.attention.kernels.__path__.append(os.environ["RIM_TEST_KERNELS"])
    sys.exit(main())
