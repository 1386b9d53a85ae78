"""Sections a to e of gpu.py: what the card is, whether every kernel computes the same on it, and how fast they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import peft
import step_time
import torch
import transformers
from common import block_ids, real_rows
from gpu_context import (
    PEAK_FLOPS,
    SHAPES,
    Context,
    Step,
    graphs,
    hide_cce,
    llama,
    no_cudnn_attention,
    reset_dynamo,
    shape_of,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from ttft import Tokenizer

import rim_dist
from rim_dist.attention import flex
from rim_dist.attention.kernels import kernel_names
from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.config import Dropouts
from rim_dist.data.packing import RowCost, pack_step
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.model.build import recompute_layers
from rim_dist.model.dropout import set_dropout
from rim_dist.model.generation import Decoding, generate_ids
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.training.engine import row_cost
from rim_dist.unwrap import bare_model

BLOCKS, MEMORY = 8, 2  # K and M of sections c and e
KERNELS = kernel_names()
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "pydantic", "datasets", "cut-cross-entropy", "numpy")


# ---- a ------------------------------------------------------------------------------------------------------------


def versions(cx: Context, entry: dict[str, Any]) -> None:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            entry[name] = importlib.metadata.version(name)
    entry |= {"python": sys.version.split()[0], "rim_dist": rim_dist.__version__}
    if cx.cuda:
        card = torch.cuda.get_device_properties(cx.device)
        entry |= {"gpu": card.name, "memory_gib": card.total_memory / 2**30, "sms": card.multi_processor_count}
        entry |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "assumed_peak_flops": PEAK_FLOPS}
        query = torch.randn(1, 4, 64, 64, device=cx.device, dtype=torch.bfloat16)
        F.scaled_dot_product_attention(query, query, query)
        if hasattr(torch._C, "_get_sdp_priority_order"):  # 0 math, 1 flash, 2 efficient, 3 cuDNN
            entry["sdp_order"] = [int(x) for x in torch._C._get_sdp_priority_order()]
        ceilings(cx, entry)
        cx.fresh()
    cx.row("a  " + ", ".join(f"{k} {round(v, 2) if isinstance(v, float) else v}" for k, v in entry.items()))


def ceilings(cx: Context, entry: dict[str, Any]) -> None:
    """What the card reaches at best: a copy within its memory, and a large bf16 matrix product."""
    x = torch.randn(1 << 30, device=cx.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    entry["copy_tb_s"] = 2 * x.nbytes / cx.mean_seconds(lambda: y.copy_(x), 10) / 1e12
    n = 8192
    a, b = (torch.randn(n, n, device=cx.device, dtype=torch.bfloat16) for _ in range(2))
    entry["matmul_tflops"] = 2 * n**3 / cx.mean_seconds(lambda: a @ b, 10) / 1e12


# ---- b ------------------------------------------------------------------------------------------------------------


def unrolled(model: Any, rows: list[Row], block: list[int]) -> torch.Tensor:
    """Weighted loss sum by separate plain causal runs [x, m_1 .. m_k, r_k] of a model without any RiM attention."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for row in rows:
        for readout in row.readouts:
            prefix = [*row.question, *block * readout.block]
            ids = torch.tensor([[*prefix, *readout.target[:-1]]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 :]
            target = torch.tensor([*readout.target], device=device)
            total = total + readout.weight * F.cross_entropy(logits.float(), target, reduction="sum")
    return total


def oracle_configs(cx: Context) -> dict[str, Any]:
    """One family of each kind: plain, with norms of queries and keys, with a sliding window and softcaps."""
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 128 if cx.smoke else 256,
        "intermediate_size": 256 if cx.smoke else 512,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    window = {"sliding_window": 96, "query_pre_attn_scalar": 64}
    return {
        "llama d64": transformers.LlamaConfig(**fields, num_attention_heads=4, head_dim=64),
        "qwen3 d128": transformers.Qwen3Config(**fields, num_attention_heads=8, head_dim=128),
        "gemma2 d64": transformers.Gemma2Config(**fields, num_attention_heads=4, head_dim=64, **window),
    }


def oracle_rows(cx: Context, seed: int) -> tuple[list[Row], list[int]]:
    """Rows of random shapes, and the ids of their blocks."""
    pick = random.Random(seed)
    block = block_ids(255, MEMORY)

    def tokens(count: int) -> list[int]:
        return [pick.randrange(250) for _ in range(count)]

    rows = []
    for _ in range(2 if cx.smoke else 7):
        blocks = pick.randint(1, 8)
        readouts = tuple(Readout(k, tokens(pick.randint(1, 14)), pick.uniform(0.1, 1.0)) for k in range(1, blocks + 1))
        rows.append(Row(tokens(pick.randint(5, 150)), blocks, len(block), readouts))
    return rows, block


class Oracle:
    """Loss and gradients of rows by unrolled runs in fp32, and how far copies of the same model are off."""

    def __init__(self, cx: Context, config: Any) -> None:
        self._config, self._device = config, cx.device
        rows, self.block = oracle_rows(cx, 0)
        self.rows = rows + oracle_rows(cx, 1)[0]
        torch.manual_seed(0)
        model = self._model(torch.float32)
        for parameter in model.parameters():  # default weights give nearly uniform attention
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.06)
        loss = unrolled(model, self.rows, self.block)
        loss.backward()
        self._loss = float(loss)
        self._gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        self._size = sum(float(g.square().sum()) for g in self._gradients.values()) ** 0.5
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def _model(self, dtype: torch.dtype) -> Any:
        model = transformers.AutoModelForCausalLM.from_config(self._config, attn_implementation="eager")
        return model.to(self._device, dtype).train()

    def copy(self, dtype: torch.dtype) -> Any:
        model = self._model(dtype)
        lacking, unknown = model.load_state_dict(self._weights, strict=False)
        assert not unknown, unknown
        assert set(lacking) <= {"lm_head.weight"}, lacking  # where it is the embedding's
        return model

    def off(self, model: Any, loss: torch.Tensor) -> tuple[float, float]:
        """Relative difference of the loss, and of the gradients as one vector."""
        parts = ((p.grad.double() - self._gradients[name]).square().sum() for name, p in model.named_parameters())
        return abs(float(loss) - self._loss) / abs(self._loss), sum(map(float, parts)) ** 0.5 / self._size


def oracle(cx: Context, entry: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    configs = oracle_configs(cx)
    with no_cudnn_attention():
        for name, config in configs.items():
            compare_family(cx, entry, name, Oracle(cx, config))
        recompilations(cx, entry, configs["llama d64"])


def compare_family(cx: Context, entry: dict[str, Any], name: str, truth: Oracle) -> None:
    """Every kernel against the unrolled runs. In bf16 those are off as well: a kernel may be twice as far off, and a little."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = f"{name} {str(dtype).removeprefix('torch.')}"
        plain = truth.copy(dtype)
        loss = unrolled(plain, truth.rows, truth.block)
        loss.backward()
        floor = entry[f"{kind} unrolled"] = truth.off(plain, loss)
        limits = (1e-5, 1e-4) if dtype == torch.float32 else (2 * floor[0] + 2e-3, 2 * floor[1] + 5e-3)
        for kernel in KERNELS:
            if kernel == "flex" and dtype == torch.float32 and name != "llama d64" and cx.cuda:
                continue  # compiling takes the time
            key = f"{kind} {kernel}"
            with cx.attempt(entry, key, f"b  {key:28s}"):
                found = entry[key] = compare_kernel(cx, truth, dtype, kernel, limits)
                verdict = "ok" if found["ok"] else "WRONG"
                figures = f"loss {found['loss']:.1e} grad {found['gradient']:.1e} (unrolled {floor[1]:.1e})"
                cx.row(f"b  {key:28s} {figures} {verdict} {found['seconds']:.1f}s")


def compare_kernel(cx: Context, truth: Oracle, dtype: torch.dtype, kernel: str, limits: tuple[float, float]) -> dict[str, Any]:
    reset_dynamo()
    before = graphs()
    model = truth.copy(dtype)
    use_rim_attention(model, kernel)
    install_readout_loss(model)
    cx.sync()
    began = time.perf_counter()
    loss = run_batch(model, pack(truth.rows, truth.block).to(cx.device))[0]
    loss.backward()
    cx.sync()
    seconds = time.perf_counter() - began
    loss_off, gradient_off = truth.off(model, loss)
    ok = loss_off <= limits[0] and gradient_off <= limits[1]
    return {"loss": loss_off, "gradient": gradient_off, "ok": ok, "seconds": seconds, "graphs": graphs() - before}


def recompilations(cx: Context, entry: dict[str, Any], config: Any) -> None:
    """Lengths change from batch to batch: how often is anything compiled again?"""
    reset_dynamo()
    model = transformers.AutoModelForCausalLM.from_config(config).to(cx.device, torch.bfloat16).train()
    use_rim_attention(model, "flex")
    install_readout_loss(model)
    made = []
    for seed in range(3 if cx.smoke else 8):
        rows, block = oracle_rows(cx, 10 + seed)
        before = graphs()
        seconds = cx.seconds_of(train_step(cx, model, pack(rows, block)))
        made.append((graphs() - before, round(seconds, 2)))
    entry["flex new graphs, seconds by batch"] = made
    cx.row(f"b  flex, batches of other lengths: (new graphs, s) {made}")


# ---- c ------------------------------------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    batch: Batch
    rows: list[Row]
    ids: list[int]


class Work(NamedTuple):
    """Steps to time one after the other, and what they are in all.

    `operations`: of the real tokens; `done`: with what padding adds.
    """

    steps: list[Step]
    tokens: int
    operations: float
    done: float


def micro_batches(cx: Context, shape: str, stage: Literal["stage1", "stage2"], budget: int, count: int) -> list[MicroBatch]:
    """Micro-batches of about `budget` tokens with GSM8K's lengths, each of other samples; the largest `count`."""
    vocabulary = shape_of(cx, shape)["vocab_size"]
    ids = block_ids(vocabulary, MEMORY)
    samples = min(1024, max(8, budget * count // (60 + BLOCKS * len(ids)) + 8))
    rows = real_rows(samples, stage, BLOCKS, len(ids), vocabulary, seed=1)
    parts = [[rows[i] for i in bins[0]] for bins in pack_step(rows, 1, budget, RowCost(1.0)).bins]
    parts.sort(key=lambda part: -sum(map(len, part)))
    return [MicroBatch(pack(part, ids), part, ids) for part in parts[:count]]


def train_step(cx: Context, model: Any, batch: Batch) -> Step:
    """Forward and backward pass of a batch that starts in the CPU's memory, as in training."""

    def step() -> None:
        model.zero_grad()
        run_batch(model, batch.to(cx.device))[0].backward()

    return step


def work_of(cx: Context, model: Any, batches: list[MicroBatch], kernel: str) -> Work:
    """`kernel`: an attention kernel, or `padded`: the first batch only, as a user of plain transformers lays it out."""
    cost, bare = row_cost(model), bare_model(model)
    if kernel == "padded":
        batches = batches[:1]
    tokens, operations = sum(b.batch.tokens for b in batches), sum(cost.of_batch(b.batch) for b in batches)
    if kernel != "padded":
        use_rim_attention(bare, kernel)
        return Work([train_step(cx, model, b.batch) for b in batches], tokens, operations, operations)
    padded = step_time.PaddedRows(batches[0].rows, batches[0].ids)
    for name, tensor in vars(padded).items():
        setattr(padded, name, tensor.to(cx.device))
    head = bare.get_output_embeddings().weight.numel()
    return Work([step_time.padded_step(model, padded)], tokens, operations, padded.tokens * (cost.token + 6.0 * head))


def profile(cx: Context, step: Step) -> dict[str, Any]:
    """Kernels of one step: how many, how long they run (`busy`, seconds), the longest ones, and waits for the device."""
    if not cx.cuda:
        return {"kernels": 0, "busy": 0.0}
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        cx.sync()
    events = recorded.events()
    on_card = [e for e in events if str(e.device_type).endswith("CUDA")]
    kernels = [e for e in on_card if not e.name.startswith("Mem")]
    top: Counter[str] = Counter()
    for e in kernels:
        top[e.name[:60]] += e.time_range.elapsed_us() / 1e3
    return {
        "kernels": len(kernels),
        "copies": len(on_card) - len(kernels),
        "syncs": sum(e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for e in events),
        "busy": sum(e.time_range.elapsed_us() for e in kernels) / 1e6,
        "top_ms": dict(top.most_common(12)),
    }


def time_work(cx: Context, work: Work) -> dict[str, Any]:
    """Seconds of a step after two to warm up, and a profile of the last one."""
    count, before = len(work.steps), graphs()
    first = cx.seconds_of(work.steps[0])
    work.steps[min(1, count - 1)]()
    seconds = cx.seconds_of(lambda: [step() for step in work.steps]) / count
    memory = cx.peak_gib()
    seen = profile(cx, work.steps[-1])
    return {
        "tokens": work.tokens / count,
        "seconds": seconds,
        "first": first,
        "tokens_per_s": work.tokens / count / seconds,
        "mfu_real": work.operations / count / seconds / PEAK_FLOPS,
        "mfu_total": work.done / count / seconds / PEAK_FLOPS,
        "memory_gib": memory,
        "graphs": graphs() - before,
        "gap": max(0.0, 1 - seen["busy"] / seconds),
        **seen,
    }


def measure(
    cx: Context, entry: dict[str, Any], name: str, model: Any, batches: list[MicroBatch], path: str, note: str = ""
) -> None:
    """Time of a micro-batch's forward and backward pass by one kernel over batches of different rows."""
    cx.fresh()
    with cx.attempt(entry, name, f"c  {name:26s}"):
        found = entry[name] = time_work(cx, work_of(cx, model, batches, path))
        cx.row(
            f"c  {name:26s} {found['tokens']:6.0f} tok {1e3 * found['seconds']:7.1f} ms "
            f"{found['tokens_per_s'] / 1e3:7.1f} ktok/s MFU {100 * found['mfu_real']:4.1f}% "
            f"(all {100 * found['mfu_total']:4.1f}%) {found['memory_gib']:5.1f} GiB "
            f"{found['kernels']:6d} kernels, idle {100 * found['gap']:3.0f}%, first {found['first']:.1f}s{note}"
        )
    model.zero_grad()
    cx.fresh()


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Flex with blocks of 64 x 64: compiled for Hopper, the stock forward for head_dim 64 (128 x 128) spills 441 registers,
    this one none."""
    before = flex.block_size
    flex.block_size = lambda _head_dim: 64
    try:
        yield
    finally:
        flex.block_size = before


@contextlib.contextmanager
def cut_cross_entropy() -> Iterator[None]:
    """The block's losses by cut-cross-entropy; ImportError where it is not installed."""
    sys.modules.pop("cut_cross_entropy", None)
    try:
        importlib.import_module("cut_cross_entropy")
        yield
    finally:
        hide_cce()


def compile_parts(model: Any) -> None:
    """What fusing of norms and of the MLP's product would bring, without touching the attention."""
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=True)


def steps(cx: Context, entry: dict[str, Any]) -> None:
    budgets = (256, 512) if cx.smoke else (8192, 16384, 32768)
    for shape in SHAPES:
        reset_dynamo()
        sets = {budget: micro_batches(cx, shape, "stage2", budget, 2 if cx.smoke else 3) for budget in budgets}
        steps_of(cx, entry, shape, sets)
        cx.fresh()
        if shape == "1B":
            with cx.attempt(entry, "lora", "c  LoRA"):
                adapters(cx, entry, sets[budgets[0]])
            cx.fresh()


def steps_of(cx: Context, entry: dict[str, Any], shape: str, sets: dict[int, list[MicroBatch]]) -> None:
    """All that is measured of one shape; sets of batches by their budget of tokens, smallest first."""
    small, large = list(sets)[:2]
    few, some = f"{small / 1024:g}k", f"{large / 1024:g}k"
    model = llama(cx, shape).train()
    install_readout_loss(model)
    for budget, batches in sets.items():
        measure(cx, entry, f"{shape} flex {budget / 1024:g}k", model, batches, "flex")
    if shape == "8B":
        return
    reset_dynamo()
    with small_blocks():
        measure(cx, entry, f"{shape} flex {some} 64x64", model, sets[large], "flex")
    try:
        with cut_cross_entropy():
            measure(cx, entry, f"{shape} flex {some} CCE", model, sets[large], "flex", " (cut-cross-entropy)")
    except ImportError as error:
        cx.row(f"c  {shape} flex {some} CCE not measured: {error}")
    with no_cudnn_attention():
        measure(cx, entry, f"{shape} split {few}", model, sets[small][:2], "split", " (flash/math)")
        measure(cx, entry, f"{shape} padded {few}", model, sets[small], "padded")
    if shape == "135M" and cx.cuda:  # the order of kernels that users get; new shapes cost plans
        batches = micro_batches(cx, shape, "stage1", 2048, 1)
        measure(cx, entry, f"{shape} split 2k cuDNN on", model, batches, "split", " (first = with cuDNN's plans)")
    compile_parts(model)
    measure(cx, entry, f"{shape} flex {some} fused", model, sets[large], "flex", " (norms, MLP compiled)")


def adapters(cx: Context, entry: dict[str, Any], batches: list[MicroBatch]) -> None:
    """The adapters of the shipped recipes (rank 128, every linear layer, dropout 0.1) by both kernels of a GPU."""
    config = peft.LoraConfig(
        r=128,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": [1, 2, 3]},
        task_type="CAUSAL_LM",
    )
    # peft makes adapters in fp32; DeepSpeed casts them as here.
    wrapped = peft.get_peft_model(llama(cx, "1B").train(), config).to(torch.bfloat16)
    install_readout_loss(wrapped.get_base_model())
    set_dropout(wrapped, Dropouts(lora=0.1))
    measure(cx, entry, "1B LoRA flex", wrapped, batches, "flex", " (recipe as shipped)")
    with no_cudnn_attention():
        measure(cx, entry, "1B LoRA split", wrapped, batches[:2], "split")


# ---- d ------------------------------------------------------------------------------------------------------------


def long_memory(cx: Context, entry: dict[str, Any]) -> None:
    blocks, memory = (4, 16) if cx.smoke else (64, 1024)
    for shape in ("135M", "1B"):
        reset_dynamo()
        cx.fresh()
        found = entry[shape] = long_row(cx, shape, blocks, memory)
        cx.row(
            f"d  {shape}: {found['tokens']} tokens, K={blocks} M={memory}: {found['seconds']:.2f} s "
            f"(first {found['first']:.1f}, block mask {1e3 * found['mask_seconds']:.0f} ms), "
            f"{found['memory_gib']:.1f} GiB, MFU {100 * found['mfu_real']:.1f}%"
        )
        cx.save()
    cx.fresh()


def long_row(cx: Context, shape: str, blocks: int, memory: int) -> dict[str, Any]:
    """Forward and backward pass of one sample with very large memory blocks, layers recomputed."""
    model = llama(cx, shape).train()
    recompute_layers(model, offload=False)
    install_readout_loss(model)
    use_rim_attention(model, "flex")
    vocabulary = shape_of(cx, shape)["vocab_size"]
    pick = random.Random(0)
    question = [pick.randrange(vocabulary - 3) for _ in range(90)]
    readouts = tuple(Readout(k, [pick.randrange(vocabulary - 3) for _ in range(6)], 1 / blocks) for k in range(1, blocks + 1))
    batch = pack([Row(question, blocks, memory + 2, readouts)], block_ids(vocabulary, memory))
    step = train_step(cx, model, batch)
    first = cx.seconds_of(step)
    layout = batch.to(cx.device).layout
    mask_seconds = cx.seconds_of(lambda: flex.block_mask(layout))
    seconds = cx.seconds_of(step)
    return {
        "tokens": batch.tokens,
        "first": first,
        "seconds": seconds,
        "mask_seconds": mask_seconds,
        "memory_gib": cx.peak_gib(),
        "sparsity": flex.block_mask(layout).sparsity(),
        "mfu_real": row_cost(model).of_batch(batch) / seconds / PEAK_FLOPS,
        "profile": profile(cx, step),
    }


# ---- e ------------------------------------------------------------------------------------------------------------


def first_token(cx: Context, entry: dict[str, Any]) -> None:
    for shape in ("135M", "1B"):
        cx.fresh()
        found = entry[shape] = {}
        answer_times(cx, entry, shape, found)
        cx.row(f"e  {shape}: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in found.items()))
        cx.save()


def answers(model: Any, end: int, question: list[int], rim: list[int], plain: list[int]) -> dict[str, Step]:
    """What is timed: one new token after a question and its blocks, after as long a plain prompt, after a chain of thought."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[end] = 0  # never the largest: no answer ends early
    words: Any = Tokenizer(end)

    def ask(prompt: list[int], tokens: int) -> Step:
        def run() -> None:
            (answer,) = generate_ids(model, words, [prompt], Decoding(tokens, 1))
            assert len(answer) == tokens, f"{len(answer)} of {tokens} tokens"

        return run

    return {"plain": ask(plain, 1), "rim": ask(rim, 1), "cot 37 + 1": ask(question, 38), "rim, 5 tokens": ask(rim, 5)}


def answer_times(cx: Context, entry: dict[str, Any], shape: str, found: dict[str, float]) -> None:
    """Medians of generating in turns, then the forward pass alone, and the time to read the weights once."""
    rounds = 2 if cx.smoke else 10
    model = llama(cx, shape).eval()
    use_plain_attention(model)
    vocabulary = shape_of(cx, shape)["vocab_size"]
    pick = random.Random(0)
    question = [pick.randrange(vocabulary - 4) for _ in range(80)]
    rim = question + block_ids(vocabulary - 1, MEMORY) * BLOCKS
    plain = [pick.randrange(vocabulary - 4) for _ in rim]
    runs = answers(model, vocabulary - 1, question, rim, plain)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-2, rounds):
        for name, run in runs.items():
            seconds = cx.seconds_of(run)
            if number >= 0:
                times[name].append(seconds)
    found |= {name: statistics.median(seconds) for name, seconds in times.items()}
    ids = torch.tensor([rim], device=cx.device)
    with torch.no_grad():
        found["forward alone"] = cx.mean_seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), rounds)
        if cx.cuda:
            with cx.attempt(entry, f"{shape} CUDA graph", f"e  {shape} CUDA graph"):
                found["forward, CUDA graph"] = replay_seconds(cx, model, ids)
    found["floor (weights once at 3.0 TB/s)"] = sum(p.nbytes for p in model.parameters()) / 3.0e12


def replay_seconds(cx: Context, model: Any, ids: torch.Tensor) -> float:
    """Seconds of the same forward pass replayed as one CUDA graph: what is left without the host's launches."""
    position = torch.arange(ids.shape[1], device=cx.device)[None]

    def run() -> None:
        model(input_ids=ids, position_ids=position, use_cache=False, logits_to_keep=1)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return cx.mean_seconds(graph.replay, 20)
