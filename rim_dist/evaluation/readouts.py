"""Answers after every block for the price of one prefix: the prompt runs once, all readouts are decoded side by side.

The prompt with all its blocks is one prefill, exactly as a server runs it. Every readout then goes on from the same keys and
values: a step runs one token of each readout, under the visibility of the packed row. Nothing is copied or computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.attention.visibility import READOUT, RowLayout, TokenCoordinates
from rim_dist.evaluation.prefixes import decode_greedily, prefix_batches
from rim_dist.model.generation import Decoding, end_ids, model_positions
from rim_dist.unwrap import bare_model


def readout_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    budgets: Sequence[int],
    decoding: Decoding,
    bidirectional: bool = False,
) -> list[list[list[int]]]:
    """New token ids of every prompt after each of the `budgets` (numbers of blocks), without the token that ends them.

    `prompts` end with max(budgets) blocks of `block_size` tokens. Greedy. The model's family must take the RiM mask
    (`prove_family`); its attention is the plain one afterwards. Raises DataError if a prompt does not fit the model.
    """
    bare, most = bare_model(model), max(budgets)

    def decode(arguments: dict[str, Any], prefix: TokenCoordinates) -> list[list[int]]:
        """Answers of one batch, prompt by prompt, each prompt's in the order of the budgets."""
        budget = torch.tensor(budgets, device=prefix.block.device)
        unseen = (most - budget) * block_size  # tokens of the blocks that a readout does not see
        ends = prefix.block.shape[1] - 1 - unseen  # columns of the last token of each budget's prefix
        cache = DynamicCache()  # all layers in full: a windowed cache would drop keys that shorter readouts still see
        if bidirectional:
            use_rim_attention(bare, "dense")
            arguments = {
                **{name: arguments[name] for name in ("input_ids", "position_ids")},
                "rim_layout": RowLayout(prefix, prefix, bidirectional=True),
            }
        else:
            use_plain_attention(bare)
        logits = model(**arguments, past_key_values=cache, use_cache=True, logits_to_keep=ends).logits
        # Token t of a readout stands at the position after its prefix; the last one must fit the model.
        first = prefix.position[:, -1:] + 1 - unseen  # [prompts, budgets]
        room = model_positions(model.config) - first
        keys = prefix

        def next_tokens(tokens: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal keys
            queries = TokenCoordinates(
                torch.zeros_like(tokens),
                torch.full_like(tokens, READOUT),
                budget.expand(tokens.shape),
                torch.minimum(first + step, first + room - 1),
            )
            keys = TokenCoordinates(*(torch.cat(pair, dim=1) for pair in zip(keys, queries, strict=True)))
            layout = RowLayout(queries, keys, bidirectional=bidirectional)
            return model(
                input_ids=tokens, position_ids=queries.position, past_key_values=cache, use_cache=True, rim_layout=layout
            ).logits.argmax(dim=-1)

        use_rim_attention(bare, "dense")
        answers = decode_greedily(tokenizer, end_ids(bare, tokenizer), logits.argmax(dim=-1), room, decoding, next_tokens)
        use_plain_attention(bare)
        return answers

    with torch.no_grad():
        batches = prefix_batches(model, tokenizer, prompts, most, block_size, decoding.batch)
        answers = [answer for batch in batches for answer in decode(*batch)]
    return [answers[i : i + len(budgets)] for i in range(0, len(answers), len(budgets))]
