"""Which checkpoints are kept: the last N, every M steps, the ends of stages, the best by a metric; always an intact one."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from rim_dist.checkpoint import store
from rim_dist.config import CheckpointSection
from rim_dist.errors import CheckpointError
from rim_dist.files import damage_of, write_atomically

_SCORES = "scores.json"
_LOWER_IS_BETTER = {"loss"}


def read_scores(checkpoints: Path) -> dict[str, dict[str, float]]:
    """Metrics by checkpoint name. They stand beside the checkpoints: an evaluation may come after a save."""
    try:
        tree = json.loads((checkpoints / _SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def note_scores(checkpoints: Path, step: int, scores: dict[str, float]) -> None:
    """Add metrics of the checkpoint of a step; those of checkpoints that are gone are dropped. First rank only."""
    name = store.folder_of(checkpoints, step).name
    known = {p.name for p in store.all_checkpoints(checkpoints)} | {name}
    tree = {key: value for key, value in read_scores(checkpoints).items() if key in known}
    tree[name] = {**tree.get(name, {}), **scores}
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoints / _SCORES, json.dumps(tree, indent=1) + "\n")


def best_first(found: Collection[Path], metric: str) -> list[Path]:
    """Checkpoints that have the metric, best first; the later one of equals."""
    sign = -1.0 if metric in _LOWER_IS_BETTER else 1.0
    values = {p: read_scores(p.parent).get(p.name, {}).get(metric) for p in found}
    scored = {p: sign * value for p, value in values.items() if value is not None}
    return sorted(scored, key=lambda p: (scored[p], p.name), reverse=True)


def choose(path: str | Path, stage: int | None, step: int | None, best: bool) -> Path:
    """The checkpoint of a run that is meant: the newest, the last of a stage, that of a step, or the best.

    Raises CheckpointError naming what there is.
    """
    found = store.run_checkpoints(path)
    matching, wanted = found, ""
    if step is not None:
        matching, wanted = [p for p in found if store.read_state(p).step == step], f"no complete checkpoint of step {step}"
    elif stage is not None:
        matching = [p for p in found if store.read_state(p).stage == f"stage{stage}"]
        wanted = f"no complete checkpoint of stage {stage}"
    elif best:
        metric = store.read_recipe(found[-1]).checkpoint.metric
        matching = best_first(found, metric)[:1]
        wanted = f"none of its checkpoints has a figure for {metric} (checkpoint.metric)"
    if not matching:
        raise CheckpointError(f"{path}: {wanted}; there are {', '.join(p.name for p in found)}")
    return matching[-1]


def retain(checkpoints: Path, policy: CheckpointSection, good: Collection[Path] = ()) -> list[Path]:
    """Remove what the policy does not keep; returns what was removed. First rank only.

    Damaged checkpoints do not count and are left for a person to look at. Nothing is removed unless one of those that stay
    is known to be intact: in `good` (this process has just written and synced it), or by its checksums.
    """
    found = store.complete_checkpoints(checkpoints)
    kept = set(found[-policy.keep :])
    if policy.keep_every_steps:
        kept |= {p for p in found if store.read_state(p).step % policy.keep_every_steps == 0}
    if policy.keep_stage_ends:
        kept |= set({store.read_state(p).stage: p for p in found}.values())
    if policy.keep_best:
        kept |= set(best_first(found, policy.metric)[: policy.keep_best])
    surplus = [p for p in found if p not in kept]
    if surplus and not kept & set(good) and all(damage_of(p, checksums=True) for p in sorted(kept, reverse=True)):
        return []
    for checkpoint in surplus:
        store.remove(checkpoint)
    return surplus
