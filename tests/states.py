"""Two checkpoints compared by what they hold."""

from __future__ import annotations

import torch

from rim_dist.checkpoint.contents import Contents
from rim_dist.checkpoint.tensors import read_tensor


def same_state(a: Contents, b: Contents) -> None:
    """Every weight, moment and step count equal, bit for bit."""
    assert a.module.keys() == b.module.keys()
    assert a.index.steps == b.index.steps
    assert a.index.steps
    for name in a.module:
        assert torch.equal(read_tensor(a.module[name]), read_tensor(b.module[name])), name
    for kind in ("exp_avg", "exp_avg_sq"):
        for name in a.index.steps:
            if name in a.module:
                left, right = read_tensor(a.index.moments[kind][name]), read_tensor(b.index.moments[kind][name])
                assert left.any(), name
                assert torch.equal(left, right), (kind, name)
