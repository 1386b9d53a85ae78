"""`python -m rim_dist`: the entry point that launchers (deepspeed, torchrun, mpirun, srun) start."""

import sys

from rim_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
