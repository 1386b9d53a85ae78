"""Calls functions of the tests' own modules one after the other in one process group; the first rank writes what they return.

call.py TODO DONE: TODO is a JSON list of ["module:function", [arguments]], DONE gets the list of results.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from rim_dist.parallel.launch import join, leave

if __name__ == "__main__":
    process = join(120)
    torch.set_num_threads(1)
    todo, done = (Path(a) for a in sys.argv[1:3])
    results = []
    for name, arguments in json.loads(todo.read_text()):
        module, _, function = name.partition(":")
        results.append(getattr(importlib.import_module(module), function)(*arguments))
    if process.is_first:
        done.write_text(json.dumps(results))
    leave()
