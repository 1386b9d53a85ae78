"""Memory of a rank: activations of large memory blocks under sequence ranks, shards under ZeRO-3, and building a model.

    python benchmarks/parallel_memory.py [--quick]

- activations: one sample with K x M = 16,384 memory tokens, forward and backward, its row whole (SP1) or shared by 2 and 4
  ranks: peak above model and gradients in place;
- shards: a Llama of SmolLM2-135M's size (8 heads, 4 for keys) under ZeRO-3 on 1, 2 and 4 ranks: bytes of all tensors that
  are alive between steps;
- building and training: the same model from an HF folder: peak of every rank above its imports, while it is built, and until
  the third step is done, against live shards + 3 x the largest module + the configured buckets. Of gathered parameters
  about four layers may be alive (`stage3_max_live_parameters`, a bucket like the others); as shipped, ZeRO-3 keeps a model of
  this size gathered from the forward to the backward pass.

A peak is the kernel's own high-water mark of a fresh process's resident memory, so that nothing between two looks is missed;
the "peak of tensors" of a second round is the count of torch's own allocator, without gloo's buffers.
Memory of 64 KiB and more is taken from the system and given back at once (MALLOC_MMAP_THRESHOLD_): the peak is that of
living tensors, not of what malloc keeps for later.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, block_ids, llama, publish
from planner import Allocator

from rim_dist.attention.registration import use_rim_attention
from rim_dist.config import Dropouts, Recipe
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.parallel.zero import shipped_config
from rim_dist.recipe import validate_recipe
from rim_dist.table import Table

# Layers of Llama-3.2-1B at a quarter of their width.
LAYERS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 15,
}
MODEL_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "vocab_size": 49_152,
}
# Entries of gathered parameters that may be alive: about four layers.
GATHERED = {"stage3_max_live_parameters": 14_000_000, "stage3_max_reuse_distance": 0}
MODEL_QUICK = {**MODEL_135M, "num_hidden_layers": 4, "vocab_size": 8192}
MODEL_TINY = {
    **MODEL_135M,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "vocab_size": 200,
}
SHARES = {"SP1": (1, "ulysses"), **{f"SP{n} {mode}": (n, mode) for n in (2, 4) for mode in ("ulysses", "allgather_kv")}}
FLOORS = {1: 1.0, 2: 0.6, 4: 0.35}
SHARD_FLOORS = {1: 1.0, 2: 0.55, 4: 0.3}


# ---- what a rank does ------------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The high-water mark of this process's resident memory above what it holds when this is made."""

    def __init__(self) -> None:
        gc.collect()
        self.start = resident()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark is set back to what is held now

    def __call__(self) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        mark = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(mark.split()[1]) * 1024 - self.start


def one_sample(blocks: int, memory: int, vocabulary: int, question: int = 80) -> Batch:
    ids = block_ids(vocabulary, memory)
    readouts = tuple(Readout(k, [1, 2, 3, 4, 5], 1.0) for k in range(1, blocks + 1))
    return pack([Row(list(range(question)), blocks, len(ids), readouts)], ids)


def activations(mode: str, blocks: int, memory: int) -> dict[str, float]:
    """Peak bytes of forward and backward above model and gradients, on the rank that has the most."""
    from rim_dist.parallel.launch import join, leave
    from rim_dist.parallel.mesh import Degrees, make_mesh
    from rim_dist.parallel.sequence import shard_row

    process = join(600)
    mesh = make_mesh(Degrees(sequence=process.ranks), process.rank, "cpu")
    model = llama(1000, **LAYERS, tie_word_embeddings=False).train()
    install_readout_loss(model)
    use_rim_attention(model, "split")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(batch: Batch) -> None:
        run_batch(model, shard_row(batch, mesh, mode))[0].backward()  # type: ignore[arg-type]

    step(one_sample(2, 30, 1000))  # what a process gets once: connections, threads, kernels
    batch = one_sample(blocks, memory, 1000)
    dist.barrier()
    peak = Peak()
    step(batch)
    most = torch.tensor(float(peak()), dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    leave()
    return {"peak_bytes": most.item()}


def live_bytes() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout is torch.strided:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def sharded_recipe(folder: Path, model: str, tensor: int, **parallel: Any) -> Recipe:
    recipe = {
        "run": {"name": "memory", "output_dir": str(folder / "runs")},
        "model": {"init_from": str(folder / model)},
        "memory": {"blocks": 1, "tokens_per_block": 1},
        "data": {"synthetic": {"samples": 8}},
        "curriculum": {"stage2": {"samples": 8}},
        "parallel": {"zero_stage": 3, "tensor": tensor, **parallel},
    }
    return validate_recipe(recipe, "memory")


def write_config(folder: Path, tensor: int) -> Path:
    """The shipped DeepSpeed configuration with few gathered parameters."""
    tree = json.loads(
        (ROOT / "ds_configs" / shipped_config(sharded_recipe(folder, "model", tensor))).read_text(encoding="utf-8")
    )
    tree["zero_optimization"] |= GATHERED
    path = folder / f"tensor{tensor}.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def sharded(tensor: int, folder: Path, config: str) -> dict[str, float]:
    """A model from an HF folder under ZeRO-3: bytes of its shards, and peaks above the imports; the largest of any rank."""
    from rim_dist.parallel.launch import join, leave

    process = join(600)
    tiny, recipe = (sharded_recipe(folder, name, tensor, deepspeed_config=config) for name in ("tiny", "model"))
    run_sharded(tiny, process)  # what is imported, connected and compiled at first use
    found = run_sharded(recipe, process)
    gc.collect()
    with Allocator() as allocator:
        start = time.time_ns()
        run_sharded(recipe, process)
    found["counted_bytes"] = allocator.peak(start, time.time_ns())
    most = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    leave()
    return dict(zip(found, most.tolist(), strict=True))


def run_sharded(recipe: Recipe, process: Any) -> dict[str, float]:
    from rim_dist.checkpoint.start import model_of, requirements_of
    from rim_dist.parallel.degrees import fit_degrees
    from rim_dist.parallel.mesh import make_mesh
    from rim_dist.parallel.tensor import full_shape
    from rim_dist.parallel.zero import compose, partitioner
    from rim_dist.training.engine import Engine

    requirements = requirements_of(recipe)
    mesh = make_mesh(fit_degrees(recipe, process.ranks), process.rank, "cpu")
    ds_config = compose(recipe, requirements.hidden_size)
    none = live_bytes()
    dist.barrier()
    peak = Peak()
    model = model_of(recipe, requirements, None, mesh, partitioner(ds_config, mesh, torch.float32))
    built_peak, built = peak(), live_bytes() - none
    engine = Engine(recipe, model, ds_config, process, mesh, requirements.sequence_mode)
    engine.begin_stage(Dropouts())
    ids = requirements.tokens.block
    row = Row([0], 1, len(ids), (Readout(1, [1], 1.0),))  # the shortest there is: the limit has no room for activations
    for _ in range(3):  # ZeRO-3 prefetches from the second one on
        engine.forward_backward(engine.sequence_slice(pack([row], ids)), 1.0, True)
        engine.step(1e-4)
    whole = {id(p): 4 * math.prod(full_shape(p)) // (tensor_ranks(p, mesh)) for p in model.parameters()}
    modules = [sum(whole[id(p)] for p in module.parameters(recurse=False)) for module in model.modules()]
    zero = ds_config["zero_optimization"]
    return {
        "built_bytes": built,
        "built_peak_bytes": built_peak,
        "shard_bytes": live_bytes() - none,
        "peak_bytes": peak(),
        "largest_module_bytes": max(modules),
        "bucket_bytes": 4 * (zero["reduce_bucket_size"] + zero["stage3_prefetch_bucket_size"]),
        "gathered_bytes": 4 * zero["stage3_max_live_parameters"],
    }


def tensor_ranks(parameter: torch.Tensor, mesh: Any) -> int:
    from rim_dist.parallel.tensor import slice_of

    return 1 if slice_of(parameter) is None else mesh.degrees.tensor


# ---- what is measured ------------------------------------------------------------------------------------------


def on_ranks(ranks: int, *job: object) -> Any:
    """What the first of so many fresh ranks prints last."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--standalone", "--nproc_per_node", str(ranks), __file__, "--rank", *map(str, job)]
    extra = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **extra, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def save_model(folder: Path, fields: dict[str, Any]) -> None:
    """An HF folder of random weights with a tokenizer as large as its vocabulary, so that memory rows are added to it."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(fields["vocab_size"] - 1)} | {"</s>": fields["vocab_size"] - 1}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="</s>", unk_token="w0"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K x M = 4,096, a 4-layer model with 8k tokens, nothing written")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        kind, *rest = options.rank
        if kind == "activations":
            found = activations(rest[0], int(rest[1]), int(rest[2]))
        else:
            found = sharded(int(rest[0]), Path(rest[1]), rest[2])
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    blocks, memory = (16, 256) if options.quick else (16, 1024)
    figures: dict[str, Any] = {"activations": {}, "shards": {}}
    lines = []
    for name, (ranks, mode) in SHARES.items():
        found = figures["activations"][name] = on_ranks(ranks, "activations", mode, blocks, memory)
        found["ratio"] = found["peak_bytes"] / figures["activations"]["SP1"]["peak_bytes"]
        lines.append([name, mib(found["peak_bytes"]), f"{found['ratio']:.3f}", FLOORS[ranks]])
        print(lines[-1], flush=True)
    heads = f"{LAYERS['num_attention_heads']} heads, {LAYERS['num_key_value_heads']} for keys"
    text = (
        f"One sample, K = {blocks}, M = {memory:,}, question of 80 tokens, {LAYERS['num_hidden_layers']} layers "
        f"{LAYERS['hidden_size']} wide ({heads}), fp32, split path; of the rank with the most.\n\n"
    )
    text += Table(["row shared by", "peak activations, MiB", "of SP1", "at most"], lines).markdown()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model", MODEL_QUICK if options.quick else MODEL_135M)
        save_model(folder / "tiny", MODEL_TINY)
        lines, more = [], []
        for ranks, tensor in ((1, 1), (2, 1), (4, 1), (4, 2)):
            found = on_ranks(ranks, "sharded", tensor, folder, write_config(folder, tensor))
            name = f"TP{tensor} x ZeRO-3 on {ranks // tensor}" if tensor > 1 else f"ZeRO-3 on {ranks}"
            figures["shards"][name] = found
            found["ratio"] = found["shard_bytes"] / figures["shards"]["ZeRO-3 on 1"]["shard_bytes"]
            lines.append([name, mib(found["shard_bytes"]), f"{found['ratio']:.3f}", SHARD_FLOORS[ranks]])
            modules = 3 * found["largest_module_bytes"] + found["bucket_bytes"]
            found["built_limit_bytes"] = found["built_bytes"] + modules
            found["limit_bytes"] = found["shard_bytes"] + modules + found["gathered_bytes"]
            parts = ("built", "built_peak", "built_limit", "shard", "counted", "peak", "limit")
            shown = [mib(found[f"{part}_bytes"]) for part in parts]
            if ranks > 1:
                more.append([name, *shown])
            print(lines[-1], shown, flush=True)
    text += "\nBytes of all tensors alive between steps, MiB, of the rank with the most:\n\n"
    text += Table(["", "MiB", "of one rank", "at most"], lines).markdown()
    text += "\nPeak above the imports, MiB. The limit is what is alive + 3 x the largest module + the configured buckets.\n\n"
    text += Table(
        ["", "built: alive", "peak", "limit", "after three steps: alive", "peak of tensors", "peak", "limit"], more
    ).markdown()
    publish("parallel-memory", "Memory of a rank", text, figures, options.quick)


if __name__ == "__main__":
    main()
