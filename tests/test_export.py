"""The export against two other readings, DeepSpeed's zero_to_fp32 and peft's merge; strictness; every way to run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe, write_recipe
from ranks import ROOT, environment, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rim_dist.checkpoint.hf_export import load_module
from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.store import find_checkpoint
from rim_dist.checkpoint.workers import Workers
from rim_dist.cli import main
from rim_dist.errors import CheckpointError
from rim_dist.evaluation import verify
from rim_dist.files import damage_of, read_manifest, record_of, write_manifest
from rim_dist.recipe import load_recipe
from rim_dist.tokens import prompt_ids

FULL = [f"full{z}" for z in range(4)] + ["bf16-full0", "bf16-full1", "bf16-full3", "gpt2-full3"]
LORA = [f"lora{z}" for z in range(4)] + ["bf16-lora3", "gpt2-lora3"]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}


def recipe_of(folder: Path, kind: str) -> dict:
    model: dict = {"config": {**tiny_recipe(folder)["model"]["config"], "tie_word_embeddings": "3" not in kind}}
    if "gpt2" in kind:
        model = {"config": dict(GPT2)}
    if "lora" in kind:
        base = folder / ("gpt2-full3" if "gpt2" in kind else "full1") / "hf"
        model = {"config": None, "tokenizer": None, "init_from": str(base), "lora": {"rank": 4, "alpha": 8}}
    own = folder / f"{kind}.json"
    tree = json.loads((ROOT / "ds_configs" / f"zero{kind[-1]}.json").read_text())
    if kind[-1] == "3":
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}
    own.write_text(json.dumps(tree))
    return tiny_recipe(
        folder,
        run={"name": kind},
        model={**model, "dtype": "bf16" if "bf16" in kind else "fp32"},
        curriculum={
            "stage1": {"samples": 32, "learning_rate": 1e-2, "max_steps": 4},
            "stage2": {
                "samples": 16,
                "learning_rate": 1e-2,
                "attention_dropout": 0.1,
                "residual_dropout": 0.1,
                **({"lora_dropout": 0.1} if "lora" in kind else {}),
            },
        },
        optimizer={"weight_decay": 0.1},
        parallel={"zero_stage": int(kind[-1]), "deepspeed_config": str(own)},
        checkpoint={"every_steps": 1, "keep": 9},
        evaluation={"at_end": False, "every_steps": 2},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds, three steps each on two ranks."""
    folder = tmp_path_factory.mktemp("export")
    paths = [str(write_recipe(folder / f"{kind}.yaml", recipe_of(folder, kind))) for kind in FULL + LORA]
    run("fork", 2, ["tests/workers/train_many.py", *paths], timeout=500)
    return folder


def zero_to_fp32(checkpoint: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from rim_dist.training.engine import restricted_loading

    with restricted_loading(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [k for k in FULL + LORA if k[-1] != "0" and k != "lora1"])
def test_shards_are_read_as_zero_to_fp32_reads_them(runs: Path, kind: str) -> None:
    """Bit for bit, several groups and sub-groups, parameters cut between ranks. (With ZeRO-1 it leaves frozen ones out.)"""
    checkpoint = find_checkpoint(runs / kind)
    expected = zero_to_fp32(checkpoint)
    module = load_module(index_checkpoint(checkpoint))
    own = module.state_dict()
    assert own.keys() - expected.keys() <= {"lm_head.weight", *(n for n in own if "lm_head" in n)}
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor.float()), name


@pytest.mark.parametrize("kind", ["full0", "bf16-full0"])
def test_without_zero_the_optimizers_copy_counts(runs: Path, kind: str) -> None:
    checkpoint = find_checkpoint(runs / kind)
    state = torch.load(checkpoint / "engine" / "mp_rank_00_model_states.pt", weights_only=True)
    weights = load_module(index_checkpoint(checkpoint)).state_dict()
    for name, tensor in state["module"].items():
        assert torch.equal(weights[name].to(tensor.dtype), tensor), name
    if kind.startswith("bf16"):
        assert any(not torch.equal(weights[n], t.float()) for n, t in state["module"].items())


@pytest.mark.parametrize("kind", LORA)
def test_merged_as_peft_merges(runs: Path, tmp_path: Path, kind: str) -> None:
    assert main(["export", str(runs / kind), str(tmp_path / "out"), "--dtype", "fp32", "--max-shard-size", "20KB"]) == 0
    expected = load_module(index_checkpoint(find_checkpoint(runs / kind))).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    base = AutoModelForCausalLM.from_pretrained(load_recipe(runs / f"{kind}.yaml").model.init_from).state_dict()
    assert any(not torch.equal(base[name], tensor) for name, tensor in expected.items() if "embed" not in name)


def test_files_and_index(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(runs / "full1"), str(out), "--max-shard-size", "20KB", "--dtype", "bf16"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert "lm_head.weight" not in tensors
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(file.stat().st_size <= 20_000 + 2_000 or len(load_file(file)) == 1 for file in files)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert not damage_of(out, checksums=True)
    card = (out / "README.md").read_text()
    assert "are the rows 128, 129, 130 of 131 (tokenizer: 131 tokens). There are no padding rows." in card


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["full1", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("full3", "lora1"))])
def test_a_padded_vocabulary_answers_the_same(
    runs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding rows score as the memory token does, so greedy answers stay; training on from the folder works."""
    plain, padded = tmp_path / "plain", tmp_path / "padded"
    assert main(["export", str(runs / kind), str(plain)]) == 0
    assert main(["export", str(runs / kind), str(padded), "--pad-vocabulary", "64", "--verify"]) == 0
    assert json.loads((padded / "config.json").read_text())["vocab_size"] == 192
    a, b = load_file(plain / "model.safetensors"), load_file(padded / "model.safetensors")
    for name in a:
        assert torch.equal(a[name], b[name][: a[name].shape[0]] if a[name].ndim else b[name]), name
        if b[name].shape != a[name].shape:
            assert b[name].shape[0] == 192
            assert torch.equal(b[name][131:], a[name][129].expand(61, -1))
    assert "has 61 rows above the tokenizer's last token" in (padded / "README.md").read_text()
    answers = []
    for folder in (plain, padded):
        capsys.readouterr()
        assert main(["generate", str(folder), "From the attic take red blue pink.", "--every-block"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["export", str(runs / kind), str(tmp_path / "no"), "--pad-vocabulary", "0"]) == 2


@pytest.mark.timeout(400)
@pytest.mark.thorough
def test_every_way_to_run_it_writes_the_same(runs: Path, tmp_path: Path) -> None:
    """One process, three, MPI ranks; each also verified or inspected in a process that imports nothing of the trainer."""
    arguments = ["to-hf", str(runs / "lora3"), "--max-shard-size", "20KB"]
    script = str(ROOT / "tools" / "convert_checkpoint.py")

    def convert(name: str, *more: str) -> str:
        command = [sys.executable, script, *arguments[:2], str(tmp_path / name), *arguments[2:], *more]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=120).stdout

    assert "verified in plain transformers, 4 questions: largest difference" in convert("one", "--verify")
    convert("three", "--processes", "3")
    run("mpirun", 2, [script, *arguments[:2], str(tmp_path / "mpi"), *arguments[2:]])
    expected = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert len([n for n in expected if n.endswith(".safetensors")]) > 3
    for name in ("three", "mpi"):
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == expected
    failed = run("mpirun", 2, [script, *arguments[:2], "/proc/nothing"], check=False)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stdout


@pytest.mark.parametrize(
    "error", ["CheckpointError('only here')", pytest.param("ValueError('a bug')", marks=pytest.mark.thorough)]
)
def test_one_mpi_rank_that_fails_ends_all(runs: Path, tmp_path: Path, error: str) -> None:
    code = (
        "import os, sys\nfrom rim_dist.checkpoint import hf_export\nfrom rim_dist.cli import main\n"
        "from rim_dist.errors import CheckpointError\n"
        f"def fail(_): raise {error}\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': hf_export.index_checkpoint = fail\n"
        f"sys.exit(main(['export', {str(runs / 'full1')!r}, {str(tmp_path / 'out')!r}]))"
    )
    failed = run("mpirun", 2, ["-c", code], timeout=200, check=False)
    assert failed.returncode == (2 if "only" in error else 1)
    assert error.split("'")[1] in failed.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("plain_logits_here")
def test_verification_fails_where_it_should(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, weights that are no numbers (whose difference is none either), and nothing that could be asked."""
    checkpoint, out = find_checkpoint(runs / "full1"), tmp_path / "out"
    shutil.copytree(runs / "full1" / "hf", out)
    weights = load_file(out / "model.safetensors")
    for harm in (lambda t: t * 1.5, lambda t: t * float("nan")):
        save_file({**weights, "model.norm.weight": harm(weights["model.norm.weight"])}, out / "model.safetensors")
        with pytest.raises(CheckpointError, match="its logits are not the checkpoint's"):
            verify.verify_export(checkpoint, out)
    monkeypatch.setattr(verify, "model_positions", lambda _: 10)
    with pytest.raises(CheckpointError, match="no question with 3 blocks fits the model's 10 positions"):
        verify.verify_export(checkpoint, out)


@pytest.mark.usefixtures("plain_logits_here")
def test_verification_asks_with_blocks_where_the_method_has_any(runs: Path, tmp_path: Path) -> None:
    """Pause tokens have blocks as RiM has: a KeyError otherwise."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoint(runs / "full1"), checkpoint)
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: rim\n", "method: pause\n"))
    assert list(verify.verify_export(checkpoint, runs / "full1" / "hf").by_blocks) == [1, 2, 3]


def test_a_failed_export_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's own writer words a full disk as a plain Exception."""

    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert main(["export", str(runs / "full1"), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unmerged_and_adapter_alone(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base + adapter, and the adapter on the original base, compute what the merged folder computes."""
    from peft import PeftModel

    source = str(runs / "lora3")
    for name, flags in (("merged", []), ("parts", ["--no-merge-lora"]), ("adapter", ["--adapter-only"])):
        assert main(["export", source, str(tmp_path / name), "--dtype", "fp32", *flags]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    parts = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "parts"), tmp_path / "parts" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(runs / "full1" / "hf")
    alone = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor(prompt_ids(tokenizer, ["From the hall take red blue."]))
    with torch.no_grad():
        expected = merged(ids).logits
        for model in (parts.eval(), alone):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    back = tmp_path / "back"
    assert main(["convert", "merge-lora", str(tmp_path / "adapter"), str(runs / "full1" / "hf"), str(back)]) == 0
    assert main(["convert", "merge-lora", str(tmp_path / "parts" / "adapter"), str(tmp_path / "parts"), str(back)]) == 0
    a, b = load_file(back / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main(["export", str(runs / "full1"), str(tmp_path / "x"), "--no-merge-lora"]) == 2
    assert "was not trained with LoRA" in capsys.readouterr().err
    extracted = tmp_path / "extracted"
    arguments = [str(tmp_path / "merged"), str(runs / "full1" / "hf"), str(extracted), "--rank", "4"]
    assert main(["convert", "extract-lora", *arguments]) == 0
    assert "14 matrices, largest relative error" in capsys.readouterr().out
    assert main(["convert", "merge-lora", str(extracted), str(runs / "full1" / "hf"), str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(again[name], b[name], atol=1e-5) for name in b)


def test_choosing_a_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, step in ((["--stage", "1"], 2), (["--step", "1"], 1), ([], 3), (["--best"], 2)):
        out = tmp_path / "".join(flags)
        assert main(["export", str(runs / "full1"), str(out / "x"), *flags]) == 0
        assert json.loads((out / "x" / "rim_dist.json").read_text())["step"] == step
    assert main(["export", str(runs / "full1"), str(tmp_path / "y"), "--step", "7"]) == 2
    assert "no complete checkpoint of step 7; there are step-00000001" in capsys.readouterr().err
    assert main(["export", str(runs / "full1"), str(tmp_path / "y"), "--max-shard-size", "many"]) == 2


def test_a_tensor_too_few_or_too_many_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards rewritten, checksums and all: only the account of tensors can find it."""

    def tampered(kind: str, file: str, change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(find_checkpoint(runs / kind), copy / "step-00000001")
        path = copy / "step-00000001" / "engine" / file
        with torch.serialization.safe_globals([]):
            state = torch.load(path, weights_only=False)
        change(state)
        torch.save(state, path)
        records = read_manifest(copy / "step-00000001")
        write_manifest(copy / "step-00000001", {**records, f"engine/{file}": record_of(path)})
        assert main(["export", str(copy / "step-00000001"), str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    name = "model.layers.1.mlp.up_proj.weight"
    states = "mp_rank_00_model_states.pt"
    assert f"1 tensors missing, first {name}" in tampered("full0", states, lambda s: s["module"].pop(name))
    extra = tampered("full0", states, lambda s: s["module"].update({"model.extra": torch.zeros(2)}))
    assert "1 tensors unexpected, first model.extra" in extra
    shape = tampered("full0", states, lambda s: s["module"].update({name: torch.zeros(3, 32)}))
    assert f"{name} has shape (3, 32), the model's is (64, 32)" in shape
    kind = tampered("full0", states, lambda s: s["module"].update({name: torch.zeros(64, 32, dtype=torch.int64)}))
    assert f"{name} is torch.int64" in kind

    def cut(state: dict) -> None:
        groups = state["optimizer_state_dict"]["param_slice_mappings"]
        groups[0].pop(next(iter(groups[0])))

    lost = tampered("full1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", cut)
    assert "do not add up to its shape" in lost
    copy = tmp_path / "copy"
    shutil.rmtree(copy)
    shutil.copytree(find_checkpoint(runs / "full3"), copy / "step-00000001")
    shard = next((copy / "step-00000001" / "engine").glob("*rank_1*optim*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["export", str(copy / "step-00000001"), str(tmp_path / "out")]) == 2
    assert "damaged: engine/zero_pp_rank_1_mp_rank_00_optim_states.pt has other contents" in capsys.readouterr().err


def test_a_shard_runs_no_code(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    copy = tmp_path / "step-00000001"
    shutil.copytree(find_checkpoint(runs / "full0"), copy)
    path = copy / "engine" / "mp_rank_00_model_states.pt"
    torch.save({"module": Evil()}, path)
    records = read_manifest(copy)
    write_manifest(copy, {**records, "engine/mp_rank_00_model_states.pt": record_of(path)})
    assert main(["export", str(copy), str(tmp_path / "out")]) == 2
    assert "not a shard that can be read" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_inspect_and_diff(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(runs / "lora3"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["stage"], facts["step"], facts["degrees"]["data"], facts["lora_rank"]) == ("stage2", 3, 2, 4)
    assert facts["damage"] == ""
    assert facts["recipe"]["method"] == "rim"
    hf = runs / "full1" / "hf"
    assert main(["convert", "inspect", str(hf)]) == 0
    assert "integrity: intact" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(hf, copy)
    file = copy / "model.safetensors"
    tensor = read_folder_index(copy)["model.norm.weight"].ranges[0]
    data = bytearray(file.read_bytes())
    data[tensor.offset + 3] ^= 1
    file.write_bytes(data)
    assert main(["convert", "inspect", str(copy)]) == 1
    assert "integrity: model.safetensors has other contents" in capsys.readouterr().out
    assert main(["convert", "diff", str(hf), str(copy)]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["model.norm.weight"]
    assert main(["convert", "diff", str(hf), str(hf)]) == 0
    assert main(["convert", "diff", str(runs / "full1"), str(hf)]) == 1  # the folder says its dtype
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} <= {
        "config.dtype",
        "config.architectures",
        "config.use_cache",
    }


@pytest.mark.usefixtures("plain_logits_here")
def test_verify_finds_what_differs(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from rim_dist.errors import CheckpointError
    from rim_dist.evaluation.verify import verify_export

    monkeypatch.chdir(tmp_path)
    assert main(["export", str(runs / "full1"), "out"]) == 0
    checkpoint, out = find_checkpoint(runs / "full1"), tmp_path / "out"
    assert max(verify_export(checkpoint, out).by_blocks.values()) < 1e-5
    weights = load_file(out / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] *= 1.5  # one memory row
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="its logits are not the checkpoint's"):
        verify_export(checkpoint, out)
    template = out / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|mem|><|mem|>", "<|mem|>"))
    with pytest.raises(CheckpointError, match="renders question 1 with 1 blocks to other tokens"):
        verify_export(checkpoint, out)


def test_inspect_names_damaged_checkpoints_beside_the_one_it_shows(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "full0" / "checkpoints", tmp_path / "checkpoints")
    shard = tmp_path / "checkpoints" / "step-00000003" / "engine" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:100])
    assert main(["convert", "inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "step: 2\n" in output
    assert "damaged beside it: step-00000003: engine/mp_rank_00_model_states.pt has 100 bytes instead of" in output


def _later(path: str) -> str:
    time.sleep(0.5)
    Path(path).write_text("written")
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_done_meanwhile(processes: int, tmp_path: Path) -> None:
    """Once, here; if it fails no process is still writing when the error arrives."""
    shares = [(str(tmp_path / str(i)),) for i in range(processes)]
    workers, done = Workers(processes), []
    try:
        assert workers.run(_later, shares, lambda: done.append(1)) == [path for (path,) in shares]
        assert done == [1]
        for (path,) in shares:
            Path(path).unlink()

        def fail() -> None:
            raise CheckpointError("full")

        with pytest.raises(CheckpointError, match="full"):
            workers.run(_later, shares, fail)
        written = [Path(path).exists() for (path,) in shares]
        time.sleep(1)
        assert written == [Path(path).exists() for (path,) in shares]
    finally:
        workers.close()


def _killed(path: str) -> str:
    if path.endswith("0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return _later(path)


def test_killed_process_is_named(tmp_path: Path) -> None:
    workers = Workers(2)
    with pytest.raises(CheckpointError, match="one of the 2 processes that write has ended"):
        workers.run(_killed, [(str(tmp_path / "0"),), (str(tmp_path / "1"),)])
    workers.close()


def _workers_script(body: str) -> list[str]:
    code = f"""
import os, signal, sys, time
from rim_dist.checkpoint.workers import Workers

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background ignores it
    workers = Workers(2)
    workers.start()
{textwrap.indent(body, "    ")}
"""
    return [sys.executable, "-c", code]


def test_processes_end_with_who_started_them() -> None:
    body = "print(*{*workers.run(os.getpid, [(), ()])}, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    started = subprocess.run(_workers_script(body), check=False, capture_output=True, text=True, timeout=120)
    assert started.returncode == -signal.SIGKILL, started.stderr
    pids = [int(word) for word in started.stdout.split()]
    assert pids
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids}: still there"
        time.sleep(0.1)


def test_interrupt_from_the_keyboard_ends_all_with_one_message() -> None:
    body = "workers.run(time.sleep, [(100,), (100,)], lambda: print('began', flush=True))"
    started = subprocess.Popen(
        _workers_script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "began\n"
    os.killpg(started.pid, signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1, said
