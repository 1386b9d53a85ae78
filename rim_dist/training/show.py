"""`rim-dist data`: what the data becomes, so that a person can see the method."""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rim_dist.attention.visibility import KIND_NAMES, MEMORY
from rim_dist.checkpoint.start import requirements_of
from rim_dist.config import Recipe
from rim_dist.data.encoding import DataReport
from rim_dist.data.loader import BatchLoader, StagePlan, plan_stages
from rim_dist.data.packing import RowCost, pack_step
from rim_dist.data.prepared import PreparedData, SampleStream, StreamedData, prepare
from rim_dist.data.rows import pack
from rim_dist.data.samples import EncodedSample, Row
from rim_dist.data.sources import source_name
from rim_dist.methods import method_of
from rim_dist.model.requirements import Requirements
from rim_dist.table import Table, show

_STREAM_LOOK = 1000
_STEPS_LOOK = 20


def show_data(recipe: Recipe, samples: int, ids: bool = False, tokens: bool = False) -> None:
    """Print counts, step histogram and lengths of a recipe's data.

    `samples`: how many are printed as text, with each stage's row. `ids`: print the texts' token ids too. `tokens`: a row token
    by token, else a readout a line.
    """
    show_row = _print_tokens if tokens else _print_row
    requirements = requirements_of(recipe)
    for note in requirements.notes:
        print(note)
    arguments = (recipe, requirements.tokenizer, requirements.tokens, requirements.positions)
    with tempfile.TemporaryDirectory() as scratch:
        data: SampleStream
        if recipe.data.streaming:
            data = StreamedData(*arguments, requirements.ends)
            data.samples(0, _STREAM_LOOK)
            print(f"a stream: the first {_STREAM_LOOK} samples")
        else:
            folder = Path(recipe.data.cache_dir) if recipe.data.cache_dir else Path(scratch)
            data = prepare(*arguments, folder, requirements.ends)
        _print_report(recipe, data.report)
        in_order = map(data.__getitem__, range(len(data))) if isinstance(data, PreparedData) else data.samples(0, samples)
        for sample in itertools.islice(in_order, samples):
            _print_texts(recipe, requirements, sample, ids)
        loader = BatchLoader(recipe, data, requirements.tokens, 0, 1)
        for plan in plan_stages(recipe, len(data)):
            if isinstance(data, PreparedData):
                _print_lengths(plan.name, [len(loader.row(plan, 0, data[i])) for i in range(min(len(data), 2000))])
            print(f"{plan.name}: {plan.steps} optimizer steps, {plan.samples} samples")
            _print_packing(recipe, loader, plan)
            starts = [
                step for step in range(plan.steps) if not step or loader.phase(plan, step) != loader.phase(plan, step - 1)
            ]
            for step in starts:
                when = f", from step {step + 1}" if len(starts) > 1 else ""
                for number, sample in enumerate(data.samples(plan.first_sample, plan.first_sample + samples), 1):
                    title = f"{plan.name}{when}, sample {number} ({source_name(recipe.data)}:{sample.line})"
                    show_row(requirements, loader.row(plan, step, sample), title)


def _print_report(recipe: Recipe, report: DataReport) -> None:
    for note in report.notes(recipe):
        print(note)
    print(f"{source_name(recipe.data)}: {report.rows} rows, {report.used} used, {sum(report.skipped.values())} left out")
    for reason, count in report.skipped.most_common():
        print(f"  left out: {count} x {reason}; first {report.examples[reason]}")
    if report.truncated:
        print(f"  cut to {recipe.curriculum.stage1.max_steps} steps: {report.truncated}")
    largest = max(report.steps.values(), default=1)
    bars = [(steps, count, "#" * round(40 * count / largest)) for steps, count in sorted(report.steps.items())]
    show(Table(["steps", "samples", ""], bars, align="rrl"))


def _print_texts(recipe: Recipe, requirements: Requirements, sample: EncodedSample, ids: bool) -> None:
    """What chat template and formats make of a sample, as the tokenizer reads its own tokens."""
    blocks = requirements.tokens.block * method_of(recipe).prompt_blocks
    pieces = {"prompt": [*sample.question, *blocks]}
    pieces |= {f"step {number}": [*step] for number, step in enumerate(sample.steps, 1)}
    pieces["answer"] = [*sample.answer]
    print(f"{source_name(recipe.data)}:{sample.line} as text:")
    for name, tokens in pieces.items():
        text = requirements.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        _say(f"  {name} ({len(tokens)} tokens): {text!r}", "    ")
        if ids:
            print(f"    {' '.join(map(str, tokens))}")


def _print_lengths(stage: str, lengths: Sequence[int]) -> None:
    ordered = sorted(lengths)
    print(
        f"{stage}: row length in tokens over {len(ordered)} samples: min {ordered[0]}, median {ordered[len(ordered) // 2]}, "
        f"95% {ordered[int(len(ordered) * 0.95)]}, max {ordered[-1]}"
    )


def _print_packing(recipe: Recipe, loader: BatchLoader, plan: StagePlan) -> None:
    """How full and how even micro-batches are over the stage's first steps, by number of ranks (cost: tokens)."""
    budget = recipe.optimizer.micro_batch_tokens
    steps = [
        [loader.row(plan, step, s) for s in loader.step_samples(plan, step)] for step in range(min(plan.steps, _STEPS_LOOK))
    ]
    for ranks in (1, 8, 64):
        if ranks > recipe.optimizer.global_batch:
            break
        packings = [pack_step(rows, ranks, budget, RowCost()) for rows in steps]
        full, even = (statistics.fmean(getattr(p, name) for p in packings) for name in ("efficiency", "balance"))
        rounds = statistics.fmean(len(p.bins) for p in packings)
        print(
            f"  on {ranks} rank(s): {rounds:.1f} micro-batches a step and rank, {100 * full:.0f}% of {budget} tokens, "
            f"no padding; mean cost / largest cost {even:.3f}"
        )


def _say(text: str, indent: str) -> None:
    """A line, broken at the width of a terminal."""
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
        text = textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)
    print(text)


def _print_row(requirements: Requirements, row: Row, title: str) -> None:
    memory = f"{row.blocks} blocks of {row.block_size - 2} memory tokens" if row.blocks else "no memory blocks"
    memory = f"{row.thoughts} thoughts" if row.latent else memory
    _say(f"{title}: question, {memory}, {len(row.readouts)} readouts (weight of each token)", "  ")
    for readout in row.readouts:
        text = requirements.tokenizer.decode(list(readout.target), clean_up_tokenization_spaces=False)
        _say(
            f"  after {f'block {readout.block}' if readout.block else 'the question'} ({readout.weight:.3f}): {text!r}", "    "
        )


def _print_tokens(requirements: Requirements, row: Row, title: str) -> None:
    def text(token: int) -> str:
        return repr(requirements.tokenizer.decode([token]))[1:-1]

    batch = pack([row], requirements.tokens.block)
    columns, labels, weights = (t.tolist() for t in (batch.targets.column, batch.targets.label, batch.targets.weight))
    targets = {column: (text(label), f"{weight:.3f}") for column, label, weight in zip(columns, labels, weights, strict=True)}
    rows = []
    columns_of_tokens = zip(batch.input_ids[0].tolist(), *(t[0].tolist() for t in batch.layout.queries), strict=True)
    for i, (token, _, kind, block, position) in enumerate(columns_of_tokens):
        thought = row.latent and kind == MEMORY and token == requirements.tokens.memory
        name = "thought" if thought else KIND_NAMES[kind]
        rows.append([i, text(token), name, block or "", position, *targets.get(i, ("", ""))])
    show(Table(["#", "token", "kind", "block", "position", "target", "weight"], rows, title, "rllrrlr"))
