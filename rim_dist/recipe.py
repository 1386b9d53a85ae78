"""Reading a recipe: YAML, overrides, validation, messages, and recipes written by earlier versions.

A recipe is a YAML file with the sections of `rim_dist.config`; `section.key=value` on the command line overrides a field.
Validation is pure: it opens no process group and writes no file.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rim_dist.attention.kernels import kernel_names
from rim_dist.config import STAGE_NAMES, Recipe, Section
from rim_dist.data.formats import format_names, format_of
from rim_dist.errors import ConfigError, first_line
from rim_dist.methods import method_names, method_of

# `format` of the recipes that rim_dist itself writes, into runs, checkpoints and exports.
FORMAT = 4


# Fields whose values are the names of files in a folder of rim_dist, besides some fixed ones.
CHOICES: dict[str, Callable[[], list[str]]] = {
    "method": method_names,
    "model.attention": lambda: ["auto", *kernel_names()],
    "data.source": lambda: ["synthetic", "hub", *format_names()],
    "evaluation.format": lambda: ["auto", *format_names()],
}


def _walks_of_rooms(tree: dict[str, Any]) -> None:
    """1 -> 2: the steps of the embedded task were rooms."""
    data = tree.get("data") or {}
    if data.get("source", "synthetic") == "synthetic":
        tree["data"] = {**data, "synthetic": {"step_text": "room", **(data.get("synthetic") or {})}}


def _dropout_by_place(tree: dict[str, Any]) -> None:
    """2 -> 3: the dropout of a stage was that of every place."""
    curriculum = dict(tree.get("curriculum") or {})
    for name in STAGE_NAMES:
        stage = dict(curriculum.get(name) or {})
        if (dropout := stage.pop("dropout", None)) is not None:
            lora = dropout if (tree.get("model") or {}).get("lora") else None
            stage |= {"lora_dropout": lora, "attention_dropout": dropout, "residual_dropout": dropout}
            tree["curriculum"] = curriculum = {**curriculum, name: stage}


def _gradients_of_the_model(tree: dict[str, Any]) -> None:
    """3 -> 4: gradients of a 16-bit model were added up in its precision."""
    if (tree.get("model") or {}).get("dtype", "fp32") != "fp32":
        tree["optimizer"] = {"grad_accum_dtype": "model", **(tree.get("optimizer") or {})}


# By N below FORMAT: changes a written recipe of format N to format N + 1.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {
    1: _walks_of_rooms,
    2: _dropout_by_place,
    3: _gradients_of_the_model,
}

# Former fields, and what stands in their place.
_MOVED = {
    f"curriculum.{name}.dropout": "it was that of every place; set lora_dropout (with model.lora), attention_dropout, "
    "residual_dropout"
    for name in STAGE_NAMES
}


def nested_section(annotation: Any) -> type[Section] | None:
    """The section class in a field's annotation, which may be optional. None if there is none."""
    options = (annotation, *typing.get_args(annotation))
    return next((option for option in options if inspect.isclass(option) and issubclass(option, Section)), None)


def field_names(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of all fields, sections included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if (nested := nested_section(field.annotation)) is not None:
            names.extend(field_names(nested, f"{prefix}{name}."))
    return names


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names; a mapping with nothing in it is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {name: leaf for part in leaves for name, leaf in part.items()}


_NAMES_ELSEWHERE = {"lr": "learning_rate", "batch_size": "global_batch", "file": "path"}  # what other trainers call it


def _nearest(path: str) -> str:
    """What to say of an unknown dotted name: the fields whose own names are most like its last part, anywhere in the recipe.

    Of equally like ones those whose sections are nearer.
    """
    if path in _MOVED:
        return f"; {_MOVED[path]}"
    names = field_names()
    parent, _, leaf = path.rpartition(".")

    def likeness(name: str) -> tuple[float, float]:
        section, _, own = name.rpartition(".")
        pairs = ((leaf.lower(), own), (parent.lower(), section))
        of_leaf, of_section = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return of_leaf + (0.2 if section == parent else 0.0), of_section  # a typo is likelier than another section

    leaf = _NAMES_ELSEWHERE.get(leaf.lower(), leaf)
    best = max(map(likeness, names))
    if best[0] >= 0.8:
        return f"; did you mean {' or '.join(name for name in names if likeness(name) == best)}?"
    siblings = [n for n in names if n.rpartition(".")[0] == parent]
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _describe(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_nearest(path)}"
    if error["type"] == "missing":
        return f"{path}: is required"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {error['input']!r} is not allowed; {message[0].lower()}{message[1:]}"


def _parse(text: str) -> Any:
    """The value in a YAML text. Raises YAMLError, also where PyYAML raises something else or reads what is not text."""
    try:
        tree = yaml.safe_load(text)
        # As one text, with what is in lists. A node that holds itself is a ValueError.
        if half := re.search(r'[^"]*[\ud800-\udfff][^"]*', json.dumps(tree, ensure_ascii=False, default=str, skipkeys=True)):
            raise ValueError(f"half of a surrogate pair in {half[0]!a}")
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as error:  # a date that is none, a number of 5,000 digits, a false tag
        raise yaml.YAMLError(first_line(error)) from None
    return tree


def _assign(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value")
    if key not in field_names() and not key.startswith("model.config."):
        raise ConfigError(f"{key}: unknown key{_nearest(key)}")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text[:80]!r} is not a YAML value ({first_line(error)})") from error
    if text.lstrip().startswith("#"):
        raise ConfigError(f"{key}: YAML reads {text!r} as a comment; with quotes of its own: '{key}=\"{text}\"'")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node[parent] = {} if node.get(parent) is None else node[parent]
        if not isinstance(node[parent], dict):
            raise ConfigError(f"{key}: {parent} is not a section")
        node = node[parent]
    node[leaf] = value


def _upgraded(tree: dict[str, Any], origin: str, written: bool) -> dict[str, Any]:
    """The recipe in the current format, without its `format`."""
    tree = dict(tree)
    version = tree.pop("format", 1 if written else FORMAT)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{origin}: format: {version!r} is not allowed; allowed: 1 to {FORMAT}, or leave it out")
    if version > FORMAT:
        raise ConfigError(
            f"{origin}: format: {version} is of a newer rim_dist; this one reads recipes up to format {FORMAT}; update it"
        )
    for old in range(version, FORMAT):
        _MIGRATIONS[old](tree)
    return tree


def validate_recipe(tree: Any, origin: str, written: bool = False) -> Recipe:
    """Check a parsed recipe. `origin` names it in messages. Raises ConfigError, a line per wrong field.

    `written`: by rim_dist itself (`dump_recipe`), whose first recipes had no `format`. A user's recipe without it is in the
    current format.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: a recipe is a mapping of sections, not {type(tree).__name__}")
    tree = _upgraded(tree, origin, written)
    lines = _wrong_choices(tree)
    try:
        recipe = Recipe.model_validate(tree)
        if not lines:
            _check_choices(recipe)
            return recipe
    except ValidationError as error:
        lines |= {_describe(e) for e in error.errors()}
    except ValueError as error:  # of _check_choices
        lines = {str(error)}
    raise ConfigError("\n".join(f"{origin}: {line}" for line in sorted(lines)))


def _wrong_choices(tree: dict[str, Any]) -> set[str]:
    """A line for each field of CHOICES with an unknown value."""
    given = flatten(tree)
    return {
        f"{field}: {value!r} is not allowed; allowed: {', '.join(names())}"
        for field, names in CHOICES.items()
        if isinstance(value := given.get(field), str) and value not in names()
    }


def _check_choices(recipe: Recipe) -> None:
    """Raise ValueError if the recipe does not fit its method or its data format."""
    method_of(recipe).check()
    source = recipe.data.source
    if recipe.data.streaming and source != "hub" and (source == "synthetic" or not format_of(source).streams):
        streamed = [name for name in format_names() if format_of(name).streams]
        raise ValueError(f"data: streaming is for hub, {', '.join(streamed)}, not {source}")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), written: bool = False) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides and validate the result. `written`: see `validate_recipe`."""
    path = Path(path)
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a recipe") from None
    if tree is None:
        raise ConfigError(f"{path}: the recipe is empty")
    if isinstance(tree, dict):
        for override in overrides:
            _assign(tree, override)
    return validate_recipe(tree, str(path), written)


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The fully resolved recipe as rim_dist writes it, with its format."""
    return {"format": FORMAT, **recipe.model_dump(mode="json")}


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(recipe_tree(recipe), sort_keys=False, allow_unicode=True)
