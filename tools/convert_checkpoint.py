#!/usr/bin/env python
"""Convert checkpoints: `python tools/convert_checkpoint.py to-hf CHECKPOINT OUT_DIR` is `rim-dist convert to-hf`."""

import sys

from rim_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
