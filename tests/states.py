"""What checkpoints hold: their weights, two of them compared, and the log of saves beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint.index import CheckpointIndex, index_checkpoint
from rim_dist.checkpoint.stored_tensors import read_tensor


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors in fp32 (the optimizer's own copy where there is one), by their names in the module."""
    return {name: read_tensor(stored).float() for name, stored in index_checkpoint(checkpoint).module.items()}


def read_saves(checkpoints: Path) -> list[dict[str, Any]]:
    """The lines of `saves.jsonl`: step, bytes, seconds the loop was blocked, seconds until it was on disk."""
    path = checkpoints / "saves.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def same_state(a: CheckpointIndex, b: CheckpointIndex) -> None:
    """Every weight, moment and step count equal, bit for bit."""
    assert a.module.keys() == b.module.keys()
    assert a.tensors.steps == b.tensors.steps
    assert a.tensors.steps
    for name in a.module:
        assert torch.equal(read_tensor(a.module[name]), read_tensor(b.module[name])), name
    for kind in ("exp_avg", "exp_avg_sq"):
        for name in a.tensors.steps:
            if name in a.module:
                left, right = read_tensor(a.tensors.moments[kind][name]), read_tensor(b.tensors.moments[kind][name])
                assert left.any(), name
                assert torch.equal(left, right), (kind, name)
