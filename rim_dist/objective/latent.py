"""Continuous thoughts in training: a packed micro-batch runs in one pass per thought of its longest row, plus one.

`question, begin, thought x n, end, readout`: a thought's input is the last hidden state of the position before it, so thoughts
run one after the other, those of all samples side by side. Every token runs once. The first pass runs the questions, packed as
the rows of every method are. Its keys and values are then sorted into a batch, a row a sample, and later passes add theirs. The
last thought runs together with the tokens after it: its output is no other token's input, and ZeRO-3 would keep the graph of a
module call that gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from rim_dist.attention.visibility import PADDING_SEGMENT, QUESTION, RowLayout, TokenCoordinates
from rim_dist.data.samples import Span
from rim_dist.unwrap import backbone


def _text(segment: torch.Tensor, position: torch.Tensor) -> TokenCoordinates:
    """Coordinates of causal text."""
    return TokenCoordinates(segment, torch.full_like(position, QUESTION), torch.zeros_like(position), position)


def _padded_text(position: torch.Tensor) -> TokenCoordinates:
    """Coordinates of causal text at the given positions, `[rows, seq]`. A negative position is padding."""
    return _text(torch.where(position < 0, PADDING_SEGMENT, 0), position.clamp_min(0))


class _Rows:
    """The samples of a packed row as a batch, a row a sample, that passes extend on the right.

    `start`, `question`, `thoughts`, `length` `[rows, 1]`: first column in the packed row, tokens of the question, continuous
    thoughts, tokens in all.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, spans: Sequence[Span]) -> None:
        self._model, self._ids, self._spans = model, ids, spans
        self.start, self.question, self.thoughts, self.length = (
            torch.tensor(values, device=ids.device).unsqueeze(1)
            for values in zip(*((s.start, s.question, s.block_size - 2, s.length) for s in spans), strict=True)
        )

    @property
    def end(self) -> torch.Tensor:
        """Offset of the end token in each row, `[rows, 1]`."""
        return self.question + 1 + self.thoughts

    def run_questions(self) -> torch.Tensor:
        """Run every question with its begin token, packed. Returns the hidden state of each begin token `[rows, 1, hidden]`."""
        device = self._ids.device
        counts = [span.question + 1 for span in self._spans]
        position = torch.cat([torch.arange(count) for count in counts]).to(device)
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
        first = torch.tensor(counts, device=device).cumsum(0).unsqueeze(1) - self.question - 1  # column of each question
        coordinates = _text(row.unsqueeze(0), position.unsqueeze(0))
        spans = tuple(Span(s, count, 0, 0, ()) for s, count in zip(first.flatten().tolist(), counts, strict=True))
        packed = DynamicCache()
        hidden = backbone(self._model)(
            input_ids=self._ids[self.start[row, 0] + position].unsqueeze(0),
            position_ids=coordinates.position,
            past_key_values=packed,
            use_cache=True,
            rim_layout=RowLayout(coordinates, coordinates, spans),
        )[0]
        # Padded on the left, so that all rows end with their begin token.
        widest = max(counts)
        position = torch.arange(widest, device=device) - (widest - 1 - self.question)
        columns = first + position.clamp_min(0)
        self._keys, self._cache = _padded_text(position), DynamicCache()
        for number, layer in enumerate(packed.layers):
            self._cache.update(*(t[0][:, columns].transpose(0, 1) for t in (layer.keys, layer.values)), number)
        return hidden[0, (first + self.question).squeeze(1)].unsqueeze(1)

    def run(self, position: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Last hidden states of `inputs` `[rows, seq, hidden]`, run at `position` `[rows, seq]` (negative: padding)."""
        queries = _padded_text(position)
        self._keys = TokenCoordinates(*(torch.cat(pair, dim=1) for pair in zip(self._keys, queries, strict=True)))
        return backbone(self._model)(
            inputs_embeds=inputs,
            position_ids=queries.position,
            past_key_values=self._cache,
            use_cache=True,
            rim_layout=RowLayout(queries, self._keys),
        )[0]

    def thought_position(self, number: int) -> torch.Tensor:
        """Position of the thought in each row, `[rows, 1]`; negative in rows with fewer thoughts."""
        return torch.where(number < self.thoughts, self.question + 1 + number, -1)

    def run_rest(self, number: int, state: torch.Tensor) -> torch.Tensor:
        """Run the last thought, fed `state` `[rows, 1, hidden]`, with end token and readout, padded on the right."""
        offset = self.end + torch.arange(int((self.length - self.end).max()), device=self._ids.device)
        inside = offset < self.length
        # The readout's position follows the end token's (`pack`), so that offset and position are the same.
        position = torch.cat([self.thought_position(number), torch.where(inside, offset, -1)], dim=1)
        rest = self._model.get_input_embeddings()(self._ids[torch.where(inside, self.start + offset, 0)])
        return self.run(position, torch.cat([state, rest], dim=1))


def thought_states(
    model: PreTrainedModel, input_ids: torch.Tensor, layout: RowLayout, column: torch.Tensor, thoughts: int
) -> torch.Tensor:
    """Last hidden states `[targets, hidden]` at `column`s (end tokens and readouts) of packed latent rows `[1, tokens]`.

    `thoughts`, at least 1: the most of any row, on any rank. Rows with fewer run padding, which is masked out.
    """
    rows = _Rows(model, input_ids[0], layout.spans)
    state = rows.run_questions()
    for number in range(thoughts - 1):
        state = rows.run(rows.thought_position(number), state)
    hidden = rows.run_rest(thoughts - 1, state)
    row = layout.queries.segment[0, column]
    return hidden[row, 1 + column - (rows.start + rows.end).squeeze(1)[row]]  # column 0 is the last thought
