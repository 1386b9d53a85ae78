"""Sizes that bound the memory of a step, here so that the planner reads them without torch."""

LOGITS_ENTRIES = 1 << 25  # logits of one chunk of the loss: 128 MiB in fp32
MASK_ENTRIES = 1 << 20  # largest mask of one call of the split attention path
CHUNK = 512  # queries of one call of it where the plain causal kernel cannot be used
