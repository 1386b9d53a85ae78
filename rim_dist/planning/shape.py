"""The sizes of a language model, read from a transformers `config.json`, and the tensors that follow from them.

Only families whose layers were read are known; others are refused, because a number for them would be a guess.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from rim_dist.config import LoraSection, Recipe
from rim_dist.errors import ConfigError

Split = Literal["column", "row"]
MEMORY_ROWS = 3  # begin, memory, end: the rows that adapters leave trainable


@dataclass(frozen=True)
class Family:
    """How the layers of a model type are built.

    `norm`: `rms` is transformers' own chain of operations, `layer` one kernel. `biases`: of queries, keys and values, of the
    attention's output, of the MLP; True, False, or the config field that says so.
    """

    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True  # act(gate(x)) * up(x), else act(up(x))
    query_norm: bool = False  # a norm of each head's queries and keys
    fused_projection: bool = False  # queries, keys and values are slices of one tensor
    rotary: bool = True  # else a table of positions is added to the embedding
    biases: tuple[bool | str, bool | str, bool | str] = (False, False, False)
    activation: str = "silu"  # this one and `tied` where the config does not say
    tied: bool = False
    splittable: bool = True  # transformers has a tensor parallel plan of column and row layers


_LLAMA_BIASES = ("attention_bias", "attention_bias", "mlp_bias")
FAMILIES = {
    "llama": Family(biases=_LLAMA_BIASES),
    "mistral": Family(),
    "qwen2": Family(biases=(True, False, False)),
    "qwen3": Family(query_norm=True, biases=("attention_bias", "attention_bias", False)),
    "smollm3": Family(biases=_LLAMA_BIASES, tied=True),
    "granite": Family(biases=_LLAMA_BIASES),
    "starcoder2": Family(norm="layer", gated=False, biases=("use_bias",) * 3, activation="gelu_pytorch_tanh", tied=True),
    "gpt2": Family(
        norm="layer",
        gated=False,
        fused_projection=True,
        rotary=False,
        biases=(True, True, True),
        activation="gelu_new",
        tied=True,
        splittable=False,
    ),
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}


@dataclass(frozen=True)
class Linear:
    """A matrix of every layer, `[outputs, inputs]`. `split`: a tensor rank has some of its outputs (column) or inputs (row)."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    split: Split


@dataclass(frozen=True)
class Tensor:
    """`count` parameters of `size` entries each, as one tensor rank holds them."""

    size: int
    count: int
    trained: bool

    @property
    def entries(self) -> int:
        return self.size * self.count


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes. `intermediate`: the width inside the MLP. `positions`: the longest sequence. `biases`: see `Family`."""

    name: str
    model_type: str
    family: Family
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    tied: bool
    activation: str
    biases: tuple[bool, bool, bool]
    sliding_window: int | None

    @property
    def config(self) -> Any:
        """The fields of a transformers config that the checks of attention and degrees read."""
        view = SimpleNamespace(
            model_type=self.model_type,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            sliding_window=self.sliding_window,
        )
        view.get_text_config = lambda: view
        return view

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[Linear]:
        """The matrices of one layer under transformers' names, as `model.lora.target_modules` writes them."""
        h, q, kv, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        query_bias, output_bias, mlp_bias = self.biases
        if self.family.fused_projection:
            attention = [Linear("attn.c_attn", h, q + 2 * kv, query_bias, "column")]
            attention.append(Linear("attn.c_proj", q, h, output_bias, "row"))
        else:
            widths = {"q": q, "k": kv, "v": kv}
            attention = [Linear(f"self_attn.{n}_proj", h, width, query_bias, "column") for n, width in widths.items()]
            attention.append(Linear("self_attn.o_proj", q, h, output_bias, "row"))
        if self.family.gated:
            *up, down = ("gate_proj", "up_proj", "down_proj")
        else:
            *up, down = ("c_fc", "c_proj")
        mlp = [Linear(f"mlp.{name}", h, i, mlp_bias, "column") for name in up]
        return [*attention, *mlp, Linear(f"mlp.{down}", i, h, mlp_bias, "row")]

    def vocabulary_rows(self, tensor: int = 1) -> int:
        """Rows of embedding and head on a tensor rank, padding included."""
        return -(-self.vocabulary // tensor)

    def tensors(self, lora: LoraSection | None = None, tensor: int = 1) -> list[Tensor]:
        """The parameters of a tensor rank, with adapters and trained memory rows under `lora`."""
        full = lora is None
        rows = self.vocabulary_rows(tensor) * self.hidden
        matrices = 1 if self.tied else 2
        found = [Tensor(rows, matrices, full)]
        if lora is not None:
            found.append(Tensor(MEMORY_ROWS * self.hidden, matrices, True))
        if not self.family.rotary:
            found.append(Tensor(self.positions * self.hidden, 1, full))
        vectors = 2 if self.family.norm == "layer" else 1  # weight, and the bias of a layer norm
        found.append(Tensor(self.hidden, vectors * (2 * self.layers + 1), full))
        if self.family.query_norm:
            found.append(Tensor(self.head_dim, 2 * self.layers, full))
        for linear in self.linears:
            found.append(Tensor(linear.inputs * linear.outputs // tensor, self.layers, full))
            if linear.bias:
                found.append(Tensor(linear.outputs // (tensor if linear.split == "column" else 1), self.layers, full))
            if lora is not None and adapted(linear, lora, self.layers):
                column = linear.split == "column"
                found.append(Tensor(linear.inputs * lora.rank // (1 if column else tensor), self.layers, True))
                found.append(Tensor(linear.outputs * lora.rank // (tensor if column else 1), self.layers, True))
        return found

    def parameters(self, lora: LoraSection | None = None, tensor: int = 1) -> int:
        return sum(t.entries for t in self.tensors(lora, tensor))


def adapted(linear: Linear, lora: LoraSection, layers: int) -> bool:
    """Whether a matrix gets an adapter, by peft's rules for `target_modules` (names, a regular expression, `all-linear`).

    Raises ConfigError for an expression that takes it in some layers only.
    """
    targets = lora.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return _matched(targets, linear.name, layers)
    return any(linear.name == t or linear.name.endswith(f".{t}") for t in targets)


@functools.cache
def _matched(expression: str, name: str, layers: int) -> bool:
    stems = ("model.layers", "transformer.h")
    found = {any(re.fullmatch(expression, f"{stem}.{n}.{name}") for stem in stems) for n in range(layers)}
    if len(found) > 1:
        raise ConfigError(f"model.lora.target_modules: {expression!r} takes {name} in some layers only: cannot be planned")
    return found.pop()


_SHAPES = resources.files("rim_dist.planning").joinpath("shapes")


def known_models() -> list[str]:
    """Names of the shapes that come with the package."""
    return sorted(file.name.removesuffix(".json") for file in _SHAPES.iterdir() if file.name.endswith(".json"))


def model_shape(name: str) -> ModelShape:
    """A shape by name, or from a `config.json` (or a folder that holds one). Raises ConfigError for anything else."""
    if name.lower() in known_models():
        return read_shape(json.loads(_SHAPES.joinpath(f"{name.lower()}.json").read_text(encoding="utf-8")), name.lower())
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(known_models())
        raise ConfigError(f"--model: {name!r} is not known and no file; known: {known}, or a path to a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {path}: not a JSON file ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--model: {path}: a config.json is a JSON object")
    return read_shape(config, str(path))


def recipe_shape(recipe: Recipe) -> ModelShape:
    """The shape of a recipe's model: its `config`, or the `config.json` where `init_from` points. Does not use the network."""
    section = recipe.model
    if section.config is not None:
        if "vocab_size" not in section.config:
            raise ConfigError("model.config.vocab_size: is required, no tokenizer is loaded; add model.config.vocab_size=N")
        return read_shape(section.config, "model.config")
    assert section.init_from is not None
    folder = Path(section.init_from)
    for path in (folder / "hf", folder, *sorted(folder.glob("checkpoints/step-*/model"), reverse=True)):
        if (path / "config.json").is_file():
            return model_shape(str(path))
    name = section.init_from.rpartition("/")[2].lower().removesuffix("-instruct")
    if name in known_models():
        return model_shape(name)
    raise ConfigError(
        f"model.init_from: {section.init_from}: its config.json is not on this machine; give --model NAME or a path to a "
        f"config.json; known names: {', '.join(known_models())}"
    )


def read_shape(config: Mapping[str, Any], origin: str) -> ModelShape:
    """The shape in a transformers config. Raises ConfigError naming the field that is missing or wrong."""
    config = config.get("text_config") or config
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(f"{origin}: model_type {model_type!r} cannot be planned; allowed: {', '.join(FAMILIES)}")
    names = _GPT2_NAMES if model_type == "gpt2" else {}

    def size(field: str, default: int | None = None) -> int:
        name = names.get(field, field)
        value = config.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{origin}: {name}: {value!r} is not allowed; allowed: a number of 1 or more")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    activation = str(config.get(names.get("hidden_act", "hidden_act")) or family.activation)
    return ModelShape(
        name=origin,
        model_type=str(model_type),
        family=family,
        vocabulary=size("vocab_size"),
        hidden=hidden,
        intermediate=size("intermediate_size", 4 * hidden if model_type == "gpt2" else None),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        positions=size("max_position_embeddings", 1 << 30 if family.rotary else 1024),
        tied=bool(family.tied if config.get("tie_word_embeddings") is None else config["tie_word_embeddings"]),
        activation=activation,
        biases=tuple(bool(config.get(b, b == "use_bias")) if isinstance(b, str) else b for b in family.biases),  # type: ignore[arg-type]
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
    )
