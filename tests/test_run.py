"""Whole runs: both stages, export, answers, evaluation, LoRA, precision, offload, and what stops a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, partitioned
from oracle import train_one_process
from ranks import ROOT, run
from safetensors.torch import load_file, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_dist.checkpoint.store import complete_checkpoints
from rim_dist.cli import main
from rim_dist.data.synthetic import SyntheticTask
from rim_dist.evaluation.loading import load_for_evaluation
from rim_dist.metrics import read_metrics
from rim_dist.recipe import load_recipe

Make = Callable[..., Path]


def train(path: Path, *overrides: str, launcher: str = "fork") -> str:
    return run(launcher, 1, ["-m", "rim_dist", "train", str(path), *overrides]).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished tiny run."""
    from conftest import tiny_recipe, write_recipe

    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(
        folder,
        evaluation={"samples": 12, "max_new_tokens": 4, "every_steps": 3},
        logging={"tensorboard": True, "profile": [2, 3], "wandb": "offline"},
    )
    # A Python of its own: wandb waits at its exit for what it still writes.
    train(write_recipe(folder / "r.yaml", recipe), launcher="python")
    return folder / "tiny"


def test_a_run_writes_what_it_should(trained: Path) -> None:
    folders = "checkpoints hf report data tensorboard wandb"
    names = f"recipe.yaml plan.json ds_config.json preflight.json metrics.jsonl wandb_id {folders}"
    assert {p.name for p in trained.iterdir()} == set(names.split())
    assert {p.name for p in (trained / "report").iterdir()} >= {
        "curves.png",
        "evaluation.json",
        "answers.jsonl",
        "profile.json",
    }
    assert (trained / "report" / "curves.png").stat().st_size > 10_000
    lines = read_metrics(trained / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert [(line["stage"], line["step"]) for line in steps] == [("stage1", i) for i in range(1, 5)] + [
        ("stage2", i) for i in range(5, 9)
    ]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3, 6, 8]
    assert all(line["grad_norm"] > 0 and line["tokens"] > 0 and line["seconds"] > 0 for line in steps)
    assert steps[-1]["samples"] == 128
    assert len(steps[-1]["block_loss"]) == 3
    assert steps[-1]["operations"] > steps[0]["operations"] > 0
    assert list((trained / "tensorboard").glob("events*"))


def test_second_start_does_nothing(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != "lock"}
    assert main(["train", str(trained.parent / "r.yaml")]) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_export_answers_as_the_trainer_did(trained: Path) -> None:
    """Plain transformers, one question at a time, no rim_dist: the tokens of the trainer's own evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    model = AutoModelForCausalLM.from_pretrained(trained / "hf")
    answers = [json.loads(line) for line in (trained / "report" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    for answer in answers:
        for k, _ in enumerate(answer["answers"], 1):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": answer["question"]}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                rim_blocks=k,
            )
            output = model.generate(**prompt, max_new_tokens=4)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer["text"]


def test_export_is_a_plain_folder(trained: Path) -> None:
    files = {p.name for p in (trained / "hf").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "rim_dist.json",
    } <= files
    with safe_open(trained / "hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - tied, stored once
    config = json.loads((trained / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 131
    assert "rim" not in json.dumps(config)
    assert "curriculum:" in (trained / "hf" / "README.md").read_text()


def test_export_command_and_its_other_names(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), str(tmp_path / "a")]) == 0
    assert main(["convert", "to-hf", str(trained / "checkpoints" / "step-00000008"), str(tmp_path / "b")]) == 0
    subprocess.run(
        [os.sys.executable, "tools/convert_checkpoint.py", "to-hf", str(trained), str(tmp_path / "c")], check=True, cwd=ROOT
    )
    expected = load_file(trained / "hf" / "model.safetensors")
    for name in "abc":
        weights = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(weights[k], expected[k]) for k in expected)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert main(["export", str(trained), str(tmp_path / "full")]) == 2
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "d")]) == 2
    assert main(["export", str(trained), "/proc/nothing"]) == 2
    error = capsys.readouterr().err
    assert "already holds something else" in error
    assert "no such checkpoint" in error


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hf, question = str(trained / "hf"), "From the hall take red blue."
    assert main(["generate", hf, question]) == 0
    final = capsys.readouterr().out
    assert main(["generate", hf, question, "--every-block"]) == 0
    every = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in every] == ["block 1", "block 2", "block 3"]
    assert every[-1] == f"block 3: {final.strip()}"
    assert main(["generate", hf, question, "--blocks", "1"]) == 0
    assert every[0] == f"block 1: {capsys.readouterr().out.strip()}"
    monkeypatch.setattr("sys.stdin", iter([question + "\n", "\n", question + "\n"]))
    assert main(["generate", hf]) == 0
    assert capsys.readouterr().out == final * 2
    monkeypatch.setattr("sys.stdin", iter([]))
    for arguments in (
        ["generate", hf],
        ["generate", hf, question, "--blocks", "0"],
        ["generate", str(trained / "data"), question],
    ):
        assert main(arguments) == 2
    assert main(["generate", hf, question, "--max-new-tokens", "0"]) == 2


def test_damaged_models_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit of an export or of a checkpoint; what a user writes into the model card is no damage."""
    folder, question = tmp_path / "run", "From the hall take red."
    shutil.copytree(trained, folder)
    newest = complete_checkpoints(folder / "checkpoints")[-1]
    (folder / "hf" / "README.md").write_text("My own words.")
    for model in (folder / "hf", newest):
        assert main(["generate", str(model), question]) == 0
    weights = [folder / "hf" / "model.safetensors", next((newest / "engine").glob("*model_states.pt"))]
    for model, file in zip((folder / "hf", newest), weights, strict=True):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        capsys.readouterr()
        assert main(["generate", str(model), question]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"{model}: damaged" in said.err
        assert f"{file.name} has other contents than its manifest says" in said.err
    assert main(["generate", str(folder / "hf"), question, "--no-verify"]) == 0


def test_prompts_that_do_not_fit_are_refused(
    trained: Path, tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = str(trained / "hf")
    assert main(["generate", hf, "From the hall take red.", "--blocks", "60"]) == 2
    message = "--blocks: 60 blocks of 4 tokens need 240 positions; the model has 128, so at most 31 blocks fit"
    assert message in capsys.readouterr().err
    assert main(["generate", hf, "From the hall take red" + " red" * 20, "--blocks", "31"]) == 2
    assert "tokens with its memory blocks; the model has 128 positions" in capsys.readouterr().err
    questions = tmp_path / "long.jsonl"
    questions.write_text(json.dumps({"question": "red " * 130, "answer": "hall"}))
    assert main(["train", str(recipe_file(evaluation={"data": str(questions)}))]) == 2
    assert "the model has 128 positions" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_evaluate(trained: Path, tmp_path: Path, gsm8k: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = str(trained / "hf")
    assert (
        main(
            [
                "evaluate",
                hf,
                "synthetic",
                "--samples",
                "12",
                "--timed",
                "4",
                "--max-new-tokens",
                "4",
                "--output",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    assert "accuracy, final block" in capsys.readouterr().out
    figures = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    own = json.loads((trained / "report" / "evaluation.json").read_text())
    assert figures["per_block"] == own["per_block"]
    assert figures["accuracy"] == own["per_block"][-1]
    assert figures["any_block"] >= figures["accuracy"]
    assert 0 < figures["latency"]["first_token_seconds"] <= figures["latency"]["answer_seconds"] * 1.5
    assert len((tmp_path / "o" / "answers.jsonl").read_text().splitlines()) == 12
    assert main(["evaluate", hf, str(gsm8k), "--samples", "2", "--timed", "1", "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["questions"] == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "1"}\n{"question": "", "answer": "1"}')
    for data in ("synthetic:x", str(bad), str(tmp_path / "none")):
        assert main(["evaluate", hf, data]) == 2
    assert f"{bad}:2: no question" in capsys.readouterr().err
    assert main(["evaluate", hf, "synthetic", "--samples", "0"]) == 2


def test_checkpoints_are_asked_as_they_are(trained: Path, tmp_path: Path) -> None:
    """A checkpoint, or a run, stands for its export; analyse draws the states of all of a run's checkpoints."""
    short = ["synthetic", "--samples", "12", "--max-new-tokens", "4"]
    answers, weights = [], []
    for number, model in enumerate((trained / "hf", trained, trained / "checkpoints" / "step-00000006")):
        out = tmp_path / str(number)
        assert main(["evaluate", str(model), *short, "--timed", "1", "--output", str(out)]) == 0
        answers.append((out / "answers.jsonl").read_text())
        weights.append(load_for_evaluation(model).model.state_dict())
    assert answers[0] == answers[1] == (trained / "report" / "answers.jsonl").read_text()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[2].keys() == weights[0].keys()
    assert not torch.equal(weights[2]["model.norm.weight"], weights[0]["model.norm.weight"])
    assert main(["analyse", str(trained), *short, "--output", str(tmp_path / "a")]) == 0
    figures = json.loads((tmp_path / "a" / "analysis.json").read_text())
    names = [entry["checkpoint"] for entry in figures["training"]["checkpoints"]]
    assert names == sorted(p.name for p in (trained / "checkpoints").glob("step-*"))
    assert (tmp_path / "a" / "training.png").stat().st_size > 10_000


def test_training_and_template_ids_are_the_same(trained: Path, gsm8k: Path) -> None:
    """1,000 questions (fewer without real data): training's question and blocks = apply_chat_template's prompt."""
    from rim_dist.checkpoint.start import requirements_of
    from rim_dist.config import ColumnsSection
    from rim_dist.data.encoding import DataReport, encode
    from rim_dist.data.sources import read_file

    recipe = load_recipe(trained / "recipe.yaml", ["data.on_bad_sample=skip", "model.config.max_position_embeddings=100000"])
    requirements = requirements_of(recipe)
    rows = list(read_file(gsm8k, "gsm8k", ColumnsSection()))[:1000]
    tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    lines = {row.line: row for row in rows}
    encoded = list(encode(recipe, rows, requirements.tokenizer, requirements.tokens, 10**6, DataReport()))
    assert len(encoded) > 0.8 * len(rows)
    for sample in encoded:
        messages = [{"role": "user", "content": lines[sample.line].question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == sample.question + requirements.tokens.block * 3
        assert prompt.count(tokenizer.bos_token_id) == 1
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.count("<|mem_end|>") == 3
    assert text.endswith("<|mem_end|>")
    assert "<|mem" not in tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False)


@pytest.mark.timeout(300)
def test_starting_from_runs_checkpoints_and_exports(trained: Path, tmp_path: Path, recipe_file: Make) -> None:
    """A run, its checkpoint and its export are the same start; the trained memory rows are kept."""
    first = []
    for name in ("", "checkpoints/step-00000008", "hf"):
        path = recipe_file(
            run={"name": f"from-{name.partition('/')[0] or 'run'}"},
            model={"config": None, "tokenizer": None, "init_from": str(trained / name)},
            curriculum={"stage1": {"samples": 0}, "stage2": {"samples": 16}},
        )
        first.append(train_one_process(load_recipe(path))[0])
    assert first[0] == first[1] == first[2]


def test_starting_from_a_rim_model_does_not_add_its_blocks_again(trained: Path, recipe_file: Make) -> None:
    """K is the new recipe's, at every budget, and a baseline gets none, whatever the start's template appended."""
    from rim_dist.checkpoint.start import requirements_of
    from rim_dist.tokens import prompt_ids

    model = {"config": None, "tokenizer": None, "init_from": str(trained)}
    for method, blocks in (("rim", 2), ("rim", 5), ("direct", 0)):
        requirements = requirements_of(load_recipe(recipe_file(method=method, model=model, memory={"blocks": blocks})))
        for budget, expected in ((None, blocks), (0, 0), (1, 1 if blocks else 0)):
            (prompt,) = prompt_ids(requirements.tokenizer, ["From the hall take red."], budget)
            assert prompt.count(requirements.tokens.end) == expected


def test_begin_of_text_comes_once_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    """Also where only the tokenizer's post-processor adds it, as Llama 3 does; an export says which it is."""
    from tokenizers.processors import TemplateProcessing

    from rim_dist.checkpoint.hf_export import _save_tokenizer
    from rim_dist.config import MemorySection
    from rim_dist.data.synthetic import synthetic_tokenizer
    from rim_dist.tokens import add_memory_tokens, prompt_ids, set_chat_template

    for adds in (True, False):
        tokenizer = synthetic_tokenizer()
        tokenizer.chat_template = None
        single = "<s> $A" if adds else "$A"
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        add_memory_tokens(tokenizer, MemorySection(blocks=2))
        set_chat_template(tokenizer, MemorySection(blocks=2), 2)
        (prompt,) = prompt_ids(tokenizer, ["From the hall take red."])
        assert prompt.count(tokenizer.bos_token_id) == (1 if adds else 0)
        # llama.cpp's converter takes what the file does not say for true.
        _save_tokenizer(tokenizer, tmp_path / str(adds))
        assert json.loads((tmp_path / str(adds) / "tokenizer_config.json").read_text())["add_bos_token"] is adds
        again = AutoTokenizer.from_pretrained(tmp_path / str(adds))
        assert prompt_ids(again, ["From the hall take red."]) == [prompt]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("zero", "dtype", "ranks"), [(3, "fp32", 2), (1, "bf16", 1)])
def test_lora_trains_adapters_and_memory_rows_only(
    trained: Path, tmp_path: Path, recipe_file: Make, zero: int, dtype: str, ranks: int
) -> None:
    """Old rows and base weights stay, memory rows move, the merged export is plain; the steps are those of a bare loop."""
    start = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(
        trained / "hf", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    ).save_pretrained(start)
    AutoTokenizer.from_pretrained(trained / "hf").save_pretrained(start)
    path = recipe_file(
        run={"name": "lora"},
        model={"config": None, "tokenizer": None, "init_from": str(start), "dtype": dtype, "lora": {"rank": 4, "alpha": 8}},
        curriculum={
            "stage1": {"samples": 48, "max_steps": 4, "learning_rate": 1e-3},
            "stage2": {"samples": 48, "learning_rate": 1e-3, "lora_dropout": 0.1, "attention_dropout": 0.1},
        },
        parallel={"zero_stage": zero, **({"deepspeed_config": partitioned(tmp_path)} if zero == 3 else {})},
    )
    run("fork", ranks, ["-m", "rim_dist", "train", str(path)])
    before, after = (load_file(f / "model.safetensors") for f in (start, tmp_path / "runs" / "lora" / "hf"))
    assert before.keys() == after.keys()
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding][:-3], after[embedding][:-3])
    assert (before[embedding][-3:] != after[embedding][-3:]).any(dim=1).all()
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not torch.equal(before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"])
    if dtype == "fp32":
        lines = [m for m in read_metrics(tmp_path / "runs" / "lora" / "metrics.jsonl") if m["stage"] == "stage1"]
        expected = train_one_process(load_recipe(path, ["curriculum.stage2.samples=0", "run.name=bare"]))
        for line, (loss, norm) in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.zero_stage=3 parallel.offload=true",
        pytest.param("model.dtype=bf16 parallel.zero_stage=2 logging.wandb=off", marks=pytest.mark.thorough),
        pytest.param(
            "curriculum.normalisation=sample optimizer.weight_decay=0.1 curriculum.stage1.weights=absolute",
            marks=pytest.mark.thorough,
        ),
        "model.activation_checkpointing=true parallel.zero_stage=0 curriculum.stage1.targets=same_step",
        pytest.param(
            "model.activation_checkpointing=true model.activation_offload=true model.attention=dense",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "method=direct curriculum.stage1.schedule=cosine curriculum.stage2.schedule=linear", marks=pytest.mark.thorough
        ),
        "method=cot memory.blocks=0 curriculum.stage2.weight_power=0 evaluation.max_new_tokens=1",
    ],
)
def test_other_ways_to_train(recipe_file: Make, tmp_path: Path, overrides: str) -> None:
    """Each runs through both stages, falls, and exports a model that loads."""
    train(recipe_file(), "curriculum.stage1.samples=160", *overrides.split())
    lines = [m for m in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl") if m["kind"] == "train"]
    assert len(lines) == 14
    assert lines[9]["loss"] < lines[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny" / "hf")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.timeout(300)
def test_bidirectional_blocks_train_and_are_not_exported(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They learn and are evaluated as trained; no folder that a server would run otherwise comes out of it."""
    path = recipe_file(memory={"inside_block": "bidirectional"})
    train(path, "curriculum.stage1.samples=160")
    folder = tmp_path / "runs" / "tiny"
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[9]["loss"] < lines[0]["loss"]
    assert lines[-1]["kind"] == "evaluation"
    assert not (folder / "hf").exists()
    assert main(["train", str(path), "curriculum.stage1.samples=160"]) == 0  # finished: nothing to do
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "memory.inside_block=bidirectional, which no ordinary server can run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(300)
def test_mpirun_and_srun_variables(recipe_file: Make, tmp_path: Path) -> None:
    run("mpirun", 2, ["-m", "rim_dist", "train", str(recipe_file()), "run.name=mpi"])
    srun = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "77"}
    run("fork", 1, ["-m", "rim_dist", "train", str(recipe_file()), "run.name=slurm"], **srun)
    several = run(
        "fork",
        1,
        ["-m", "rim_dist", "train", str(recipe_file()), "run.name=x"],
        check=False,
        **srun,
        SLURM_STEP_NUM_NODES="2",
    )
    assert several.returncode == 2
    assert "MASTER_ADDR is not set" in several.stdout
    for name in ("mpi", "slurm"):
        assert (tmp_path / "runs" / name / "hf" / "config.json").is_file()


@pytest.mark.timeout(300)
def test_loss_that_is_not_finite_stops_the_run(trained: Path, tmp_path: Path, recipe_file: Make) -> None:
    """A model with a NaN for one word: the step and the lines of the samples are named, the checkpoint stays."""
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(trained / "hf"), str(broken)], check=True)
    model = AutoModelForCausalLM.from_pretrained(broken)
    tokenizer = AutoTokenizer.from_pretrained(broken)
    problems = list(SyntheticTask(1, 4).training(200, 0))
    (word,) = tokenizer("black", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("nan")
    # Untied, so that the NaN is in the input row alone and hits only the samples that have the word.
    model.config.tie_word_embeddings = False
    head = trained_head = AutoModelForCausalLM.from_pretrained(trained / "hf").get_output_embeddings().weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head)
    assert torch.isfinite(trained_head).all()
    model.save_pretrained(broken)
    path = recipe_file(
        model={"config": None, "tokenizer": None, "init_from": str(broken)},
        optimizer={"global_batch": 4},
        checkpoint={"every_steps": 1},
    )
    result = run("fork", 1, ["-m", "rim_dist", "train", str(path)], check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stdout
    assert "the loss is not finite in stage1, step" in result.stdout
    assert ("Nothing was saved yet" in result.stdout) == (not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*")))
    named = result.stdout.split("): ")[-1].split(". ")[0]
    assert named
    assert all("black" in problems[int(line) - 1].question for line in named.split(", "))


@pytest.mark.parametrize(
    ("sections", "overrides", "message"),
    [
        (
            {"memory": {"blocks": 40}},
            [],
            "memory.blocks: 40 blocks of 4 tokens need 160 positions; the model has 128, so at most 31",
        ),
        (
            {"memory": {"tokens_per_block": 100_000}},
            [],
            "memory.tokens_per_block: a block of 100002 tokens does not fit: the model has 128 positions",
        ),
        ({"optimizer": {"global_batch": 1}}, [], None),
        ({"model": {"config": {**TINY_MODEL, "model_type": "bloom"}}}, [], "bloom has no field"),
        ({"model": {"config": {**TINY_MODEL, "hiden_size": 3}}}, [], "llama has no field hiden_size"),
        ({"model": {"config": {"model_type": "stablelm"}}}, [], "layout did not reach"),
        ({"model": {"config": {"model_type": "nothing"}}}, [], "model.config"),
        ({"model": {"config": None, "init_from": "./nowhere"}}, [], "./nowhere: no such folder"),
        ({"model": {"config": None, "init_from": "nobody/nothing"}}, [], "cannot be loaded"),
        ({"model": {"tokenizer": "nowhere.model"}}, [], "nowhere.model: no such file"),
        ({"evaluation": {"data": "nowhere.jsonl"}}, [], "nowhere.jsonl: no such file"),
        ({"parallel": {"deepspeed_config": "nowhere.json"}}, [], "nowhere.json: no such file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    recipe_file: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict,
    overrides: list[str],
    message: str | None,
) -> None:
    if message is None:
        result = run("fork", 2, ["-m", "rim_dist", "train", str(recipe_file(**sections))], check=False)
        assert "optimizer.global_batch: 1 samples cannot be spread over 2 data ranks" in result.stdout
        return
    assert main(["train", str(recipe_file(**sections)), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_folder_of_another_run_is_refused(
    trained: Path, tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(trained.parent / "r.yaml"), "optimizer.global_batch=8"]) == 2
    assert "optimizer.global_batch: 16 there, 8 here" in capsys.readouterr().err
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("x")
    assert main(["train", str(recipe_file())]) == 2
    assert "not empty and not a run" in capsys.readouterr().err
    assert main(["train", str(recipe_file()), "run.output_dir=/proc/nothing"]) == 2
    assert "cannot be written" in capsys.readouterr().err.replace("is not a writable folder", "cannot be written")
    assert main(["train", str(recipe_file(run={"name": "half"})), "model.dtype=fp16"]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err


def test_checkpoint_of_other_ranks_or_another_model(trained: Path, tmp_path: Path) -> None:
    from rim_dist.checkpoint.hf_export import load_trained_model
    from rim_dist.checkpoint.store import find_checkpoint
    from rim_dist.errors import CheckpointError

    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    subprocess.run(["rm", "-r", str(copy / "hf")], check=True)
    recipe = (
        (copy / "recipe.yaml")
        .read_text()
        .replace(f"output_dir: {trained.parent}", f"output_dir: {tmp_path}")
        .replace("name: tiny", "name: copy")
    )
    (copy / "recipe.yaml").write_text(recipe)
    result = run("fork", 2, ["-m", "rim_dist", "train", str(copy / "recipe.yaml")], check=False)
    assert "saved by 1 ranks, this run has 2; start it with 1" in result.stdout
    checkpoint = find_checkpoint(copy)
    config = json.loads((checkpoint / "model" / "config.json").read_text())
    (checkpoint / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"tensors missing, first model.layers.2"):
        load_trained_model(checkpoint)
    (checkpoint / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"tensors unexpected, first model.layers.1"):
        load_trained_model(checkpoint)


def test_prefetch_fills_the_cache(recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_file(data={"synthetic": {"samples": 50, "max_steps": 4}, "cache_dir": str(tmp_path / "cache")})
    assert main(["prefetch", str(path)]) == 0
    assert "data: 50 of 50 rows" in capsys.readouterr().out
    assert list((tmp_path / "cache").glob("*/tokens.npy"))


def test_sentencepiece_file_as_tokenizer(recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare `.model` file beside other files: its own special tokens, no pad token, which generation says."""
    import sentencepiece

    from rim_dist.checkpoint.start import requirements_of

    words = [p.question for p in SyntheticTask(1, 4).training(300, 0)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "own"), vocab_size=64, hard_vocab_limit=False, minloglevel=2
    )
    path = recipe_file(model={"tokenizer": str(tmp_path / "own.model")})
    tokenizer = requirements_of(load_recipe(path)).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert "the tokenizer has no pad token; generation pads with '</s>', masked" in train(path)
    assert main(["generate", str(tmp_path / "runs" / "tiny" / "hf"), words[0]]) == 0
    assert "no pad token" in capsys.readouterr().err
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=64,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    assert main(["train", str(recipe_file(model={"tokenizer": str(tmp_path / "endless.model")})), "run.name=bad"]) == 2
    assert "the tokenizer has no end-of-text token" in capsys.readouterr().err
    (tmp_path / "bad.model").write_text("nothing")
    assert main(["train", str(recipe_file(model={"tokenizer": str(tmp_path / "bad.model")})), "run.name=bad"]) == 2
    assert "not a SentencePiece model" in capsys.readouterr().err
