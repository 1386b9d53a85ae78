"""Runs side by side on one page. Reads what training and the evaluation commands left on disk; loads no model."""
