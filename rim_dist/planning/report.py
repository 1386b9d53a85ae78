"""A plan as tables, as JSON and as a picture."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from typing import Any

from rim_dist.planning.communication import sent_bytes
from rim_dist.planning.memory import PARTS, evaluation_cache
from rim_dist.planning.recommend import DECIDED, USABLE, Candidate, Planner, gib, notable, reasons
from rim_dist.table import Table, show

SHOWN = 6  # candidates in table and picture
SEQUENCE_DEGREES = (1, 2, 4, 8, 16, 32, 64)


class Plan:
    """The plan of a recipe: its own degrees (None, with the `refusal`, if it cannot run) and the recommended ones."""

    def __init__(self, planner: Planner, written: Candidate | None, refusal: str) -> None:
        self.planner, self.written, self.refusal = planner, written, refusal
        self.chosen, self.candidates = planner.recommend()
        self.shown = notable(planner, self.chosen, self.candidates, SHOWN)
        self.reasons = reasons(planner, self.chosen, self.candidates)

    def cache(self, prompts: int) -> int:
        """Bytes of keys and values on a rank while the recipe evaluates so many prompts together."""
        p = self.planner
        return evaluation_cache(p.shape, self.chosen.setup, p.row, prompts, p.recipe.evaluation.max_new_tokens)

    @property
    def most_prompts(self) -> int:
        """Prompts that can be evaluated together, beside the states and the gathered parameters."""
        memory = self.chosen.memory
        room = self.planner.cluster.usable - memory.states_bytes - memory.peak.get("gathered parameters", 0)
        return max(0, room) // self.cache(1)

    def largest(self) -> list[dict[str, Any]]:
        """Largest memory blocks with the chosen degrees, and with activation checkpointing at each sequence degree."""
        p, setup = self.planner, self.chosen.setup
        ways = [("as recommended", setup)]
        for sequence in SEQUENCE_DEGREES:
            ranks = setup.tensor * sequence
            if p.cluster.gpus % ranks == 0 and p.cluster.gpus // ranks <= p.recipe.optimizer.global_batch:
                ways.append((f"recomputed layers, sequence {sequence}", p.resplit(setup, sequence)))
        return [
            {"way": name, "memory": p.largest_memory(way), "blocks": p.largest_blocks(way), "sequence": way.sequence}
            for name, way in ways
        ]

    def as_json(self) -> dict[str, Any]:
        p, cluster = self.planner, self.planner.cluster
        return {
            "model": {"name": p.shape.name, "parameters": p.shape.parameters()},
            "cluster": {
                "gpus": cluster.gpus,
                "gpus_per_node": cluster.gpus_per_node,
                "gpu_memory_bytes": cluster.memory,
                "usable_bytes": cluster.usable,
                "interconnect": asdict(cluster.link),
            },
            "row": {**asdict(p.row), "tokens": p.row.row},
            "as_written": _candidate(self.written) if self.written else {"refused": self.refusal},
            "recommended": {**_candidate(self.chosen), "overrides": self.chosen.overrides, "reasons": self.reasons},
            "alternatives": [_candidate(c) for c in self.shown[1:]],
            "largest": self.largest(),
            "evaluation": {"cache_bytes": self.cache(p.recipe.evaluation.batch), "most_prompts": self.most_prompts},
        }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    memory = candidate.memory
    names = (*DECIDED, "sequence_mode", "data", "attention")
    return {
        **{name: getattr(candidate.setup, name) for name in names},
        "micro_batches": candidate.load.rounds,
        "fits": candidate.fits,
        "between_steps_bytes": memory.states,
        "peak_bytes": memory.peak,
        "peak_total_bytes": memory.peak_bytes,
        "peak_at": memory.moment,
        "cpu_bytes": memory.host,
        "sent": [asdict(t) for t in candidate.transfers],
        "seconds": {**asdict(candidate.time), "total": candidate.time.total},
    }


# ---- tables ------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    planner, cluster = plan.planner, plan.planner.cluster
    shape, recipe, row = planner.shape, planner.recipe, planner.row
    trained = sum(t.entries for t in shape.tensors(recipe.model.lora) if t.trained)
    show(
        f"{shape.name}: {shape.parameters():,} parameters, {trained:,} trained, {recipe.model.dtype}; "
        f"{cluster} ({USABLE:.0%} usable), {cluster.gpus_per_node} a node, {cluster.link.name}",
        f"{recipe.optimizer.global_batch} rows a step, each {planner.row_in_words()}: {row.row:,} tokens",
        _candidates(plan),
    )
    if plan.written is None:
        show(f"the recipe as it is cannot run here: {plan.refusal}")
    elif not plan.written.fits:
        show("!: does not fit")
    show(f"\nrecommended: {plan.chosen}", *(f"  {line}" for line in plan.reasons))
    show(f"  rim-dist train RECIPE {' '.join(plan.chosen.overrides)}", _memory(plan))
    if plan.chosen.memory.host:
        show(f"CPU memory of a rank: {gib(plan.chosen.memory.host)}")
    prompts = recipe.evaluation.batch
    line = f"evaluation, {prompts} prompts together: keys and values {gib(plan.cache(prompts))} beside the states"
    if plan.most_prompts < prompts:
        line += f"; too much: set evaluation.batch to at most {plan.most_prompts}"
    show(line, _sent(plan.chosen))
    if row.blocks:
        show(_largest(plan), f"The model's {shape.positions:,} positions are a limit as well.")


def _candidates(plan: Plan) -> Table:
    def row(name: str, c: Candidate) -> list[object]:
        s, peak = c.setup, c.memory.peak
        held = sum(peak.get(part, 0) for part in ("parameters", "gradients", "optimizer"))
        kept = peak.get("activations", 0)
        return [
            name,
            s.tensor,
            s.sequence,
            s.data,
            f"{s.zero_stage}{' + CPU' if s.offload else ''}",
            f"{'yes' if s.activation_checkpointing else ''}{' + CPU' if s.activation_offload else ''}",
            f"{s.micro_batch_tokens:,}",
            f"{held / 2**30:,.1f}",
            f"{kept / 2**30:,.1f}",
            f"{(c.memory.peak_bytes - held - kept) / 2**30:,.1f}",
            f"{c.memory.peak_bytes / 2**30:,.1f}{'' if c.fits else ' !'}",
            f"{sent_bytes(c.transfers) / 2**30:,.1f}",
            f"{c.time.total:,.2f}",
        ]

    rows = [row("recipe as it is", plan.written)] if plan.written is not None else []
    rows += [row("recommended", plan.chosen), *(row("", candidate) for candidate in plan.shown[1:])]
    head = ["", "tensor", "seq", "data", "ZeRO", "recompute", "tokens", "states", "kept", "rest", "total", "sent", "s/step"]
    return Table(head, rows, "GiB of a GPU at its fullest, GiB it sends a step, seconds of a step")


def _memory(plan: Plan) -> Table:
    memory = plan.chosen.memory
    rows = [
        [part, *(f"{found.get(part, 0) / 2**30:,.2f}" for found in (memory.states, memory.peak))]
        for part in PARTS
        if part in memory.peak or part in memory.states
    ]
    rows.append(["total", f"{memory.states_bytes / 2**30:,.2f}", f"{memory.peak_bytes / 2**30:,.2f}"])
    title = f"\nMemory of a GPU, GiB; fullest at: {memory.moment}"
    return Table(["part", "between steps", "at its fullest"], rows, title)


def _sent(chosen: Candidate) -> Table:
    rows = [
        [t.part, t.what, t.operation, f"{t.times:,.0f}", f"{t.sent / 2**30:,.2f}", f"{t.seconds:,.3f}"]
        for t in chosen.transfers
    ]
    rows.append(["", "computing", "", "", "", f"{chosen.time.compute:,.3f}"])
    rows.append(["", "step (ZeRO's sending beside computing)", "", "", "", f"{chosen.time.total:,.3f}"])
    title = f"\nSent by a GPU in a step of {chosen.load.rounds} micro-batch{'es' if chosen.load.rounds > 1 else ''}"
    return Table(["", "what", "how", "times", "GiB", "seconds"], rows, title, "lllr")


def _largest(plan: Plan) -> Table:
    blocks, size = plan.planner.row.blocks, plan.planner.recipe.memory.tokens_per_block
    found = [(way["way"], way["memory"], way["blocks"]) for way in plan.largest()]
    rows = [[way, f"{m:,}", f"{blocks * m:,}", f"{k:,}", f"{k * size:,}"] for way, m, k in found]
    head = ["", f"M at K = {blocks}", "K x M", f"K at M = {size}", "K x M"]
    return Table(head, rows, "\nLargest memory blocks, one row in a micro-batch")


# ---- picture -----------------------------------------------------------------------------------------------


def draw_plan(plan: Plan) -> bytes:
    """PNG: memory by part for the candidates against the GPU's, and memory against K x M."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    _draw_parts(bars, plan)
    _draw_growth(lines, plan)
    cluster = plan.planner.cluster
    for axes in (bars, lines):
        axes.axhline(cluster.memory / 2**30, color="black", linewidth=1)
        axes.axhline(cluster.usable / 2**30, color="black", linewidth=1, linestyle="--")
        axes.set_ylabel("GiB of a GPU")
    figure.suptitle(f"{plan.planner.shape.name} on {cluster} (dashed: {USABLE:.0%})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_parts(axes: Any, plan: Plan) -> None:
    named = [("recipe", plan.written)] if plan.written is not None else []
    named += [("recommended", plan.chosen), *(("", c) for c in plan.shown[1:])]
    candidates = [(name, c) for name, c in named if c is not None]
    base = [0.0] * len(candidates)
    for number, part in enumerate(PARTS):
        heights = [c.memory.peak.get(part, 0) / 2**30 for _, c in candidates]
        if any(heights):
            axes.bar(range(len(candidates)), heights, bottom=base, label=part, color=f"C{number}")
            base = [a + b for a, b in zip(base, heights, strict=True)]
    labels = []
    for name, c in candidates:
        s = c.setup
        sharding = f"ZeRO-{s.zero_stage}{'+CPU' if s.offload else ''}"
        kept = "recompute" if s.activation_checkpointing else ""
        labels.append(f"T{s.tensor} S{s.sequence} D{s.data}\n{sharding}\n{kept}\n{name}")
    axes.set_xticks(range(len(candidates)), labels, fontsize=7)
    axes.set_title("by part, when fullest")
    memory = plan.planner.cluster.memory / 2**30
    axes.set_ylim(0, min(2 * memory, 1.4 * max(memory, *base)))  # a recipe far beyond the GPU would flatten all others
    axes.legend(fontsize="x-small", ncols=3, loc="upper right")


def _draw_growth(axes: Any, plan: Plan) -> None:
    planner, setup = plan.planner, plan.chosen.setup
    blocks = max(1, planner.row.blocks)
    room = (planner.shape.positions - planner.row.question - planner.row.target) // blocks - 2
    sizes = [2**k for k in range(1, 18) if 2**k <= room]
    ways = [("as recommended", setup)]
    if setup.activation_checkpointing:
        ways.append(("kept activations", replace(setup, activation_checkpointing=False, activation_offload=False)))
    degrees = [d for d in (1, 2, 4, 8) if planner.cluster.gpus % (setup.tensor * d) == 0]
    ways += [(f"recomputed, sequence {d}", planner.resplit(setup, d)) for d in degrees]
    for name, way in ways:
        values = [planner.memory_with(way, blocks, size).peak_bytes / 2**30 for size in sizes]
        axes.plot([blocks * size for size in sizes], values, marker="o", markersize=3, label=name)
    axes.set(title=f"one row, K = {blocks}, M growing", xlabel="memory tokens K x M", xscale="log")
    axes.set_ylim(0, 2 * planner.cluster.memory / 2**30)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
