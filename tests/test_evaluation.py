"""Evaluation: states, probe, ranking, stopping early, sampling, latency, significance, splits, and the commands."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import scipy.stats
import torch
from ranks import run
from safetensors.torch import load_file
from tiny_export import BLOCKS, write_model

from rim_dist.cli import main
from rim_dist.config import ColumnsSection
from rim_dist.data.samples import Sample
from rim_dist.errors import DataError
from rim_dist.evaluation.block_budgets import measure_budgets
from rim_dist.evaluation.comparison import compare_paired, mcnemar, read_answers, select_by_splits
from rim_dist.evaluation.early_exit import answer_stepwise, time_early_exit
from rim_dist.evaluation.evaluate import block_answers, evaluation_samples, sampled_pass_at_k, score, write_evaluation
from rim_dist.evaluation.latency import answer_place, measure_latency
from rim_dist.evaluation.loading import LoadedModel, load_for_evaluation
from rim_dist.evaluation.probe import Probe, auprc, auroc, chosen_blocks, exit_blocks, fit_probe, halves, judge_probe
from rim_dist.evaluation.scoring import extract_answer
from rim_dist.evaluation.states import block_states
from rim_dist.model.generation import Decoding, Sampling, answer_texts, generate_ids
from rim_dist.tokens import prompt_ids

DECODING = Decoding(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def export(folder: Path) -> LoadedModel:
    return load_for_evaluation(folder)


@pytest.fixture(scope="module")
def samples(export: LoadedModel) -> list[Sample]:
    """40 questions of unlike lengths; the target of three in four is what the model says after one of the blocks."""
    walks = evaluation_samples("synthetic", "auto", 40, ColumnsSection(), 4)
    questions = [w.question + " red" * (i % 3) for i, w in enumerate(walks)]
    answers = block_answers(export.model, export.tokenizer, questions, BLOCKS, DECODING)
    targets = [extract_answer(row[i % 4], "x") if i % 4 < BLOCKS else "" for i, row in enumerate(answers)]
    return [Sample(q, (), t or "nowhere", i) for i, (q, t) in enumerate(zip(questions, targets, strict=True), 1)]


@pytest.fixture(scope="module")
def questions_file(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": s.question, "answer": s.answer}) + "\n" for s in samples))
    return path


# ---- states, stopping early, sampling, latency ---------------------------------------------------------------


def test_states_of_all_blocks_from_one_prefill(export: LoadedModel) -> None:
    """The state after block k = the last state of a plain run of the prompt with k blocks."""
    questions = ["the black hall", "a door", "From the attic take red blue pink."]
    assert export.block_size == 4
    states = block_states(export, export.prompts(questions), 2)
    assert states.shape == (3, BLOCKS, export.model.config.hidden_size)
    for k in range(1, BLOCKS + 1):
        for i, prompt in enumerate(prompt_ids(export.tokenizer, questions, k)):
            with torch.no_grad():
                output = export.model(torch.tensor([prompt]), output_hidden_states=True)
            assert torch.allclose(output.hidden_states[-1][0, -1], states[i, k - 1], atol=1e-5)
            # What the head reads: the probe sees all that decides the first token.
            assert torch.allclose(export.model.lm_head(states[i, k - 1]), output.logits[0, -1], atol=1e-4)


def test_stopping_early_gives_the_answer_of_that_budget(export: LoadedModel, samples: list[Sample]) -> None:
    block = prompt_ids(export.tokenizer, ["?"], 1)[0][-export.block_size :]
    hidden = export.model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    probe = Probe(torch.zeros(hidden), torch.ones(hidden), torch.randn(hidden, generator=generator).double(), 0.0, 1.0)
    used = set()
    for sample in samples[:12]:
        (question,) = prompt_ids(export.tokenizer, [sample.question], 0)
        states = block_states(export, [question + block * BLOCKS])
        expected = int(exit_blocks(probe.probabilities(states), 0.7)[0]) + 1
        early = answer_stepwise(export, question, block, DECODING, probe, 0.7)
        whole = answer_stepwise(export, question, block, DECODING)
        assert (early.blocks, whole.blocks) == (expected, BLOCKS)
        for answer in (early, whole):
            prompts = prompt_ids(export.tokenizer, [sample.question], answer.blocks)
            assert answer.ids == generate_ids(export.model, export.tokenizer, prompts, DECODING)[0]
            assert 0 < answer.first_token_seconds <= answer.answer_seconds
        used.add(early.blocks)
    assert used == {1, 2, 3}


def test_sampled_answers_depend_on_the_seed_alone(export: LoadedModel, samples: list[Sample]) -> None:
    prompts = prompt_ids(export.tokenizer, [s.question for s in samples[:3]])
    draw = [
        generate_ids(export.model, export.tokenizer, prompts, DECODING, Sampling(4, temperature, seed))
        for temperature, seed in ((1.0, 0), (1.0, 0), (1.0, 1), (1e-4, 0))
    ]
    assert draw[0] == draw[1] != draw[2]
    assert len(draw[0]) == 12
    greedy = generate_ids(export.model, export.tokenizer, prompts, DECODING)
    assert draw[3] == [answer for answer in greedy for _ in range(4)]
    before = torch.get_rng_state()
    figures = sampled_pass_at_k(export, samples[:8], BLOCKS, DECODING, Sampling(3, 1e-4))
    assert torch.equal(torch.get_rng_state(), before)
    final = [a[-1] for a in block_answers(export.model, export.tokenizer, [s.question for s in samples[:8]], BLOCKS, DECODING)]
    accuracy = sum(extract_answer(t, "x").lower() == s.answer.lower() for t, s in zip(final, samples, strict=False)) / 8
    assert figures == {"1": accuracy, "2": accuracy, "3": accuracy}


def test_answers_are_read_as_the_recipe_wrote_them(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A model that knows four answers by heart writes `From the hall.`: right in training, `evaluate` and `blocks`."""
    data = tmp_path / "d.jsonl"
    rooms = {"red": "kitchen", "blue": "hall", "pink": "attic", "green": "garden"}
    data.write_text("".join(json.dumps({"question": f"take {q}", "answer": a}) + "\n" for q, a in rooms.items()))
    stages = {"stage1": {"samples": 16, "max_steps": 4}, "stage2": {"samples": 16 * 30, "learning_rate": 1e-2}}
    path = recipe_file(
        data={"source": "jsonl", "path": str(data), "answer_format": "From the {answer}."},
        curriculum=stages,
        checkpoint={"every_steps": 0},
        evaluation={"data": str(data), "max_new_tokens": 8},
        parallel={"preflight": False},
    )
    said = run("fork", 1, ["-m", "rim_dist", "train", str(path)]).stdout
    assert "warning: no sample has steps, and method rim learns from them: no row has the column steps" in said
    folder = tmp_path / "runs" / "tiny"
    for model in (folder / "hf", folder):
        assert load_for_evaluation(model).answer_format == "From the {answer}."
    output = str(tmp_path / "out")
    command = [str(folder / "hf"), str(data), "--samples", "4", "--timed", "1", "--max-new-tokens", "8", "--output", output]
    assert main(["evaluate", *command, "--sampled", "1", "--temperature", "0.01"]) == main(["blocks", *command]) == 0
    for written in (folder / "report", tmp_path / "out"):
        lines = [json.loads(line) for line in (written / "answers.jsonl").read_text().splitlines()]
        assert [line["text"] for line in lines] == [f"From the {room}." for room in rooms.values()]
        figures = json.loads((written / "evaluation.json").read_text())
        assert figures["per_block"] == [1.0, 1.0, 1.0]
    assert figures["pass_at_k"] == {"1": 1.0}
    budgets = json.loads((tmp_path / "out" / "blocks.json").read_text())["budgets"]
    assert [budget["accuracy"] for budget in budgets] == [1.0, 1.0, 1.0]
    loaded = load_for_evaluation(folder / "hf")
    hidden = loaded.model.config.hidden_size
    probe = Probe(torch.zeros(hidden), torch.ones(hidden), torch.zeros(hidden).double(), 0.0, 1.0)
    stepped = time_early_exit(loaded, evaluation_samples(str(data), "auto", 4, ColumnsSection()), probe, 0.9, Decoding(8))
    assert stepped["all_blocks"]["accuracy"] == stepped["early_exit"]["accuracy"] == 1.0


def test_where_an_answer_starts(export: LoadedModel) -> None:
    names = export.tokenizer
    steps = names("kitchen garden", add_special_tokens=False)["input_ids"]
    answer = names("#### hall", add_special_tokens=False)["input_ids"]
    place = answer_place(names, steps + answer)
    assert "#" not in names.decode((steps + answer)[:place])
    assert "#" in names.decode((steps + answer)[: place + 1])
    assert answer_place(names, answer) == 0
    assert answer_place(names, steps) == len(steps)  # no answer proper
    assert answer_place(names, []) == 0
    said = names("kitchen garden From the hall.", add_special_tokens=False)["input_ids"]
    assert names.decode(said[: answer_place(names, said, "From the {answer}.")]) == "kitchen garden"
    assert answer_place(names, said, "{answer}.") == 0


@pytest.mark.parametrize("family", ["GPT-2", "Qwen3", "Gemma 2", "OPT", "Cohere"])
def test_states_are_what_the_head_reads(family: str) -> None:
    """In families with other norms, scales and caps around the head: the probe and stopping early see the same state."""
    from families import BLOCK, build

    model = build(family).eval()
    prompts = [[7, 3, 9] + BLOCK * 2, [5] + BLOCK * 2]
    names: Any = SimpleNamespace(eos_token_id=93, pad_token_id=0, bos_token_id=None)
    states = block_states(LoadedModel(model, names, 2, len(BLOCK)), prompts)
    for i, prompt in enumerate(prompts):
        for k, ids in enumerate((prompt[: -len(BLOCK)], prompt)):
            with torch.no_grad():
                last = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert torch.allclose(states[i, k], last, atol=1e-5)


def test_latency(export: LoadedModel, samples: list[Sample]) -> None:
    prompts = prompt_ids(export.tokenizer, [s.question for s in samples[:4]])
    run = measure_latency(export.model, export.tokenizer, prompts, Decoding(4))
    assert 0 < run.first_token_seconds <= run.answer_start_seconds <= run.answer_seconds
    lengths = [len(ids) for ids in generate_ids(export.model, export.tokenizer, prompts, Decoding(4))]
    assert run.new_tokens == sum(lengths) / 4


# ---- ranking and probe ---------------------------------------------------------------------------------------


def brute_auroc(scores: Sequence[float], right: Sequence[bool]) -> float:
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, x), (b, y) in itertools.product(zip(scores, right, strict=True), repeat=2)
        if x and not y
    ]
    return sum(pairs) / len(pairs)


def brute_auprc(scores: Sequence[float], right: Sequence[bool]) -> float:
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [r for s, r in zip(scores, right, strict=True) if s >= threshold]
        new = sum(taken) / sum(right)
        total += (new - recall) * sum(taken) / len(taken)
        recall = new
    return total


@pytest.mark.parametrize("seed", range(5))
def test_areas_against_their_definitions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (30,), generator=generator) / 8  # many ties
    right = torch.rand(30, generator=generator) < scores * 0.6 + 0.2
    assert auroc(scores, right) == pytest.approx(brute_auroc(scores.tolist(), right.tolist()))
    assert auprc(scores, right) == pytest.approx(brute_auprc(scores.tolist(), right.tolist()))


def test_areas_by_hand() -> None:
    scores, right = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, False])
    assert auroc(scores, right) == 0.75
    assert auprc(scores, right) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert auroc(torch.ones(4), right) == 0.5
    assert auprc(torch.ones(4), right) == 0.5
    assert auroc(scores, torch.ones(4, dtype=torch.bool)) is None
    assert auprc(scores, torch.zeros(4, dtype=torch.bool)) is None


def planted(questions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States in which one direction says, up to noise, whether the answer is right."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(questions, BLOCKS, 16, generator=generator) * 3 + 5
    signal = states[..., 3] - 5 + torch.randn(questions, BLOCKS, generator=generator)
    return states, signal > 2


def test_probe_finds_a_planted_direction() -> None:
    states, right = planted(300, 0)
    probe = fit_probe(states, right)
    assert int(probe.weight.abs().argmax()) == 3
    others, truth = planted(200, 1)
    probabilities = probe.probabilities(others)
    figures = judge_probe(probabilities, truth)
    assert figures["auroc"] > 0.9
    assert abs(float(probabilities.mean()) - float(truth.double().mean())) < 0.05  # calibrated
    assert figures["selected"] > figures["final_block"] + 0.2
    assert figures["selected"] <= figures["any_block"]
    recoverable = figures["recoverable"]
    assert recoverable["questions"] == round(200 * figures["any_block"])
    assert recoverable["selected"] == pytest.approx(figures["selected"] / figures["any_block"])
    assert probe.penalty < 1  # a signal this clear is not shrunk away


def test_probe_minimises_its_loss() -> None:
    """At the fitted point the gradient of mean cross-entropy + penalty / 2 |w|^2 vanishes."""
    states, right = planted(60, 2)
    probe = fit_probe(states, right)
    rows = ((states.double() - probe.mean) / probe.scale).flatten(0, 1)
    residual = probe.probabilities(states).flatten() - right.flatten().double()
    assert float((rows.T @ residual / len(rows) + probe.penalty * probe.weight).abs().max()) < 1e-6
    assert abs(float(residual.mean())) < 1e-6


def test_probe_figures_before_scikit_learn() -> None:
    """What the project's own L-BFGS and its own areas gave on the same states."""
    probe = fit_probe(*planted(60, 2))
    others, truth = planted(40, 3)
    probabilities = probe.probabilities(others)
    assert probe.penalty == 0.001
    assert probe.weight[:4].tolist() == pytest.approx([-0.0276074514, 0.6292834356, -0.1304380204, 7.1580871837], abs=1e-5)
    assert probabilities[0].tolist() == pytest.approx([0.0341892151, 1.45143487e-6, 0.0994095194], abs=1e-6)
    figures = judge_probe(probabilities, truth)
    assert figures["auroc"] == pytest.approx(0.9626676332, abs=1e-9)
    assert figures["auprc"] == pytest.approx(0.8958386017, abs=1e-9)
    assert (figures["final_block"], figures["selected"], figures["any_block"]) == (0.325, 0.55, 0.6)
    assert [entry["blocks"] for entry in figures["early_exit"]] == pytest.approx([2.3, 2.35, 2.35, 2.35, 2.45, 2.5, 2.65])


def test_probe_of_one_right_question() -> None:
    """A fold has all right answers: scikit-learn refuses to fit the others. The figures are those of before."""
    states, right = planted(20, 0)
    right = torch.zeros_like(right)
    right[4] = True
    probe = fit_probe(states, right)
    assert (probe.penalty, probe.bias) == (1.0, pytest.approx(-2.948583505, abs=1e-5))


def test_probe_does_not_depend_on_threads() -> None:
    from threadpoolctl import threadpool_limits

    states, right = planted(300, 0)
    with threadpool_limits(1):
        one = fit_probe(states, right)
    with threadpool_limits(2):
        two = fit_probe(states, right)
    assert one.penalty == two.penalty
    assert torch.allclose(one.weight, two.weight, atol=1e-9)
    assert torch.equal(fit_probe(states, right).weight, fit_probe(states, right).weight)


def test_probe_refuses_what_teaches_nothing() -> None:
    states, right = planted(20, 0)
    with pytest.raises(DataError, match="none of its answers are right"):
        fit_probe(states, torch.zeros_like(right))
    with pytest.raises(DataError, match="all of its answers are right"):
        fit_probe(states, torch.ones_like(right))
    with pytest.raises(DataError, match="at least 5 questions"):
        fit_probe(states[:4], right[:4])


def test_choosing_and_stopping() -> None:
    p = torch.tensor([[0.1, 0.9, 0.9], [0.95, 0.2, 0.3], [0.1, 0.2, 0.3]])
    assert chosen_blocks(p).tolist() == [2, 0, 2]
    assert exit_blocks(p, 0.9).tolist() == [1, 0, 2]
    figures = judge_probe(p, torch.tensor([[False, True, False], [True, True, True], [False, False, False]]))
    early = {entry["confidence"]: entry for entry in figures["early_exit"]}
    assert early[0.9]["accuracy"] == pytest.approx(2 / 3)
    assert early[0.9]["blocks"] == pytest.approx(2)
    assert early[0.99]["saved"] == pytest.approx(0)
    learned, judged = halves(11)
    assert sorted(learned + judged) == list(range(11))
    assert len(learned) == 5


# ---- significance and splits ---------------------------------------------------------------------------------


def test_mcnemar_against_all_outcomes() -> None:
    """Two-sided: twice the chance of so few or fewer on the smaller side."""
    for a, b in ((0, 0), (1, 0), (3, 9), (9, 3), (5, 5)):
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=a + b)]
        expected = min(1.0, 2 * sum(x <= min(a, b) for x in outcomes) / len(outcomes))
        assert mcnemar(a, b) == pytest.approx(expected)


def test_paired_comparison() -> None:
    a, b = [True] * 60 + [False] * 40, [True] * 40 + [False] * 20 + [True] * 10 + [False] * 30
    result = compare_paired(a, b)
    assert (result.only_a, result.only_b) == (20, 10)
    assert result.difference == pytest.approx(0.1)
    # The normal approximation of the paired difference: sd = sqrt((20 + 10) / 100 - 0.1^2) / 10.
    half = 1.96 * math.sqrt(0.3 - 0.01) / 10
    assert result.low == pytest.approx(0.1 - half, abs=0.015)
    assert result.high == pytest.approx(0.1 + half, abs=0.015)
    # The general bootstrap over questions, which draws other samples.
    bootstrap = scipy.stats.bootstrap((numpy.array(a, float) - numpy.array(b),), numpy.mean, method="percentile", rng=0)
    assert (result.low, result.high) == pytest.approx(tuple(bootstrap.confidence_interval), abs=0.011)
    alone = compare_paired([True], [False])  # one question, which the general one refuses
    assert (alone.low, alone.high, alone.p_value) == (1, 1, 1)
    back = compare_paired(b, a)
    assert back.p_value == result.p_value
    same = compare_paired(a, a)
    assert (same.low, same.high, same.p_value) == (0, 0, 1)


def test_selection_over_splits() -> None:
    generator = torch.Generator().manual_seed(0)
    correct = [(torch.rand(1319, generator=generator) < share).tolist() for share in (0.3, 0.42, 0.41)]
    figures = select_by_splits(correct)
    assert figures.selection_questions == 264
    assert len(figures.accuracies) == 16
    assert 0 not in figures.chosen
    for chosen, accuracy in zip(figures.chosen, figures.accuracies, strict=True):
        assert accuracy == pytest.approx(sum(correct[chosen]) / 1319, abs=0.03)
    spread = math.sqrt(sum((a - figures.mean) ** 2 for a in figures.accuracies) / 15)
    assert figures.standard_error == pytest.approx(spread / 4)
    # A checkpoint that is right exactly where it is chosen gains nothing from it.
    assert select_by_splits([[True, False]] * 2).chosen == [0] * 16


# ---- commands ------------------------------------------------------------------------------------------------


def test_block_budgets(export: LoadedModel, samples: list[Sample]) -> None:
    budgets = [1, 2, 5]
    figures, probe = measure_budgets(export, samples, budgets, Decoding(4, 16), timed=4, confidence=0.8)
    questions = [s.question for s in samples]
    for entry in figures["budgets"]:
        prompts = prompt_ids(export.tokenizer, questions, entry["blocks"])
        texts = answer_texts(export.tokenizer, generate_ids(export.model, export.tokenizer, prompts, DECODING), DECODING)
        right = [extract_answer(t, s.answer).lower() == s.answer.lower() for t, s in zip(texts, samples, strict=True)]
        assert entry["accuracy"] == pytest.approx(sum(right) / len(right))
        assert entry["memory_tokens"] == 4 * entry["blocks"]
        assert entry["latency"]["questions"] == 4
    assert probe is not None
    assert figures["probe"]["learned_from"] == figures["probe"]["questions"] == 20
    assert figures["early_exit"]["all_blocks"]["blocks"] == BLOCKS
    assert figures["early_exit"]["early_exit"]["blocks"] <= BLOCKS
    _, judged = halves(40)
    per_block = torch.tensor(
        [[extract_answer(t, "x") == samples[i].answer for t in row] for i, row in zip(judged, block_answers(
            export.model, export.tokenizer, [samples[i].question for i in judged], BLOCKS, DECODING), strict=True)]
    )  # fmt: skip
    assert figures["probe"]["any_block"] == pytest.approx(float(per_block.any(1).double().mean()))


def test_evaluate_and_blocks_commands(
    folder: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = str(folder), str(questions_file)
    short = ["--max-new-tokens", "4", "--timed", "4"]
    out = tmp_path / "evaluation"
    arguments = ["evaluate", model, data, *short, "--timed-batch", "2", "--sampled", "2", "--output", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in ("accuracy, majority over blocks", "pass@2, sampled", "first token of the answer itself"):
        assert line in printed
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["questions"] == 40
    assert set(figures["pass_at_k"]) == {"1", "2"}
    assert figures["latency"]["batch"] == 2
    assert figures["method"] == "rim"
    assert "first_token_seconds_iqr" in figures["latency"]
    out = tmp_path / "blocks"
    assert main(["blocks", model, data, *short, "--probe-data", data, "--output", str(out)]) == 0
    assert "block by block, stopping early" in capsys.readouterr().out
    figures = json.loads((out / "blocks.json").read_text())
    assert [entry["blocks"] for entry in figures["budgets"]] == [1, 2, 3]
    assert figures["probe"]["questions"] == figures["probe"]["learned_from"] == 40
    assert (out / "blocks.png").stat().st_size > 10_000
    assert set(load_file(out / "probe.safetensors")) == {"mean", "scale", "weight"}
    assert main(["blocks", model, "synthetic", *short, "--samples", "8", "--output", str(out)]) == 0
    printed = capsys.readouterr()
    assert "no probe: " in printed.out
    assert "rim-dist blocks" not in printed.err
    # The earlier name of the command, for one release: it says its new name, and writes the files of that name.
    old = tmp_path / "old"
    assert main(["sweep", model, data, *short, "--samples", "8", "--output", str(old)]) == 0
    assert "`rim-dist sweep` is now `rim-dist blocks`" in capsys.readouterr().err
    assert {"sweep.json", "sweep.png"} <= {path.name for path in old.iterdir()}
    assert json.loads((old / "sweep.json").read_text())["questions"] == 8


def test_columns_of_a_file(folder: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a model was trained on can be asked without naming its columns again; another file's are named."""
    rows = [json.loads(line) for line in questions_file.read_text().splitlines()[:6]]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": r["question"], "result": r["answer"]}) + "\n" for r in rows))
    questions = [str(file), "--timed", "1", "--max-new-tokens", "4"]
    assert main(["evaluate", str(folder), *questions]) == 2
    assert f"{file}:1: missing column (question)" in capsys.readouterr().err
    named = ["--column", "question=prompt", "--column", "answer=result"]
    assert main(["evaluate", str(folder), *questions, *named, "--output", str(tmp_path / "a")]) == 0
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    about = json.loads((own / "rim_dist.json").read_text())
    about["recipe"] = {"data": {"columns": {"question": "prompt", "steps": None, "answer": "result"}}}
    (own / "rim_dist.json").write_text(json.dumps(about))
    assert main(["evaluate", str(own), *questions, "--output", str(tmp_path / "b")]) == 0
    first, second = (json.loads((tmp_path / x / "evaluation.json").read_text()) for x in "ab")
    assert first["questions"] == second["questions"] == 6
    assert first["per_block"] == second["per_block"]
    capsys.readouterr()
    for wrong in ("prompt", "text=prompt", "question="):
        assert main(["evaluate", str(folder), *questions, "--column", wrong]) == 2
        assert f"--column: {wrong!r} is not allowed; write FIELD=NAME with one of question, steps, answer" in (
            capsys.readouterr().err
        )


def test_latency_command(folder: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models side by side; a plain prompt of as many tokens beside each one with blocks."""
    direct = write_model(tmp_path / "direct", blocks=0, method="direct")
    arguments = ["latency", str(questions_file), str(folder), str(direct), "--timed", "4", "--max-new-tokens", "3"]
    assert main([*arguments, "--timed-batch", "2", "--output", str(tmp_path / "out")]) == 0
    assert "a plain prompt as long" in capsys.readouterr().out
    models = json.loads((tmp_path / "out" / "latency.json").read_text())["models"]
    rim, plain, without = models[str(folder)], models[f"{folder}: a plain prompt as long"], models[str(direct)]
    assert set(models) == {str(folder), f"{folder}: a plain prompt as long", str(direct)}
    assert rim["prompt_tokens"] == plain["prompt_tokens"] == without["prompt_tokens"] + BLOCKS * 4
    assert plain["new_tokens"] <= 1 < rim["new_tokens"]
    assert all(m["questions"] == 4 and m["batch"] == 2 and m["first_token_seconds"] > 0 for m in models.values())
    assert main([*arguments[:3], str(folder)]) == 2
    assert "the same one is given twice" in capsys.readouterr().err
    assert main([*arguments, "--timed-batch", "41"]) == 2
    assert "there are 40 questions" in capsys.readouterr().err


def test_questions_are_text(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line and on standard input; a byte order mark is read away."""
    command = ["generate", "--max-new-tokens", "3", str(folder)]
    half = b"red \xff".decode("utf-8", "surrogateescape")  # how Python hands over an argument that is not UTF-8
    assert main([*command, half]) == 2
    assert capsys.readouterr().err.endswith("rim-dist: question 1: 'red \\udcff' is not Unicode text\n")
    assert main([*command, "red"]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfred\n"), encoding="utf-8"))
    assert main(command) == 0
    assert capsys.readouterr().out == answer
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"red\n\xff\n"), encoding="utf-8"))
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("rim-dist: question: standard input is not text in utf-8\n")


def test_answers_that_no_model_can_write_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer of the embedded task knows no digits."""
    (tmp_path / "q.jsonl").write_text('{"question": "red", "answer": "hall"}\n{"question": "red", "answer": 7}\n')
    assert main(["evaluate", str(folder), str(tmp_path / "q.jsonl"), "--timed", "1", "--max-new-tokens", "3"]) == 0
    note = "warning: 1 of 2 answers to evaluate are only unknown text to the tokenizer; first in line 2\n"
    assert note in capsys.readouterr().err


def test_answers_with_other_line_ends_are_read_back(tmp_path: Path) -> None:
    samples = [Sample("one\u2028two\x85three\x0c", (), "72", 1), Sample("q", (), "hall", 2)]
    write_evaluation(score(samples, [["#### 72"], ["#### hall"]], "#### {answer}"), tmp_path, {})
    assert [answer["question"] for answer in read_answers(tmp_path)] == [sample.question for sample in samples]
    for line in (b"\xff", b"[" * 100_000, b'{"question": ' + b"9" * 5000 + b"}", b"{}"):
        (tmp_path / "answers.jsonl").write_bytes(line)
        with pytest.raises(DataError, match=r"answers\.jsonl:1: not an answer of an evaluation"):
            read_answers(tmp_path)


def test_compare_command(folder: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for k in (1, 3):
        names.append(str(tmp_path / str(k)))
        arguments = ["--blocks", str(k), "--timed", "1", "--max-new-tokens", "4", "--output", names[-1]]
        assert main(["evaluate", str(folder), str(questions_file), *arguments]) == 0
    capsys.readouterr()
    assert main(["compare", *names]) == 0
    printed = capsys.readouterr().out
    assert "p (McNemar)" in printed
    assert "final block, 40 questions" in printed
    assert main(["compare", "--select", *names]) == 0
    assert "chosen by 8 questions, 16 splits" in capsys.readouterr().out
    assert main(["compare", names[0]]) == 2
    assert "give two or more" in capsys.readouterr().err
    assert main(["compare", names[0], str(tmp_path)]) == 2
    assert "no answers.jsonl" in capsys.readouterr().err
    lines = (tmp_path / "1" / "answers.jsonl").read_text().splitlines()
    (tmp_path / "1" / "answers.jsonl").write_text("\n".join(lines[1:] + lines[:1]))
    assert main(["compare", *names]) == 2
    assert "question 1 of " in capsys.readouterr().err
    (tmp_path / "1" / "answers.jsonl").write_text("\n".join(lines[:3]))
    assert main(["compare", *names]) == 2
    assert "the same ones are needed" in capsys.readouterr().err
    (tmp_path / "1" / "answers.jsonl").write_text(lines[0] + "\n{}")
    assert main(["compare", *names]) == 2
    assert "answers.jsonl:2: not an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "MODEL", "DATA", "--timed-batch", "0"], "--timed-batch: 0 is not allowed"),
        (["evaluate", "MODEL", "DATA", "--timed-batch", "99"], "there are 40 questions"),
        (["evaluate", "MODEL", "DATA", "--sampled", "0"], "--sampled: 0 is not allowed"),
        (["evaluate", "MODEL", "DATA", "--temperature", "0"], "--temperature: 0 is not allowed"),
        (["evaluate", "MODEL", "DATA", "--output", "/proc/none/x"], "--output: /proc/none/x cannot be written"),
        (["evaluate", "NONE", "DATA"], "no such folder"),
        (["evaluate", "BARE", "DATA"], "its tokenizer has no chat template"),
        (["blocks", "MODEL", "DATA", "--output", "OUT", "--budgets", "1,x"], "--budgets: '1,x' is not allowed"),
        (["blocks", "MODEL", "DATA", "--output", "OUT", "--budgets", "0"], "--budgets: '0' is not allowed"),
        (
            ["blocks", "MODEL", "DATA", "--output", "OUT", "--budgets", "90"],
            "--budgets: 90 blocks of 4 tokens need 360 positions",
        ),
        (["blocks", "MODEL", "DATA", "--output", "OUT", "--confidence", "1"], "--confidence: 1 is not allowed"),
        (["blocks", "MODEL", "NONE", "--output", "OUT"], "no such file"),
        (["blocks", "PLAIN", "DATA", "--output", "OUT"], "this model has no memory blocks"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    folder: Path,
    questions_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"MODEL": folder, "DATA": questions_file, "NONE": tmp_path / "none", "OUT": tmp_path / "out"}
    if "PLAIN" in arguments:
        names["PLAIN"] = write_model(tmp_path / "plain", blocks=0, method="direct")
    if "BARE" in arguments:
        names["BARE"] = shutil.copytree(folder, tmp_path / "bare")
        (tmp_path / "bare" / "chat_template.jinja").unlink()
    assert main([str(names.get(a, a)) for a in arguments]) == 2
    assert message in capsys.readouterr().err
