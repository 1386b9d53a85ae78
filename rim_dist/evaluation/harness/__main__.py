"""Prints the folder of the task files: `lm_eval --include_path $(python -m rim_dist.evaluation.harness)`."""

from pathlib import Path

print(Path(__file__).parent)
