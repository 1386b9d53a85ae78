"""A run from its recipe to its export: both stages, resumable at every step."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.checkpoint import store
from rim_dist.checkpoint.hf_export import export_checkpoint
from rim_dist.checkpoint.portable import is_portable, starts_fresh
from rim_dist.checkpoint.resume import agree_on_checkpoint
from rim_dist.checkpoint.retention import note_scores
from rim_dist.checkpoint.saver import CheckpointSaver
from rim_dist.checkpoint.start import model_of, requirements_of
from rim_dist.checkpoint.store import TrainingState
from rim_dist.config import Recipe, StageName
from rim_dist.data.loader import BatchLoader, RankBatch, StagePlan, plan_stages
from rim_dist.data.prepared import SampleStream, StreamedData, prepare
from rim_dist.data.rows import Batch
from rim_dist.data.samples import EncodedSample
from rim_dist.data.sources import source_name
from rim_dist.errors import CheckpointError, ConfigError, Stopped, TrainingError
from rim_dist.evaluation.evaluate import (
    Evaluation,
    block_answers,
    recipe_samples,
    score,
    unknown_answers_note,
    write_evaluation,
)
from rim_dist.files import describe_os_error, os_errors, write_atomically
from rim_dist.heartbeat import send_heartbeat
from rim_dist.messages import say
from rim_dist.methods import method_of
from rim_dist.metrics import EvaluationDone, TrainStep, make_line, progress_texts, read_metrics
from rim_dist.model.generation import Decoding, check_prompts, padding_note
from rim_dist.model.precision import switch_kernels, with_precision
from rim_dist.model.requirements import Requirements
from rim_dist.model.skeleton import DTYPES
from rim_dist.objective.loss import ReadoutLoss
from rim_dist.parallel.degrees import fit_degrees
from rim_dist.parallel.launch import Process
from rim_dist.parallel.mesh import describe, make_mesh
from rim_dist.parallel.zero import compose, partitioner
from rim_dist.recipe import dump_recipe
from rim_dist.tokens import prompt_ids
from rim_dist.training.curves import curve_metrics, draw_curves
from rim_dist.training.engine import Engine
from rim_dist.training.folder import check_run_folder
from rim_dist.training.grounding import GroundingWatch, near_guessing, not_learned
from rim_dist.training.hardware import peak_memory_bytes, peak_operations
from rim_dist.training.inputs import checked_inputs, gather_inputs, write_inputs
from rim_dist.training.lease import Lease
from rim_dist.training.metrics_log import MetricsLog
from rim_dist.training.preflight import Preflight
from rim_dist.training.progress import ProgressReport
from rim_dist.training.schedule import learning_rate
from rim_dist.training.signals import StopRequest
from rim_dist.unwrap import bare_model


def finished_state(recipe: Recipe) -> TrainingState | None:
    """The final state of a run that is already complete, export included; None if there is something left to do.

    Raises ConfigError if the folder holds a run with another recipe.
    """
    check_run_folder(recipe)
    found = store.complete_checkpoints(recipe.folder / "checkpoints")
    result = recipe.folder / ("hf/rim_dist.json" if recipe.exportable else "report/curves.png")
    if found and result.is_file():
        state = store.read_state(found[-1])
        return state if state.finished else None
    return None


def open_data(recipe: Recipe, requirements: Requirements) -> SampleStream:
    """The run's data: prepared (cached on disk) or streamed."""
    if recipe.data.streaming:
        return StreamedData(recipe, requirements.tokenizer, requirements.tokens, requirements.positions, requirements.ends)
    folder = Path(recipe.data.cache_dir) if recipe.data.cache_dir else recipe.folder / "data"
    return prepare(recipe, requirements.tokenizer, requirements.tokens, requirements.positions, folder, requirements.ends)


class Trainer:
    """The training loop. Ranks call everything collective in the same order."""

    def __init__(self, recipe: Recipe, process: Process, requirements: Requirements, data: SampleStream) -> None:
        recipe = with_precision(recipe)
        switch_kernels(recipe.model.cudnn_attention, recipe.model.tf32)
        degrees = fit_degrees(recipe, process.ranks)
        if recipe.model.dtype == "fp16" and process.device == "cpu":
            raise ConfigError("model.dtype: fp16 needs a GPU; on a CPU use fp32 or bf16")
        if recipe.parallel.zero_plus_plus and process.device == "cpu":
            raise ConfigError("parallel.zero_plus_plus: true needs GPUs: its kernels are CUDA's")
        self._recipe, self._process, self._requirements, self._data = recipe, process, requirements, data
        self._ds_config = compose(recipe, requirements.hidden_size, process.hosts.count(process.hosts[process.rank]))
        if process.is_first and process.ranks > 1:
            say(describe(degrees, process.hosts))
        self._preflight = Preflight(recipe, process) if recipe.parallel.preflight else None
        if self._preflight is not None:
            self._preflight.compare(requirements, data.fingerprint, self._ds_config)
        self._mesh = make_mesh(degrees, process.rank, process.device.partition(":")[0])
        self._folder = recipe.folder
        self._checkpoints = recipe.folder / "checkpoints"
        self._plans = plan_stages(recipe, len(data))
        self._total_steps = sum(plan.steps for plan in self._plans)
        self._questions = recipe_samples(recipe)
        self._peak = peak_operations(recipe.model.dtype)
        self._lease = Lease(recipe.folder)
        self._saver = CheckpointSaver(recipe, self._checkpoints, process, self._lease.check)
        self._saved_step = self._evaluated_step = -1
        self._last_loss = 0.0
        self._told = False
        self._operations = 0.0

    # ---- the run -------------------------------------------------------------------------------------

    def run(self, until: StageName | None = None) -> None:
        """Train what is left of the run, then evaluate, export and draw. Raises Stopped after a signal.

        `until`: return after this stage, when it is saved. Raises ConfigError if another process runs it.
        """
        try:
            self._run(until)
        finally:
            if self._process.is_first:
                self._lease.release()

    def _run(self, until: StageName | None) -> None:
        if self._preflight is not None:
            self._preflight.try_links(self._mesh)
            self._preflight.check_parity(self._requirements, self._mesh)
        self._process.follow_first(self._lease.acquire)
        resume = agree_on_checkpoint(self._checkpoints, self._process)
        self._check_inputs(resume)
        if self._process.is_first:
            self._write_run_folder()
        partition = partitioner(self._ds_config, self._mesh, DTYPES[self._recipe.model.dtype])
        model = model_of(self._recipe, self._requirements, resume, self._mesh, partition)
        self._process.share("built")  # all have read their weights: DeepSpeed broadcasts them
        self._engine = Engine(self._recipe, model, self._ds_config, self._process, self._mesh, self._requirements.sequence_mode)
        state = TrainingState(self._plans[0].name, 0, 0, 0, 0.0, self._process.ranks)
        if resume is not None:
            state = self._load(resume)
        with self._reports(state, resume):
            if resume is not None and not state.finished and self._evaluation_is_due(state.step):
                self._evaluate_unless_done(state, report=False)
            with self._profiler() as self._profile:
                for plan in self._plans:
                    if state.step < plan.first_step + plan.steps:
                        state = self._run_stage(plan, state)
                    if plan.name == until:
                        break
            if state.finished and self._recipe.evaluation.at_end:
                self._evaluate_unless_done(state, report=True)
        if state.finished:
            self._process.follow_first(self._finish)
        if until is None and not state.finished:
            raise TrainingError(f"{self._folder}: ended after step {state.step} of {self._total_steps}")

    @contextlib.contextmanager
    def _reports(self, state: TrainingState, resume: Path | None) -> Iterator[None]:
        """In this context signals request a stop, and the first rank has its log and progress report open."""
        self._log = self._progress = None
        self._closing_note: str | None = None
        self._grounding = GroundingWatch()
        if self._process.is_first:
            resolved = self._recipe.model_dump(mode="json")
            self._log = MetricsLog(self._folder, self._recipe.logging, state.step, resolved)
            self._progress = ProgressReport(self._total_steps, state.step, self._recipe.logging.every_steps)
            self._announce(state, resume)
            for line in read_metrics(self._folder / "metrics.jsonl"):
                if line["kind"] == "train" and line["stage"] == state.stage:
                    self._grounding.observe(line)
                if line["kind"] == "evaluation":
                    self._evaluated_step = line["step"]
        self._stop = StopRequest()
        broken = False
        try:
            yield
        except BaseException as error:
            broken = self._process.ranks > 1 and not isinstance(error, Stopped)
            raise
        finally:
            # A launcher that loses a rank ends the others with SIGTERM. They ignore it until they have named that rank.
            if not broken:
                self._stop.close()
            if self._progress is not None:
                self._progress.close()
            if self._log is not None:
                self._log.close(broken)

    def _run_stage(self, plan: StagePlan, state: TrainingState) -> TrainingState:
        """Run what is left of a stage. Raises Stopped after a signal."""
        mesh = self._mesh
        loader = BatchLoader(
            self._recipe, self._data, self._requirements.tokens, mesh.coordinates.data, mesh.degrees.data, self._engine.row_cost
        )
        dropouts = self._recipe.dropouts(plan.name)
        self._engine.set_dropout(dropouts)
        kernel = self._requirements.attention[plan.name].kernel
        use_rim_attention(bare_model(self._engine.module), kernel)
        for step in range(state.step - plan.first_step, plan.steps):
            started = time.perf_counter()
            rank_batch = loader.rank_batch(plan, step)
            self._tell_of_data()
            if step == 0 or loader.phase(plan, step) != loader.phase(plan, step - 1):
                self._engine.begin_stage(dropouts)
            if self._preflight is not None:
                started += self._dry_batch(self._preflight, rank_batch)
                self._preflight = None
            done, stop = self._step(rank_batch, plan, step)
            state = done.state
            send_heartbeat(f"{plan.name} step {state.step}")
            if self._log is not None and self._progress is not None:
                done.seconds = time.perf_counter() - started
                done.memory_bytes = peak_memory_bytes()
                line = make_line(done)
                self._lease.check()
                self._log.write(line)
                self._progress.step(line)
                for warning in self._grounding.observe(line, (batch.targets for batch in rank_batch.micro_batches)):
                    self._progress.say(warning)
            if self._profile is not None:
                self._profile.step()
            self._save_if_due(state, at_once=stop or step == plan.steps - 1)
            if not stop and self._evaluation_is_due(state.step):
                self._evaluate(state, report=False)
            if stop and state.step < self._total_steps:
                raise Stopped(f"stopped by a signal after step {state.step}, saved; start the same command again to go on")
        return state

    def _save_if_due(self, state: TrainingState, at_once: bool) -> None:
        """Save after every `checkpoint.every_steps`. `at_once`: save now in any case, and wait until it is written."""
        every = self._recipe.checkpoint.every_steps
        if at_once or (every and state.step % every == 0):
            self._save(state)
            if at_once:
                self._saver.wait()
            send_heartbeat(f"saving step {state.step}")

    def _dry_batch(self, preflight: Preflight, rank_batch: RankBatch) -> float:
        """Run the next step's largest micro-batch, forward and backward, with weight 0. Returns its seconds.

        Its gradients are zeros, to which the step's are added: the step computes the same bits as without it.
        """
        started = time.perf_counter()
        batch = max(rank_batch.micro_batches, key=lambda batch: batch.tokens)
        local = self._engine.sequence_slice(batch.without_weight())
        losses = self._engine.forward_backward(local, 1.0, last=False).token_losses
        sums = self._sum({"tokens": local.tokens, "loss": float(losses.sum()), "targets": len(losses)})
        seconds = time.perf_counter() - started
        loss = float(sums["loss"] / sums["targets"]) if sums["targets"] else None
        preflight.finish(int(sums["tokens"]), seconds, loss, peak_memory_bytes())
        return seconds

    def _step(self, rank_batch: RankBatch, plan: StagePlan, step: int) -> tuple[TrainStep, bool]:
        """Run an optimizer step; returns what is known of it, and whether to stop after it."""
        batch_samples = min(self._recipe.optimizer.global_batch, plan.samples - step * self._recipe.optimizer.global_batch)
        divisor, stop = self._before_step(rank_batch, batch_samples)
        self._seed(plan.first_step + step)
        sums = self._forward_backward(rank_batch, plan, step, divisor)
        rate = learning_rate(self._recipe.curriculum.stage(plan.name), step, plan.steps)
        norm = self._engine.step(rate)
        self._operations += float(sums["operations"])
        state = self._state_after(plan, step + 1)
        peak = self._peak * self._process.ranks if self._peak else None
        packing = rank_batch.packing
        return TrainStep(state, packing, sums, self._last_loss, rate, norm, batch_samples, peak_operations=peak), stop

    def _before_step(self, rank_batch: RankBatch, batch_samples: int) -> tuple[float, bool]:
        """The divisor of the step's loss, and whether to stop after the step: one reduction before the first forward."""
        # All ranks of a sequence group have the same rows.
        weight = rank_batch.weight / self._mesh.degrees.sequence
        known = self._sum({"weight": weight}, stop=self._stop.requested, failed=self._saver.failed)
        if known["failed"]:
            self._saver.wait()  # raises what went wrong in the background, on every rank
        divisor = float(known["weight"]) if self._recipe.curriculum.normalisation == "weight" else float(batch_samples)
        return divisor, bool(known["stop"])

    def _seed(self, step: int) -> None:
        """Seed dropout from seed, step and shard, so that there is no random state to save.

        Tensor ranks run the same tokens and must drop the same of them.
        """
        entropy = numpy.random.SeedSequence([self._recipe.run.seed, step, self._mesh.shard])
        torch.manual_seed(int(entropy.generate_state(1, numpy.uint64)[0] >> 1))

    def _forward_backward(self, rank_batch: RankBatch, plan: StagePlan, step: int, divisor: float) -> dict[str, numpy.ndarray]:
        """All micro-batches of a step; sums over all ranks by name. Raises TrainingError if the loss is not finite."""
        last, operations = len(rank_batch.micro_batches) - 1, self._engine.operations
        batches = [self._engine.sequence_slice(batch) for batch in rank_batch.micro_batches]
        losses = [self._engine.forward_backward(batch, 1.0 / divisor, last=i == last) for i, batch in enumerate(batches)]
        # The device is read once a step: after every micro-batch it would stall.
        sums = self._sum(
            {
                "loss": sum(torch.stack([loss.weighted_sum for loss in losses]).double().tolist()),
                "tokens": sum(batch.tokens for batch in batches),
                "operations": self._engine.operations - operations,
                "by_block": torch.stack([loss.by_block for loss in losses]).double().sum(0).cpu().numpy(),
            }
        )
        self._last_loss = float(sums["loss"]) / divisor
        if not math.isfinite(self._last_loss):
            self._refuse_loss(plan, step, batches, rank_batch.samples, losses)
        return sums

    def _state_after(self, plan: StagePlan, done: int) -> TrainingState:
        """The state after `done` optimizer steps of a stage."""
        return TrainingState(
            plan.name,
            done,
            plan.first_step + done,
            plan.first_sample + min(done * self._recipe.optimizer.global_batch, plan.samples),
            self._operations,
            self._process.ranks,
            finished=plan is self._plans[-1] and done == plan.steps,
        )

    def _sum(self, values: Mapping[str, Any], **flags: bool) -> dict[str, numpy.ndarray]:
        """Sums over ranks by name, in one reduction. Tensor ranks have equal `values`, which are counted once."""
        if self._process.ranks > 1 and not self._mesh.counts:
            values = {name: numpy.zeros_like(value, dtype=numpy.float64) for name, value in values.items()}
        arrays = {name: numpy.asarray(value, dtype=numpy.float64) for name, value in {**values, **flags}.items()}
        if self._process.ranks == 1:
            return arrays
        flat = torch.from_numpy(numpy.concatenate([array.ravel() for array in arrays.values()])).to(self._process.device)
        dist.all_reduce(flat)
        ends = numpy.cumsum([array.size for array in arrays.values()])[:-1]
        sums = numpy.split(flat.cpu().numpy(), ends)
        return {name: total.reshape(array.shape) for (name, array), total in zip(arrays.items(), sums, strict=True)}

    def _refuse_loss(
        self, plan: StagePlan, step: int, batches: list[Batch], packed: list[list[EncodedSample]], losses: list[ReadoutLoss]
    ) -> None:
        """Raise TrainingError with the samples, on any rank, whose loss is not finite. Collective."""
        bad = [
            samples[i].line
            for loss, batch, samples in zip(losses, batches, packed, strict=True)
            for i in batch.rows_at(~loss.token_losses.isfinite())
            if samples
        ]
        gathered: list[Any] = [None] * self._process.ranks
        dist.all_gather_object(gathered, bad)
        lines = sorted({line for bad in gathered for line in bad})
        saved = store.complete_checkpoints(self._checkpoints)
        kept = f"The checkpoint of step {store.read_state(saved[-1]).step} is intact" if saved else "Nothing was saved yet"
        raise TrainingError(
            f"the loss is not finite in {plan.name}, step {plan.first_step + step + 1}; samples (lines of "
            f"{source_name(self._recipe.data)}): {', '.join(map(str, lines))}. {kept}; lower the "
            "learning rate, or look at these samples with `rim-dist data`"
        )

    # ---- state ---------------------------------------------------------------------------------------

    def _load(self, checkpoint: Path) -> TrainingState:
        state, degrees = store.read_state(checkpoint), self._mesh.degrees
        if state.ranks != self._process.ranks and not is_portable(checkpoint):
            raise CheckpointError(
                f"{checkpoint}: saved by {state.ranks} ranks, this run has {self._process.ranks}; start it with {state.ranks}, "
                f"or make it one for others: rim-dist convert reshape {checkpoint} OUT --tensor {degrees.tensor} "
                f"--sequence {degrees.sequence} --data {degrees.data}"
            )
        if not starts_fresh(checkpoint):
            self._engine.load(checkpoint)
            self._process.share("loaded")
        self._operations = state.operations
        self._saved_step = state.step
        return state

    def _check_inputs(self, resume: Path | None) -> None:
        """Refuse other inputs than the checkpoint's, whose stage plan is kept. All ranks call it, the first looks at files."""
        problem = ""
        if self._process.is_first:
            now = gather_inputs(self._requirements, self._data, self._ds_config, self._plans)
            try:
                self._inputs = checked_inputs(self._recipe, resume, now)
            except ConfigError as error:
                problem = str(error)
        if problem := self._process.share(problem)[0]:
            raise ConfigError(problem)
        if resume is not None and (kept := store.read_inputs(resume)):
            self._plans = [StagePlan(**plan) for plan in kept["plan"]]
            self._total_steps = sum(plan.steps for plan in self._plans)

    def _save(self, state: TrainingState) -> None:
        if state.step == self._saved_step:
            return

        def write_model(folder: Path) -> None:
            folder.mkdir()  # fails where another owner has removed what is around it, and makes nothing anew
            bare_model(self._engine.module).config.save_pretrained(folder)
            self._requirements.generation.save_pretrained(folder)
            with os_errors(folder):
                self._requirements.tokenizer.save_pretrained(folder)
            write_inputs(folder.parent, self._inputs)

        self._saver.save(state, self._engine.capture, write_model, {"loss": self._last_loss})
        self._saved_step = state.step

    def _write_run_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / "ds_config.json", json.dumps(self._ds_config, indent=1) + "\n")
            write_atomically(self._folder / "recipe.yaml", dump_recipe(self._recipe))
            plan = {"total_steps": self._total_steps, "stages": [asdict(plan) for plan in self._plans]}
            write_atomically(self._folder / "plan.json", json.dumps(plan, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({describe_os_error(error)})") from None

    # ---- evaluation and reports ------------------------------------------------------------------------

    def _evaluate_unless_done(self, state: TrainingState, report: bool) -> None:
        """Evaluate after the run's last step so far, if no earlier start has. Collective."""
        done = self._process.is_first and self._evaluated_step == state.step
        if not self._sum({}, done=done)["done"]:
            self._evaluate(state, report)

    def _evaluate(self, state: TrainingState, report: bool) -> None:
        """Accuracy after every block on the recipe's questions, sharded over ranks, decoded as a server would. Collective."""
        if not self._questions:
            return
        self._saver.wait()  # an evaluation may take long: what it follows is on disk before it begins
        recipe, process, mesh = self._recipe, self._process, self._mesh
        mine = self._questions[mesh.shard :: mesh.degrees.shards]
        count = -(-len(self._questions) // mesh.degrees.shards)
        padded = mine + self._questions[:1] * (count - len(mine))  # equally many on every rank
        method = method_of(recipe)
        decoding = Decoding(method.answer_tokens, recipe.evaluation.batch, synced_ranks=process.ranks > 1)
        model = self._engine.module
        model.eval()
        use_plain_attention(bare_model(model))
        bidirectional = recipe.memory.inside_block == "bidirectional"
        questions = [s.question for s in padded]
        texts = block_answers(model, self._requirements.tokenizer, questions, method.prompt_blocks, decoding, bidirectional)
        use_rim_attention(bare_model(model), self._requirements.attention[state.stage].kernel)
        gathered: list[Any] = [None] * process.ranks
        dist.all_gather_object(gathered, list(zip(mine, texts, strict=False)) if mesh.counts else [])
        send_heartbeat(f"evaluation after step {state.step}")
        if process.is_first:
            samples, answers = zip(*(pair for answered in gathered for pair in answered), strict=True)
            self._record_evaluation(state, score(samples, answers, recipe.data.answer_format), report)

    def _record_evaluation(self, state: TrainingState, result: Evaluation, report: bool) -> None:
        """Note an evaluation's scores for the checkpoint of its step, write the `report`, log it at last (first rank only)."""
        assert self._log is not None
        assert self._progress is not None
        self._lease.check()
        if self._saved_step == state.step:
            scores = {"accuracy": result.accuracy, "any_block_accuracy": result.any_block}
            note_scores(self._checkpoints, state.step, scores)
        recipe = self._recipe
        if report:
            embedded = (recipe.evaluation.data or recipe.data.source).partition(":")[0] == "synthetic"  # the questions
            if embedded and near_guessing(result.accuracy) and recipe.method != "direct":  # the task is made too hard for it
                self._closing_note = not_learned(recipe.method, result.accuracy)
            write_evaluation(result, self._folder / "report", {"run": recipe.run.name, "step": state.step})
        line = make_line(EvaluationDone(state, result))
        self._log.write(line)
        self._progress.say(f"step {state.step}: {'  '.join(progress_texts(line))}")

    def _evaluation_is_due(self, step: int) -> bool:
        every = self._recipe.evaluation.every_steps
        done_at_end = step == self._total_steps and self._recipe.evaluation.at_end
        return bool(every) and step % every == 0 and not done_at_end

    def _tell_of_data(self) -> None:
        """Say once what a user has to know of the data: before the first step, when a stream too has been looked at."""
        if self._progress is not None and not self._told:
            self._told = True
            for note in self._data.report.notes(self._recipe):
                self._progress.say(note)

    def _announce(self, state: TrainingState, resume: Path | None) -> None:
        assert self._progress is not None
        report = self._data.report
        if len(self._data):
            skipped = f", {sum(report.skipped.values())} left out" if report.skipped else ""
            self._progress.say(f"data: {report.used} of {report.rows} rows used{skipped}")
        stages = ", ".join(f"{plan.name} {plan.steps} steps ({plan.samples} samples)" for plan in self._plans)
        self._progress.say(
            f"{self._recipe.run.name}: method {self._recipe.method}, {stages}; ZeRO-{self._recipe.parallel.zero_stage} on "
            f"{self._process.ranks} rank(s) of {self._process.device.partition(':')[0]}, {self._recipe.model.dtype}; "
            f"attention {self._requirements.attention_in_words}"
        )
        padding = padding_note(self._requirements.tokenizer) if self._questions else ""
        for note in filter(None, [*self._requirements.notes, padding]):
            self._progress.say(note)
        if note := unknown_answers_note(self._requirements.tokenizer, self._questions):
            self._progress.say(note)
        if resume is not None:
            self._progress.say(f"resumed from {resume} ({state.stage}, step {state.step})")

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        window = self._recipe.logging.profile
        if window is None or not self._process.is_first:
            yield None
            return
        first, last = window
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        folder = self._folder / "report"
        folder.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=max(0, first - 1), warmup=0, active=last - first + 1, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(folder / "profile.json")),
        ) as profile:
            yield profile

    def _finish(self) -> None:
        """Export the last checkpoint as `rim-dist export` does, and draw the curves (first rank only)."""
        self._lease.check()
        try:
            if self._recipe.exportable:
                export_checkpoint(self._checkpoints, self._folder / "hf")
            lines = read_metrics(self._folder / "metrics.jsonl")
            curves = draw_curves({self._recipe.run.name: lines}, [(metric, "step") for metric in curve_metrics()])
            (self._folder / "report").mkdir(exist_ok=True)
            path = self._folder / "report" / "curves.png"
            with os_errors(path):
                path.write_bytes(curves)
        except OSError as error:
            raise TrainingError(f"{self._folder}: the report cannot be written ({describe_os_error(error)})") from error
        plain = f"{self._folder / 'hf'} is a plain HF folder"
        bidirectional = "blocks that are bidirectional inside are not exported: no server runs them"
        say(f"done: {plain if self._recipe.exportable else bidirectional}")
        hf, data = shlex.quote(str(self._folder / "hf")), self._recipe.evaluation.data or self._recipe.data.source
        questions = shlex.quote(data) if self._questions else "FILE"
        if self._recipe.exportable:
            say(f'  rim-dist generate {hf} "QUESTION"\n  rim-dist evaluate {hf} {questions}')
        say(f"  rim-dist report {shlex.quote(str(self._folder))}")
        if self._closing_note:
            say(self._closing_note)


def prepare_run(recipe: Recipe) -> tuple[Requirements, SampleStream]:
    """All checks and the data of a run, before any process group or weight exists."""
    check_run_folder(recipe)
    compose(recipe, 1)
    requirements = requirements_of(recipe)
    questions = [sample.question for sample in recipe_samples(recipe)]
    thoughts = method_of(recipe).thoughts
    check_prompts(prompt_ids(requirements.tokenizer, questions), requirements.positions, thoughts + 2 if thoughts else 0)
    return requirements, open_data(recipe, requirements)
