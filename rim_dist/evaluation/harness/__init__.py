"""Task files for lm-evaluation-harness (docs/evaluation.md)."""
