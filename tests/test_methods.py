"""The baselines: their rows, continuous thoughts against slow runs without a cache, and Coconut on real ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, partitioned, tiny_recipe, write_recipe
from families import FAMILIES, TRAINED_ON_CPU, build
from oracle import thought_loss, train_one_process
from ranks import run
from test_generation import lively, tokenizer
from test_objective import ANSWER, EOS, QUESTION_IDS, SAMPLE, STEPS, recipe_of

import rim_dist.methods
from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.cli import main
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.data.rows import pack
from rim_dist.data.samples import EncodedSample, Readout, Row
from rim_dist.errors import ConfigError, DataError
from rim_dist.evaluation.evaluate import evaluate_model, evaluation_samples
from rim_dist.evaluation.loading import load_for_evaluation
from rim_dist.methods import method_names, method_of
from rim_dist.methods.base import StageProgress
from rim_dist.metrics import read_metrics
from rim_dist.model.generation import Decoding, generate_ids
from rim_dist.model.thinking import think_before_answers
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.recipe import load_recipe
from rim_dist.training.trainer import prepare_run

BLOCK = [94, 95, 96]


# ---- rows ----------------------------------------------------------------------------------------------------


def test_pause_row() -> None:
    """As many tokens before the answer as RiM has at inference; nothing is predicted before the last one."""
    for stage in ("stage1", "stage2"):
        row = method_of(recipe_of("pause")).row(SAMPLE, StageProgress(stage))  # type: ignore[arg-type]
        assert (row.blocks, row.block_size) == (2, 3)
        assert row.readouts == (Readout(2, ANSWER, 1.0),)


def test_one_stage_only() -> None:
    """Stage 1 only and stage 2 only are recipes of rim."""
    first = method_of(recipe_of("rim", {"stage2": {"samples": 0}}))
    second = method_of(recipe_of("rim", {"stage1": {"samples": 0}}))
    assert {len(row.readouts) for row in first.longest_rows(SAMPLE)} == {len(STEPS)}
    assert {row.readouts[0].target is ANSWER for row in second.longest_rows(SAMPLE)} == {True}


def chain(*steps: list[int]) -> list[int]:
    return [token for step in steps for token in step[:-1]] + ANSWER


@pytest.mark.parametrize(
    ("stage", "fraction", "thoughts", "written"),
    [
        ("stage1", 0.0, 0, STEPS),
        ("stage1", 0.33, 0, STEPS),
        ("stage1", 1 / 3, 2, STEPS[1:]),
        ("stage1", 2 / 3, 4, STEPS[2:]),
        ("stage1", 0.99, 4, STEPS[2:]),
        ("stage2", 0.0, 4, []),
    ],
)
def test_coconut_rows(stage: str, fraction: float, thoughts: int, written: list[list[int]]) -> None:
    """Two latent stages of two thoughts a step: question, begin, thoughts, end, the rest of the chain."""
    method = method_of(recipe_of("coconut", coconut={"max_latent_stage": 2}))
    row = method.row(SAMPLE, StageProgress(stage, fraction))  # type: ignore[arg-type]
    assert (row.latent, row.thoughts, row.blocks, row.block_size) == (True, thoughts, 1, thoughts + 2)
    (readout,) = row.readouts
    assert list(readout.target) == chain(*written)
    batch = pack([row], [90, 91, 92], thoughts=thoughts)
    assert batch.input_ids[0].tolist() == [*QUESTION_IDS, 90, *[91] * thoughts, 92, *chain(*written)[:-1]]
    assert batch.position_ids[0].tolist() == list(range(batch.tokens))
    first = len(QUESTION_IDS) + thoughts + 1  # the end token predicts the first token after it
    assert batch.targets.column.tolist() == list(range(first, batch.tokens))


def test_coconut_stages_by_epochs_and_alone() -> None:
    by_epochs = method_of(recipe_of("coconut", coconut={"epochs_per_stage": 0.5, "max_latent_stage": 2}))
    stages = [by_epochs.phase(StageProgress("stage1", epochs=e)) for e in (0.0, 0.49, 0.5, 1.0, 7.0)]
    assert stages == [0, 0, 1, 2, 2]
    assert by_epochs.phase(StageProgress("stage2")) == 3
    alone = method_of(recipe_of("coconut", {"stage2": {"samples": 0}}, coconut={"max_latent_stage": 2}))
    assert [alone.phase(StageProgress("stage1", fraction=s)) for s in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]
    kept = method_of(recipe_of("coconut", coconut={"reset_optimizer": False}))
    assert {kept.phase(StageProgress("stage1", fraction=s)) for s in (0.0, 0.5, 0.9)} == {0}


def test_mixed_stages_are_drawn_from_the_samples_own_steps() -> None:
    """`uniform_prob`: stages 0 .. T alike, the same at every call; the others keep the schedule's stage."""
    method = method_of(recipe_of("coconut", coconut={"max_latent_stage": 2, "c_thought": 1, "uniform_prob": 0.4}))
    samples = [EncodedSample(QUESTION_IDS, STEPS, ANSWER, line) for line in range(4000)]
    rows = [method.row(sample, StageProgress("stage1", 0.4, step=9)) for sample in samples]
    assert rows == [method.row(sample, StageProgress("stage1", 0.4, step=9)) for sample in samples]
    count = Counter((row.thoughts, len(row.readouts[0].target)) for row in rows)
    # T = 3: stage 3 has no steps left and, as the last stage, two thoughts
    stages = [(0, len(chain(*STEPS))), (1, len(chain(*STEPS[1:]))), (2, len(chain(*STEPS[2:]))), (2, len(chain()))]
    assert [count[stage] / 4000 for stage in stages] == pytest.approx([0.1, 0.7, 0.1, 0.1], abs=0.03)
    assert rows != [method.row(sample, StageProgress("stage1", 0.4, step=10)) for sample in samples]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"memory": {"tokens_per_block": 0}}, "memory.tokens_per_block: 0 is not allowed with method coconut"),
        ({"model": {"config": dict(TINY_MODEL), "tokenizer": "synthetic", "activation_checkpointing": True}}, "keeps a cache"),
        ({"memory": {"inside_block": "bidirectional"}}, "memory.inside_block: .*with method coconut: causal"),
        ({"parallel": {"sequence": 2}}, "parallel.sequence: .*with method coconut: 1"),
        ({"coconut": {"c_thought": 0}}, "coconut.c_thought: 0 is not allowed"),
        ({"coconut": {"max_latent_stages": 2}}, r"did you mean coconut.max_latent_stage\?"),
    ],
)
def test_coconut_refuses(recipe_file: Any, sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(method="coconut", **sections))


NEW_METHOD = '''
"""Answers twice: after the first block and after the last one."""

from rim_dist.methods.base import Method


class Twice(Method):
    uses_blocks = True
    answer_factor = 2

    def row(self, sample, progress):
        blocks = self.recipe.memory.blocks
        return self.block_row(sample.question, blocks, [(1, sample.answer, 0.5), (blocks, sample.answer, 0.5)])


METHOD = Twice
'''


def test_a_new_method_is_one_file(tmp_path: Path, recipe_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in `rim_dist/methods` is enough for a recipe to name it, for its data, its rows and its prompts."""
    (tmp_path / "twice.py").write_text(NEW_METHOD)
    monkeypatch.setattr(rim_dist.methods, "__path__", [*rim_dist.methods.__path__, str(tmp_path)])
    recipe = load_recipe(recipe_file(method="twice", evaluation={"max_new_tokens": 5}))
    requirements, data = prepare_run(recipe)
    assert requirements.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).count("<|mem|>") == 0
    prompt = requirements.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.count("<|mem|>") == 2 * recipe.memory.blocks
    plan = plan_stages(recipe, len(data))[0]
    rank_batch = BatchLoader(recipe, data, requirements.tokens, 0, 1).rank_batch(plan, 0)
    assert {*rank_batch.micro_batches[0].targets.block.tolist()} == {1, recipe.memory.blocks}
    assert method_of(recipe).answer_tokens == 10
    with pytest.raises(ConfigError, match="allowed: coconut, cot, direct, pause, rim, twice"):
        load_recipe(recipe_file(method="thrice"))


@pytest.mark.parametrize("method", method_names())
def test_data_shows_every_method(method: str, recipe_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(recipe_file(method=method, coconut={"max_latent_stage": 2})), "--show", "1", "--tokens"]) == 0
    text = capsys.readouterr().out
    assert text.count("sample 1") == (4 if method == "coconut" else 2)  # one of each latent stage
    assert text.count("thought ") == (2 + 4 + 4 if method == "coconut" else 0)


# ---- continuous thoughts ---------------------------------------------------------------------------------------


def latent_rows() -> list[Row]:
    """Questions and readouts of unlike lengths, 0 to 3 thoughts, unlike weights."""
    pick = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 94, (count,), generator=pick).tolist()

    shapes = [(5, 2, 4, 1.0), (9, 0, 1, 0.5), (2, 3, 7, 1.0), (5, 2, 4, 2.0), (3, 1, 2, 1.0)]
    return [Row(tokens(q), 1, n + 2, (Readout(1, tokens(t), w),), latent=True) for q, n, t, w in shapes]


@pytest.mark.parametrize("kernel", TRAINED_ON_CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_equal_slow_runs(family: str, kernel: str) -> None:
    """Loss and all gradients of a packed micro-batch against one sample at a time without a cache, fp32."""
    check_thoughts(family, kernel, latent_rows(), 3)
    check_thoughts(family, kernel, latent_rows(), 4)  # another rank's rows may need more passes
    check_thoughts(family, kernel, [Row(row.question, 1, 2, row.readouts, latent=True) for row in latent_rows()], 0)


def check_thoughts(family: str, kernel: str, rows: list[Row], thoughts: int) -> None:
    model = build(family).eval()
    use_plain_attention(model)
    wanted = sum((thought_loss(model, row, BLOCK) for row in rows), torch.zeros(()))
    wanted.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install_readout_loss(model)
    use_rim_attention(model, kernel)
    loss, _ = run_batch(model, pack(rows, BLOCK, thoughts=thoughts))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in model.named_parameters():
        if name in expected:
            assert float((p.grad - expected[name]).abs().max()) <= 1e-5 * largest, name
    embedding = model.get_input_embeddings().weight.grad
    assert not embedding[BLOCK[1]].any() or model.config.tie_word_embeddings  # a thought is no vocabulary row


@pytest.mark.parametrize("thoughts", [0, 3])
def test_no_module_runs_without_a_gradient(thoughts: int) -> None:
    """ZeRO-3 keeps the graph of a module call whose backward never comes: memory would grow with every step."""
    model = build("Llama")
    install_readout_loss(model)
    use_rim_attention(model, "split")
    calls = {"forward": 0, "backward": 0}

    def came_back(_gradient: torch.Tensor) -> None:
        calls["backward"] += 1

    def ran(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        calls["forward"] += 1
        output.register_hook(came_back)

    leaves = [module for module in model.base_model.modules() if not [*module.children()] and [*module.parameters()]]
    for module in leaves:
        module.register_forward_hook(ran)
    rows = [row for row in latent_rows() if row.thoughts <= thoughts]
    run_batch(model, pack(rows, BLOCK, thoughts=thoughts))[0].backward()
    assert calls["forward"] == calls["backward"]
    passes = thoughts + 1
    assert calls["forward"] == passes * (len(leaves) - 1) + (2 if thoughts else 1)  # the embedding: first and last pass


def test_thoughts_are_passed_on() -> None:
    """The input of a thought is not the memory token's row, and the number of thoughts matters."""
    model = build("Llama").eval()
    install_readout_loss(model)
    use_rim_attention(model, "split")
    (row, *_) = latent_rows()
    with torch.no_grad():
        losses = [
            float(run_batch(model, pack([Row(row.question, 1, n + 2, row.readouts, latent=True)], BLOCK, thoughts=n))[0])
            for n in (0, 1, 2)
        ]
        plain = float(run_batch(model, pack([Row(row.question, 1, 4, row.readouts)], BLOCK))[0])
    assert len({round(value, 4) for value in (*losses, plain)}) == 4


def slow_answer(model: Any, prompt: list[int], thoughts: int, count: int, eos: int) -> list[int]:
    """Greedy decoding after continuous thoughts, everything again for every token."""
    embed = model.get_input_embeddings()
    states = embed(torch.tensor([[*prompt, BLOCK[0]]]))
    for _ in range(thoughts):
        states = torch.cat([states, model.base_model(inputs_embeds=states, use_cache=False)[0][:, -1:]], dim=1)
    states = torch.cat([states, embed(torch.tensor([[BLOCK[2]]]))], dim=1)
    answer: list[int] = []
    while len(answer) < count:
        token = int(model(inputs_embeds=states, use_cache=False).logits[0, -1].argmax())
        if token == eos:
            break
        answer.append(token)
        states = torch.cat([states, embed(torch.tensor([[token]]))], dim=1)
    return answer


QUESTIONS = [[7, 3, 9], [1, 2, 3, 4, 5, 6, 7, 8], [11], [13, 14, 15]]


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma 2", "Qwen3"])
def test_answers_after_thoughts(family: str) -> None:
    """`generate` in batches of unlike prompts gives, token by token, what slow decoding gives."""
    model = lively(family)
    use_plain_attention(model)
    with torch.no_grad():
        wanted = {n: [slow_answer(model, q, n, 6, eos=93) for q in QUESTIONS] for n in (0, 3)}
    assert wanted[0] != wanted[3]
    for thoughts, answers in wanted.items():
        think_before_answers(model, thoughts, BLOCK)  # the second call replaces the first
        assert generate_ids(model, tokenizer(93), QUESTIONS, Decoding(6, batch=3)) == answers


def test_thoughts_leave_room_for_the_answer() -> None:
    """An answer ends at the model's last position; a prompt that leaves none is refused; samples keep their prompt."""
    model = lively("Llama")
    use_plain_attention(model)
    think_before_answers(model, 3, BLOCK)
    long = [[1 + i % 90 for i in range(120)]]
    assert len(generate_ids(model, tokenizer(EOS), long, Decoding(50))[0]) <= 128 - 125
    with pytest.raises(DataError, match="130 tokens with its continuous thoughts; the model has 128 positions"):
        generate_ids(model, tokenizer(EOS), [long[0] + [1] * 5], Decoding(5))
    prompts = torch.tensor([[7, 3], [4, 5]])
    torch.manual_seed(0)
    drawn = model.generate(input_ids=prompts, max_new_tokens=4, do_sample=True, num_return_sequences=3, pad_token_id=0)
    assert drawn[:, :2].tolist() == prompts.repeat_interleave(3, dim=0).tolist()
    assert drawn.shape[1] <= 2 + 4


# ---- a run -------------------------------------------------------------------------------------------------------


def coconut_like(folder: Path, zero: int, tensor: int = 1) -> dict:
    """Latent stages 0, 1 and 2 of two steps each, then the last one; mixed stages."""
    extra = {"deepspeed_config": partitioned(folder)} if zero == 3 else {}
    return tiny_recipe(
        folder,
        method="coconut",
        run={"name": f"zero{zero}-tensor{tensor}"},
        data={"synthetic": {"samples": 200, "min_steps": 1, "max_steps": 4}},
        coconut={"max_latent_stage": 2, "c_thought": 2, "uniform_prob": 0.3},
        curriculum={
            "stage1": {"samples": 6 * 16, "learning_rate": 1e-3, "max_steps": 4, "warmup_fraction": 0.5},
            "stage2": {"samples": 2 * 16 - 3, "learning_rate": 5e-4},
        },
        parallel={"zero_stage": zero, "tensor": tensor, "timeout_seconds": 120, **extra},
        checkpoint={"every_steps": 5},
    )


@pytest.mark.timeout(400)
@pytest.mark.thorough
def test_coconut_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    """ZeRO-0 to 3, two tensor ranks, LoRA: every step's loss and gradient norm against a bare loop of slow runs."""
    trees = [coconut_like(tmp_path, zero, tensor) for zero, tensor in [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2)]]
    adapted = coconut_like(tmp_path, 3)
    adapted["run"] = {**adapted["run"], "name": "lora"}
    adapted["model"] = {"init_from": str(tmp_path / "zero1-tensor1"), "lora": {"rank": 4, "alpha": 8}}
    recipes = [write_recipe(tmp_path / f"{tree['run']['name']}.yaml", tree) for tree in (*trees, adapted)]
    run("fork", 2, ["tests/workers/train_many.py", *map(str, recipes)], timeout=350)
    full = train_one_process(load_recipe(recipes[0]))
    references = dict.fromkeys(recipes[:-1], full) | {recipes[-1]: train_one_process(load_recipe(recipes[-1]))}
    for path, reference in references.items():
        lines = [m for m in read_metrics(tmp_path / path.stem / "metrics.jsonl") if m["kind"] == "train"]
        assert len(lines) == len(reference) == 8
        for line, (loss, norm) in zip(lines, reference, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-5), path.stem
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-5), path.stem
    # The export: evaluated with its thoughts, as in training; its card says that servers cannot.
    folder = tmp_path / "zero3-tensor1" / "hf"
    about = json.loads((folder / "rim_dist.json").read_text())
    assert (about["blocks"], about["thoughts"]) == (0, 4)
    assert "cannot feed that back" in (folder / "README.md").read_text()
    export = load_for_evaluation(folder)
    recipe = load_recipe(tmp_path / "zero3-tensor1.yaml")
    samples = evaluation_samples("synthetic", "auto", 8, recipe.data.columns, 4)
    result = evaluate_model(export, samples, export.blocks, Decoding(3, 8), timed_questions=2)
    answers = [json.loads(line) for line in (tmp_path / "zero3-tensor1" / "report" / "answers.jsonl").read_text().splitlines()]
    given = {a["question"]: a["text"] for a in answers}
    assert given == {a["question"]: a["text"] for a in result.answers}
    # A checkpoint as it is, without an export.
    checkpoint = load_for_evaluation(tmp_path / "zero3-tensor1" / "checkpoints" / "step-00000008")
    again = evaluate_model(checkpoint, samples, checkpoint.blocks, Decoding(3, 8), timed_questions=1)
    assert again.answers == result.answers
    assert result.latency["first_token_seconds"] > 0
