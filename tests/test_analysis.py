"""What blocks do: principal components, attention mass, exchanged and left-out blocks, each against a slow way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import BLOCKS, write_model

from rim_dist.cli import main
from rim_dist.config import ColumnsSection
from rim_dist.evaluation.analysis import spaced
from rim_dist.evaluation.attention_mass import attention_mass
from rim_dist.evaluation.evaluate import evaluation_samples
from rim_dist.evaluation.loading import LoadedModel, load_for_evaluation
from rim_dist.evaluation.patching import exchange_blocks, exchanged_answers
from rim_dist.evaluation.states import principal_axes, project, variance_fractions
from rim_dist.model.generation import Decoding, answer_texts, generate_ids
from rim_dist.tokens import prompt_ids

SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def export(folder: Path) -> LoadedModel:
    return load_for_evaluation(folder)


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [s.question for s in evaluation_samples("synthetic", "auto", 24, ColumnsSection(), 4)]


def equally_long(export: LoadedModel, questions: list[str]) -> torch.Tensor:
    prompts = prompt_ids(export.tokenizer, questions, BLOCKS)
    lengths = [len(p) for p in prompts]
    most = max(set(lengths), key=lengths.count)
    return torch.tensor([p for p in prompts if len(p) == most])


def test_components_of_a_planted_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(12, 2, generator=generator, dtype=torch.float64)).Q.T
    places = torch.randn(30, 4, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 2.0], dtype=torch.float64)
    states = places @ axes + 3
    found = principal_axes(states.float())
    explained, found_axes = found.explained_variance_ratio_, torch.from_numpy(found.components_)
    assert sum(explained) == pytest.approx(1, abs=1e-6)
    assert explained[0] > explained[1]
    assert torch.allclose((found_axes @ axes.T).abs(), torch.eye(2, dtype=torch.float64), atol=0.2)
    back = project(found, states) @ found_axes + torch.from_numpy(found.mean_)
    assert torch.allclose(back, states, atol=1e-5)
    assert bool((found_axes.gather(1, found_axes.abs().argmax(dim=1, keepdim=True)) > 0).all())
    mirrored = torch.from_numpy(principal_axes(-states.float()).components_)
    assert torch.allclose(mirrored, found_axes, atol=1e-5)  # the sign is not the solver's whim


def test_variance_divides() -> None:
    generator = torch.Generator().manual_seed(0)
    block, question = torch.randn(1, 5, 8, generator=generator), torch.randn(40, 1, 8, generator=generator)
    shares = variance_fractions((block + 0 * question).expand(40, 5, 8))
    assert shares == pytest.approx({"blocks": 1, "questions": 0, "both": 0}, abs=1e-6)
    shares = variance_fractions(block * 0 + question)
    assert shares == pytest.approx({"blocks": 0, "questions": 1, "both": 0}, abs=1e-6)
    assert variance_fractions(block + question)["both"] == pytest.approx(0, abs=1e-6)
    mixed = variance_fractions(block * question)
    assert mixed["both"] > 0.3
    assert sum(mixed.values()) == pytest.approx(1)


def test_attention_mass_of_one_prompt_by_hand(export: LoadedModel, questions: list[str]) -> None:
    prompts = prompt_ids(export.tokenizer, [questions[0], "red " + questions[1], "a door"], BLOCKS)
    together = attention_mass(export, prompts)
    assert export.model.config._attn_implementation == "sdpa"
    layers = export.model.config.num_hidden_layers
    expected = torch.zeros(layers, BLOCKS, 1 + BLOCKS, dtype=torch.float64)
    export.model.set_attn_implementation("eager")
    for prompt in prompts:
        with torch.no_grad():
            weights = export.model(torch.tensor([prompt]), output_attentions=True).attentions
        question = len(prompt) - BLOCKS * SIZE
        for layer, weight in enumerate(weights):
            for k in range(BLOCKS):
                rows = weight[0, :, question + k * SIZE : question + (k + 1) * SIZE].mean(dim=(0, 1))
                parts = [
                    rows[:question].sum(),
                    *(rows[question + j * SIZE : question + (j + 1) * SIZE].sum() for j in range(BLOCKS)),
                ]
                expected[layer, k] += torch.stack(parts) / len(prompts)
    export.model.set_attn_implementation("sdpa")
    assert torch.allclose(together, expected, atol=1e-6)
    assert torch.allclose(together.sum(-1), torch.ones(layers, BLOCKS, dtype=torch.float64), atol=1e-6)
    assert float(together[:, 0, 2:].abs().max()) == 0  # no block sees a later one


def hooked_first_token(export: LoadedModel, row: torch.Tensor, donor: torch.Tensor, places: slice) -> int:
    """The first token of the answer to `row` when every layer's keys and values at `places` are those of `donor`'s run."""
    kept: dict[Any, torch.Tensor] = {}
    projections = [p for layer in export.model.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]

    def keep(module: Any, _inputs: Any, output: torch.Tensor) -> None:
        kept[module] = output[:, places].clone()

    def put(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, places] = kept[module]
        return output

    for hook, ids in ((keep, donor), (put, row)):
        handles = [p.register_forward_hook(hook) for p in projections]
        with torch.no_grad():
            logits = export.model(ids.unsqueeze(0)).logits[0, -1]
        for handle in handles:
            handle.remove()
    return int(logits.argmax())


def test_exchanged_blocks_against_hooks(export: LoadedModel, questions: list[str]) -> None:
    """One pass over the whole prompt in which later blocks see the donor's keys and values."""
    ids = equally_long(export, questions)[:8]
    donors = torch.arange(len(ids)).roll(-1)
    one = Decoding(1)
    texts = exchanged_answers(export, ids, donors, one)
    question = ids.shape[1] - BLOCKS * SIZE
    changed = 0
    for k in range(1, BLOCKS):
        places = slice(question + (k - 1) * SIZE, question + k * SIZE)
        first = [[hooked_first_token(export, ids[i], ids[donors[i]], places)] for i in range(len(ids))]
        assert texts[f"block {k}"] == answer_texts(export.tokenizer, first, one)
        changed += sum(a != b for a, b in zip(texts[f"block {k}"], texts["own"], strict=True))
    assert changed
    # The state that answers after the last block is the donor's.
    assert texts[f"block {BLOCKS}"] == texts["all"] == [texts["own"][d] for d in donors.tolist()]


def test_left_out_blocks_and_no_exchange(export: LoadedModel, questions: list[str]) -> None:
    ids = equally_long(export, questions)[:6]
    itself = torch.arange(len(ids))
    texts = exchanged_answers(export, ids, itself, Decoding(4))
    plain = [generate_ids(export.model, export.tokenizer, [row.tolist()], Decoding(4))[0] for row in ids]
    assert texts["own"] == answer_texts(export.tokenizer, plain, Decoding(4))
    for name in (*(f"block {k}" for k in range(1, BLOCKS + 1)), "all"):
        assert texts[name] == texts["own"]
    shorter = [generate_ids(export.model, export.tokenizer, [row[:-SIZE].tolist()], Decoding(4))[0] for row in ids]
    assert texts[f"without {BLOCKS}"] == answer_texts(export.tokenizer, shorter, Decoding(4))
    length, question = ids.shape[1], ids.shape[1] - BLOCKS * SIZE
    kept = [*range(question), *range(question + SIZE, length)]
    expected = []
    for row in ids:
        tokens, places = row[kept].tolist(), list(kept)
        answer: list[int] = []
        while len(answer) < 4:
            with torch.no_grad():
                logits = export.model(torch.tensor([tokens]), position_ids=torch.tensor([places])).logits[0, -1]
            if (token := int(logits.argmax())) == export.tokenizer.eos_token_id:
                break
            answer.append(token)
            tokens, places = [*tokens, token], [*places, length + len(answer) - 1]
        expected.append(answer)
    assert texts["without 1"] == answer_texts(export.tokenizer, expected, Decoding(4))


def test_exchange_fractions(export: LoadedModel, questions: list[str]) -> None:
    prompts = prompt_ids(export.tokenizer, questions, BLOCKS)
    figures = exchange_blocks(export, prompts, Decoding(4, 5))
    assert 0 < figures["pairs"] <= len(prompts)
    assert [entry["blocks"] for entry in figures["exchanged"]] == ["block 1", "block 2", "block 3", "all"]
    for entry in figures["exchanged"]:
        assert entry["own"] + entry["donor"] + entry["other"] == pytest.approx(1)
    assert [entry["block"] for entry in figures["left_out"]] == [1, 2, 3]
    alone = exchange_blocks(export, prompts[:1] * 3, Decoding(4))
    assert alone == {"pairs": 0, "exchanged": [], "left_out": []}  # equal answers say nothing


def test_spaced() -> None:
    assert spaced([1, 2, 3]) == [1, 2, 3]
    assert spaced(list(range(100)), 4) == [0, 33, 66, 99]


def test_analyse_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "analysis"
    arguments = ["analyse", str(folder), "synthetic", "--samples", "12", "--max-new-tokens", "3"]
    assert main([*arguments, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "attention to the question %" in printed
    assert "all blocks exchanged" in printed
    figures = json.loads((out / "analysis.json").read_text())
    assert len(figures["accuracy_per_block"]) == BLOCKS
    assert len(figures["attention"]["by_block"]) == BLOCKS
    assert "training" not in figures
    names = {"analysis.json", "states.png", "attention.png", "patching.png"}
    assert {p.name for p in out.iterdir()} == names
    assert all(p.stat().st_size > 1000 for p in out.iterdir())
    plain = write_model(tmp_path / "plain", blocks=0, method="direct")
    assert main(["analyse", str(plain), "synthetic", "--output", str(out)]) == 2
    assert "this model has no memory blocks" in capsys.readouterr().err
    assert main(["analyse", str(folder), "synthetic", "--samples", "1", "--output", str(tmp_path / "one")]) == 0
    assert "no exchanges" in capsys.readouterr().out
