"""What a run is made from besides its recipe. Every checkpoint has it, and a start with other inputs is refused.

inputs.json has sizes and hashes of `data`, `tokenizer`, `template`, `deepspeed` (the configuration) and initial `weights`, and
besides the `plan` of the stages, whose lengths data of another size would change, and the `changes` that were accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rim_dist.checkpoint.store import INPUTS, read_inputs, read_state
from rim_dist.config import Recipe
from rim_dist.data.loader import StagePlan
from rim_dist.data.prepared import SampleStream, tokenizer_digests
from rim_dist.errors import ConfigError
from rim_dist.files import MANIFEST, sampled_hash, write_atomically
from rim_dist.model.requirements import Requirements
from rim_dist.recipe import flatten

_SHOWN = 5
_TEMPLATE = "chat_template.jinja"  # of the tokenizer's files
_OF_HOSTS = "zero_hpz_partition_size"  # follows the number of ranks on a host, which may change


def gather_inputs(
    requirements: Requirements, data: SampleStream, ds_config: dict[str, Any], plans: Sequence[StagePlan]
) -> dict[str, Any]:
    """The inputs of a run that starts now."""
    files = tokenizer_digests(requirements.tokenizer)
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != _OF_HOSTS}
    return {
        "data": data.inputs,
        "tokenizer": {name: digest[:16] for name, digest in files.items() if name != _TEMPLATE},
        "template": {"content": hashlib.sha256(str(requirements.tokenizer.chat_template).encode()).hexdigest()[:16]},
        "deepspeed": {**ds_config, "zero_optimization": zero},
        "weights": {"content": _weights(requirements)},
        "plan": [asdict(plan) for plan in plans],
    }


def _weights(requirements: Requirements) -> str:
    """A hash of the weights that the run starts from: of a checkpoint's checksums, or of samples of an HF folder's files."""
    start = requirements.start
    if start.checkpoint is not None:
        return sampled_hash([start.checkpoint / MANIFEST])
    if start.source is None:
        return "from scratch"
    if not (folder := Path(start.source)).is_dir():
        return str(folder)
    files = (path for ending in ("safetensors", "bin", "gguf") for path in folder.glob(f"*.{ending}"))
    return sampled_hash(sorted(files))


def checked_inputs(recipe: Recipe, resume: Path | None, now: dict[str, Any]) -> dict[str, Any]:
    """The inputs to keep from now on. Raises ConfigError if they are not the checkpoint's and are not accepted by name."""
    kept = read_inputs(resume) if resume is not None else {}
    if not kept:  # a new run, or one of an earlier version
        return {**now, "changes": []}
    assert resume is not None
    changes = list(kept.get("changes", []))
    refused = []
    for name in ("data", "tokenizer", "template", "deepspeed", "weights"):
        old, new = flatten(kept.get(name), name), flatten(now[name], name)
        lines = [
            f"{key}: {old.get(key)} there, {new.get(key)} here"
            for key in old.keys() | new.keys()
            if old.get(key) != new.get(key)
        ]
        if lines and name in recipe.run.accept_changes:
            changes.append({"after_step": read_state(resume).step, "changes": sorted(lines)})
        elif lines:
            refused.append((name, sorted(lines)))
    if refused:
        lines = [line for _, found in refused for line in found]
        shown = "; ".join([*lines[:_SHOWN], *["..."][: max(0, len(lines) - _SHOWN)]])
        raise ConfigError(
            f"{recipe.folder} was started with other inputs ({shown}); choose another run.name, or go on with these ones from "
            f"here: run.accept_changes=[{','.join(name for name, _ in refused)}]"
        )
    return {**now, "plan": kept["plan"], "changes": changes}


def write_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    write_atomically(folder / INPUTS, json.dumps(inputs, indent=1) + "\n")
