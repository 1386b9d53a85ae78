"""The commands that ask a model: arguments and calls. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_dist.data.formats import format_names
from rim_dist.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from rim_dist.data.samples import Sample
    from rim_dist.evaluation.opened import ExportedModel
    from rim_dist.model.generation import Decoding

Command = Callable[..., argparse.ArgumentParser]
_MODEL = "an exported folder, any HF causal LM folder, a checkpoint, or a run (its newest checkpoint)"


def _model_arguments(sub: argparse.ArgumentParser, samples: int = 264) -> None:
    sub.add_argument("model", help=_MODEL)
    sub.add_argument("data", help="a file of questions, or synthetic[:SEED]")
    _format_argument(sub)
    sub.add_argument("--samples", type=int, default=samples, metavar="N", help=f"questions to ask, the first ones ({samples})")
    sub.add_argument("--batch", type=int, default=64, metavar="N", help="questions answered together (64)")


def _format_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--format",
        default="auto",
        choices=["auto", *format_names()],
        help="format of the file (auto)",
    )
    sub.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="column of the question, the steps or the answer, as in question=prompt (default: as the model was trained)",
    )


def _decoding_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (32; 512 for chains of thought)")
    _stop_argument(sub)


def _stop_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends before this text too (repeatable)"
    )


def add_evaluation_commands(command: Command) -> None:
    """`command(name, function, description, *examples)` makes a command's parser."""
    generate = command(
        "generate",
        _generate,
        "Answer questions with an exported folder; without a question, one a line from standard input.",
        'rim-dist generate runs/demo/hf "From the attic take red blue pink."',
        "rim-dist generate runs/demo/hf --every-block < questions.txt",
    )
    generate.add_argument("model", help=_MODEL)
    generate.add_argument("question", nargs="?", help="the question")
    generate.add_argument("--blocks", type=int, metavar="K", help="memory blocks (default: as trained)")
    generate.add_argument("--every-block", action="store_true", help="the answer after every block")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (256)")
    _stop_argument(generate)

    evaluate = command(
        "evaluate",
        _evaluate,
        "Accuracy after every block, and latency.",
        "rim-dist evaluate runs/demo/hf synthetic:1 --samples 512",
        "rim-dist evaluate exported/ gsm8k/test.jsonl --samples 1319 --output report/",
        "rim-dist evaluate exported/ gsm8k/test.jsonl --sampled 16 --temperature 0.8",
    )
    _model_arguments(evaluate)
    _decoding_arguments(evaluate)
    evaluate.add_argument("--output", metavar="DIR", help="write evaluation.json and answers.jsonl here")
    evaluate.add_argument("--blocks", type=int, metavar="K", help="memory blocks (default: as trained)")
    evaluate.add_argument("--sampled", type=int, metavar="N", help="also draw N answers a question, for pass@k")
    evaluate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the drawn answers (1.0)")
    evaluate.add_argument("--timed", type=int, default=32, metavar="N", help="questions that are timed (32)")
    evaluate.add_argument("--timed-batch", type=int, default=1, metavar="N", help="questions timed together (1)")

    latency = command(
        "latency",
        _latency,
        "Time several models side by side on the same questions, and a plain prompt as long as one with blocks.",
        "rim-dist latency synthetic:1 runs/demo/hf runs/demo-direct/hf runs/demo-base/hf",
        "rim-dist latency gsm8k/test.jsonl exported/rim exported/cot --timed-batch 8 --output latency/",
    )
    latency.add_argument("data", help="a file of questions, or synthetic[:SEED]")
    latency.add_argument("models", nargs="+", metavar="MODEL", help=_MODEL)
    _format_argument(latency)
    _decoding_arguments(latency)
    latency.add_argument("--timed", type=int, default=32, metavar="N", help="questions that are timed (32)")
    latency.add_argument("--timed-batch", type=int, default=1, metavar="N", help="questions timed together (1)")
    latency.add_argument("--output", metavar="DIR", help="write latency.json here")

    sweep = command(
        "sweep",
        _sweep,
        "Accuracy and latency at many block budgets; a probe that selects an answer; stopping early.",
        "rim-dist sweep runs/demo/hf synthetic:1 --budgets 1,2,3,4,5,6,8 --output sweep/",
        "rim-dist sweep exported/ gsm8k/test.jsonl --samples 1319 --probe-data gsm8k/train.jsonl --output sweep/",
    )
    _model_arguments(sweep, 512)
    _decoding_arguments(sweep)
    sweep.add_argument("--output", metavar="DIR", required=True, help="write sweep.json, sweep.png and probe.safetensors here")
    sweep.add_argument("--budgets", metavar="K,K,...", help="numbers of blocks (default: 1 to the trained one)")
    sweep.add_argument("--timed", type=int, default=32, metavar="N", help="questions timed at each budget (32)")
    sweep.add_argument(
        "--probe-data",
        metavar="FILE",
        help="the probe learns from as many questions of this file (default: from half of the questions, judged on the rest)",
    )
    sweep.add_argument(
        "--confidence", type=float, default=0.9, metavar="P", help="stop at the first block that the probe gives this (0.9)"
    )

    analyse = command(
        "analyse",
        _analyse,
        "What the blocks do: their states over blocks and over training, what they look at, what the answer takes from them.",
        "rim-dist analyse runs/demo synthetic:1 --output analysis/",
        "rim-dist analyse exported/ gsm8k/test.jsonl --samples 128 --output analysis/",
    )
    _model_arguments(analyse)
    _decoding_arguments(analyse)
    analyse.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        help="write analysis.json and pictures here; a run's folder as MODEL adds its checkpoints' states (training.png)",
    )

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


def _blocks(given: int | None, trained: int) -> int:
    """The block budget of a command: the trained one unless given. Raises ConfigError if it makes no sense."""
    if given is None:
        return trained
    if trained == 0:
        raise ConfigError(f"--blocks: {given} is not allowed; this model has no memory blocks")
    if given < 1:
        raise ConfigError(f"--blocks: {given} is not allowed; allowed: 1 or more")
    return given


def _at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not allowed; allowed: 1 or more")


def _questions(
    arguments: argparse.Namespace, export: ExportedModel, data: str | None = None, count: int | None = None
) -> list[Sample]:
    from rim_dist.evaluation.evaluate import evaluation_samples

    columns = export.columns.model_copy(update=_columns(arguments.column))
    return evaluation_samples(
        data or arguments.data, arguments.format, count or arguments.samples, columns, export.synthetic_steps
    )


def _columns(given: list[str]) -> dict[str, str]:
    """`--column FIELD=NAME` as fields of `data.columns`. Raises ConfigError for another field."""
    fields = ("question", "steps", "answer")
    columns = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not equals or field not in fields or not name:
            raise ConfigError(f"--column: {text!r} is not allowed; write FIELD=NAME with one of {', '.join(fields)}")
        columns[field] = name
    return columns


def _decoding(arguments: argparse.Namespace, export: ExportedModel, batch: int | None = None) -> Decoding:
    from rim_dist.methods import method_class
    from rim_dist.model.generation import Decoding

    limit = arguments.max_new_tokens or 32 * method_class(export.method).answer_factor
    return Decoding(limit, batch or arguments.batch, stop=tuple(arguments.stop))


def _needs_blocks(export: ExportedModel, arguments: argparse.Namespace) -> None:
    if not export.blocks:
        raise ConfigError(f"{arguments.model}: this model has no memory blocks")


def _output(folder: str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written ({error.strerror})") from None
    return Path(folder)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _generate(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.evaluate import block_answers
    from rim_dist.evaluation.opened import open_export
    from rim_dist.model.generation import Decoding, answer_questions

    _at_least_one(arguments, "max-new-tokens")
    export = open_export(arguments.model)
    blocks = _blocks(arguments.blocks, export.blocks)
    if arguments.every_block and not blocks:
        raise ConfigError("--every-block: this model has no memory blocks")
    questions = [arguments.question] if arguments.question is not None else (line.strip() for line in sys.stdin)
    decoding = Decoding(arguments.max_new_tokens, stop=tuple(arguments.stop))
    asked = 0
    for question in questions:
        if not question.strip():
            continue
        asked += 1
        if arguments.every_block:
            for k, text in enumerate(block_answers(export.model, export.tokenizer, [question], blocks, decoding)[0], 1):
                print(f"block {k}: {text}", flush=True)
        else:
            print(answer_questions(export.model, export.tokenizer, [question], blocks or None, decoding)[0], flush=True)
    if not asked:
        raise ConfigError("question: there is none; give one, or one a line on standard input")
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.evaluate import evaluate_export, write_evaluation
    from rim_dist.evaluation.latency import device_name
    from rim_dist.evaluation.opened import open_export
    from rim_dist.evaluation.table import print_evaluation
    from rim_dist.model.generation import Sampling

    _at_least_one(arguments, "samples", "batch", "timed", "timed-batch", "sampled", "max-new-tokens")
    if arguments.temperature <= 0:
        raise ConfigError(f"--temperature: {arguments.temperature:g} is not allowed; allowed: above 0")
    output = _output(arguments.output) if arguments.output else None
    export = open_export(arguments.model)
    blocks = _blocks(arguments.blocks, export.blocks)
    samples = _questions(arguments, export)
    if arguments.timed_batch > len(samples):
        raise ConfigError(f"--timed-batch: {arguments.timed_batch} is not allowed; there are {len(samples)} questions")
    sampling = Sampling(arguments.sampled, arguments.temperature) if arguments.sampled else None
    decoding = _decoding(arguments, export)
    result = evaluate_export(export, samples, blocks, decoding, arguments.timed, arguments.timed_batch, sampling)
    print_evaluation(result, arguments.model)
    if output is not None:
        about = {"model": arguments.model, "data": arguments.data, "method": export.method, "blocks": blocks}
        write_evaluation(result, output, {**about, "device": device_name()})
    else:
        figures = {k: v for k, v in vars(result).items() if k != "answers"}
        print(json.dumps(figures))
    return EXIT_DONE


def _latency(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.latency import Candidate, device_name, time_side_by_side
    from rim_dist.evaluation.opened import open_export
    from rim_dist.evaluation.table import print_latency
    from rim_dist.model.generation import Decoding
    from rim_dist.tokens import prompt_ids

    _at_least_one(arguments, "timed", "timed-batch", "max-new-tokens")
    output = _output(arguments.output) if arguments.output else None
    batch, names = arguments.timed_batch, arguments.models
    if len(set(names)) < len(names):
        raise ConfigError("models: the same one is given twice")
    exports = {name: open_export(name) for name in names}
    questions = [s.question for s in _questions(arguments, exports[names[0]], count=max(batch, arguments.timed))]
    if batch > len(questions):
        raise ConfigError(f"--timed-batch: {batch} is not allowed; there are {len(questions)} questions")
    candidates = {
        name: Candidate(
            e.model, e.tokenizer, prompt_ids(e.tokenizer, questions, e.blocks or None), _decoding(arguments, e, batch)
        )
        for name, e in exports.items()
    }
    for name, export in exports.items():
        if export.blocks:
            memory = export.blocks * export.block_size()
            plain = [(ids * (1 + memory // len(ids)))[:memory] + ids for ids in prompt_ids(export.tokenizer, questions, 0)]
            longer = Candidate(export.model, export.tokenizer, plain, Decoding(1, batch))
            candidates[f"{name}: a plain prompt as long"] = longer
    timed = time_side_by_side(candidates, batch)
    tokens = {name: sum(map(len, c.prompts)) / len(c.prompts) for name, c in candidates.items()}
    figures: dict[str, dict[str, Any]] = {
        name: {"prompt_tokens": tokens[name], "only_first_token": name not in exports, **seconds}
        for name, seconds in timed.items()
    }
    print_latency(figures, f"{device_name()}, batches of {batch}")
    if output is not None:
        _write_json(output / "latency.json", {"data": arguments.data, "device": device_name(), "models": figures})
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


def _sweep(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.latency import device_name
    from rim_dist.evaluation.opened import open_export
    from rim_dist.evaluation.sweep import draw_sweep, sweep
    from rim_dist.evaluation.table import print_sweep

    _at_least_one(arguments, "samples", "batch", "timed", "max-new-tokens")
    if not 0 < arguments.confidence < 1:
        raise ConfigError(f"--confidence: {arguments.confidence:g} is not allowed; allowed: between 0 and 1")
    output = _output(arguments.output)
    export = open_export(arguments.model)
    _needs_blocks(export, arguments)
    budgets = _budgets(arguments.budgets, export.blocks)
    samples = _questions(arguments, export)
    others = _questions(arguments, export, arguments.probe_data) if arguments.probe_data else None
    decoding = _decoding(arguments, export)
    figures, probe = sweep(export, samples, budgets, decoding, arguments.timed, arguments.confidence, others)
    _write_json(output / "sweep.json", {"model": arguments.model, "data": arguments.data, "device": device_name(), **figures})
    draw_sweep(figures, output / "sweep.png")
    if probe is not None:
        probe.save(output / "probe.safetensors")
    print_sweep(figures, arguments.model)
    return EXIT_DONE


def _analyse(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.store import run_checkpoints
    from rim_dist.evaluation.analysis import analyse
    from rim_dist.evaluation.opened import open_export
    from rim_dist.evaluation.table import print_analysis

    _at_least_one(arguments, "samples", "batch", "max-new-tokens")
    output = _output(arguments.output)
    export = open_export(arguments.model)
    _needs_blocks(export, arguments)
    samples = _questions(arguments, export)
    folder = Path(arguments.model)
    checkpoints = run_checkpoints(folder) if (folder / "checkpoints").is_dir() else []
    figures = analyse(export, samples, checkpoints, _decoding(arguments, export), output)
    _write_json(output / "analysis.json", {"model": arguments.model, "data": arguments.data, **figures})
    print_analysis(figures, arguments.model)
    return EXIT_DONE


def _compare(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.answers import read_answers, same_questions
    from rim_dist.evaluation.significance import compare_paired
    from rim_dist.evaluation.splits import select_by_splits
    from rim_dist.evaluation.table import print_comparisons, print_selection

    folders = arguments.evaluation
    if len(folders) < 2:
        raise ConfigError(f"evaluation: {folders[0]} alone cannot be compared; give two or more")
    answers = [read_answers(Path(folder)) for folder in folders]
    same_questions(folders, answers)
    correct = [[answer["correct"][-1] for answer in rows] for rows in answers]
    if arguments.select:
        print_selection(select_by_splits(correct), folders, [sum(row) / len(row) for row in correct])
    else:
        pairs = [(i, j) for i in range(len(folders)) for j in range(i + 1, len(folders))]
        print_comparisons([(folders[i], folders[j], compare_paired(correct[i], correct[j])) for i, j in pairs])
    return EXIT_DONE
