"""Sizes that bound the memory of a step, here so that the planner reads them without torch."""

# Logits of one chunk of the loss, by type of device: 128 MiB in fp32, and 1 GiB. Each is a pass over the head's gradient.
LOGITS_ENTRIES = {"cpu": 1 << 25, "cuda": 1 << 28}
MASK_ENTRIES = 1 << 20  # largest mask of one call of the split attention path
CHUNK = 512  # queries of one call of it where the plain causal kernel cannot be used
