"""Answers after every block from one prefix against separate plain runs at each budget, and how answers end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import BLOCK, FAMILIES, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_dist.attention.registration import use_plain_attention
from rim_dist.data.synthetic import synthetic_tokenizer
from rim_dist.evaluation.prefixes import prefix_coordinates
from rim_dist.evaluation.readouts import readout_ids
from rim_dist.model.generation import Decoding, answer_texts, generate_ids

QUESTIONS = [[7, 3, 9], [1, 2, 3, 4, 5, 6, 7, 8], [11], [13, 14, 15]]

NEVER = 93  # an end that these models do not write


def lively(family: str) -> Any:
    """A model whose answers differ from prompt to prompt: with weights of the usual spread it repeats one token."""
    model = build(family).eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def tokenizer(eos: int) -> Any:
    """What generation asks of a tokenizer."""
    return SimpleNamespace(eos_token_id=eos, eos_token="</s>", pad_token_id=0, bos_token_id=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_from_one_prefix(family: str) -> None:
    """The same answers, token by token, as a plain run for every budget; batches of prompts of unlike lengths."""
    blocks = 4
    model = lively(family)
    prompts = [q + BLOCK * blocks for q in QUESTIONS]
    first = readout_ids(model, tokenizer(NEVER), prompts, len(BLOCK), range(1, blocks + 1), Decoding(6, batch=4))
    answers = [answer for row in first for answer in row]
    ends = {token: len({[*a, token].index(token) for a in answers}) for a in answers for token in a}
    eos = max(ends, key=lambda token: ends[token])  # a token that ends answers at different lengths
    names = tokenizer(eos)
    got = readout_ids(model, names, prompts, len(BLOCK), range(1, blocks + 1), Decoding(6, batch=3))
    assert model.config._attn_implementation in ("sdpa", "eager")  # as a server runs it, for whoever comes next
    for k in range(1, blocks + 1):
        plain = [generate_ids(model, names, [q + BLOCK * k], Decoding(6, batch=1))[0] for q in QUESTIONS]
        assert [row[k - 1] for row in got] == plain, f"after block {k}"
    assert len({len(answer) for row in got for answer in row}) > 1


def test_first_logits_are_the_plain_ones() -> None:
    """The scores of the first token after every block, not only their order."""
    model = build("Llama").eval()
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _m, _a, output: seen.append(output.logits))
    readout_ids(model, tokenizer(NEVER), [QUESTIONS[1] + BLOCK * 3], len(BLOCK), [1, 2, 3], Decoding(2))
    hook.remove()
    assert [t.shape[1] for t in seen] == [3, 3]  # one prefill for all budgets, then a token of each
    use_plain_attention(model)
    for k in (1, 2, 3):
        ids = torch.tensor([QUESTIONS[1] + BLOCK * k])
        with torch.no_grad():
            plain = model(ids).logits[0, -1]
            ids = torch.cat([ids, plain.argmax().view(1, 1)], dim=1)
            second = model(ids).logits[0, -1]
        assert torch.allclose(seen[0][0, k - 1], plain, atol=1e-5)
        assert torch.allclose(seen[1][0, k - 1], second, atol=1e-5)


def test_some_budgets_only_and_the_model_end() -> None:
    model = build("GPT-2").eval()
    room = model.config.n_positions - len(BLOCK) * 3
    question = [5] * (room - 2)
    got = readout_ids(model, tokenizer(NEVER), [question + BLOCK * 3], len(BLOCK), [1, 3], Decoding(50))
    plain = [generate_ids(model, tokenizer(NEVER), [question + BLOCK * k], Decoding(50))[0] for k in (1, 3)]
    assert got[0] == plain
    assert [len(answer) for answer in got[0]] == [10, 2]  # each up to the model's last position


def test_bidirectional_blocks_are_decoded_as_trained() -> None:
    """Scores under the layout that training used; they differ from a causal server's."""
    from rim_dist.attention.registration import use_rim_attention
    from rim_dist.data.rows import pack
    from rim_dist.data.samples import Readout, Row

    model = build("Llama").eval()
    question = QUESTIONS[1]
    prompts = [question + BLOCK * 3, [9] + BLOCK * 3]
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _m, _a, output: seen.append(output.logits))
    answers = [
        readout_ids(model, tokenizer(NEVER), prompts, len(BLOCK), [2, 3], Decoding(4), variant)[0] for variant in (False, True)
    ]
    hook.remove()
    assert float((seen[0] - seen[len(seen) // 2]).abs().max()) > 1e-2  # the prefills differ
    use_rim_attention(model, "split")
    for answer, k in zip(answers[1], (2, 3), strict=True):
        batch = pack([Row(question, 3, len(BLOCK), (Readout(k, answer, 1.0),))], BLOCK, bidirectional=True)
        with torch.no_grad():
            logits = model(batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False).logits
        assert logits[0, batch.targets.column].argmax(-1).tolist() == answer


def test_stop_texts() -> None:
    names = synthetic_tokenizer()
    torch.manual_seed(0)
    config = build("Llama").config
    config.vocab_size = len(names)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [names("the black hall")["input_ids"] + names("a door")["input_ids"] * 2]
    size = len(names("a door")["input_ids"])
    whole = readout_ids(model, names, prompts, size, [1, 2], Decoding(8))[0]
    text = names.decode(whole[1], skip_special_tokens=True)
    word = text[len(text) // 2 :][:3]  # whatever a random model says
    decoding = Decoding(8, stop=(word,))
    cut = readout_ids(model, names, prompts, size, [1, 2], decoding)[0]
    plain = generate_ids(model, names, prompts, decoding)[0]
    assert len(cut[1]) < len(whole[1])
    assert answer_texts(names, [cut[1], plain], decoding) == [text.partition(word)[0]] * 2


def test_prefix_coordinates() -> None:
    coordinates = prefix_coordinates([5, 7], 2, 2)
    assert coordinates.segment.tolist() == [[-1, -1, 0, 0, 0, 0, 0], [0] * 7]
    assert coordinates.kind.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert coordinates.block.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 2
    assert coordinates.position.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


def test_a_family_without_the_mask_answers_at_every_budget(tmp_path: Any) -> None:
    """Budgets one by one where the family cannot share a prefix."""
    from transformers import BloomConfig

    from rim_dist.config import MemorySection
    from rim_dist.evaluation.evaluate import block_answers
    from rim_dist.tokens import add_memory_tokens, set_chat_template

    names = synthetic_tokenizer()
    memory = MemorySection(blocks=2)
    add_memory_tokens(names, memory)
    set_chat_template(names, memory, 2)
    names.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=len(names), hidden_size=16, n_layer=2, n_head=2)).eval()
    answers = block_answers(model, AutoTokenizer.from_pretrained(tmp_path), ["the black hall"], 2, Decoding(3))
    assert [len(row) for row in answers] == [2]
