"""What a folder holds is what is trained, asked and converted, as plain transformers reads it; or it is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_recipe, write_recipe
from families import FAMILIES, SIZES
from ranks import run
from safetensors.torch import load_file, save_file
from tiny_export import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_dist.attention.registration import use_plain_attention
from rim_dist.checkpoint.pretrained import open_pretrained
from rim_dist.checkpoint.start import model_of, requirements_of
from rim_dist.checkpoint.store import find_checkpoint
from rim_dist.cli import main
from rim_dist.errors import CheckpointError, ModelError
from rim_dist.evaluation.verify import verify_export
from rim_dist.methods import method_names
from rim_dist.recipe import load_recipe
from rim_dist.unwrap import bare_model

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]
WEIGHTS = "model.safetensors"
MATRIX = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama with its tokenizer."""
    return write_model(tmp_path_factory.mktemp("plain") / "model")


def changed(folder: Path, out: Path, change: Change | None = None, **config: object) -> Path:
    """A copy of a folder with other tensors, or other fields of its configuration."""
    shutil.copytree(folder, out)
    if change is not None:
        save_file(change(load_file(out / WEIGHTS)), out / WEIGHTS, {"format": "pt"})
    file = out / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return out


def saved(config: transformers.PretrainedConfig, out: Path, auto: type = AutoModelForCausalLM) -> transformers.PreTrainedModel:
    """A random model of a family, saved by transformers."""
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    model.save_pretrained(out)
    return model


def without(name: str) -> Change:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def named(prefix: str) -> Change:
    return lambda tensors: {prefix + n: t for n, t in tensors.items()}


def with_tensors(**more: torch.Tensor) -> Change:
    return lambda tensors: {**tensors, **{name.replace("__", "."): t for name, t in more.items()}}


def recipe_from(folder: Path, out: Path, **sections: object) -> Path:
    model = {"config": None, "tokenizer": None, "init_from": str(folder), **sections.pop("model", {})}  # type: ignore[dict-item]
    return write_recipe(out / "recipe.yaml", tiny_recipe(out / "runs", model=model, **sections))


def start_of(folder: Path, out: Path, **sections: object) -> Tensors:
    """The tensors that a run starts with, whatever its rows of memory tokens."""
    recipe = load_recipe(recipe_from(folder, out, **sections))
    return model_of(recipe, requirements_of(recipe)).state_dict()


DOORS = ["train", "train LoRA", "train ZeRO-3", "data", "evaluate", "generate", "from-hf", "merge-lora", "extract-lora"]


def go_through(door: str, folder: Path, out: Path) -> int:
    """The exit status of a command that reads the folder."""
    recipe = str(recipe_from(folder, out))
    result = str(out / "result")
    if door == "merge-lora":
        adapter = out / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        save_file({}, adapter / "adapter_model.safetensors")
        return main(["convert", door, str(adapter), str(folder), result])
    commands = {
        "train": ["train", recipe],
        "train LoRA": ["train", recipe, "model.lora={rank: 2, alpha: 4}"],
        "train ZeRO-3": ["train", recipe, "parallel.zero_stage=3"],
        "data": ["data", recipe],
        "evaluate": ["evaluate", str(folder), "synthetic", "--samples", "2"],
        "generate": ["generate", str(folder), "From the attic take red."],
        "from-hf": ["convert", "from-hf", str(folder), result, "--recipe", recipe],
        "extract-lora": ["convert", "extract-lora", str(folder), str(folder), result, "--rank", "1"],
    }
    return main(commands[door])


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_a_model_without_its_head(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str
) -> None:
    folder = changed(plain, tmp_path / "model", without(HEAD))
    assert go_through(door, folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{folder}: its tensors are not those of the model: 1 missing ({HEAD})" in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "result").exists()


INT8 = torch.zeros(64, 32, dtype=torch.int8)
UNKNOWN: dict[str, tuple[Change, str]] = {
    "a matrix missing": (without(MATRIX), f"1 missing ({MATRIX})"),
    "a tensor too many": (with_tensors(v_head__weight=torch.zeros(3)), "1 unexpected (v_head.weight); what the model does not"),
    "too few rows": (
        lambda t: {**t, EMBEDDING: t[EMBEDDING][:90].contiguous()},
        f"{EMBEDDING} has shape (90, 32), the model's",
    ),
    "codes": (lambda t: {**t, MATRIX: INT8}, f"1 not of floating point ({MATRIX}); are they codes"),
    "an adapter inside": (
        lambda t: {**t, MATRIX.replace("weight", "lora_A.default.weight"): torch.zeros(2, 32)},
        "merge the adapter first",
    ),
    "nothing fits": (named("other."), "21 missing (lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_tensors_without_counterpart_are_named(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, message = UNKNOWN[case]
    folder = changed(plain, tmp_path / "model", change)
    assert main(["train", str(recipe_from(folder, tmp_path))]) == 2
    error = capsys.readouterr().err
    assert f"model.init_from: {folder}: its tensors are not those of the model: " in error
    assert message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_wrappers(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str) -> None:
    """Trained and asked as without them, and said."""
    folder = changed(plain, tmp_path / "model", named(prefix))
    found = start_of(folder, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    answers = []
    for asked in (plain, folder):
        assert main(["generate", str(asked), "From the attic take red blue.", "--every-block"]) == 0
        answers.append(capsys.readouterr())
    assert answers[0].out == answers[1].out
    assert all(
        f"`{part}...`" in answers[1].err for part in prefix.replace(".", ".|").split("|") if part and "base" not in prefix
    )


def test_wrapped_names_become_the_start_of_a_run(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(plain, tmp_path / "model", named("_orig_mod."))
    assert go_through("from-hf", folder, tmp_path) == 0
    assert "`_orig_mod....`" in capsys.readouterr().err
    weights = load_file(next((tmp_path / "result").glob("checkpoints/*/portable/portable.safetensors")))
    expected = load_file(plain / WEIGHTS)
    assert {name.removeprefix("weight/") for name in weights} == expected.keys()
    assert all(torch.equal(weights[f"weight/{name}"], tensor) for name, tensor in expected.items())


def test_experts_are_accounted_for(tmp_path: Path) -> None:
    """Families with another layout on disk: transformers makes their tensors, from all that the file should have."""
    model = saved(FAMILIES["Mixtral"], tmp_path / "whole")
    read = open_pretrained(tmp_path / "whole").weights()
    assert all(torch.equal(read(name), tensor) for name, tensor in model.state_dict().items())
    lost = [n for n in load_file(tmp_path / "whole" / WEIGHTS) if "layers.1." in n and "experts.2." in n]
    changed(tmp_path / "whole", tmp_path / "lost", lambda t: {n: x for n, x in t.items() if n not in lost})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.\w+ has shape \(3, .*, the model's is \(4, "):
        open_pretrained(tmp_path / "lost")


def test_torch_files(plain: Path, tmp_path: Path) -> None:
    weights = load_file(plain / WEIGHTS)
    for name, tensors in (("whole", weights), ("headless", without(HEAD)(weights))):
        shutil.copytree(plain, tmp_path / name, ignore=shutil.ignore_patterns(WEIGHTS))
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
    found = start_of(tmp_path / "whole", tmp_path)
    assert all(torch.equal(found[n], tensor) for n, tensor in weights.items())
    with pytest.raises(ModelError, match=r"1 missing \(lm_head\.weight\)"):
        requirements_of(load_recipe(recipe_from(tmp_path / "headless", tmp_path)))
    (tmp_path / "whole" / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        requirements_of(load_recipe(recipe_from(tmp_path / "whole", tmp_path)))


def test_of_two_sets_of_files_the_one_of_transformers(plain: Path, tmp_path: Path) -> None:
    """An index that an earlier, larger save left behind."""
    folder = changed(plain, tmp_path / "model")
    weights = load_file(plain / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = start_of(folder, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_masks_in_old_files(tmp_path: Path) -> None:
    """GPT-2's files had the causal mask of every layer, and the number for what is masked; nothing else is let through."""
    model = saved(FAMILIES["GPT-2"], tmp_path / "model")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    old = changed(tmp_path / "model", tmp_path / "old", lambda tensors: {**tensors, **mask})
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(open_pretrained(old).load(torch.float32)(ids).logits, model(ids).logits)
    more = {"transformer.h.0.attn.extra": torch.ones(1, 1, 9, 8)}
    with pytest.raises(ModelError, match=r"1 unexpected \(transformer\.h\.0\.attn\.extra\)"):
        open_pretrained(changed(tmp_path / "model", tmp_path / "more", lambda tensors: {**tensors, **more}))


def test_files_that_are_none(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "model")
    data = (folder / WEIGHTS).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, message in ((data[:-9], "shorter than its shape"), (b"", "not a safetensors"), (pointer, "git lfs pull")):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_pretrained(folder)


def test_an_adapter_is_no_model(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would load the adapter's base instead of what is beside it."""
    beside = changed(plain, tmp_path / "beside")
    alone = tmp_path / "alone"
    alone.mkdir()
    for folder in (beside, alone):
        (folder / "adapter_config.json").write_text("{}")
        for door in ("train", "generate"):
            assert go_through(door, folder, tmp_path) == 2
            assert f"{folder}: holds a PEFT adapter, not a model of its own; merge it first" in capsys.readouterr().err


# ---- tied and separate heads ------------------------------------------------------------------------------------


def tied(plain: Path, out: Path, separate: bool) -> Path:
    """A folder whose configuration ties the head, with a head in its files: a trained one, or the embedding again."""
    return changed(plain, out, None if separate else lambda t: {**t, HEAD: t[EMBEDDING].clone()}, tie_word_embeddings=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_trained_head_beside_a_tied_configuration(plain: Path, tmp_path: Path, lora: dict | None) -> None:
    folder = tied(plain, tmp_path / "model", separate=True)
    model = {"init_from": str(folder), "lora": lora}
    recipe = load_recipe(recipe_from(folder, tmp_path, model=model))
    requirements = requirements_of(recipe)
    assert "not tied" in requirements.start.notes[0]
    own = model_of(recipe, requirements).eval()
    use_plain_attention(bare_model(own))
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.allclose(own(ids).logits, expected, atol=1e-5)


def test_a_head_that_is_the_embedding_stays_tied(plain: Path, tmp_path: Path) -> None:
    folder = tied(plain, tmp_path / "model", separate=False)
    recipe = load_recipe(recipe_from(folder, tmp_path))
    requirements = requirements_of(recipe)
    assert requirements.start.notes == ()
    model = model_of(recipe, requirements)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # The head alone in the files: transformers takes it for both.
    shutil.rmtree(folder)
    changed(plain, folder, lambda t: {n: x for n, x in t.items() if n != EMBEDDING}, tie_word_embeddings=True)
    found, expected = start_of(folder, tmp_path), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_a_family_draws_while_it_is_built(tmp_path: Path) -> None:
    """DiffLlama's lambdas are real tensors on the meta device: they would stay as they were drawn."""
    from rim_dist.model.skeleton import empty_model
    from rim_dist.model.weights import MemoryRows, fill
    from rim_dist.tokens import MemoryTokens

    config = transformers.DiffLlamaConfig(**SIZES)
    expected = saved(config, tmp_path / "model").state_dict()
    assert any("lambda" in name for name in expected)
    rows = MemoryRows(MemoryTokens(94, 95, 96, 2, ()), "keep", 0)
    model = empty_model(config)
    fill(model, open_pretrained(tmp_path / "model").weights(), rows)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    drawn = []
    for _ in range(2):  # from the seed alone, without a source
        model = empty_model(config)
        fill(model, None, rows)
        drawn.append(model.state_dict())
    assert all(torch.equal(a, drawn[1][name]) for name, a in drawn[0].items())


# ---- quantised folders ------------------------------------------------------------------------------------------


def quantised(*suffixes: str, codes: bool = False) -> Change:
    """The tensors with those of a scheme in place of (or beside, as `codes`) every projection's matrix."""

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if "_proj.weight" not in name:
                found[name] = tensor
                continue
            found |= {name: tensor.to(torch.int8)} if codes else {}
            found |= {name.removesuffix("weight") + suffix: torch.zeros(4, dtype=torch.uint8) for suffix in suffixes}
        return found

    return change


SCHEMES: dict[str, tuple[Change, object, str]] = {
    "bitsandbytes 8-bit": (
        quantised("SCB", "weight_format", codes=True),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes_8bit",
    ),
    "bitsandbytes 4-bit": (
        quantised("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", codes=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes_4bit",
    ),
    "int8 without a word": (quantised("weight_scale", codes=True), None, "FP8 or compressed-tensors"),
    "GPTQ": (quantised("qweight", "qzeros", "scales", "g_idx"), {"quant_method": "gptq", "bits": 4}, "gptq"),
    "GPTQ without a word": (quantised("qweight", "qzeros", "scales", "g_idx"), None, "GPTQ"),
    "AWQ": (quantised("qweight", "qzeros", "scales"), {"quant_method": "awq", "bits": 4}, "awq"),
    "compressed-tensors": (
        quantised("weight_packed", "weight_scale", "weight_shape"),
        {"quant_method": "compressed-tensors"},
        "compressed-tensors",
    ),
    "torchao": (quantised("weight:qdata", "weight:scale"), {"quant_method": "torchao", "quant_type": "int8"}, "torchao"),
    "HQQ": (quantised("W_q", "scale", "zero"), {"quant_method": "hqq"}, "hqq"),
    "a scheme of tomorrow": (quantised("codes"), {"quant_method": "superquant"}, "superquant"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_folders_are_refused_by_their_scheme(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    change, settings, name = SCHEMES[scheme]
    more = {} if settings is None else {"quantization_config": settings}
    folder = changed(plain, tmp_path / "model", change, **more)
    for door in ("train", "generate"):
        assert go_through(door, folder, tmp_path) == 2
        error = capsys.readouterr().err
        assert f"{folder}: is quantised ({name}" in error
        assert "start from the plain model" in error or "dequanti" in error
        assert len(error.splitlines()) <= 3
    assert not (tmp_path / "runs").exists()


def test_fp8_is_dequantised(plain: Path, tmp_path: Path) -> None:
    """By transformers, on the CPU: codes times the scale of their block. What is left of the scheme is not exported."""
    scales: Tensors = {}

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            found[name] = tensor
            if "_proj.weight" in name:
                blocks = tensor.reshape(tensor.shape[0] // 8, 8, tensor.shape[1] // 16, 16)
                scale = blocks.abs().amax((1, 3)) / 448
                found[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = scales[name] = scale
        return found

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
    folder = changed(plain, tmp_path / "model", change, quantization_config=settings)
    stored, found = load_file(folder / WEIGHTS), start_of(folder, tmp_path)
    for name, tensor in stored.items():
        if not name.endswith("_scale_inv"):
            scale = scales[name].repeat_interleave(8, 0).repeat_interleave(16, 1) if name in scales else 1
            assert torch.equal(found[name], tensor.float() * scale), name
    start = requirements_of(load_recipe(recipe_from(folder, tmp_path)))
    assert "quantization_config" not in start.config.to_dict()
    assert "dequantised by transformers" in start.start.notes[0]
    save_file(without(HEAD)(stored), folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"is quantised \(fp8.*1 missing \(lm_head.weight\)"):
        open_pretrained(folder)


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_a_leftover_of_quantisation(plain: Path, tmp_path: Path, method: str) -> None:
    """The configuration says so, the tensors are plain: they are taken as they are, and the configuration is put right."""
    folder = changed(plain, tmp_path / "model", quantization_config={"quant_method": method, "load_in_8bit": True})
    requirements = requirements_of(load_recipe(recipe_from(folder, tmp_path)))
    assert "the tensors are plain" in requirements.start.notes[0]
    assert "quantization_config" not in requirements.config.to_dict()
    found = start_of(folder, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(folder / WEIGHTS).items())


def test_a_type_of_number_that_is_not_known(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "model")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b'"F32"', b'"F4Q"', 1))
    with pytest.raises(CheckpointError, match="is F4Q, which is not read here"):
        open_pretrained(folder)


# ---- models of more than text -----------------------------------------------------------------------------------

_TEXT = {**SIZES, "head_dim": 12, "num_hidden_layers": 2}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_VISION |= {"patch_size": 14}
_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
_MROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
T = transformers
COMPOSITES = {
    "gemma3": lambda: T.Gemma3Config(text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4),
    "mistral3": lambda: T.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral"}, vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8}
    ),
    "llama4": lambda: T.Llama4Config(
        text_config={**_TEXT, "num_local_experts": 2, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
        vision_config={**_VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "llava": lambda: T.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"}, vision_config={**_VISION, "model_type": "clip_vision_model"}
    ),
    "qwen2_5_vl": lambda: T.Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config=_QWEN),
    "qwen3_vl": lambda: T.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config={**_QWEN, "deepstack_visual_indexes": [0]}
    ),
}


@pytest.mark.parametrize("family", COMPOSITES)
def test_models_of_more_than_text(tmp_path: Path, family: str) -> None:
    """As their text model, with the logits that the whole model has for text; or refused in a line."""
    whole = saved(COMPOSITES[family](), tmp_path / "model", T.AutoModelForImageTextToText)
    if "qwen" in family:
        with pytest.raises(ModelError, match=f"{family} is a model of more than text, and transformers has no text model"):
            open_pretrained(tmp_path / "model")
        return
    found = open_pretrained(tmp_path / "model")
    assert f"{family} is read as its text model" in found.notes[0]
    read = found.weights()
    text = found.load(torch.float32)
    for name, tensor in text.named_parameters():
        assert torch.equal(read(name), tensor), name
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(input_ids=ids).logits)
    lost = next(n for n in load_file(tmp_path / "model" / WEIGHTS) if "vision" in n)
    changed(tmp_path / "model", tmp_path / "lost", without(lost))
    with pytest.raises(ModelError, match=r"1 missing \(\S*vision"):
        open_pretrained(tmp_path / "lost")


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_a_new_model_of_more_than_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path / "runs", model={"config": {"model_type": model_type}}))
    assert main(["train", str(recipe)]) == 2
    assert (
        f"model.config: {model_type} is a model of more than text; give model_type: {model_type}_text"
        in capsys.readouterr().err
    )


def test_an_encoder_and_a_decoder_are_refused(tmp_path: Path) -> None:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    saved(T.BartConfig(vocab_size=97, d_model=16, **sizes), tmp_path / "bart", T.AutoModelForSeq2SeqLM)
    with pytest.raises(ModelError, match="bart is an encoder and a decoder; only decoder models are trained"):
        open_pretrained(tmp_path / "bart")


# ---- what becomes of them ---------------------------------------------------------------------------------------


def verified_export(folder: Path, out: Path, **sections: object) -> Path:
    """The export, verified, of a run that starts from a folder and has not learned yet."""
    recipe = recipe_from(folder, out, **sections)
    assert main(["convert", "from-hf", str(folder), str(out / "run"), "--recipe", str(recipe)]) == 0
    assert main(["export", str(out / "run"), str(out / "hf"), "--verify"]) == 0
    return out / "hf"


def logits_of(folder: Path, auto: type = AutoModelForCausalLM) -> torch.Tensor:
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return auto.from_pretrained(folder).float().eval()(input_ids=ids).logits[..., :128]  # without rows of memory tokens


@pytest.mark.usefixtures("plain_logits_here")
@pytest.mark.parametrize("method", method_names())
def test_exports_of_every_method_are_verified(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """At every budget of blocks, or after its thoughts; and a change that only they see is found."""
    out = verified_export(plain, tmp_path, method=method)
    said = capsys.readouterr().out
    assert "largest difference of a logit 0.00e+00" in said
    assert ("after 6 thoughts" if method == "coconut" else "by number of blocks") in said
    assert torch.equal(logits_of(out), logits_of(plain))
    weights = load_file(out / WEIGHTS)
    row = 128 if method in ("rim", "pause", "coconut") else 9  # the token that begins a block; a word of the template
    weights[EMBEDDING][row:] *= 1.5
    save_file(weights, out / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match="its logits are not the checkpoint's"):
        verify_export(find_checkpoint(tmp_path / "run"), out)


def wide(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """With a row for every token of the tokenizer."""
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = 131
    return config


UNUSUAL: dict[str, Callable[[Path, Path], object]] = {
    "wrapped": lambda plain, out: changed(plain, out, named("module._orig_mod.")),
    "tied, with a head": lambda plain, out: tied(plain, out, separate=True),
    "leftover of quantisation": lambda plain, out: changed(plain, out, quantization_config={"quant_method": "fp8"}),
    "experts": lambda _, out: saved(wide(FAMILIES["Mixtral"]), out),
    "GPT-2": lambda _, out: saved(wide(FAMILIES["GPT-2"]), out),
}


@pytest.mark.usefixtures("plain_logits_here")
@pytest.mark.parametrize("kind", [*UNUSUAL, *(f for f in COMPOSITES if "qwen" not in f and f != "llama4")])
def test_exports_of_unusual_folders_are_verified(plain: Path, tmp_path: Path, kind: str) -> None:
    """Their logits are those of the folder in plain transformers, and no field of theirs says what no longer holds."""
    folder, auto = tmp_path / "model", AutoModelForCausalLM
    if kind in UNUSUAL:
        UNUSUAL[kind](plain, folder)
    else:
        auto = T.AutoModelForImageTextToText
        saved(wide(COMPOSITES[kind]()), folder, auto)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    expected = logits_of(plain) if kind in ("wrapped", "leftover of quantisation") else logits_of(folder, auto)
    out = verified_export(folder, tmp_path)
    torch.testing.assert_close(logits_of(out), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [type(AutoModelForCausalLM.from_pretrained(out)).__name__]


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_runs_from_unusual_folders(plain: Path, tmp_path: Path) -> None:
    """Whole runs that learn next to nothing: their exports are the folders that they started from, in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(plain)
    saved(wide(COMPOSITES["gemma3"]()), tmp_path / "gemma3", T.AutoModelForImageTextToText)
    tokenizer.save_pretrained(tmp_path / "gemma3")
    tied(plain, tmp_path / "tied", separate=True)
    stages = {stage: {"samples": 16, "learning_rate": 1e-12} for stage in ("stage1", "stage2")}
    recipes = []
    for name, zero in (("gemma3", 3), ("tied", 1)):
        recipe = tiny_recipe(
            tmp_path / "runs",
            run={"name": name},
            model={"config": None, "tokenizer": None, "init_from": str(tmp_path / name), "lora": {"rank": 2, "alpha": 4}},
            parallel={"zero_stage": zero},
            curriculum=stages,
            evaluation={"at_end": False},
        )
        recipes.append(str(write_recipe(tmp_path / f"{name}.yaml", recipe)))
    said = run("fork", 1, ["tests/workers/train_many.py", *recipes]).stdout
    assert f"{tmp_path / 'gemma3'}: gemma3 is read as its text model" in said
    ids = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    for name, auto, architecture in (
        ("gemma3", T.AutoModelForImageTextToText, "Gemma3ForCausalLM"),
        ("tied", AutoModelForCausalLM, "LlamaForCausalLM"),
    ):
        out = tmp_path / "runs" / name / "hf"
        assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
        with torch.no_grad():
            expected = auto.from_pretrained(tmp_path / name)(input_ids=ids).logits
            assert torch.allclose(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected, atol=1e-4)
        assert main(["export", str(tmp_path / "runs" / name), str(tmp_path / f"{name}-out"), "--verify"]) == 0
