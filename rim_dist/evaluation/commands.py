"""The commands that evaluate a model: arguments and calls. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_dist.data.formats import format_names
from rim_dist.errors import EXIT_DONE, ConfigError
from rim_dist.messages import say
from rim_dist.table import show

if TYPE_CHECKING:
    from rim_dist.data.samples import Sample
    from rim_dist.evaluation.loading import LoadedModel
    from rim_dist.model.generation import Decoding

Command = Callable[..., argparse.ArgumentParser]
_MODEL = "an exported folder, any HF causal LM folder, a checkpoint, or a run (its newest checkpoint)"


def _count(text: str, default: int | None = None) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": "N", "help": text if default is None else f"{text} (%(default)s)"}


_COUNTS = {
    "--samples": _count("questions to ask, the first ones", 264),
    "--batch": _count("questions answered together", 64),
    "--max-new-tokens": _count("most tokens of an answer (32; 512 for chains of thought)"),
    "--sampled": _count("also draw N answers a question, for pass@k"),
    "--timed": _count("questions that are timed", 32),
    "--timed-batch": _count("questions timed together", 1),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **_COUNTS,
    "model": {"help": _MODEL},
    "data": {"help": "a file of questions, or synthetic[:SEED]"},
    "--format": {"default": "auto", "help": "format of the file (auto)"},
    "--column": {
        "action": "append",
        "default": [],
        "metavar": "FIELD=NAME",
        "help": "column of the question, the steps or the answer, as in question=prompt (default: as the model was trained)",
    },
    "--stop": {"action": "append", "default": [], "metavar": "TEXT", "help": "an answer ends before this text (repeatable)"},
    "--blocks": {"type": int, "metavar": "K", "help": "memory blocks (default: as trained)"},
    "--output": {"metavar": "DIR"},
    "--no-verify": {"action": "store_true", "help": "do not compare the model's files with their checksums first"},
}
_QUESTIONS = ("data", "--format", "--column", "--samples", "--batch", "--max-new-tokens", "--stop")


def _add(sub: argparse.ArgumentParser, *names: str, **changed: Any) -> None:
    """Add arguments of `_OPTIONS` to a command; `changed`: what is different for this command."""
    for name in names:
        argument = sub.add_argument(name, **{**_OPTIONS[name], **changed})
        if name == "--format":
            argument.choices = ["auto", *format_names()]  # the formats that are registered by now


def add_evaluation_commands(command: Command) -> None:
    """`command(name, function, description, *examples)` makes a command's parser."""
    generate = command(
        "generate",
        _generate,
        "Answer questions with an exported folder; without a question, one a line from standard input.",
        'rim-dist generate runs/demo/hf "From the attic take red blue pink green white."',
        "rim-dist generate runs/demo/hf --every-block < questions.txt",
    )
    _add(generate, "model")
    generate.add_argument("question", nargs="?", help="the question")
    generate.add_argument("--every-block", action="store_true", help="the answer after every block")
    _add(generate, "--blocks", "--stop", "--no-verify")
    _add(generate, "--max-new-tokens", default=256, help="most tokens of an answer (256)")

    evaluate = command(
        "evaluate",
        _evaluate,
        "Accuracy after every block, and latency.",
        "rim-dist evaluate runs/demo/hf synthetic:1 --samples 512",
        "rim-dist evaluate exported/ gsm8k/test.jsonl --samples 1319 --output report/",
        "rim-dist evaluate exported/ gsm8k/test.jsonl --sampled 16 --temperature 0.8",
    )
    _add(evaluate, "model", *_QUESTIONS, "--blocks", "--sampled", "--timed", "--timed-batch", "--no-verify")
    evaluate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the drawn answers (1.0)")
    _add(evaluate, "--output", help="write evaluation.json and answers.jsonl here")

    latency = command(
        "latency",
        _latency,
        "Time several models side by side on the same questions, and a plain prompt as long as one with blocks.",
        "rim-dist latency synthetic:1 runs/demo/hf runs/demo-direct/hf runs/demo-base/hf",
        "rim-dist latency gsm8k/test.jsonl exported/rim exported/cot --timed-batch 8 --output latency/",
    )
    latency.add_argument("data", **_OPTIONS["data"])
    latency.add_argument("models", nargs="+", metavar="MODEL", help=_MODEL)
    _add(latency, "--format", "--column", "--max-new-tokens", "--stop", "--timed", "--timed-batch", "--no-verify")
    _add(latency, "--output", help="write latency.json here")

    for name, text in (
        ("blocks", "Accuracy and latency at many block budgets; a probe that selects an answer; stopping early."),
        ("sweep", "The earlier name of `blocks`, for one release."),
    ):
        blocks = command(
            name,
            _block_budgets,
            text,
            f"rim-dist {name} runs/demo/hf synthetic:1 --budgets 1,2,3,4,5,6,8 --output {name}/",
            f"rim-dist {name} exported/ gsm8k/test.jsonl --samples 1319 --probe-data gsm8k/train.jsonl --output {name}/",
        )
        _add(blocks, "model", *_QUESTIONS, "--timed", "--no-verify")
        blocks.set_defaults(samples=512)
        _add(blocks, "--output", required=True, help=f"write {name}.json, {name}.png and probe.safetensors here")
        blocks.add_argument("--budgets", metavar="K,K,...", help="numbers of blocks (default: 1 to the trained one)")
        learns = "the probe learns from as many questions of this file (default: from half of all; the rest judges it)"
        blocks.add_argument("--probe-data", metavar="FILE", help=learns)
        stops = "stop at the first block that the probe gives this (0.9)"
        blocks.add_argument("--confidence", type=float, default=0.9, metavar="P", help=stops)

    analyse = command(
        "analyse",
        _analyse,
        "What the blocks do: their states over blocks and over training, their attention, what the answer takes from them.",
        "rim-dist analyse runs/demo synthetic:1 --output analysis/",
        "rim-dist analyse exported/ gsm8k/test.jsonl --samples 128 --output analysis/",
    )
    _add(analyse, "model", *_QUESTIONS, "--no-verify")
    written = "write analysis.json and pictures here; a run's folder as MODEL adds its checkpoints' states (training.png)"
    _add(analyse, "--output", required=True, help=written)

    compare = command(
        "compare",
        _compare,
        "Is one evaluation better than another on the same questions, and which of several checkpoints to take.",
        "rim-dist compare report/rim report/direct report/cot",
        "rim-dist compare --select runs/demo/report/evaluation-step-*",
    )
    compare.add_argument("evaluation", nargs="+", help="a folder that evaluate or a run wrote (answers.jsonl in it)")
    compare.add_argument(
        "--select",
        action="store_true",
        help="they are checkpoints of one run: choose by 20 %% of the questions, score on the rest, over 16 random splits",
    )


def _load(arguments: argparse.Namespace, model: str) -> LoadedModel:
    from rim_dist.evaluation.loading import load_for_evaluation

    return load_for_evaluation(model, verify=not arguments.no_verify)


def _blocks(given: int | None, loaded: LoadedModel) -> int:
    """The block budget of a command: the trained one unless given. Raises ConfigError if it makes no sense."""
    if given is None:
        return loaded.blocks
    if loaded.blocks == 0:
        raise ConfigError(f"--blocks: {given} is not allowed; this model has no memory blocks")
    if given < 1:
        raise ConfigError(f"--blocks: {given} is not allowed; allowed: 1 or more")
    loaded.check_blocks(given, "--blocks")
    return given


def _check(arguments: argparse.Namespace) -> None:
    """Check what needs no model, and make the folder of `--output`, if there is one. Raises ConfigError."""
    given = vars(arguments)
    for name in _COUNTS:
        value = given.get(name.removeprefix("--").replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is not allowed; allowed: 1 or more")
    if (temperature := given.get("temperature", 1)) <= 0:
        raise ConfigError(f"--temperature: {temperature:g} is not allowed; allowed: above 0")
    if not 0 < (confidence := given.get("confidence", 0.5)) < 1:
        raise ConfigError(f"--confidence: {confidence:g} is not allowed; allowed: between 0 and 1")
    if (folder := given.get("output")) is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output: {folder} cannot be written ({error.strerror})") from None


def _questions(arguments: argparse.Namespace, loaded: LoadedModel, data: str, count: int) -> list[Sample]:
    from rim_dist.evaluation.evaluate import evaluation_samples, unknown_answers_note

    columns = loaded.columns.model_copy(update=column_names(arguments.column))
    samples = evaluation_samples(data, arguments.format, count, columns, loaded.synthetic_steps)
    if note := unknown_answers_note(loaded.tokenizer, samples):
        say(note)
    if (batch := getattr(arguments, "timed_batch", 1)) > len(samples):
        raise ConfigError(f"--timed-batch: {batch} is not allowed; there are {len(samples)} questions")
    return samples


def column_names(given: list[str]) -> dict[str, str]:
    """`--column FIELD=NAME` as fields of `data.columns`. Raises ConfigError for another field."""
    fields = ("question", "steps", "answer")
    columns = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not equals or field not in fields or not name:
            raise ConfigError(f"--column: {text!r} is not allowed; write FIELD=NAME with one of {', '.join(fields)}")
        columns[field] = name
    return columns


def _decoding(arguments: argparse.Namespace, loaded: LoadedModel, batch: int) -> Decoding:
    from rim_dist.methods import method_class
    from rim_dist.model.generation import Decoding

    limit = arguments.max_new_tokens or 32 * method_class(loaded.method).answer_factor
    return Decoding(limit, batch, stop=tuple(arguments.stop))


def _load_with_blocks(arguments: argparse.Namespace) -> tuple[LoadedModel, list[Sample], Decoding]:
    """The model, which has to have memory blocks, its questions, and how it answers them."""
    loaded = _load(arguments, arguments.model)
    if not loaded.blocks:
        raise ConfigError(f"{arguments.model}: this model has no memory blocks")
    samples = _questions(arguments, loaded, arguments.data, arguments.samples)
    return loaded, samples, _decoding(arguments, loaded, arguments.batch)


def _write_json(folder: str | None, name: str, tree: dict[str, Any]) -> None:
    if folder is not None:
        (Path(folder) / name).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _generate(arguments: argparse.Namespace) -> int:
    from rim_dist.data.formats.base import is_unicode
    from rim_dist.evaluation.evaluate import block_answers
    from rim_dist.model.generation import Decoding, answer_questions

    _check(arguments)
    loaded = _load(arguments, arguments.model)
    blocks = _blocks(arguments.blocks, loaded)
    if arguments.every_block and not blocks:
        raise ConfigError("--every-block: this model has no memory blocks")
    questions = [arguments.question] if arguments.question is not None else _standard_input()
    decoding = Decoding(arguments.max_new_tokens, stop=tuple(arguments.stop))
    answered = 0
    for question in filter(str.strip, questions):
        answered += 1
        if not is_unicode(question):
            raise ConfigError(f"question {answered}: {question!a} is not Unicode text")
        if arguments.every_block:
            for k, text in enumerate(block_answers(loaded.model, loaded.tokenizer, [question], blocks, decoding)[0], 1):
                print(f"block {k}: {text}", flush=True)
        else:
            print(answer_questions(loaded.model, loaded.tokenizer, [question], blocks or None, decoding)[0], flush=True)
    if not answered:
        raise ConfigError("question: there is none; give one, or one a line on standard input")
    return EXIT_DONE


def _standard_input() -> Iterator[str]:
    """Its lines. Raises ConfigError if it is not UTF-8."""
    try:
        for line in sys.stdin:
            yield line.removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"question: standard input is not text in {error.encoding}") from None


def _evaluate(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.evaluate import evaluate_model, write_evaluation
    from rim_dist.evaluation.latency import device_name
    from rim_dist.evaluation.tables import evaluation_table
    from rim_dist.model.generation import Sampling

    _check(arguments)
    loaded = _load(arguments, arguments.model)
    blocks = _blocks(arguments.blocks, loaded)
    samples = _questions(arguments, loaded, arguments.data, arguments.samples)
    sampling = Sampling(arguments.sampled, arguments.temperature) if arguments.sampled else None
    decoding = _decoding(arguments, loaded, arguments.batch)
    result = evaluate_model(loaded, samples, blocks, decoding, arguments.timed, arguments.timed_batch, sampling)
    show(evaluation_table(result, arguments.model))
    if arguments.output is not None:
        about = {"model": arguments.model, "data": arguments.data, "method": loaded.method, "blocks": blocks}
        write_evaluation(result, Path(arguments.output), {**about, "device": device_name()})
    else:
        print(json.dumps(result.figures()))
    return EXIT_DONE


def _latency(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.latency import Candidate, device_name, time_side_by_side
    from rim_dist.evaluation.tables import latency_table
    from rim_dist.model.generation import Decoding

    _check(arguments)
    batch, names = arguments.timed_batch, arguments.models
    if len(set(names)) < len(names):
        raise ConfigError("models: the same one is given twice")
    models = {name: _load(arguments, name) for name in names}
    samples = _questions(arguments, models[names[0]], arguments.data, max(batch, arguments.timed))
    questions = [sample.question for sample in samples]
    candidates = {
        name: Candidate(model, model.prompts(questions), _decoding(arguments, model, batch)) for name, model in models.items()
    }
    for name, model in models.items():
        if memory := model.blocks * model.block_size:
            plain = [(ids * (1 + memory // len(ids)))[:memory] + ids for ids in model.prompts(questions, 0)]
            candidates[f"{name}: a plain prompt as long"] = Candidate(model, plain, Decoding(1, batch))
    timed = time_side_by_side(candidates, batch)
    figures: dict[str, dict[str, Any]] = {
        name: {
            "prompt_tokens": sum(map(len, candidates[name].prompts)) / len(questions),
            "only_first_token": name not in models,
            **seconds,
        }
        for name, seconds in timed.items()
    }
    show(latency_table(figures, f"{device_name()}, batches of {batch}"))
    _write_json(arguments.output, "latency.json", {"data": arguments.data, "device": device_name(), "models": figures})
    return EXIT_DONE


def _budgets(given: str | None, trained: int) -> list[int]:
    if given is None:
        return list(range(1, trained + 1))
    try:
        budgets = [int(part) for part in given.split(",")]
    except ValueError:
        budgets = []
    if not budgets or min(budgets) < 1 or len(set(budgets)) < len(budgets):
        raise ConfigError(f"--budgets: {given!r} is not allowed; write different numbers of blocks, as in 1,2,4,8")
    return sorted(budgets)


def _block_budgets(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.block_budgets import measure_budgets
    from rim_dist.evaluation.figures import draw_budgets
    from rim_dist.evaluation.latency import device_name
    from rim_dist.evaluation.tables import budget_tables

    name = arguments.command  # under its earlier name the command writes the files of that name
    if name == "sweep":
        say("rim-dist: `rim-dist sweep` is now `rim-dist blocks`; the next release has only the new name")
    _check(arguments)
    loaded, samples, decoding = _load_with_blocks(arguments)
    budgets = _budgets(arguments.budgets, loaded.blocks)
    loaded.check_blocks(budgets[-1], "--budgets")
    others = _questions(arguments, loaded, arguments.probe_data, arguments.samples) if arguments.probe_data else None
    figures, probe = measure_budgets(loaded, samples, budgets, decoding, arguments.timed, arguments.confidence, others)
    about = {"model": arguments.model, "data": arguments.data, "device": device_name()}
    _write_json(arguments.output, f"{name}.json", {**about, **figures})
    draw_budgets(figures, Path(arguments.output) / f"{name}.png")
    if probe is not None:
        probe.save(Path(arguments.output) / "probe.safetensors")
    show(*budget_tables(figures, arguments.model))
    return EXIT_DONE


def _analyse(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.store import run_checkpoints
    from rim_dist.evaluation.analysis import analyse
    from rim_dist.evaluation.tables import analysis_tables

    _check(arguments)
    loaded, samples, decoding = _load_with_blocks(arguments)
    folder = Path(arguments.model)
    checkpoints = run_checkpoints(folder) if (folder / "checkpoints").is_dir() else []
    figures = analyse(loaded, samples, checkpoints, decoding, Path(arguments.output))
    _write_json(arguments.output, "analysis.json", {"model": arguments.model, "data": arguments.data, **figures})
    show(*analysis_tables(figures, arguments.model))
    return EXIT_DONE


def _compare(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.comparison import compare_paired, read_answers, same_questions, select_by_splits
    from rim_dist.evaluation.tables import comparison_table, selection_tables

    folders = arguments.evaluation
    if len(folders) < 2:
        raise ConfigError(f"evaluation: {folders[0]} alone cannot be compared; give two or more")
    answers = [read_answers(Path(folder)) for folder in folders]
    same_questions(folders, answers)
    correct = [[answer["correct"][-1] for answer in rows] for rows in answers]
    if arguments.select:
        show(*selection_tables(select_by_splits(correct), folders, [sum(row) / len(row) for row in correct]))
    else:
        named = itertools.combinations(zip(folders, correct, strict=True), 2)
        pairs = [(a, b, compare_paired(rows_a, rows_b)) for (a, rows_a), (b, rows_b) in named]
        show(comparison_table(pairs, f"final block, {len(answers[0])} questions"))
    return EXIT_DONE
