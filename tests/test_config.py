"""Recipes: overrides, types, unknown keys and impossible combinations, each with a message that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import write_recipe
from ranks import ROOT

from rim_dist.cli import main
from rim_dist.config import around_text
from rim_dist.errors import ConfigError
from rim_dist.parallel.zero import OWNED_KEYS, compose, shipped_config
from rim_dist.recipe import FORMAT, dump_recipe, load_recipe, validate_recipe
from rim_dist.training.folder import check_run_folder
from rim_dist.training.trainer import prepare_run

Make = Callable[..., Path]


def test_resolved_recipe_reads_back_the_same(recipe_file: Make, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file())
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_are_typed(recipe_file: Make) -> None:
    recipe = load_recipe(
        recipe_file(),
        ["curriculum.stage1.learning_rate=3e-4", "run.seed=7", "model.lora=null", "model.config.num_hidden_layers=3"],
    )
    assert recipe.curriculum.stage1.learning_rate == 3e-4
    assert recipe.run.seed == 7
    assert recipe.model.config is not None
    assert recipe.model.config["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.bloks=3", r"memory.bloks: unknown key; did you mean memory.blocks\?"),
        ("learning_rate=1", r"did you mean curriculum.stage1.learning_rate or curriculum.stage2.learning_rate\?"),
        ("run.seed=abc", "run.seed: 'abc' is not allowed"),
        ("run.seed=true", "run.seed: True is not allowed"),
        ("optimizer.global_batch=0", "optimizer.global_batch: 0 is not allowed"),
        ("method=rimm", "method: 'rimm' is not allowed"),
        ("memory.blocks=0", "memory.blocks: 0 is not allowed with method rim"),
        ("memory.tokens_per_block=0", "memory.tokens_per_block: 0 is not allowed"),
        ("memory.end_token=<|mem|>", "must differ"),
        ("data.source=jsonl", "source jsonl needs path"),
        ("data.source=hub", "source hub needs id"),
        ("data.streaming=true", "streaming is for hub"),
        ("data.answer_format=x", r"data.answer_format: x must contain \{answer\} once"),
        ("data.step_format=x", r"data.step_format: x must contain \{step\} once"),
        ("data.step_format='<<{answer}>>'", r"'answer' is unknown\); its field is \{step\}"),
        (
            r"data.answer_format='\boxed{{answer}}'",
            r"gives the same text for every answer; a brace that belongs .* written twice: \\boxed\{\{\{answer\}\}\}",
        ),
        (r"data.answer_format='\boxed{answer}'", r"loses the braces of \\boxed; .*: \\boxed\{\{\{answer\}\}\}"),
        ("data.answer_format='{answer} {unit}'", r"data.answer_format: \{answer\} \{unit\} cannot .* \('unit' is unknown\)"),
        ("data.answer_format='{answer} {}'", "cannot be filled in .*index 0"),
        ("data.answer_format='{answer} }'", "cannot be filled in .*Single '}'"),
        ("data.answer_format='{answer} {answer}'", r"must contain \{answer\} once"),
        ("data.answer_format='{answer!r}'", r"must contain \{answer\} once, as it stands"),
        ("data.answer_format='{answer:>5}'", r"must contain \{answer\} once, as it stands"),
        ("data.answer_format='{answer[0]}'", r"must contain \{answer\} once, as it stands"),
        ("data.answer_format='{answer:d}'", "cannot be filled in .*format code 'd'"),
        ("data.answer_format='{answer.unit}'", "cannot be filled in .*no attribute 'unit'"),
        ("data.answer_format={answer}", "data.answer_format: {'answer': None} is not allowed"),  # YAML reads a mapping
        ("data.answer_format=#### {answer}", r"as a comment; with quotes of its own: 'data.answer_format=\"#### \{answer\}\"'"),
        ("curriculum.stage1.epochs=1", "samples or epochs, not both"),
        ("parallel.offload=true", "offload needs zero_stage 3"),
        ("parallel.tensor=2", "1 ranks cannot be divided: parallel.tensor 2 x parallel.sequence 1 takes 2"),
        ("model.init_from=x", "exactly one of init_from"),
        ("run.name=a/b", "run.name: 'a/b' is not allowed"),
        ("model.attention=flash", "model.attention: 'flash' is not allowed; .*dense.*split"),
        ("model.attention=flex", "model.attention: flex cannot be used: it has no backward pass on cpu"),
        ("model.activation_offload=true", "activation_offload needs activation_checkpointing"),
        ("optimizer.micro_batch_tokens=0", "optimizer.micro_batch_tokens: 0 is not allowed"),
        ("optimizer.micro_batch=4", r"unknown key; did you mean optimizer.micro_batch_tokens\?"),
        ("optimizer.micro_batch_tokens=20", r"its row is above optimizer.micro_batch_tokens=20 \(\d+ tokens\)"),
        ("memory.inside_block=both", "memory.inside_block: 'both' is not allowed"),
        ("nonsense", "write section.key=value"),
        ("run.seed=[1", "is not a YAML value"),
        ("run.seed.deeper=1", "unknown key"),
        ("data.synthetic.min_steps=9", "min_steps 9 is above max_steps 4"),
        ("curriculum.stage1.learning_rate=.inf", "curriculum.stage1.learning_rate: inf is not allowed; .* finite"),
        ("logging.profile=[5, 2]", r"logging.profile: \[5, 2\] is not allowed; allowed: 1 <= FIRST <= LAST"),
        ("model.init_from=''", "model.init_from: '' is not allowed"),
    ],
)
def test_wrong_values_are_named(recipe_file: Make, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    import re

    assert main(["train", str(recipe_file()), override]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("- 1\n", "a mapping of sections"),
        ("a: [", "not valid YAML"),
        ("method: rim\n", "model: is required"),
        ("[" * 1000 + "]" * 1000, "nested too deeply"),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 1200 + "]" * 1200, "nested too deeply"),
        ("9" * 5000, "5000 digits"),
        ("2024-13-45", "month must be in 1..12"),
        ('["a", "x\\ud800"]', r"half of a surrogate pair in 'x\\ud800'"),
        ("&a [*a]", "Circular reference"),
        ("!!bool maybe", "maybe"),
        ("!!timestamp x", "groupdict"),
    ],
)
def test_yaml_that_is_no_recipe(
    recipe_file: Make, capsys: pytest.CaptureFixture[str], value: str, message: str, tmp_path: Path
) -> None:
    """PyYAML reads these, or fails on them with something else than its own error; as a file and as an override."""
    path = recipe_file()
    override = tmp_path / "override.yaml"
    override.write_text(path.read_text() + f"\nlogging: {{wandb_project: {value}}}\n")
    for command, named in ((["data", str(override)], str(override)), (["data", str(path), f"run.name={value}"], "run.name")):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"rim-dist: {named}: ")
        assert len(error.splitlines()) == 1
        assert re.search(message, error), error


def test_missing_recipe_and_no_stage(tmp_path: Path, recipe_file: Make) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="nothing to train"):
        load_recipe(recipe_file(curriculum={"stage1": {"samples": 0}, "stage2": {"samples": 0}}))


def test_baselines_need_no_blocks(recipe_file: Make) -> None:
    for method in ("direct", "cot"):
        assert load_recipe(recipe_file(method=method, memory={"blocks": 0})).memory.blocks == 0


def test_formats_of_targets(recipe_file: Make) -> None:
    """What stands around an answer, worked out by hand; chains of thought need something before it."""
    for text_format, around in (
        ("#### {answer}", ("#### ", "")),
        ("\\boxed{{{answer}}}", ("\\boxed{", "}")),
        ("The answer is {answer}.", ("The answer is ", ".")),
        ("{answer}", ("", "")),
        ("{{{answer}}} of 7", ("{", "} of 7")),
    ):
        assert around_text(text_format, "answer") == around
        assert load_recipe(recipe_file(data={"answer_format": text_format})).data.answer_format == text_format
    for method in ("cot", "coconut"):
        with pytest.raises(ConfigError, match=rf"data\.answer_format: '\{{answer\}}.*not allowed with method {method}.*#### "):
            load_recipe(recipe_file(method=method, data={"answer_format": "{answer}."}))


def test_streams_have_no_epochs(recipe_file: Make) -> None:
    with pytest.raises(ConfigError, match="a stream has no known length"):
        load_recipe(recipe_file(data={"source": "jsonl", "path": "x", "streaming": True}, curriculum={"stage1": {"epochs": 1}}))


def test_formats_of_written_recipes(recipe_file: Make, tmp_path: Path) -> None:
    """What rim_dist wrote before recipes had a format is read as it was meant; what a newer one wrote is refused."""
    recipe = load_recipe(recipe_file())
    tree = yaml.safe_load(dump_recipe(recipe))
    assert tree["format"] == FORMAT
    assert validate_recipe(tree, "now", written=True) == recipe
    del tree["format"], tree["data"]["synthetic"]["step_text"]
    assert validate_recipe(tree, "a user's") == recipe
    assert validate_recipe(tree, "old", written=True).data.synthetic.step_text == "room"
    other = {**tree, "data": {"source": "gsm8k", "path": "x"}}
    assert validate_recipe(other, "old", written=True) == validate_recipe(other, "a user's")
    # Format 2 had one dropout a stage, of every place.
    stages = {"stage1": {"samples": 64, "max_steps": 4}, "stage2": {"samples": 64, "learning_rate": 5e-4, "dropout": 0.1}}
    dropping = {**yaml.safe_load(dump_recipe(recipe)), "format": 2, "curriculum": stages}
    assert validate_recipe(dropping, "old", written=True).dropouts("stage2") == (0.1, 0.1, 0.0)
    assert validate_recipe(dropping, "old", written=True).dropouts("stage1") == (0.0, 0.0, 0.0)
    dropping["model"] = {"init_from": "x", "lora": {"rank": 4}}
    assert validate_recipe(dropping, "old", written=True).dropouts("stage2") == (0.1, 0.1, 0.1)
    moved = r"curriculum\.stage2\.dropout: unknown key; it was that of every place; set lora_dropout"
    with pytest.raises(ConfigError, match=moved):
        validate_recipe({**dropping, "format": FORMAT}, "a user's")
    with pytest.raises(ConfigError, match=moved):
        load_recipe(recipe_file(), ["curriculum.stage2.dropout=0.1"])
    # Format 3 added gradients up in the precision of the model.
    for dtype, accumulated in (("bf16", "model"), ("fp32", "auto")):
        half = yaml.safe_load(dump_recipe(load_recipe(recipe_file(model={"dtype": dtype}))))
        del half["optimizer"]["grad_accum_dtype"]
        assert validate_recipe({**half, "format": 3}, "old", written=True).optimizer.grad_accum_dtype == accumulated
        assert validate_recipe(half, "now", written=True).optimizer.grad_accum_dtype == "auto"
    for version, message in (
        (FORMAT + 1, f"new: format: {FORMAT + 1} is of a newer rim_dist; this one reads recipes up to format {FORMAT}; update"),
        (0, "new: format: 0 is not allowed; allowed: 1 to"),
        (True, "new: format: True is not allowed"),
        ("x", "new: format: 'x' is not allowed"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            validate_recipe({**tree, "format": version}, "new")
    # A run of the old task in the folder is not gone on with silently.
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"data\.synthetic\.step_text: 'room' there, 'equation' here"):
        check_run_folder(recipe)


def test_precision_of_added_gradients(recipe_file: Make) -> None:
    """fp32 where DeepSpeed has it; a configuration of the same key is the recipe's, and fp32 models have one precision."""
    for dtype, zero, wanted, expected in (
        ("bf16", 1, "auto", "fp32"),
        ("fp16", 3, "fp32", "fp32"),
        ("bf16", 2, "model", None),
        ("bf16", 0, "auto", None),
        ("fp32", 1, "fp32", None),
    ):
        recipe = load_recipe(
            recipe_file(model={"dtype": dtype}, parallel={"zero_stage": zero}, optimizer={"grad_accum_dtype": wanted})
        )
        assert compose(recipe, 32).get("data_types", {}).get("grad_accum_dtype") == expected
    wrong = ["model.dtype=bf16", "parallel.zero_stage=0", "optimizer.grad_accum_dtype=fp32"]
    with pytest.raises(ConfigError, match=r"optimizer\.grad_accum_dtype: fp32 needs parallel\.zero_stage 1, 2 or 3 with"):
        load_recipe(recipe_file(), wrong)


def test_dropout_by_place(recipe_file: Make) -> None:
    """0 unless asked; adapters have that of model.lora where a stage has none of its own, and no other where there are none."""
    lora = {"config": None, "tokenizer": None, "init_from": "x", "lora": {"rank": 4}}
    recipe = load_recipe(recipe_file(model=lora))
    assert recipe.dropouts("stage1") == recipe.dropouts("stage2") == recipe.largest_dropouts == (0.0, 0.0, 0.0)
    given = ["model.lora.dropout=0.1", "curriculum.stage2.lora_dropout=0", "curriculum.stage1.attention_dropout=0.2"]
    recipe = load_recipe(recipe_file(model=lora), given)
    assert (recipe.dropouts("stage1"), recipe.dropouts("stage2")) == ((0.2, 0.0, 0.1), (0.0, 0.0, 0.0))
    assert load_recipe(recipe_file(model=lora), [*given, "curriculum.stage1.samples=0"]).largest_dropouts == (0.0, 0.0, 0.0)
    without = load_recipe(recipe_file(), ["curriculum.stage1.lora_dropout=0.1", "curriculum.stage2.residual_dropout=0.2"])
    assert without.dropouts("stage1") == (0.0, 0.0, 0.0)
    notes = [note for note in prepare_run(without)[0].notes if "drops nothing" in note]
    assert notes == [
        "note: lora_dropout 0.1 drops nothing: the run has no adapters (model.lora)",
        "note: residual_dropout 0.2 drops nothing: llama has no dropout of hidden states",
    ]
    with pytest.raises(ConfigError, match=r"curriculum\.stage1\.attention_dropout: 1 is not allowed"):
        load_recipe(recipe_file(), ["curriculum.stage1.attention_dropout=1"])


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert {"demo.yaml", "gsm8k-smollm2-135m.yaml", "gsm8k-aug-gpt2.yaml", "gsm8k-aug-llama-3.2-1b.yaml"} <= {
        p.name for p in recipes
    }
    for path in recipes:
        recipe = load_recipe(path)
        compose(recipe, 64)


def test_shipped_ds_configs_compose_without_auto(recipe_file: Make) -> None:
    names = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    for zero in range(4):
        recipe = load_recipe(recipe_file(parallel={"zero_stage": zero}))
        names.remove(shipped_config(recipe))
        tree = compose(recipe, 512)
        assert "auto" not in json.dumps(tree)
        assert tree["gradient_clipping"] == 1.0
    recipe = load_recipe(recipe_file(parallel={"zero_stage": 3, "offload": True}))
    names.remove(shipped_config(recipe))
    offload = compose(recipe, 512)
    assert offload["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    for degrees in ({"tensor": 2}, {"sequence": 2}, {"tensor": 2, "sequence": 2}, {"zero_plus_plus": True}):
        recipe = load_recipe(recipe_file(parallel={"zero_stage": 3, **degrees}))
        assert shipped_config(recipe) in names
        names.remove(shipped_config(recipe))
        tree = compose(recipe, 512, 8)
        assert "auto" not in json.dumps(tree)
        assert tree["zero_optimization"].get("zero_hpz_partition_size", 8) == 8
    assert not names, "a file that no recipe uses"
    half = compose(load_recipe(recipe_file(model={"dtype": "fp16"})), 512)
    assert half["fp16"]["enabled"]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"offload": True}, "offload needs zero_stage 3, not 1"),
        ({"zero_plus_plus": True}, "zero_plus_plus needs zero_stage 3, not 1"),
        (
            {"zero_stage": 3, "zero_plus_plus": True, "tensor": 2},
            "zero_plus_plus cannot be combined with offload or tensor above 1",
        ),
        ({"tensor": 0}, "parallel.tensor: 0 is not allowed"),
    ],
)
def test_impossible_sharding_is_refused(recipe_file: Make, parallel: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(parallel=parallel))


def test_node_copies_under_tensor_ranks_are_refused(recipe_file: Make, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"zero_hpz_partition_size": 4}}))
    recipe = load_recipe(recipe_file(parallel={"zero_stage": 3, "tensor": 2, "deepspeed_config": str(own)}))
    with pytest.raises(ConfigError, match="zero_hpz_partition_size cannot be combined"):
        compose(recipe, 64)


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_trainer_owned_keys_are_refused_by_name(recipe_file: Make, tmp_path: Path, key: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({key: {"enabled": True}}))
    with pytest.raises(ConfigError, match=f"{key} belongs to the trainer"):
        compose(load_recipe(recipe_file(parallel={"deepspeed_config": str(own)})), 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not a JSON file"),
        ("[]", "is a JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage is 3, parallel.zero_stage is 1"),
        ('{"fp16": {"enabled": true}}', "fp16.enabled belongs to the trainer"),
        ('{"zero_optimization": {"sub_group_size": "auto"}}', "no value for sub_group_size"),
    ],
)
def test_own_deepspeed_config_is_checked(recipe_file: Make, tmp_path: Path, text: str | None, message: str) -> None:
    own = tmp_path / "own.json"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose(load_recipe(recipe_file(parallel={"deepspeed_config": str(own)})), 64)


def test_own_deepspeed_config_may_use_auto_for_what_the_trainer_owns(recipe_file: Make, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000}}))
    tree = compose(load_recipe(recipe_file(parallel={"deepspeed_config": str(own)})), 64)
    assert tree["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5000}
    assert "train_batch_size" not in tree


def test_recipe_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="not list"):
        validate_recipe([], "x")


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["train"],
        ["export"],
        ["convert"],
        ["convert", "to-hf"],
        ["generate"],
        ["evaluate"],
        ["data"],
        ["prefetch"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            main([*command, "--help"])
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        assert "examples:" in text
        assert "exit status:" in text


def test_model_from_scratch_needs_a_tokenizer(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", {"method": "rim", "model": {"config": {"model_type": "llama"}}})
    with pytest.raises(ConfigError, match="a model from scratch needs tokenizer"):
        load_recipe(path)


def test_recipe_of_the_readme() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    recipe = validate_recipe(yaml.safe_load(text), "README.md")
    assert (recipe.data.source, recipe.evaluation.data) == ("jsonl", "held_out.jsonl")
    assert len(text.splitlines()) <= 10
