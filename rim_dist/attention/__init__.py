"""Who sees whom, and the attention that honours it."""
