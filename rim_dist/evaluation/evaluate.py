"""Accuracy after every block and latency, of an exported folder or of the model in training."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rim_dist.attention.probe import probe_family
from rim_dist.config import ColumnsSection, Recipe
from rim_dist.data.sources import BadSample, Sample, read_file, recognise
from rim_dist.data.synthetic import SyntheticTask
from rim_dist.errors import CheckpointError, DataError, ModelError
from rim_dist.evaluation.generation import Decoding, Latency, answer_questions, answer_texts, measure_latency, padding_note
from rim_dist.evaluation.readouts import readout_ids
from rim_dist.evaluation.scoring import extract_answer, same_answer
from rim_dist.evaluation.thinking import think_before_answers
from rim_dist.memory import prompt_ids
from rim_dist.methods import method_names
from rim_dist.unwrap import bare_model

_TAKES_MASK = "_rim_dist_takes_mask"


@dataclass
class Evaluation:
    """Result over `questions` questions. `per_block[k - 1]` is the accuracy after block k (one entry without blocks)."""

    questions: int
    accuracy: float
    per_block: list[float]
    any_block: float
    answers: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, float] = field(default_factory=dict)


def evaluation_samples(data: str, file_format: str, limit: int, columns: ColumnsSection, steps: int = 5) -> list[Sample]:
    """Questions of a file, or of the embedded task's held-out problems (`synthetic[:SEED]`), the first `limit`.

    Raises DataError: no such file, unknown format, a bad row (with its line), no rows.
    """
    name, _, seed = data.partition(":")
    if name == "synthetic":
        if seed and not seed.isdigit():
            raise DataError(f"{data}: the seed of synthetic is a whole number")
        problems = SyntheticTask(1, steps).held_out(limit, int(seed or 0))
        return [Sample(p.question, p.steps, p.answer, i) for i, p in enumerate(problems, 1)]
    path = Path(data)
    file_format = recognise(path) if file_format == "auto" else file_format
    samples: list[Sample] = []
    for row in read_file(path, file_format, columns):
        if isinstance(row, BadSample):
            detail = f" ({row.detail})" if row.detail else ""
            raise DataError(f"{path}:{row.line}: {row.reason}{detail}")
        samples.append(row)
        if len(samples) == limit:
            break
    if not samples:
        raise DataError(f"{path}: no questions in it")
    return samples


def recipe_samples(recipe: Recipe) -> list[Sample]:
    """The evaluation questions of a recipe; empty if it names none."""
    data = recipe.evaluation.data or ("synthetic" if recipe.data.source == "synthetic" else None)
    if data is None:
        return []
    return evaluation_samples(
        data, recipe.evaluation.format, recipe.evaluation.samples, recipe.data.columns, recipe.data.synthetic.max_steps
    )


def block_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    blocks: int,
    decoding: Decoding,
    bidirectional: bool = False,
) -> list[list[str]]:
    """Answer texts of every question after each of 1 .. `blocks` blocks (one text each with 0 blocks)."""
    if not blocks:
        return [[text] for text in answer_questions(model, tokenizer, questions, None, decoding)]
    budgets = range(1, blocks + 1)
    if not bidirectional and not _takes_mask(bare_model(model)):
        columns = [answer_questions(model, tokenizer, questions, budget, decoding) for budget in budgets]
        return [list(row) for row in zip(*columns, strict=True)]
    prompts = prompt_ids(tokenizer, questions, blocks)
    block_size = (len(prompts[0]) - len(prompt_ids(tokenizer, questions[:1], 0)[0])) // blocks if prompts else 0
    answers = readout_ids(model, tokenizer, prompts, block_size, budgets, decoding, bidirectional)
    return [answer_texts(tokenizer, row, decoding) for row in answers]


def _takes_mask(model: Any) -> bool:
    """Whether a model can decode all readouts from one prefix: its family honours the RiM mask."""
    if not hasattr(model, _TAKES_MASK):
        try:
            probe_family(model.config)
            setattr(model, _TAKES_MASK, True)
        except ModelError:
            setattr(model, _TAKES_MASK, False)
    return getattr(model, _TAKES_MASK)


def score(samples: Sequence[Sample], texts: Sequence[Sequence[str]]) -> Evaluation:
    """Compare answers after every block with the targets."""
    answers = []
    for sample, row in zip(samples, texts, strict=True):
        given = [extract_answer(text) for text in row]
        answers.append(
            {
                "question": sample.question,
                "target": sample.answer,
                "answers": given,
                "correct": [same_answer(text, sample.answer) for text in given],
                "text": row[-1],
            }
        )
    correct = torch.tensor([a["correct"] for a in answers], dtype=torch.float64)
    return Evaluation(
        questions=len(answers),
        accuracy=float(correct[:, -1].mean()),
        per_block=correct.mean(dim=0).tolist(),
        any_block=float(correct.any(dim=1).double().mean()),
        answers=answers,
    )


@dataclass(frozen=True)
class ExportedModel:
    """A plain HF folder, loaded: `blocks` memory blocks come with every prompt (0: none)."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    blocks: int
    method: str
    synthetic_steps: int


def open_export(folder: str | Path) -> ExportedModel:
    """Load an exported folder (or any HF causal LM folder). Raises CheckpointError if it is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not an HF model folder (no config.json); `rim-dist export` makes one")
    about: dict[str, Any] = {}
    try:
        if (folder / "rim_dist.json").is_file():
            about = json.loads((folder / "rim_dist.json").read_text(encoding="utf-8"))
        method = about.get("method", "direct")
        if method not in method_names():
            raise ValueError(f"its method {method} is not known here")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if note := padding_note(tokenizer):
        print(note, file=sys.stderr)
    if torch.cuda.is_available():
        model = model.to("cuda")
    if thoughts := about.get("thoughts", 0):
        think_before_answers(model, thoughts, about["memory_token_ids"])
    return ExportedModel(model, tokenizer, about.get("blocks", 0), method, about.get("synthetic_steps", 5))


def latency_summary(runs: Sequence[Latency]) -> dict[str, float]:
    """Medians, and the middle half's width of the time to the first token, in seconds."""
    first = sorted(run.first_token_seconds for run in runs)
    quarter = len(first) // 4
    return {
        "questions": len(runs),
        "first_token_seconds": statistics.median(first),
        "first_token_seconds_iqr": first[-1 - quarter] - first[quarter],
        "answer_seconds": statistics.median(run.answer_seconds for run in runs),
        "new_tokens": statistics.fmean(run.new_tokens for run in runs),
    }


def evaluate_export(
    export: ExportedModel, samples: Sequence[Sample], blocks: int, decoding: Decoding, timed_questions: int
) -> Evaluation:
    """Accuracy after every block, and latency over the first `timed_questions` questions after a warm-up."""
    questions = [sample.question for sample in samples]
    result = score(samples, block_answers(export.model, export.tokenizer, questions, blocks, decoding))
    prompts = prompt_ids(export.tokenizer, questions[: max(1, timed_questions)], blocks or None)
    for prompt in prompts[:3]:
        measure_latency(export.model, export.tokenizer, prompt, decoding.max_new_tokens)
    result.latency = latency_summary(
        [measure_latency(export.model, export.tokenizer, p, decoding.max_new_tokens) for p in prompts]
    )
    return result


def write_evaluation(result: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """`evaluation.json` (figures) and `answers.jsonl` (every question with its answers by block)."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {k: v for k, v in asdict(result).items() if k != "answers"}
    (folder / "evaluation.json").write_text(json.dumps({**about, **figures}, indent=1) + "\n", encoding="utf-8")
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.answers)
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
