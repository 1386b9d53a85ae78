"""Memory of one GPU (or CPU rank) in training, from the sizes of the model and how it is distributed.

Every term is a tensor that exists, with the reason it does. What autograd keeps was found with saved-tensor hooks on
transformers' layers (`tests/test_planning.py` compares), what DeepSpeed keeps in its source and by its allocations
(`benchmarks/planner.py` measures). `d`: ranks that ZeRO shards over (data x sequence), `b`: bytes of a model entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rim_dist.attention.kernels import kernel_of
from rim_dist.config import Dropouts, LoraSection
from rim_dist.limits import LOGITS_ENTRIES
from rim_dist.planning.shape import Linear, ModelShape, adapted
from rim_dist.planning.workload import Workload

Parts = dict[str, int]
PARTS = (
    "parameters",
    "gathered parameters",
    "gradients",
    "optimizer",
    "communication buckets",
    "activations",
    "attention",
    "logits",
    "working memory",
)
# DeepSpeed's own settings where a JSON says nothing.
REUSE_DISTANCE = 1_000_000_000  # stage3_max_reuse_distance
SUB_GROUP = 1_000_000_000  # sub_group_size: entries ZeRO-3 updates at a time
ALL_REDUCE_BUCKET = 500_000_000  # entries ZeRO-0 flattens for one all-reduce


@dataclass(frozen=True)
class Buckets:
    """Sizes, in entries, from a DeepSpeed configuration (`rim_dist.parallel.zero.compose`)."""

    reduce: int
    prefetch: int
    persistence: int
    reuse: int  # ZeRO-3 keeps a gathered parameter if it is used again within so many entries

    @staticmethod
    def of(ds_config: Mapping[str, Any]) -> Buckets:
        zero = ds_config["zero_optimization"]
        return Buckets(
            reduce=int(zero.get("reduce_bucket_size", 0)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 0)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 0)),
            reuse=int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
        )


@dataclass(frozen=True)
class Setup:
    """How a run is distributed and computed. `tensor`, `sequence`, `data`: degrees; their product is the number of ranks."""

    buckets: Buckets
    tensor: int = 1
    sequence: int = 1
    data: int = 1
    zero_stage: int = 3
    offload: bool = False
    sequence_mode: Literal["ulysses", "allgather_kv"] = "ulysses"
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    lora: LoraSection | None = None
    activation_checkpointing: bool = False
    activation_offload: bool = False
    micro_batch_tokens: int = 0
    attention: str = "flex"
    dropouts: Dropouts = field(default_factory=Dropouts)
    device: Literal["cuda", "cpu"] = "cuda"
    fp32_gradients: bool = False  # `Recipe.accumulates_in_fp32`

    @property
    def gradient_entry(self) -> int:
        """Bytes of an entry of the gradients that are added up."""
        return 4 if self.fp32_gradients else self.entry

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data

    @property
    def shards(self) -> int:
        """Ranks that ZeRO shards over: sequence ranks are data ranks to DeepSpeed."""
        return self.sequence * self.data

    @property
    def entry(self) -> int:
        """Bytes of a parameter, gradient or activation entry."""
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True)
class Weights:
    """Parameters of a tensor rank, in entries.

    `persistent`: those that ZeRO-3 keeps whole on every rank, because each is small. `largest`: the largest that is trained.
    `layer`: the trained ones of one layer. `module`: the largest of all, which ZeRO-3 gathers at once.
    """

    all: int
    trained: int
    persistent: int
    largest: int
    layer: int
    head: int
    module: int

    @staticmethod
    def of(shape: ModelShape, setup: Setup) -> Weights:
        tensors = shape.tensors(setup.lora, setup.tensor)
        return Weights(
            all=sum(t.entries for t in tensors),
            trained=sum(t.entries for t in tensors if t.trained),
            persistent=sum(t.entries for t in tensors if t.size <= setup.buckets.persistence),
            largest=max(t.size for t in tensors if t.trained),
            layer=sum(t.entries for t in tensors if t.trained and t.count >= shape.layers) // shape.layers,
            head=shape.vocabulary_rows(setup.tensor) * shape.hidden,
            module=max(t.size for t in tensors),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank by kind: between steps, and at the `moment` of a step that needs most. `host`: in CPU memory."""

    states: Parts
    peak: Parts
    moment: str
    host: int = 0

    @property
    def states_bytes(self) -> int:
        return sum(self.states.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def states(weights: Weights, setup: Setup) -> Parts:
    """What is on the device between optimizer steps.

    ZeRO-0 in fp32 is torch's AdamW, with two moments a trained parameter. Everything else also keeps an fp32 copy, ZeRO-1 to 3
    of the rank's shard only. ZeRO-3 shards the parameters too, keeps small ones whole on every rank, and always holds a
    gradient shard and a reduce bucket.
    """
    b, d = setup.entry, setup.shards
    if setup.zero_stage == 0:
        return {"parameters": b * weights.all, "optimizer": (8 if b == 4 else 12) * weights.trained}
    if setup.zero_stage < 3:
        return {"parameters": b * weights.all, "optimizer": 12 * weights.trained // d}
    found = {
        "parameters": b * weights.persistent if d > 1 or setup.offload else 0,
        "communication buckets": b * setup.buckets.reduce,
    }
    if not setup.offload:
        found["parameters"] += b * weights.all // d
        found["gradients"] = setup.gradient_entry * weights.trained // d
        found["optimizer"] = 12 * weights.trained // d
    return found


def host_bytes(shape: ModelShape, setup: Setup, load: Workload, weights: Weights) -> int:
    """CPU memory of a rank.

    Offload keeps parameter shards, fp32 copies, moments, fp32 gradients and a buffer for gradients from the device there;
    activation offload the input of every layer.
    """
    b, d = setup.entry, setup.shards
    found = (b * weights.all + (16 + b) * weights.trained) // d if setup.offload else 0
    if setup.activation_offload:
        found += shape.layers * layer_input(shape, setup, _rank_tokens(setup, load))
    return found


def layer_activations(shape: ModelShape, setup: Setup, tokens: int, row_tokens: int) -> int:
    """Bytes that the backward pass of one layer needs, for `tokens` on this rank of a packed row of `row_tokens`."""
    b, lora = setup.entry, setup.lora
    total = _attention_activations(shape, setup, tokens, row_tokens)
    for part in ("attn", "mlp"):  # both norms, and the inputs of the matrices after them
        kept = any(_keeps_input(shape, setup, linear) for linear in _linears(shape, "column", part))
        total += _norm(shape, setup, tokens, shape.hidden) + (b * tokens * shape.hidden if kept else 0)
    # act(gate) * up keeps gate, act(gate) and up; gelu keeps its input. gelu_new is written out in tensor operations and keeps
    # the cube's base, tanh and both factors of a product as well. The last matrix keeps its input.
    inside = (3 if shape.family.gated else 1) + (3 if shape.activation == "gelu_new" else 0)
    (output,) = _linears(shape, "row", "mlp")
    total += b * tokens * (shape.intermediate // setup.tensor) * (inside + _keeps_input(shape, setup, output))
    # A dropout mask: booleans by CUDA's kernel, the scaled noise on a CPU.
    mask = 1 if setup.device == "cuda" else b
    for linear in shape.linears:
        if lora is not None and adapted(linear, lora, shape.layers):
            total += b * tokens * lora.rank
            if setup.dropouts.lora:  # each adapter drops entries of its own input and keeps the result and the mask
                total += tokens * (linear.inputs // (setup.tensor if linear.split == "row" else 1)) * (b + mask)
    if setup.dropouts.residual and not shape.family.rotary:  # GPT-2's dropouts after attention and MLP
        total += 2 * tokens * shape.hidden * mask
    return total


def _keeps_input(shape: ModelShape, setup: Setup, linear: Linear) -> bool:
    """Whether the input of a matrix is kept: its gradient, or that of its adapter, needs it."""
    return setup.lora is None or adapted(linear, setup.lora, shape.layers)


def _linears(shape: ModelShape, split: str, part: str) -> list[Linear]:
    """The layer's matrices that are split by `column` or `row`, of its `attn` or `mlp`."""
    return [linear for linear in shape.linears if linear.split == split and part in linear.name]


def _attention_activations(shape: ModelShape, setup: Setup, tokens: int, row_tokens: int) -> int:
    b, t = setup.entry, setup.tensor
    q, kv, heads = shape.query_width // t, shape.kv_width // t, shape.heads // t
    # The attention keeps its inputs (queries and keys after rotation, values), its output and its log-sum-exp.
    kv_tokens, kv_width = tokens, kv
    if setup.sequence > 1 and setup.sequence_mode == "allgather_kv":
        kv_tokens = row_tokens
    elif setup.sequence > 1:
        # Fewer KV heads than ranks are repeated: every rank has at least one of the whole row.
        kv_width = shape.head_dim * math.lcm(shape.kv_heads // t, setup.sequence)
    total = b * (tokens * q + 2 * kv_tokens * kv_width) + b * tokens * q + 4 * tokens * heads
    if shape.family.query_norm:
        total += _norm(shape, setup, tokens, q) + _norm(shape, setup, tokens, kv)
        total += 4 * tokens * (heads + shape.kv_heads // t - 2)  # a statistic a head, not one a token
    # The next matrix's input is the kernel's output, unless that was joined from several calls or came by all-to-all.
    exchanged = setup.sequence > 1 and setup.sequence_mode == "ulysses"
    (output,) = _linears(shape, "row", "attn")
    if _keeps_input(shape, setup, output) and (kernel_of(setup.attention).joins_outputs or exchanged):
        total += b * tokens * q
    return total


def _norm(shape: ModelShape, setup: Setup, tokens: int, width: int) -> int:
    """What a norm keeps.

    RMS: its input in fp32 (a copy in half precision), the normalised entries if its weight is trained, a statistic a token. The
    layer norm's kernel: its input and two statistics a token.
    """
    if shape.family.norm == "layer":
        return tokens * (width * setup.entry + 2 * (setup.entry if setup.device == "cpu" else 4))
    return tokens * (width * (4 + (setup.entry if setup.lora is None else 0)) + 4)


def layer_input(shape: ModelShape, setup: Setup, tokens: int) -> int:
    return setup.entry * tokens * shape.hidden


def attention_masks(setup: Setup, load: Workload) -> int:
    """Masks that the attention kernel builds once per micro-batch for all layers."""
    gathered = setup.sequence if setup.sequence_mode == "allgather_kv" else 1
    return kernel_of(setup.attention).mask_bytes(load, setup.entry, setup.device, setup.dropouts.attention, gathered)


def estimate(shape: ModelShape, setup: Setup, load: Workload) -> MemoryEstimate:
    """Memory of a rank in an optimizer step of `load.rounds` micro-batches."""
    weights = Weights.of(shape, setup)
    between = states(weights, setup)
    moments = {
        "loss": _at_loss(shape, setup, load, weights),
        "backward": _at_backward(shape, setup, load, weights),
        "reduction": _at_reduction(setup, load, weights),
        "update": _at_update(setup, weights),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    peak = {part: between.get(part, 0) + moments[moment].get(part, 0) for part in PARTS}
    return MemoryEstimate(between, {k: v for k, v in peak.items() if v}, moment, host_bytes(shape, setup, load, weights))


def _rank_tokens(setup: Setup, load: Workload) -> int:
    return -(-load.tokens // setup.sequence)


def _rank_targets(setup: Setup, load: Workload) -> int:
    """Supervised positions of the rank that has most.

    Under ulysses ranks hold consecutive tokens of a row. If a rank holds less than a sample, the last one holds its readouts.
    """
    own = _rank_tokens(setup, load)
    if setup.sequence == 1 or setup.sequence_mode == "allgather_kv" or own >= load.row:
        return -(-load.targets // setup.sequence)
    ends_of_blocks = load.readouts * max(0, own - load.readout_tokens) / load.prefix
    return math.ceil(min(own, load.readout_tokens) + ends_of_blocks)


def _during(shape: ModelShape, setup: Setup, load: Workload, weights: Weights) -> Parts:
    """What is held besides the states from the end of the forward pass to the beginning of the backward pass."""
    b, d, tokens = setup.entry, setup.shards, _rank_tokens(setup, load)
    if not setup.activation_checkpointing:
        layer = layer_activations(shape, setup, tokens, load.tokens)
    else:
        layer = 0 if setup.activation_offload and setup.device == "cuda" else layer_input(shape, setup, tokens)
    rotary = 2 * b * tokens * shape.head_dim if shape.family.rotary else 0
    found = {
        "activations": layer * shape.layers + _norm(shape, setup, tokens, shape.hidden) + rotary,
        "attention": attention_masks(setup, load),
    }
    if load.rounds > 1 and setup.zero_stage < 3:
        # Of earlier micro-batches: whole gradients, or a shard under ZeRO-2. ZeRO-3's shard is one of the states.
        found["gradients"] = setup.gradient_entry * weights.trained // (d if setup.zero_stage == 2 else 1)
    if setup.zero_stage == 1 and load.rounds > 1:
        found["communication buckets"] = (
            setup.gradient_entry * setup.buckets.reduce
        )  # made by the first backward pass, unused until the last
    if setup.zero_stage == 3 and (d > 1 or setup.offload):
        sharded = weights.all - weights.persistent
        if setup.lora is not None and not shape.tied:
            sharded -= weights.head  # a frozen embedding has no backward pass and is released at once
        # Parameters stay gathered if they are used again within the reuse distance. When the backward pass begins, these are
        # the ones of the last half of that distance, besides the module that runs.
        found["gathered parameters"] = b * min(sharded, setup.buckets.reuse // 2 + weights.module)
    if setup.lora is None:
        # The loss computes the whole gradient of the head in the forward pass.
        found["logits"] = b * weights.head
    return found


def _at_loss(shape: ModelShape, setup: Setup, load: Workload, weights: Weights) -> Parts:
    """The end of the forward pass: one chunk of logits, its log-softmax, and the hidden states they come from."""
    b, tokens = setup.entry, _rank_tokens(setup, load)
    rows = shape.vocabulary_rows(setup.tensor)
    targets = _rank_targets(setup, load)
    most = max(1, LOGITS_ENTRIES[setup.device] // rows)
    chunk = min(targets, most) * rows
    found = _during(shape, setup, load, weights)
    # Logits, an fp32 copy of them in half precision, and log-softmax. Hidden states of all tokens; those of the targets, and
    # their gradient.
    found["logits"] = found.get("logits", 0) + chunk * (8 if b == 4 else 10)
    if setup.lora is None and b == 2 and targets > most:
        found["logits"] += 4 * weights.head  # the sum over chunks, in fp32
    found["working memory"] = b * shape.hidden * (tokens + 2 * targets)
    return found


def _at_backward(shape: ModelShape, setup: Setup, load: Workload, weights: Weights) -> Parts:
    """The backward pass of the last layer, when the activations of all layers are still kept."""
    b, tokens = setup.entry, _rank_tokens(setup, load)
    found = _during(shape, setup, load, weights)
    # Gradients of gate, up and act(gate) while the MLP's product is freed; of the residual stream.
    found["working memory"] = b * tokens * (2 * shape.intermediate // setup.tensor + shape.hidden)
    found["activations"] -= _norm(shape, setup, tokens, shape.hidden)  # the last norm's are done with
    layer = layer_activations(shape, setup, tokens, load.tokens)
    if setup.activation_checkpointing:
        found["activations"] += layer
        if not setup.activation_offload and (b == 4 or shape.family.norm == "layer"):
            found["activations"] -= layer_input(shape, setup, tokens)  # what was kept of the layer is its first norm's input
    if setup.zero_stage == 2:
        # Two buckets in turn. When the first is reduced, the buffer for all gradients of this rank is made. The activations of
        # the layers whose gradients fill a bucket are free by then; the gradient of a head of its own fills it at once.
        found["communication buckets"] = 2 * b * setup.buckets.reduce
        own = setup.gradient_entry * weights.trained // setup.shards
        done = 0
        if setup.lora is not None or shape.tied:
            each = layer_input(shape, setup, tokens) if setup.activation_checkpointing else layer
            done = int(each * min(shape.layers, setup.buckets.reduce / max(1, weights.layer)))
        if own > done:
            found["gradients"] = found.get("gradients", 0) + own
            found["activations"] -= done
    if setup.zero_stage >= 2 and setup.lora is None and not shape.tied:
        found["working memory"] = max(found["working memory"], b * weights.head)  # flattened to be reduced
    elif "gathered parameters" in found and not shape.tied:
        found["gathered parameters"] -= b * weights.head  # the head is done with
    return found


def _at_reduction(setup: Setup, load: Workload, weights: Weights) -> Parts:
    """The end of the last backward pass: activations are freed, all gradients are being reduced to their owners."""
    b, g, d, reduce = setup.entry, setup.gradient_entry, setup.shards, setup.buckets.reduce
    trained = g * weights.trained
    if setup.zero_stage == 0:
        flat = b * min(weights.trained, ALL_REDUCE_BUCKET) if d > 1 else 0
        return {"gradients": trained, "communication buckets": flat}
    if setup.zero_stage == 1:
        return {"gradients": trained + trained // d, "communication buckets": g * reduce}
    if setup.zero_stage == 2:
        shards = trained // d * (2 if load.rounds > 1 else 1)
        return {"gradients": shards, "communication buckets": b * (2 * reduce + weights.largest)}
    filled = max(min(reduce, weights.trained), weights.largest)  # a larger matrix is reduced on its own
    # A bucket that holds all gradients is reduced after the backward pass, when no parameter is gathered any more.
    gathered = b * weights.largest if weights.trained > reduce else 0
    return {"communication buckets": 2 * b * filled, "gathered parameters": gathered}


def _at_update(setup: Setup, weights: Weights) -> Parts:
    """The optimizer's step: a flat fp32 copy of the gradients. Fused AdamW has no temporaries."""
    b, d = setup.entry, setup.shards
    if setup.offload:
        return {}
    if setup.zero_stage == 0:
        return {"gradients": b * weights.trained, "working memory": 4 * weights.trained if b == 2 else 0}
    shard = weights.trained // d
    if setup.zero_stage < 3:
        return {"gradients": (4 if setup.fp32_gradients else b + 4) * shard}
    whole = b * weights.persistent if d > 1 else 0  # small parameters are updated in shards
    return {"gradients": 4 * min(shard, SUB_GROUP), "parameters": -whole}


def evaluation_cache(shape: ModelShape, setup: Setup, load: Workload, prompts: int, new_tokens: int) -> int:
    """Bytes of keys and values in an evaluation after every block (`rim_dist.evaluation.readouts`)."""
    keys = load.prefix + load.readouts * new_tokens  # a prompt once, and the answers of its readouts
    return prompts * keys * 2 * shape.layers * (shape.kv_width // setup.tensor) * setup.entry
