"""An export against its checkpoint: plain transformers in a new process, the logits after every number of blocks compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from rim_dist.checkpoint.hf_export import ADAPTER, load_module
from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.model_card import read_export_info
from rim_dist.errors import CheckpointError, RimError
from rim_dist.evaluation.evaluate import recipe_samples
from rim_dist.evaluation.plain_logits import logits_after
from rim_dist.methods import method_of
from rim_dist.model.generation import model_positions
from rim_dist.tokens import prompt_ids

# Rounding of weights to the export's dtype, and another order of additions, as a fraction of the largest logit.
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
_QUESTIONS = ["Tom has 3 bags of 4 nuts and eats 2. How many are left?", "What is left of 1,000 after paying 250?"]
_COUNT = 4


@dataclass(frozen=True)
class Verification:
    """The largest difference of a logit after each number of blocks (or after continuous thoughts), and the largest logit."""

    by_blocks: dict[int, float]
    largest_logit: float
    dtype: str
    questions: int
    thoughts: int = 0

    def text(self) -> str:
        worst = max(self.by_blocks.values())
        blocks = ", ".join(f"{k}: {v:.1e}" for k, v in self.by_blocks.items())
        after = f"after {self.thoughts} thoughts" if self.thoughts else f"by number of blocks {blocks}"
        return (
            f"verified in plain transformers, {self.questions} questions: largest difference of a logit {worst:.2e} "
            f"(largest logit {self.largest_logit:.1f}, {self.dtype}; {after})"
        )


def verify_export(checkpoint: Path, out: Path) -> Verification:
    """Compare; raises CheckpointError if a prompt's ids differ or a logit differs by more than rounding."""
    index = index_checkpoint(checkpoint)
    recipe = index.recipe
    try:
        questions = [sample.question for sample in recipe_samples(recipe)][:_COUNT] or _QUESTIONS
    except RimError:  # the evaluation file of the run is not on this machine
        questions = _QUESTIONS
    method = method_of(recipe)
    with_blocks, thoughts = method.prompt_blocks, method.thoughts
    markers = [index.tokens.begin, index.tokens.end]
    blocks = list(range(1, with_blocks + 1)) or [0]
    positions = model_positions(index.config)
    added = thoughts + len(markers) if thoughts else 0
    longest = prompt_ids(index.tokenizer, questions, blocks[-1] or None)
    questions = [question for question, prompt in zip(questions, longest, strict=True) if len(prompt) + added <= positions]
    if not questions:
        raise CheckpointError(
            f"{out}: not verified: no question with {blocks[-1]} blocks fits the model's {positions} positions"
        )
    adapter = out / ADAPTER if (out / ADAPTER / "adapter_config.json").is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        task_file, answer = Path(folder) / "task.json", Path(folder) / "logits.safetensors"
        task = {
            "questions": questions,
            "blocks": blocks if with_blocks else [None],
            "adapter": str(adapter) if adapter else None,
            "thoughts": thoughts,
            "markers": markers,
        }
        task_file.write_text(json.dumps(task), encoding="utf-8")
        # -P and the file's own path: what runs there cannot import rim_dist by accident of the working folder.
        script = Path(__file__).with_name("plain_logits.py")
        command = [sys.executable, "-P", str(script), str(out), str(task_file), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"{out}: does not load in plain transformers: {done.stderr.strip().splitlines()[-1]}")
        found = load_file(answer)
    module = load_module(index).eval()
    differences: dict[int, float] = {}
    largest = 0.0
    for k in blocks:
        prompts = prompt_ids(index.tokenizer, questions, k if with_blocks else None)
        for i, prompt in enumerate(prompts):
            key = f"{i}/{k if with_blocks else None}"
            if found[f"ids/{key}"].tolist() != prompt:
                raise CheckpointError(f"{out}: its chat template renders question {i + 1} with {k} blocks to other tokens")
            with torch.no_grad():
                expected = logits_after(module, torch.tensor([prompt]), thoughts, markers)
            logits = found[f"logits/{key}"][:, : expected.shape[-1]]  # what is left are padding rows of the export
            difference = float((expected - logits).abs().max())
            # max() would pass over a NaN.
            differences[k] = max(differences.get(k, 0.0), difference if math.isfinite(difference) else math.inf)
            largest = max(largest, float(expected.abs().max()))
    dtype = str(read_export_info(out)["dtype"])
    result = Verification(differences, largest, dtype, len(questions), thoughts)
    if not max(differences.values()) <= _TOLERANCE[dtype] * largest:
        raise CheckpointError(f"{out}: its logits are not the checkpoint's: {result.text()}")
    return result
