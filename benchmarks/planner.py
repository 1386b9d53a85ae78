"""The planner's memory against what a run really needs, on CPU ranks, for models, memory blocks and degrees of many kinds.

    python benchmarks/planner.py [--quick] [--only NAME]

Each configuration is a fresh group of processes that builds the model and the engine as the trainer does and runs two optimizer
steps; the second is measured, on the rank that needs most. "Between steps": bytes of all live tensors' storages before it.
"Peak": the most that torch's CPU allocator had given out during it, counted by the allocator itself in all threads, which is
what `torch.cuda.max_memory_allocated` is on a GPU. The resident set above the imports is there to compare with: it also holds
what libraries, the interpreter and gloo take.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, SMOLLM2_135M, VOCABULARIES, publish

from rim_dist.config import Dropouts, Recipe
from rim_dist.parallel.degrees import choose_mode
from rim_dist.planning.memory import Buckets, MemoryEstimate, Setup, estimate
from rim_dist.planning.shape import read_shape
from rim_dist.planning.workload import Workload
from rim_dist.recipe import validate_recipe
from rim_dist.table import Table

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
NARROW = {**TINY, "hidden_size": 128, "intermediate_size": 320, "vocab_size": 1000}
SMOLLM2 = {"model_type": "llama", "vocab_size": VOCABULARIES["49k"], **SMOLLM2_135M}
GPT2 = {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 4096, "vocab_size": 20000}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 320,
    "intermediate_size": 960,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 12000,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Case:
    """One measured configuration."""

    name: str
    model: dict[str, Any]
    load: Workload
    zero_stage: int = 3
    tensor: int = 1
    sequence: int = 1
    data: int = 1
    dtype: str = "fp32"
    sequence_mode: str = "auto"
    checkpointing: bool = False
    activation_offload: bool = False
    offload: bool = False
    lora_rank: int = 0
    attention: str = "split"

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data


def recipe_of(case: Case) -> Recipe:
    model: dict[str, Any] = {
        "init_from": "x",
        "dtype": case.dtype,
        "attention": case.attention,
        "activation_checkpointing": case.checkpointing,
        "activation_offload": case.activation_offload,
    }
    if case.lora_rank:
        model["lora"] = {"rank": case.lora_rank, "alpha": 2 * case.lora_rank}
    return validate_recipe(
        {
            "method": "rim",
            "model": model,
            "memory": {"blocks": case.load.blocks, "tokens_per_block": case.load.memory},
            "curriculum": {"stage1": {"samples": 1}, "stage2": {"samples": 1}},
            "parallel": {
                "zero_stage": case.zero_stage,
                "offload": case.offload,
                "tensor": case.tensor,
                "sequence": case.sequence,
                "sequence_mode": case.sequence_mode,
            },
        },
        case.name,
    )


def ds_config_of(case: Case) -> dict[str, Any]:
    from rim_dist.parallel.zero import compose

    return compose(recipe_of(case), read_shape(case.model, case.name).hidden)


def setup_of(case: Case) -> Setup:
    recipe, shape = recipe_of(case), read_shape(case.model, case.name)
    heads, kv_heads = shape.heads // case.tensor, shape.kv_heads // case.tensor
    return Setup(
        buckets=Buckets.of(ds_config_of(case)),
        tensor=case.tensor,
        sequence=case.sequence,
        data=case.data,
        zero_stage=case.zero_stage,
        offload=case.offload,
        sequence_mode=choose_mode(case.sequence_mode, case.sequence, heads, kv_heads),
        dtype=recipe.model.dtype,
        lora=recipe.model.lora,
        activation_checkpointing=case.checkpointing,
        activation_offload=case.activation_offload,
        attention=case.attention,
        device="cpu",
    )


def predicted(case: Case) -> MemoryEstimate:
    """What the planner says of the configuration."""
    return estimate(read_shape(case.model, case.name), setup_of(case), case.load)


# ---- one rank ----------------------------------------------------------------------------------------------


class Allocator:
    """The CPU allocator's count over time. A profile reports allocations of its own thread; the running total in each report
    is made to count those of all threads, such as gloo's."""

    def __enter__(self) -> Allocator:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)

    def peak(self, start: int, stop: int) -> int:
        """Largest count between two times (nanoseconds)."""
        from torch._C._profiler import _EventType

        most, last, waiting = 0, (0, 0), list(self._profile.profiler.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting.extend(event.children)
            if event.tag == _EventType.Allocation:
                at, total = event.start_time_ns, event.extra_fields.total_allocated
                if start <= at <= stop:
                    most = max(most, total)
                elif at < start:
                    last = max(last, (at, total))
        return max(most, last[1])


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def process_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure_here(case: Case, process: Any) -> dict[str, int]:
    """Measure on this rank of a group that has joined."""
    from transformers import AutoConfig

    from rim_dist.attention.choice import KernelChoice
    from rim_dist.checkpoint.start import model_of
    from rim_dist.data.rows import pack
    from rim_dist.data.samples import Readout, Row
    from rim_dist.model.build import DTYPES
    from rim_dist.model.requirements import Requirements
    from rim_dist.parallel.degrees import fit_degrees
    from rim_dist.parallel.mesh import make_mesh
    from rim_dist.parallel.zero import partitioner
    from rim_dist.tokens import MemoryTokens
    from rim_dist.training.engine import Engine

    recipe, load = recipe_of(case), case.load
    before = process_status("RssAnon")
    with Allocator() as allocator:
        fields = dict(case.model)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields, **NO_TOKENS)
        size = config.get_text_config().vocab_size
        tokens = MemoryTokens(size - 3, size - 2, size - 1, load.memory, ())
        mode = setup_of(case).sequence_mode
        kernel = {"stage1": KernelChoice(case.attention, "")}
        requirements = Requirements(None, tokens, config, None, None, kernel, mode)  # type: ignore[arg-type]
        mesh = make_mesh(fit_degrees(recipe, process.ranks), process.rank, "cpu")
        ds_config = ds_config_of(case)
        model = model_of(recipe, requirements, None, mesh, partitioner(ds_config, mesh, DTYPES[recipe.model.dtype]))
        engine = Engine(recipe, model, ds_config, process, mesh, mode)
        engine.begin_stage(Dropouts())

        def row() -> Row:
            question = [3 + i % 100 for i in range(load.question)]
            readouts = tuple(Readout(k, [1] * load.target, 1.0) for k in range(1, load.blocks + 1))
            return Row(question, load.blocks, load.block, readouts)

        def step() -> None:
            for number in range(load.rounds):
                batch = pack([row() for _ in range(load.samples)], tokens.block)
                assert (batch.tokens, len(batch.targets.label)) == (load.tokens, load.targets)
                engine.forward_backward(engine.sequence_slice(batch), 1.0, last=number == load.rounds - 1)
                del batch
            engine.step(1e-3)

        step()
        between = live_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        start = time.time_ns()
        step()
        stop = time.time_ns()
        resident = process_status("VmHWM") - process_status("RssFile") - before
    found = {"between": between, "peak": allocator.peak(start, stop), "resident": resident}
    most = torch.tensor(list(found.values()), dtype=torch.float64)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return {name: int(value) for name, value in zip(found, most.tolist(), strict=True)}


def rank_main(case: Case) -> dict[str, int]:
    from rim_dist.parallel.launch import join, leave

    process = join(600)
    result = measure_here(case, process)
    leave()
    return result


# ---- all of them -------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, int]:
    """Run the configuration in fresh processes; the largest figures of its ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        # Freed blocks go back to the system at once, so that the resident set is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
    }
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--nproc_per_node", str(case.ranks), "--master_port", str(port), __file__]
    encoded = json.dumps(asdict(case))
    done = subprocess.run([*command, "--one", encoded], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr[-3000:]}")
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("{"))
    return json.loads(line)


def cases() -> list[Case]:
    """Models, memory blocks and degrees of many kinds. Each has several micro-batches a step but where it says not."""
    rows = Workload(question=60, blocks=8, memory=16, target=6, samples=4, rounds=2, alike=True)
    small = Workload(question=60, blocks=8, memory=2, target=6, samples=4, rounds=2, alike=True)
    wide = Workload(question=80, blocks=8, memory=64, target=6, samples=1, rounds=2, alike=True)
    long = Workload(question=80, blocks=16, memory=256, target=5, samples=1, rounds=2, alike=True)
    longest = Workload(question=80, blocks=32, memory=512, target=5, samples=1, rounds=2, alike=True)
    return [
        Case("SmolLM2-135M", SMOLLM2, small, zero_stage=0),
        Case("SmolLM2-135M", SMOLLM2, small, zero_stage=2, data=2, dtype="bf16"),
        Case("SmolLM2-135M", SMOLLM2, wide, zero_stage=3, data=2),
        Case("SmolLM2-135M", SMOLLM2, replace(wide, rounds=1), zero_stage=3, data=2, lora_rank=16),
        Case("SmolLM2-135M", SMOLLM2, wide, zero_stage=3, sequence=2, checkpointing=True),
        Case("llama, 256 wide", TINY, rows, zero_stage=1, tensor=2),
        Case("llama, 256 wide", TINY, rows, zero_stage=2, tensor=2, data=2, dtype="bf16"),
        Case("llama, 256 wide", TINY, rows, zero_stage=3, tensor=2, sequence=2),
        Case("llama, 256 wide", TINY, rows, zero_stage=3, data=2, offload=True),
        Case("llama, 128 wide", NARROW, long, zero_stage=3, sequence=4),
        Case("llama, 128 wide", NARROW, long, zero_stage=1, sequence=2, sequence_mode="allgather_kv"),
        Case("llama, 128 wide", NARROW, longest, zero_stage=3, sequence=2, checkpointing=True),
        Case("gpt2, 384 wide", GPT2, rows, zero_stage=1, data=2),
        Case("qwen3, 320 wide", QWEN3, rows, zero_stage=3, data=2, dtype="bf16", checkpointing=True),
        Case("qwen3, 320 wide", QWEN3, replace(rows, samples=6), zero_stage=3, tensor=2, lora_rank=8, dtype="bf16"),
        Case("qwen3, 320 wide", QWEN3, rows, zero_stage=1, sequence=2),
    ]


def decode(text: str) -> Case:
    fields = json.loads(text)
    return replace(Case(**fields), load=Workload(**fields["load"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small models only, nothing written")
    parser.add_argument("--only", help="substring of the cases to run, nothing written")
    parser.add_argument("--measured", type=Path, help="a result's JSON: the formulas of now against its measurements")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        result = rank_main(decode(options.one))
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)
        os._exit(0)
    lines, figures, earlier = [], [], {}
    if options.measured:
        page = json.loads(options.measured.read_text(encoding="utf-8"))
        earlier = {json.dumps(f["case"]): f["measured"] for f in page["figures"]}
    for case in cases():
        if (options.only and options.only not in case.name) or (options.quick and case.model is SMOLLM2):
            continue
        found, said = earlier.get(json.dumps(asdict(case))) or measure(case), predicted(case)
        # On a CPU what offload keeps in CPU memory is in the same place.
        between, peak = said.states_bytes + said.host, said.peak_bytes + said.host
        ratios = (between / found["between"], peak / found["peak"])
        lines.append([*describe(case), *(f"{found[name] / 2**20:.0f}" for name in ("between", "peak", "resident"))])
        lines[-1][-1:-1] = [f"{ratio:.3f}" for ratio in ratios] + [said.moment]
        figures.append({"case": asdict(case), "measured": found, "predicted": {"between": between, "peak": peak}})
        print(lines[-1], flush=True)
    worst = max(abs(f["predicted"][name] / f["measured"][name] - 1) for f in figures for name in ("between", "peak"))
    head = ["model", "ranks", "how", "rows a micro-batch", "K x M", "between, MiB", "peak, MiB"]
    head += ["between, said / measured", "peak, said / measured", "fullest at", "resident, MiB"]
    text = f"{len(figures)} configurations; the prediction furthest off: {worst:.1%}."
    text += f" Measured at commit {page['commit']}.\n\n" if options.measured else "\n\n"
    text += Table(head, lines).markdown()
    publish("planner", "The planner against measurements", text, figures, options.quick or bool(options.only))


def describe(case: Case) -> list[Any]:
    setup, load = setup_of(case), case.load
    how = [case.dtype, f"ZeRO-{case.zero_stage}"]
    how += ["offload"] * case.offload + [f"LoRA {case.lora_rank}"] * bool(case.lora_rank)
    how += ["recompute"] * case.checkpointing + [setup.sequence_mode] * (case.sequence > 1)
    how += ["one micro-batch"] * (load.rounds == 1)
    ranks = f"T{case.tensor} S{case.sequence} D{case.data}"
    return [case.name, ranks, ", ".join(how), f"{load.samples:g} x {load.row}", f"{load.blocks} x {load.memory}"]


if __name__ == "__main__":
    main()
