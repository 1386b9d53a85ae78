"""Several recipes one after the other in one process group: importing deepspeed is slow, ranks are reused."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rim_dist.parallel.launch import join, leave
from rim_dist.recipe import load_recipe
from rim_dist.training.trainer import Trainer, prepare_run

if __name__ == "__main__":
    process = join(120)
    for path in (a for a in sys.argv[1:] if not a.startswith("--")):  # the deepspeed launcher adds --local_rank
        recipe = load_recipe(path)
        requirements, data = prepare_run(recipe)
        Trainer(recipe, process, requirements, data).run()
    leave()
