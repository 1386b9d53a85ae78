"""Answers after every block from one prefix against separate plain runs at each budget, and how answers end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL
from families import BLOCK, FAMILIES, build
from ranks import run
from tiny_tokenizers import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rim_dist.attention.registration import use_plain_attention
from rim_dist.checkpoint.start import requirements_of
from rim_dist.cli import main
from rim_dist.data.synthetic import synthetic_tokenizer
from rim_dist.errors import ModelError
from rim_dist.evaluation.loading import load_for_evaluation
from rim_dist.evaluation.prefixes import prefix_coordinates
from rim_dist.evaluation.readouts import readout_ids
from rim_dist.model.generation import Decoding, Sampling, answer_texts, end_ids, generate_ids
from rim_dist.model.thinking import think_before_answers
from rim_dist.recipe import load_recipe

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


def plain_answer(model: Any, prompt: list[int], count: int, **settings: Any) -> list[int]:
    """New tokens of one prompt, as plain transformers generates them."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **settings
    )
    return output[0, len(prompt) :].tolist()


def test_every_end_of_the_models_generation_config_ends_an_answer() -> None:
    """Where transformers stops; the tokenizer's end-of-text, with which targets end, is one more."""
    model = lively("Llama")
    free = [plain_answer(model, q + BLOCK * k, 8) for q in QUESTIONS for k in (1, 2)]
    first, second, eos = free[0][2], free[3][4], free[5][5]
    model.generation_config.eos_token_id = [first, second]
    names = tokenizer(eos)
    seen = set()
    for k in (1, 2):
        expected = []
        for question in QUESTIONS:
            answer = plain_answer(model, question + BLOCK * k, 8, eos_token_id=[first, second, eos])
            expected.append(answer[:-1] if answer[-1] in (first, second, eos) else answer)
            seen.add(answer[-1])
        assert generate_ids(model, names, [q + BLOCK * k for q in QUESTIONS], Decoding(8, batch=3)) == expected
        by_budget = readout_ids(model, names, [q + BLOCK * 2 for q in QUESTIONS], len(BLOCK), [1, 2], Decoding(8))
        assert [row[k - 1] for row in by_budget] == expected
    assert len({first, second, eos} & seen) > 1
    model.generation_config.eos_token_id = first
    assert end_ids(model, names) == [eos, first]
    with pytest.raises(ModelError, match="no answer could ever end"):
        end_ids(SimpleNamespace(generation_config=None), SimpleNamespace(eos_token_id=None))


def test_decoding_takes_nothing_else_from_the_models_generation_config() -> None:
    """Greedy means the likeliest token; drawn answers come from the whole distribution."""
    model = lively("Llama")
    expected = generate_ids(model, tokenizer(NEVER), QUESTIONS, Decoding(6))
    ids = torch.tensor([QUESTIONS[1]])
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert expected[1] == ids[0, len(QUESTIONS[1]) :].tolist()
    settings = {"repetition_penalty": 9.0, "num_beams": 3, "top_p": 1e-6, "min_new_tokens": 9, "suppress_tokens": expected[1]}
    model.generation_config.update(**settings)
    assert plain_answer(model, QUESTIONS[1], 6) != expected[1]
    assert generate_ids(model, tokenizer(NEVER), QUESTIONS, Decoding(6)) == expected
    drawn = generate_ids(model, tokenizer(NEVER), QUESTIONS[:1], Decoding(6), Sampling(8, temperature=9.0))
    assert len(set(map(tuple, drawn))) > 1
    assert model.generation_config.top_p == settings["top_p"]


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "OPT"])  # learned positions fail beyond the last one
def test_an_answer_is_as_long_beside_a_longer_prompt_as_alone(family: str) -> None:
    model = lively(family)
    positions = model.config.max_position_embeddings
    blocks, size = 2, len(BLOCK)
    lengths = [positions - 3, 5, positions - 9, positions - 3, 7, positions - 1]
    questions = [[1 + (i * 7 + n) % 90 for i in range(n - blocks * size)] for n in lengths if n > blocks * size]
    questions += [[3, 5], [9, 4, 1]]
    prompts = [q + BLOCK * blocks for q in questions]
    limits = [min(20, positions - len(prompt)) for prompt in prompts]
    alone = [plain_answer(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert [len(answer) for answer in alone] == limits
    assert set(limits) == {3, 9, 1, 20}
    assert generate_ids(model, tokenizer(NEVER), prompts, Decoding(20, batch=8)) == alone
    by_budget = readout_ids(model, tokenizer(NEVER), prompts, size, [1, 2], Decoding(20, batch=8))
    assert [row[1] for row in by_budget] == alone
    one = [plain_answer(model, q + BLOCK, min(20, positions - len(q) - size)) for q in questions]
    assert [row[0] for row in by_budget] == one


def test_thoughts_do_not_shorten_the_answers_beside_them() -> None:
    model = lively("Llama")
    use_plain_attention(model)
    positions = model.config.max_position_embeddings
    prompts = [[1 + i % 90 for i in range(positions - 9)], [7, 3]]
    think_before_answers(model, 2, BLOCK[:3])
    alone = [generate_ids(model, tokenizer(NEVER), [prompt], Decoding(12))[0] for prompt in prompts]
    assert [len(answer) for answer in alone] == [9 - 4, 12]
    assert generate_ids(model, tokenizer(NEVER), prompts, Decoding(12)) == alone


def test_ranks_generate_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 gathers weights in every pass: a rank with fewer lengths near the end runs its last batch again."""
    model = lively("Llama")
    positions = model.config.max_position_embeddings
    prompts = [[1 + i % 90 for i in range(positions - 3)], [7, 3]]
    expected = generate_ids(model, tokenizer(NEVER), prompts, Decoding(4))
    calls = []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda **keywords: calls.append(keywords.pop("synced_gpus")) or plain(**keywords))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.fill_(5))  # another rank's batches
    assert generate_ids(model, tokenizer(NEVER), prompts, Decoding(4, synced_ranks=True)) == expected
    assert calls == [True] * 5


def write_base(folder: Path, **ends: Any) -> Path:
    """An HF folder as another trainer leaves it, with a turn's end besides end-of-text; `ends`: of its generation config."""
    names = byte_tokenizer("{{ messages[0]['content'] }}")
    names.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    fields = {name: value for name, value in TINY_MODEL.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=len(names), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    names.save_pretrained(folder)
    return folder


def test_ends_go_through_training_into_the_export(recipe_file: Any, tmp_path: Path) -> None:
    """A list of ends stays one: in checkpoint, evaluation and export; what is an ordinary token is left out and said."""
    eot = 2 + 256
    base = write_base(tmp_path / "base", eos_token_id=[eot, 1, 40])
    stage = {"samples": 8, "max_steps": 4}
    path = recipe_file(
        model={"config": None, "tokenizer": None, "init_from": str(base)},
        curriculum={"stage1": stage, "stage2": {"samples": 8}},
        optimizer={"global_batch": 8, "micro_batch_tokens": 2000},
        memory={"blocks": 2},
        evaluation={"samples": 2},
    )
    said = run("fork", 1, ["-m", "rim_dist", "train", str(path)]).stdout
    assert "note: eos_token_id 40 of the model is no special token" in said
    trained = tmp_path / "runs" / "tiny"
    for folder in (trained / "hf", trained / "checkpoints" / "step-00000002" / "model"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, eot]
    for place in (trained / "hf", trained):
        loaded = load_for_evaluation(place)
        assert end_ids(loaded.model, loaded.tokenizer) == [1, eot]
    # A model that writes nothing but the turn's end, in plain transformers and here.
    model, names = AutoModelForCausalLM.from_pretrained(trained / "hf").eval(), AutoTokenizer.from_pretrained(trained / "hf")
    model.lm_head = torch.nn.Linear(32, len(names))
    with torch.no_grad():
        model.lm_head.bias[eot] = 1e3
    prompt = names.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=False)
    assert model.generate(torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :].tolist() == [eot]
    assert generate_ids(model, names, [prompt], Decoding(5)) == [[]]


def test_ends_of_another_vocabulary_do_not_count(recipe_file: Any, tmp_path: Path, capsys: Any) -> None:
    base = write_base(tmp_path / "base", eos_token_id=[258, 1])
    byte_tokenizer("{{ messages[0]['content'] }}").save_pretrained(tmp_path / "other")
    model = {"config": None, "tokenizer": str(tmp_path / "other"), "init_from": str(base)}
    assert requirements_of(load_recipe(recipe_file(model=model))).ends == [1]
    (base / "generation_config.json").write_text('{"eos_token_id": ["<|eot|>"]}')
    assert main(["data", str(recipe_file(model={**model, "tokenizer": None}))]) == 2
    assert "eos_token_id ['<|eot|>'] is no token id or list of them" in capsys.readouterr().err


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
