"""Malformed inputs: each case changes one thing in a folder that trains, and knows what the message about it must name.

The folder has `recipe.yaml`, `data.jsonl` and `model/`, an HF folder with tokenizer and chat template. What can be enumerated
(fields, rows, tensors) is drawn from a seed. `python tests/malformed.py` writes docs/checks.md.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import TINY_MODEL, tiny_recipe, write_recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rim_dist.config import Recipe
from rim_dist.recipe import field_names, nested_section

ROWS = 24
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """`change` is applied to a copy of the folder. `names`: patterns that the message must have, besides its file or field."""

    name: str
    change: Callable[[Path], None]
    names: tuple[str, ...]


def rows() -> list[dict[str, Any]]:
    """Sums of two numbers, in two steps."""
    found = []
    for i in range(ROWS):
        a, b = i + 2, 3 * i + 1
        steps = [f"{a}+{b}={a + b}", f"{a + b}+1={a + b + 1}"]
        found.append({"question": f"Ann has {a} and gets {b} and one more. How many?", "steps": steps, "answer": a + b + 1})
    return found


def write_rows(folder: Path, changed: list[Any]) -> None:
    """A line a row; a row that is bytes is the line itself."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in changed]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def write_folder(folder: Path) -> Path:
    """Everything as it should be."""
    folder.mkdir(parents=True)
    write_rows(folder, rows())
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    texts = [json.dumps(row) for row in rows()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder / "model")
    fields = {key: value for key, value in TINY_MODEL.items() if key not in ("model_type", "tie_word_embeddings")}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False, **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    recipe = tiny_recipe(
        folder / "runs",
        model={"config": None, "tokenizer": None, "init_from": str(folder / "model")},
        data={"source": "jsonl", "path": str(folder / "data.jsonl")},
        curriculum={
            "stage1": {"samples": 16, "learning_rate": 1e-3, "max_steps": 4},
            "stage2": {"samples": 16, "learning_rate": 5e-4},
        },
        optimizer={"global_batch": 8, "micro_batch_tokens": 300},
        evaluation={"samples": 4, "max_new_tokens": 3, "data": str(folder / "data.jsonl")},
    )
    write_recipe(folder / "recipe.yaml", recipe)
    return folder


# ---- recipes -------------------------------------------------------------------------------------------------------


def _set(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "recipe.yaml"
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node[parent] = node.get(parent) or {}
            node = node[parent]
        node[leaf] = value
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")

    return change


def _is_section(name: str) -> bool:
    section: Any = Recipe
    for part in name.split("."):
        section = nested_section(section.model_fields[part].annotation)
        if section is None:
            return False
    return True


def recipes(drawn: random.Random) -> Iterator[Case]:
    leaves = [name for name in field_names() if not _is_section(name)]
    for name in sorted(drawn.sample(leaves, 14)):
        value = drawn.choice([{"a": {"b": 1}}, [[1], [2]], [{}, None]])
        yield Case(f"{name} of another type", _set(name, value), (re.escape(name),))
    for name in sorted(drawn.sample(leaves, 8)):
        at = drawn.randrange(len(name.rpartition(".")[2]))
        section, dot, leaf = name.rpartition(".")
        typo = section + dot + leaf[:at] + drawn.choice("qxz") + leaf[at:]
        yield Case(f"{typo} misspelt", _set(typo, 1), (re.escape(typo), "unknown key"))
    for name, value in (
        ("run.seed", -1),
        ("run.name", "../escape"),
        ("optimizer.eps", float("nan")),
        ("curriculum.stage1.learning_rate", float("inf")),
        ("curriculum.stage2.weight_power", float("nan")),
        ("memory.blocks", 10**9),
        ("memory.begin_token", "<|mem_end|>"),
        ("data.limit", 0),
        ("data.step_format", "{step} {unknown}"),
        ("data.answer_format", "{answer"),
        ("data.answer_format", "{answer.x}"),
        ("model.init_from", "./nowhere"),
        ("model.init_from", ""),
        ("model.tokenizer", "./nowhere"),
        ("parallel.zero_stage", 4),
        ("parallel.tensor", 3),
        ("parallel.deepspeed_config", "./nowhere.json"),
        ("evaluation.data", "./nowhere.jsonl"),
        ("logging.profile", [5, 2]),
    ):
        # A message may name the section, and then the field.
        field = re.escape(name).replace(r"\.", r"(\.|: )")
        yield Case(f"{name}: {value}", _set(name, value), (field + "|nowhere",))

    def text(content: bytes) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / "recipe.yaml").write_bytes(content)

        return change

    for name, content in (
        ("empty", b""),
        ("a list", b"- 1\n- 2\n"),
        ("not UTF-8", b"method: \xff\xfe\n"),
        ("with a tab", b"method: rim\nmodel:\n\tconfig: 1\n"),
        ("with a zero byte", b"method: rim\x00\n"),
        ("that asks for Python", b"method: !!python/object/apply:os.system [true]\n"),
        ("with a key that is a list", b"? [1, 2]\n: 3\n"),
        ("with keys that are numbers", b"1: 2\n3: 4\n"),
        ("nested a thousand times", b"[" * 1000 + b"]" * 1000),
    ):
        yield Case(f"recipe {name}", text(content), (r"recipe\.yaml",))


# ---- rows ----------------------------------------------------------------------------------------------------------


def data(drawn: random.Random) -> Iterator[Case]:
    def row(**changed: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda old: {**old, **changed}

    def without(name: str) -> Callable[[dict[str, Any]], Any]:
        return lambda old: {key: value for key, value in old.items() if key != name}

    deep = b'{"question": "a", "answer": 1, "steps": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for name, changed, reason in (
        ("without a question", without("question"), "question"),
        ("without an answer", without("answer"), "answer"),
        ("with an empty question", row(question=" "), "question"),
        ("with a question that is a list", row(question=["a"]), "question"),
        ("with an answer that is a list", row(answer=[1]), "answer"),
        ("with no answer", row(answer=None), "answer"),
        ("with an answer that is NaN", lambda old: json.dumps({**old, "answer": float("nan")}).encode(), "answer"),
        ("with an answer that is true", row(answer=True), "answer"),
        ("with steps that are numbers", row(steps=[1, 2]), "steps"),
        ("with steps that are a mapping", row(steps={"a": "b"}), "steps"),
        ("with a lone surrogate", row(question="a \ud800 b"), ""),
        ("with a memory token", row(question="a <|mem|> b"), "memory token"),
        ("with a question that is too long", row(question="many words " * 500), "tokens"),
        (
            "with a number of 5,000 digits",
            lambda old: json.dumps(old).encode().replace(b'"answer": ', b'"answer": ' + b"1" * 5000),
            "",
        ),
        ("nested 100,000 times", lambda _: deep, ""),
        ("that is a list", lambda _: b"[1, 2]", ""),
        ("cut in the middle", lambda old: json.dumps(old).encode()[:40], "JSON"),
        ("that is not UTF-8", lambda _: b'{"question": "\xff", "answer": 1}', "UTF-8"),
    ):
        line = drawn.randrange(ROWS)

        def change(folder: Path, line: int = line, changed: Callable[[Any], Any] = changed) -> None:
            write_rows(folder, [changed(old) if i == line else old for i, old in enumerate(rows())])

        yield Case(f"row {name}", change, (rf"data\.jsonl:{line + 1}: ", reason))

    def whole(content: bytes | None) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / "data.jsonl").unlink()
            if content is None:
                (folder / "data.jsonl").mkdir()
            else:
                (folder / "data.jsonl").write_bytes(content)

        return change

    for name, content in (
        ("that is empty", b""),
        ("of blank lines", b"\n\n \n"),
        ("that is a folder", None),
        ("of zero bytes", b"\x00" * 4096),
        ("that is compressed", b"\x1f\x8b\x08\x00" + bytes(drawn.randrange(256) for _ in range(200))),
    ):
        yield Case(f"data {name}", whole(content), (r"data\.jsonl",))


# ---- templates and tokenizers --------------------------------------------------------------------------------------


def _edit_json(path: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model" / path
        tree = json.loads(file.read_text(encoding="utf-8"))
        changed = edit(tree)
        file.write_text(json.dumps(tree if changed is None else changed), encoding="utf-8")

    return change


def templates(_: random.Random) -> Iterator[Case]:
    def template(text: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")

        return change

    for name, text, reason in (
        ("that is not closed", "{% for message in messages %}{{ message['content'] }}", ""),
        ("with an unknown filter", TEMPLATE.replace("message['content']", "message['content'] | shout"), "shout"),
        ("that refuses", "{{ raise_exception('Only tools may speak') }}" + TEMPLATE, "Only tools may speak"),
        ("without the question", "{% for message in messages %}<|{{ message['role'] }}|>{% endfor %}", "question"),
        ("that cuts the question", TEMPLATE.replace("message['content']", "message['content'][:9]"), "question"),
        ("that adds a number to the content", TEMPLATE.replace("message['content']", "message['content'] + 1"), ""),
        ("that wants a third message", "{{ messages[2]['content'] }}" + TEMPLATE, ""),
        ("that calls what is undefined", "{{ undefined_function() }}" + TEMPLATE, "undefined_function"),
        ("that reaches for Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATE, ""),
        (
            "that says the question in capitals",
            TEMPLATE.replace("message['content']", "message['content'] | upper"),
            "question",
        ),
    ):
        yield Case(f"template {name}", template(text), ("template", reason))


def _write(path: str, content: bytes | None) -> Callable[[Path], None]:
    """Replace a file of the model folder; None: remove it."""

    def change(folder: Path) -> None:
        file = folder / "model" / path
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)

    return change


def tokenizers(_: random.Random) -> Iterator[Case]:
    def no_end(tree: dict[str, Any]) -> None:
        tree.pop("eos_token")

    def unknown_model(tree: dict[str, Any]) -> None:
        tree["model"]["type"] = "Mystery"

    def no_vocabulary(tree: dict[str, Any]) -> None:
        tree["model"].pop("vocab")

    def wrong_merges(tree: dict[str, Any]) -> None:
        tree["model"]["merges"].append(["no such", "pieces"])

    for name, change in (
        ("without its file", _write("tokenizer.json", None)),
        ("that is empty", _write("tokenizer.json", b"")),
        ("cut in the middle", _write("tokenizer.json", b'{"version": "1.0", "model": {')),
        ("that is a list", _write("tokenizer.json", b"[]")),
        ("that is not UTF-8", _write("tokenizer.json", b"\xff\xfe\x00")),
        ("without end-of-text", _edit_json("tokenizer_config.json", no_end)),
        ("of an unknown kind", _edit_json("tokenizer.json", unknown_model)),
        ("without a vocabulary", _edit_json("tokenizer.json", no_vocabulary)),
        ("with merges of nothing", _edit_json("tokenizer.json", wrong_merges)),
        ("with a broken configuration", _write("tokenizer_config.json", b"{")),
    ):
        yield Case(f"tokenizer {name}", change, (r"model\.tokenizer|tokenizer",))


# ---- model folders -------------------------------------------------------------------------------------------------


def models_(drawn: random.Random) -> Iterator[Case]:
    def config(**changed: Any) -> Callable[[Path], None]:
        return _edit_json("config.json", lambda tree: {**tree, **changed})

    for name, change, reason in (
        ("without config.json", _write("config.json", None), r"model"),
        ("with an empty config.json", _write("config.json", b""), r"config"),
        ("with a list for a config.json", _write("config.json", b"[1]"), r"config|cannot be loaded"),
        ("of an unknown family", config(model_type="nothing"), "nothing"),
        (
            "of no family",
            _edit_json("config.json", lambda tree: {k: v for k, v in tree.items() if k != "model_type"}),
            "model_type",
        ),
        ("that is an encoder", config(model_type="bert", architectures=["BertModel"]), "bert"),
        ("of negative layers", config(num_hidden_layers=-2), "num_hidden_layers|layers"),
        ("of layers in words", config(num_hidden_layers="two"), "num_hidden_layers"),
        ("of no heads", config(num_attention_heads=0), r"model\.init_from"),
        ("of three heads", config(num_attention_heads=3), "heads|hidden_size|q_proj"),
        ("of another width", config(hidden_size=48), "hidden_size|heads|embed_tokens|shape"),
        ("with more layers than weights", config(num_hidden_layers=3), r"layers\.2"),
        ("with fewer layers than weights", config(num_hidden_layers=1), r"layers\.1"),
        ("of another vocabulary", config(vocab_size=1000), "embed_tokens|lm_head"),
        ("of an unknown activation", config(hidden_act="shout"), "shout"),
        ("of an unknown rope", config(rope_parameters={"rope_type": "spiral"}), "spiral"),
        ("of few positions", config(max_position_embeddings=8), "positions"),
        ("without weights", _write("model.safetensors", None), "model"),
        ("with weights of no bytes", _write("model.safetensors", b""), r"model\.safetensors"),
        (
            "with weights of rubbish",
            _write("model.safetensors", bytes(drawn.randrange(256) for _ in range(999))),
            r"safetensors",
        ),
    ):
        yield Case(f"model {name}", change, (reason,))

    for name, text in (("of rubbish", "{"), ("of missing files", '{"weight_map": {"lm_head.weight": "x.safetensors"}}')):

        def index(folder: Path, text: str = text) -> None:
            (folder / "model" / "model.safetensors").unlink()
            (folder / "model" / "model.safetensors.index.json").write_text(text, encoding="utf-8")

        yield Case(f"model with an index {name}", index, (r"x\.safetensors|index",))

    def truncated(folder: Path) -> None:
        file = folder / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    yield Case("model with weights cut short", truncated, (r"model\.safetensors",))

    def tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            file = folder / "model" / "model.safetensors"
            found = load_file(file)
            edit(found)
            save_file(found, file, metadata={"format": "pt"})

        return change

    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        *(
            f"model.layers.{drawn.randrange(2)}.{part}.weight"
            for part in ("self_attn.k_proj", "mlp.down_proj", "input_layernorm")
        ),
    ]
    for name in names:

        def leave_out(found: dict[str, torch.Tensor], name: str = name) -> None:
            del found[name]

        yield Case(f"model without {name}", tensors(leave_out), (re.escape(name),))
    for name in drawn.sample(names, 2):

        def turn(found: dict[str, torch.Tensor], name: str = name) -> None:
            found[name] = found[name][1:].contiguous()

        yield Case(f"model with a row less in {name}", tensors(turn), (re.escape(name),))
    for name in drawn.sample(names, 2):

        def round_off(found: dict[str, torch.Tensor], name: str = name) -> None:
            found[name] = (found[name] * 100).to(torch.int8)

        yield Case(f"model with integers in {name}", tensors(round_off), (re.escape(name),))

    def surplus(found: dict[str, torch.Tensor]) -> None:
        found["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)

    yield Case("model with a tensor too many", tensors(surplus), (r"q_norm",))

    def unsafe(folder: Path) -> None:
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")

    yield Case("model of a pickle that calls", unsafe, (r"model",))


KINDS = {
    "Recipes": recipes,
    "Rows and data files": data,
    "Chat templates": templates,
    "Tokenizers": tokenizers,
    "Model folders": models_,
}


def cases(seed: int = 0) -> dict[str, list[Case]]:
    """All cases by kind, the same for a seed."""
    drawn = random.Random(seed)
    return {kind: list(make(drawn)) for kind, make in KINDS.items()}


def page() -> str:
    """docs/checks.md."""
    text = (
        "# What is checked before a run\n\n"
        "Each line is a test (`tests/test_malformed.py`) that changes one thing in inputs that train. The command ends with\n"
        "exit status 2 and one message of at most three lines that names what was changed; nothing is written. Fields and\n"
        "rows are drawn from a seed. docs/testing.md has what must come out of good inputs. Written by\n"
        "`python tests/malformed.py`.\n"
    )
    for kind, found in cases().items():
        text += f"\n## {kind}\n\n" + "".join(f"- {case.name}\n" for case in found)
    return text


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of the folder whose recipe names its own files."""
    shutil.copytree(folder, target)
    path = target / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(str(folder), str(target)), encoding="utf-8")
    return target


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "checks.md").write_text(page(), encoding="utf-8")
