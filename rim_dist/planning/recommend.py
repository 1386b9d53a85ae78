"""Which degrees fit, which of those are fastest, and how large memory blocks can be."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rim_dist.attention.choice import choose_kernel
from rim_dist.attention.kernels.base import Demands
from rim_dist.config import LoraSection, Recipe
from rim_dist.data.samples import EncodedSample
from rim_dist.errors import ConfigError
from rim_dist.methods import method_of
from rim_dist.parallel.degrees import check_tensor_degree, choose_mode, fit_degrees
from rim_dist.parallel.zero import compose
from rim_dist.planning.communication import Transfer, seconds, transfers
from rim_dist.planning.links import Interconnect
from rim_dist.planning.memory import Buckets, MemoryEstimate, Setup, estimate
from rim_dist.planning.shape import ModelShape
from rim_dist.planning.workload import Workload

Pairs = tuple[tuple[Any, bool], ...]

# Of a GPU's memory: the rest is for the CUDA context, NCCL's and cuBLAS's buffers and gaps between blocks. Not measured here.
USABLE = 0.9
# Operations a second of a GPU at work, to weigh recomputing against sending: 40% of an H100's peak (data sheet: 989e12 in 16
# bits, 67e12 in fp32). Other GPUs shift compute and communication against each other.
OPERATIONS = {"fp32": 0.4 * 67e12, "bf16": 0.4 * 989e12, "fp16": 0.4 * 989e12}
# A mechanism must make a step faster by this factor to be recommended: each makes a run harder to understand.
WORTH = 1.02
MOST_SEQUENCE = 64
# The recipe fields that are decided here, with their sections.
DECIDED = {
    "tensor": "parallel",
    "sequence": "parallel",
    "zero_stage": "parallel",
    "offload": "parallel",
    "activation_checkpointing": "model",
    "activation_offload": "model",
    "micro_batch_tokens": "optimizer",
}


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs and the links between them. `memory`: bytes of a GPU, `cpu_memory`: of a node."""

    gpus: int
    memory: int
    link: Interconnect
    gpus_per_node: int = 8
    cpu_memory: int = 2**40

    def __str__(self) -> str:
        return f"{self.gpus:,} GPU{'s' if self.gpus > 1 else ''} of {gib(self.memory)}"

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)

    @property
    def usable_cpu(self) -> int:
        """CPU memory for one rank."""
        return int(self.cpu_memory * USABLE) // min(self.gpus, self.gpus_per_node)

    def holds(self, memory: MemoryEstimate) -> bool:
        return memory.peak_bytes <= self.usable and memory.host <= self.usable_cpu


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step. ZeRO's communication overlaps with computing; what layers wait for does not."""

    compute: float
    zero: float
    tensor: float
    sequence: float
    offload: float

    @property
    def total(self) -> float:
        return max(self.compute, self.zero) + self.tensor + self.sequence + self.offload


@dataclass(frozen=True)
class Candidate:
    """One way to distribute the run, with the memory it needs, what it sends and the time of a step."""

    setup: Setup
    load: Workload
    memory: MemoryEstimate
    transfers: list[Transfer]
    time: StepTime
    fits: bool

    def mechanisms(self, budget: int) -> int:
        """How many things it does that plain data parallelism with micro-batches of `budget` tokens does not."""
        s = self.setup
        changed = s.micro_batch_tokens != budget
        return sum((s.tensor > 1, s.sequence > 1, s.offload, s.activation_checkpointing, s.activation_offload, changed))

    @property
    def overrides(self) -> list[str]:
        """The recipe fields that make a run like this, as `section.name=value`."""
        return [f"{section}.{name}={str(getattr(self.setup, name)).lower()}" for name, section in DECIDED.items()]

    def __str__(self) -> str:
        s = self.setup
        words = [f"tensor {s.tensor} x sequence {s.sequence} x data {s.data}", f"ZeRO-{s.zero_stage}"]
        if s.offload:
            words.append("offload")
        if s.activation_checkpointing:
            words.append("activation checkpointing" + (" and offload" if s.activation_offload else ""))
        return ", ".join([*words, f"micro-batches of {s.micro_batch_tokens:,} tokens"])


class Planner:
    """The ways to run one recipe with one model on one cluster.

    `question`, `target`: lengths in tokens that a recipe does not say, of a question, and of what a readout predicts with its
    end-of-text token.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, cluster: Cluster, question: int = 128, target: int = 16) -> None:
        if recipe.parallel.zero_plus_plus:
            raise ConfigError("parallel.zero_plus_plus: true cannot be planned; allowed: false")
        recipe = recipe.with_dtype("bf16")  # its GPUs have it
        self.recipe, self.shape, self.cluster, self._lengths = recipe, shape, cluster, (question, target)
        self._demands = Demands.of(recipe, shape.config, "cuda", "auto")
        self.row = _longest_row(recipe, question, target)
        if self.row.positions > shape.positions:
            raise ConfigError(
                f"memory.blocks: a question of {question} tokens, {self.row.blocks} blocks of {self.row.block} and a "
                f"target of {self.row.target} need {self.row.positions} positions; {shape.name} has {shape.positions}"
            )

    # ---- single candidates ---------------------------------------------------------------------------------

    def as_written(self) -> Candidate:
        """The recipe's own degrees. Raises ConfigError where it could not run at all."""
        fit_degrees(self.recipe, self.cluster.gpus)
        check_tensor_degree(self.recipe.parallel.tensor, self.shape.config)
        budget = self.recipe.optimizer.micro_batch_tokens
        if budget < self.row.row:
            raise ConfigError(
                f"optimizer.micro_batch_tokens: {budget} tokens hold no row of {self.row.row} ({self.row_in_words()}); "
                f"allowed: {self.row.row} or more"
            )
        own = {name: getattr(getattr(self.recipe, section), name) for name, section in DECIDED.items()}
        return self.candidate(**own, mode=self.recipe.parallel.sequence_mode)

    def candidate(self, **decided: Any) -> Candidate:
        """Memory, communication and time with these values of `DECIDED`, micro-batches full."""
        setup = self._setup(**decided)
        samples = setup.micro_batch_tokens / self.row.row
        rounds = math.ceil(self.recipe.optimizer.global_batch / (setup.data * max(1.0, samples)))
        load = replace(self.row, samples=samples, rounds=rounds)
        memory = estimate(self.shape, setup, load)
        sent = transfers(self.shape, setup, load, self.cluster.link, self.cluster.gpus_per_node)
        time = StepTime(self._compute_seconds(setup), *(seconds(sent, p) for p in ("zero", "tensor", "sequence", "offload")))
        return Candidate(setup, load, memory, sent, time, self.cluster.holds(memory))

    def _setup(self, tensor: int, sequence: int, micro_batch_tokens: int, mode: str = "auto", **decided: Any) -> Setup:
        recipe, shape, dtype = self.recipe, self.shape, self.recipe.model.dtype
        assert dtype != "auto"
        mode = choose_mode(mode, sequence, shape.heads // tensor, shape.kv_heads // tensor)
        return Setup(
            buckets=self._buckets(decided["zero_stage"], decided["offload"], tensor > 1, sequence > 1),
            tensor=tensor,
            sequence=sequence,
            data=self.cluster.gpus // (tensor * sequence),
            sequence_mode=mode,
            dtype=dtype,
            lora=recipe.model.lora,
            micro_batch_tokens=micro_batch_tokens,
            attention=self._kernel(mode if sequence > 1 else None, micro_batch_tokens),
            dropouts=recipe.largest_dropouts,
            fp32_gradients=recipe.accumulates_in_fp32_under(decided["zero_stage"]),
            **decided,
        )

    @functools.cache  # noqa: B019 - a planner lives as long as its command
    def _kernel(self, mode: str | None, micro_batch_tokens: int) -> str:
        demands = replace(self._demands, sequence_mode=mode, micro_batch_tokens=micro_batch_tokens)
        return choose_kernel(self.recipe.model.attention, demands).kernel

    @functools.cache  # noqa: B019 - a planner lives as long as its command
    def _buckets(self, zero_stage: int, offload: bool, tensor: bool, sequence: bool) -> Buckets:
        parallel = self.recipe.parallel
        own = parallel.deepspeed_config if zero_stage == parallel.zero_stage else None
        degrees = {"tensor": 2 if tensor else 1, "sequence": 2 if sequence else 1}
        changed = {"zero_stage": zero_stage, "offload": offload, "deepspeed_config": own, **degrees}
        recipe = self.recipe.model_copy(update={"parallel": parallel.model_copy(update=changed)})
        return Buckets.of(compose(recipe, self.shape.hidden, self.cluster.gpus_per_node))

    def _compute_seconds(self, setup: Setup) -> float:
        """Floating-point work of the step (`rim_dist.data.packing.RowCost`) on all GPUs."""
        shape, row = self.shape, self.row
        matrices = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
        trained = sum(t.entries for t in shape.tensors(setup.lora) if t.trained and t.count >= shape.layers)
        token = 6.0 * trained + (4.0 * matrices if setup.lora is not None else 0.0)
        pair = 12.0 * shape.layers * shape.query_width
        target = (6.0 if setup.lora is None else 4.0) * shape.vocabulary * shape.hidden
        work = row.row * token + row.pairs * pair + row.targets * target
        if setup.activation_checkpointing:
            work += 2.0 * row.row * matrices + row.pairs * pair / 3
        return self.recipe.optimizer.global_batch * work / (self.cluster.gpus * OPERATIONS[setup.dtype])

    def row_in_words(self) -> str:
        r = self.row
        blocks = f" + {r.blocks} blocks of {r.block}" if r.blocks else ""
        return f"a question of {r.question}{blocks} + readouts of {r.readout_tokens}"

    # ---- all of them ---------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Every sensible way to use all GPUs. Raises ConfigError if there is none."""
        sharding = ((0, False), (1, False), (2, False), (3, False), (3, True))
        found = self._candidates(sharding, ((False, False), (True, False), (True, True)), self._budgets)
        if not found:
            raise ConfigError(
                f"optimizer.global_batch: {self.recipe.optimizer.global_batch} samples cannot be spread over "
                f"{self.cluster.gpus} GPUs: no tensor x sequence degree leaves so few data ranks; allowed: more samples or "
                f"fewer GPUs"
            )
        return found

    def frugal(self) -> list[Candidate]:
        """The ways that need least memory: ZeRO-3, activation checkpointing, one row in a micro-batch."""
        sharding, kept = ((3, False), (3, True)), ((True, False), (True, True))
        return self._candidates(sharding, kept, lambda _data: [self.row.row])

    def _candidates(self, sharding: Pairs, kept: Pairs, budgets: Callable[[int], list[int]]) -> list[Candidate]:
        """All degrees with all (zero_stage, offload), (activation_checkpointing, activation_offload) and micro_batch_tokens."""
        return [
            self.candidate(
                tensor=tensor,
                sequence=sequence,
                zero_stage=zero_stage,
                offload=offload,
                activation_checkpointing=checkpointing,
                activation_offload=activation_offload,
                micro_batch_tokens=budget,
            )
            for tensor, sequence in self._degrees()
            for zero_stage, offload in sharding
            for checkpointing, activation_offload in kept
            for budget in budgets(self.cluster.gpus // (tensor * sequence))
        ]

    def _degrees(self) -> Iterator[tuple[int, int]]:
        """(tensor, sequence) degrees with tensor groups within a node and a sample or more for every data rank."""
        shape, gpus = self.shape, self.cluster.gpus
        common = math.gcd(shape.heads, shape.kv_heads, shape.intermediate) if shape.family.splittable else 1
        for tensor in _divisors(math.gcd(common, gpus)):
            if tensor > self.cluster.gpus_per_node or self.cluster.gpus_per_node % tensor:
                continue
            for sequence in _divisors(gpus // tensor):
                if sequence <= MOST_SEQUENCE and gpus // (tensor * sequence) <= self.recipe.optimizer.global_batch:
                    yield tensor, sequence

    def _budgets(self, data: int) -> list[int]:
        """Tokens of a micro-batch to try: the recipe's, and one, two, four ... rows up to all samples of a data rank."""
        row, most = self.row.row, math.ceil(self.recipe.optimizer.global_batch / data)
        found = {row * 2**k for k in range(most.bit_length())}
        if self.recipe.optimizer.micro_batch_tokens >= row:
            found.add(self.recipe.optimizer.micro_batch_tokens)
        return sorted(found)

    def best(self, candidates: list[Candidate]) -> Candidate | None:
        """The fastest of those that fit, where every mechanism must gain `WORTH`; None if none fits."""
        budget = self.recipe.optimizer.micro_batch_tokens
        fitting = [c for c in candidates if c.fits]
        return min(fitting, key=lambda c: (c.time.total * WORTH ** c.mechanisms(budget), c.memory.peak_bytes), default=None)

    def recommend(self) -> tuple[Candidate, list[Candidate]]:
        """The candidate to run, and all of them. Raises ConfigError, with what is closest and what would fit, if none does."""
        candidates = self.candidates()
        best = self.best(candidates)
        if best is None:
            raise ConfigError(self._nothing_fits())
        return best, candidates

    def fill_in(self) -> list[str]:
        """Overrides for the fields that the recipe leaves open; those that it sets are kept. Raises ConfigError."""
        given = {}
        for name, section in DECIDED.items():
            fields = getattr(self.recipe, section)
            if name in fields.model_fields_set:
                given[name] = getattr(fields, name)
        kept = [c for c in self.candidates() if all(getattr(c.setup, name) == value for name, value in given.items())]
        best = self.best(kept)
        if best is None:
            fixed = ", ".join(sorted(f"{DECIDED[name]}.{name}" for name in given))
            least = f" (at least {gib(min(c.memory.peak_bytes for c in kept))} of a GPU)" if kept else ""
            raise ConfigError(
                f"{self.shape.name} does not fit {self.cluster} with what the recipe sets: {fixed}{least}; see rim-dist plan"
            )
        return [override for override, name in zip(best.overrides, DECIDED, strict=True) if name not in given]

    def _nothing_fits(self) -> str:
        cluster, recipe = self.cluster, self.recipe

        def excess(c: Candidate) -> float:
            return max(c.memory.peak_bytes / cluster.usable, c.memory.host / cluster.usable_cpu)

        closest = min(self.frugal(), key=excess)
        need, host = closest.memory.peak_bytes, closest.memory.host
        larger_ones = []
        if need > cluster.usable:
            larger_ones.append(f"GPUs of {gib(need / USABLE)}")
        if host > cluster.usable_cpu:
            larger_ones.append(f"nodes with {gib(host / USABLE * min(cluster.gpus, cluster.gpus_per_node))} of CPU memory")
        ways = [" and ".join(larger_ones)]
        for gpus in (cluster.gpus * 2**k for k in range(1, 14)):
            per_node = max(cluster.gpus_per_node, min(8, gpus))
            larger = Planner(recipe, self.shape, replace(cluster, gpus=gpus, gpus_per_node=per_node), *self._lengths)
            if any(c.fits for c in larger.frugal()):
                ways.append(f"{gpus:,} GPUs")
                break
        if recipe.model.lora is None and recipe.model.config is None:
            adapters = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": LoraSection()})})
            if any(c.fits for c in Planner(adapters, self.shape, cluster, *self._lengths).frugal()):
                ways.append("adapters (model.lora={}) instead of full training")
        if self.row.blocks and (memory := max(self.largest_memory(c.setup) for c in self.frugal())):
            ways.append(f"memory.tokens_per_block={memory}")
        return (
            f"{self.shape.name} fits nowhere on {cluster} ({USABLE:.0%} usable: "
            f"{gib(cluster.usable)}). Closest: {closest}: {gib(need)} of a GPU"
            + (f" and {gib(host)} of CPU memory a rank" if host else "")
            + f". It would fit with {' or '.join(ways)}"
        )

    # ---- memory blocks -------------------------------------------------------------------------------------

    def resplit(self, setup: Setup, sequence: int) -> Setup:
        """The setup at another sequence degree with ZeRO-3, activation checkpointing and one row in a micro-batch."""
        kept = {name: getattr(setup, name) for name in DECIDED}
        changed = {"sequence": sequence, "zero_stage": 3, "activation_checkpointing": True, "micro_batch_tokens": self.row.row}
        return self._setup(**(kept | changed))

    def fits_with(self, setup: Setup, blocks: int, memory: int) -> bool:
        return self.cluster.holds(self.memory_with(setup, blocks, memory))

    def memory_with(self, setup: Setup, blocks: int, memory: int) -> MemoryEstimate:
        """One row of `blocks` blocks of `memory` tokens in a micro-batch, several of these a step."""
        return estimate(self.shape, setup, replace(self.row, blocks=blocks, memory=memory, samples=1, rounds=2))

    def largest_memory(self, setup: Setup) -> int:
        """Most memory tokens of a block, at the planned number of blocks, that fit memory and positions; 0 if none does."""
        blocks = self.row.blocks
        return _largest(lambda memory: self.fits_with(setup, blocks, memory), self.room // max(1, blocks) - 2)

    def largest_blocks(self, setup: Setup) -> int:
        """Most blocks, of the recipe's size."""
        memory = self.recipe.memory.tokens_per_block
        return _largest(lambda blocks: self.fits_with(setup, blocks, memory), self.room // (memory + 2))

    @property
    def room(self) -> int:
        """Positions of the model that question and target leave to blocks."""
        return self.shape.positions - self.row.question - self.row.target


def _longest_row(recipe: Recipe, question: int, target_tokens: int) -> Workload:
    """The longest row that a sample of the given lengths becomes in any stage, as the recipe's method makes it.

    Raises ConfigError for rows of continuous thoughts.
    """
    target = [0] * target_tokens
    sample = EncodedSample([0] * question, [target] * recipe.curriculum.stage1.max_steps, target, 0)
    longest = max(method_of(recipe).longest_rows(sample), key=len)
    if longest.latent:
        raise ConfigError(f"method: {recipe.method} cannot be planned: its rows hold continuous thoughts")
    return Workload(
        question,
        longest.blocks,
        recipe.memory.tokens_per_block,
        max(len(readout.target) for readout in longest.readouts),
        one_readout=longest.blocks > 0 and len(longest.readouts) == 1,
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of 1 .. `most` that fits, where smaller ones do as well; 0 if none."""
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def reasons(planner: Planner, chosen: Candidate, candidates: list[Candidate]) -> list[str]:
    """A line a setting: how the best candidate with another value compares with the chosen one."""
    s, budget = chosen.setup, planner.recipe.optimizer.micro_batch_tokens

    def otherwise(name: str, others: list[Candidate]) -> str:
        if not others:
            return f"{name} is not possible here"
        best = planner.best(others)
        if best is None:
            least = min(c.memory.peak_bytes for c in others)
            return f"{name} needs at least {gib(least)}, usable are {gib(planner.cluster.usable)}"
        factor = best.time.total / chosen.time.total
        if factor < 1:
            return f"{name} gains {1 - factor:.1%}, less than it is worth"
        if factor < 1.005:
            return f"{name} takes as long and needs {gib(best.memory.peak_bytes)} instead of {gib(chosen.memory.peak_bytes)}"
        return f"{name} takes {factor:.2f}x the time of a step"

    lines = []
    for name in ("tensor", "sequence"):
        degree = getattr(s, name)
        mode = f" ({s.sequence_mode})" if name == "sequence" and degree > 1 else ""
        others = [c for c in candidates if (getattr(c.setup, name) > 1) != (degree > 1)]
        lines.append(f"{name} {degree}{mode}: {otherwise(f'{name} 1' if degree > 1 else 'a larger degree', others)}")
    by_stage = {n: [c for c in candidates if c.setup.zero_stage == n] for n in (s.zero_stage - 1, s.zero_stage + 1)}
    lines += [f"ZeRO-{s.zero_stage}: {otherwise(f'ZeRO-{n}', others)}" for n, others in by_stage.items() if others]
    for name, on, off in (
        ("activation_checkpointing", "recomputing layers", "keeping all activations"),
        ("activation_offload", "keeping layer inputs in CPU memory", "layer inputs on the GPU"),
        ("offload", "optimizer and parameters in CPU memory", "all on the GPU"),
    ):
        value = getattr(s, name)
        if name == "activation_checkpointing" or value:
            others = [c for c in candidates if getattr(c.setup, name) != value]
            lines.append(f"{on if value else off}: {otherwise(off if value else on, others)}")
    if s.micro_batch_tokens != budget:
        other = otherwise(f"the recipe's {budget:,}", [c for c in candidates if c.setup.micro_batch_tokens == budget])
        lines.append(f"micro-batches of {s.micro_batch_tokens:,} tokens: {other}")
    return lines


def notable(planner: Planner, chosen: Candidate, candidates: list[Candidate], count: int) -> list[Candidate]:
    """The chosen candidate and the best of each other kind (degrees, sharding, what is kept), fastest first."""

    def kind(c: Candidate) -> tuple[int, ...]:
        return (c.setup.tensor, c.setup.sequence, c.setup.zero_stage, c.setup.offload, c.setup.activation_checkpointing)

    by_kind = itertools.groupby(sorted(candidates, key=kind), key=kind)
    best = [planner.best(list(members)) for key, members in by_kind if key != kind(chosen)]
    return [chosen, *sorted((c for c in best if c is not None), key=lambda c: c.time.total)][:count]
