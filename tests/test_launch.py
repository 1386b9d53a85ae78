"""What a process sets up when it joins the ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranks import ROOT, environment


@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_a_say(variables: dict[str, str], kept: bool) -> None:
    """A block of 256 MiB, freed: it stays with the process, or goes back to the system."""
    code = (
        "import torch\n"
        "from rim_dist.parallel.launch import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "block = torch.ones(2**26)\n"
        "del block\n"
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')))\n"
    )
    bare = {name: value for name, value in environment().items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**bare, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (int(done.stdout) > 400_000) == kept, done.stderr + done.stdout
