"""Time to the first answer token, and answers after every block, on a model of SmolLM2-135M's size.

    python benchmarks/ttft.py [--quick]

Random weights and tokens: the time does not depend on them. Prompts of 80 tokens, batch size 1, generation as users call it
(transformers' generate; the project's decoding for every block), medians over prompts in turns after a warm-up.

- plain: a prompt of as many tokens as question and 8 blocks together, without blocks;
- rim: the question with 8 blocks of M = 2;
- chain of thought: the question, 37 tokens of thought, then the first answer token;
- one answer / every block: 5 answer tokens after the last block / after each of the 8.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import VOCABULARIES, block_ids, llama, publish, side_by_side

from rim_dist.evaluation.readouts import readout_ids
from rim_dist.model.generation import Decoding, generate_ids
from rim_dist.table import Table

QUESTION, BLOCKS, THOUGHT, ANSWER = 80, 8, 37, 5


class Tokenizer:
    """What generation asks of a tokenizer; nothing the model writes ends an answer."""

    pad_token_id, bos_token_id = 0, None

    def __init__(self, end: int) -> None:
        self.eos_token_id = end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 layers, 5 rounds, nothing written")
    options = parser.parse_args()
    layers, rounds = (6, 5) if options.quick else (30, 12)
    vocabulary = VOCABULARIES["49k"]
    model = llama(vocabulary, num_hidden_layers=layers, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.lm_head.weight[vocabulary - 4] = 0  # never the largest: no answer ends early
        model.lm_head.weight[:100] += 1
    tokenizer: Any = Tokenizer(vocabulary - 4)
    ids = block_ids(vocabulary, 2)
    memory = BLOCKS * len(ids)
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, vocabulary - 4, (length,), generator=generator).tolist()

    question = prompt(QUESTION)

    def generate(tokens: list[int], count: int) -> None:
        (answer,) = generate_ids(model, tokenizer, [tokens], Decoding(count, batch=1))
        assert len(answer) == count

    def every_block() -> None:
        (answers,) = readout_ids(
            model, tokenizer, [question + ids * BLOCKS], len(ids), range(1, BLOCKS + 1), Decoding(ANSWER, batch=1)
        )
        assert [len(a) for a in answers] == [ANSWER] * BLOCKS

    plain = prompt(QUESTION + memory)
    seconds = side_by_side(
        {
            "plain": lambda: generate(plain, 1),
            "rim": lambda: generate(question + ids * BLOCKS, 1),
            "chain of thought": lambda: generate(question, THOUGHT + 1),
            "one answer": lambda: generate(question + ids * BLOCKS, ANSWER),
            "every block": every_block,
        },
        rounds,
        warmup=3,
    )
    lines = [[name, f"{1000 * value:.1f}", f"{value / seconds['rim']:.2f}"] for name, value in seconds.items()]
    text = f"{layers} layers of SmolLM2-135M, fp32, question of {QUESTION} tokens, K = {BLOCKS}, M = 2, {rounds} rounds.\n\n"
    text += Table(["", "ms", "x rim"], lines).markdown()
    text += f"\nEvery block against one answer: {seconds['every block'] / seconds['one answer']:.2f}x.\n"
    publish("ttft", "Time to the first token", text, seconds, options.quick)


if __name__ == "__main__":
    main()
