"""Sizes that bound what a step holds at once, where they can be read without torch."""

LOGITS_ENTRIES = 1 << 25  # logits of one chunk of the loss: 128 MiB in fp32
MASK_ENTRIES = 1 << 20  # largest mask of one call of the split attention path
