"""Continuous thoughts in training: a packed micro-batch in as many passes as its longest row has thoughts, plus one.

`question, begin, thought x n, end, readout`: a thought's input is the last hidden state of the position before it, so thoughts
run one after the other, those of all samples side by side. Every token runs once: the first pass is packed as every other
method's rows are; its keys and values then become a batch, a row a sample, to which the later passes add theirs. The last
thought runs with what follows it: nothing is fed its state, and ZeRO-3 keeps the graph of a module call without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from rim_dist.attention.visibility import PADDING_SEGMENT, QUESTION, RowLayout, TokenCoordinates
from rim_dist.data.samples import Span


def _plain_places(position: torch.Tensor) -> TokenCoordinates:
    """TokenCoordinates of causal text at the given positions, `[rows, seq]`; a negative position is padding."""
    zeros = torch.zeros_like(position)
    segment = torch.where(position < 0, PADDING_SEGMENT, zeros)
    return TokenCoordinates(segment, torch.full_like(position, QUESTION), zeros, position.clamp_min(0))


def _first_pass(spans: Sequence[Span], device: torch.device) -> tuple[torch.Tensor, RowLayout]:
    """Columns of the packed row that run at once (every question with its begin token), and their layout."""
    columns, segments, positions, first = [], [], [], []
    start = 0
    for number, span in enumerate(spans):
        count = span.question + 1
        positions.append(torch.arange(count))
        columns.append(positions[-1] + span.start)
        segments.append(torch.full((count,), number))
        first.append(Span(start, count, 0, 0, ()))
        start += count
    position = torch.cat(positions).unsqueeze(0)
    zeros = torch.zeros_like(position)
    places = TokenCoordinates(torch.cat(segments).unsqueeze(0), torch.full_like(position, QUESTION), zeros, position)
    places = places.map(lambda t: t.to(device))
    return torch.cat(columns).to(device), RowLayout(places, places, tuple(first))


def _as_rows(cache: DynamicCache, column: torch.Tensor) -> DynamicCache:
    """Keys and values `[1, heads, tokens, dim]` of a packed pass as `[rows, heads, seq, dim]`, by columns `[rows, seq]`."""
    rows = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = (t[0][:, column].transpose(0, 1) for t in (layer.keys, layer.values))
        rows.update(keys, values, number)
    return rows


def thought_states(
    model: PreTrainedModel, input_ids: torch.Tensor, layout: RowLayout, column: torch.Tensor, thoughts: int
) -> torch.Tensor:
    """Last hidden states `[targets, hidden]` at `column`s (end tokens and readouts) of packed latent rows `[1, tokens]`.

    `thoughts`, at least one: of the row that has the most, on any rank. Rows with fewer wait, on padding that nobody sees.
    """
    device, spans = input_ids.device, layout.spans
    ids = input_ids[0]
    start, question, size = (
        torch.tensor(values, device=device).unsqueeze(1)
        for values in ([s.start for s in spans], [s.question for s in spans], [s.block_size for s in spans])
    )
    length = torch.tensor([s.length for s in spans], device=device).unsqueeze(1)
    own = size - 2  # thoughts of each row, [rows, 1]

    columns, first = _first_pass(spans, device)
    cache = DynamicCache()
    hidden = model.base_model(
        input_ids=ids[columns].unsqueeze(0),
        position_ids=first.queries.position,
        past_key_values=cache,
        use_cache=True,
        rim_layout=first,
    )[0]

    # Padded on the left, so that all rows end with their begin token.
    widest = int(max(s.question for s in spans)) + 1
    position = torch.arange(widest, device=device) - (widest - 1 - question)
    offset = torch.tensor([s.start for s in first.spans], device=device).unsqueeze(1)
    cache = _as_rows(cache, offset + position.clamp_min(0))
    keys = _plain_places(position)
    last = hidden[0, (offset + question).squeeze(1)].unsqueeze(1)  # [rows, 1, hidden], at the begin tokens

    def run(queries: TokenCoordinates, **inputs: Any) -> torch.Tensor:
        nonlocal keys
        keys = TokenCoordinates(*(torch.cat(pair, dim=1) for pair in zip(keys, queries, strict=True)))
        return model.base_model(
            **inputs,
            position_ids=queries.position,
            past_key_values=cache,
            use_cache=True,
            rim_layout=RowLayout(queries, keys),
        )[0]

    def thought(number: int) -> torch.Tensor:
        """Position of each row's thought, `[rows, 1]`."""
        return torch.where(number < own, question + 1 + number, -1)

    for number in range(thoughts - 1):
        last = run(_plain_places(thought(number)), inputs_embeds=last)

    # Last thought, end token and readout, padded on the right; the readout's position follows the end token's (`pack`).
    shift = question + 1 + own  # of the end token in its row
    offset_in_row = torch.arange(int((length - shift).max()), device=device).unsqueeze(0)
    inside = offset_in_row < length - shift
    position = torch.cat([thought(thoughts - 1), torch.where(inside, shift + offset_in_row, -1)], dim=1)
    rest = model.get_input_embeddings()(ids[torch.where(inside, start + shift + offset_in_row, 0)])
    final = run(_plain_places(position), inputs_embeds=torch.cat([last, rest], dim=1))

    row = layout.queries.segment[0, column]
    return final[row, 1 + column - (start + shift).squeeze(1)[row]]
