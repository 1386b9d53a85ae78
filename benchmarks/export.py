"""Memory and speed of `rim-dist export`, beside DeepSpeed's zero_to_fp32 and `cp` of the same bytes, in one run.

    python benchmarks/export.py [--quick] [--folder DIR] [--repeats N]

Makes ZeRO-3 checkpoints of random Llamas (two data ranks, fp32 weights and both moments) and exports each with files of at
most 200 MB. Every measurement is a process of its own. Peak memory is what the process needs above its state after imports
(VmHWM, mapped files counted); seconds leave imports, and what transformers compiles at first use, out and end in fsync.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, publish

from rim_dist.table import Table

SHARD_BYTES = 200 * 10**6
RANKS = 2
SIZES: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192},
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def make_checkpoint(run: Path, size: str) -> Path:
    """A run folder with one ZeRO-3 checkpoint of random values, its shards laid out as DeepSpeed lays them out."""
    from collections import OrderedDict

    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from transformers import AutoConfig, AutoModelForCausalLM

    from rim_dist.checkpoint import store
    from rim_dist.checkpoint.snapshot import write_files
    from rim_dist.data.synthetic import synthetic_tokenizer
    from rim_dist.files import FileRecord
    from rim_dist.model.generation import generation_config
    from rim_dist.recipe import dump_recipe, validate_recipe
    from rim_dist.tokens import add_memory_tokens, set_chat_template

    config = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 2048, **SIZES[size]}
    recipe = validate_recipe(
        {
            "run": {"name": run.name, "output_dir": str(run.parent)},
            "model": {"config": config, "tokenizer": "synthetic"},
            "curriculum": {"stage2": {"samples": 128}},
        },
        size,
    )
    fields = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    shapes = OrderedDict((name, p.shape) for name, p in model.named_parameters())
    share = sum(-(-math.prod(shape) // RANKS) for shape in shapes.values())
    partial = store.start_writing(run / "checkpoints", 1)
    records: dict[str, FileRecord] = {}
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        flats = [torch.empty(share).uniform_(-0.05, 0.05, generator=generator) for _ in range(3)]
        optimizer = {
            "zero_stage": ZeroStageEnum(3),
            "partition_count": RANKS,
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(1.0), "exp_avg": flats[1], "exp_avg_sq": flats[2]}},
                "param_groups": [],
            },
            "fp32_flat_groups": [flats[0]],
        }
        module = {
            "module": OrderedDict(),
            "buffer_names": [],
            "param_shapes": [shapes],
            "frozen_param_shapes": OrderedDict(),
            "frozen_param_fragments": OrderedDict(),
            "shared_params": {"lm_head.weight": "model.embed_tokens.weight"},
            "ds_version": "0.19.8",
        }
        records |= write_files(
            partial,
            {
                f"engine/zero_pp_rank_{rank}_mp_rank_00_model_states.pt": module,
                f"engine/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": {
                    "optimizer_state_dict": optimizer,
                    "ds_version": "0",
                },
            },
        )
    tokenizer = synthetic_tokenizer()
    add_memory_tokens(tokenizer, recipe.memory)
    set_chat_template(tokenizer, recipe.memory, recipe.memory.blocks)
    model.config.save_pretrained(partial / store.MODEL)
    generation_config(tokenizer).save_pretrained(partial / store.MODEL)
    tokenizer.save_pretrained(partial / store.MODEL)
    state = store.TrainingState("stage2", 1, 1, 128, 0.0, RANKS)
    return store.announce(partial, state, dump_recipe(recipe), records)


# ---- in a process of its own ---------------------------------------------------------------------------------


def _memory_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def measure(what: str, checkpoint: Path, out: Path, processes: int) -> dict[str, float]:
    """Run one conversion here. Imports first, so that neither time nor memory counts them."""
    if what == "export":
        from transformers import LlamaForCausalLM, LlamaTokenizer  # noqa: F401 - loaded, not used
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        from rim_dist.checkpoint import adapters, index  # noqa: F401
        from rim_dist.checkpoint.hf_export import ExportOptions, export_checkpoint
        from rim_dist.checkpoint.workers import Workers
        from rim_dist.training import engine  # noqa: F401

        get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns at its first call, about a second
        workers = Workers(processes)
        if processes > 1:
            workers.start()

        def convert() -> None:
            export_checkpoint(checkpoint, out, ExportOptions("fp32", SHARD_BYTES), workers)

    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        def convert() -> None:
            # Not as safetensors: with a tied head zero_to_fp32 0.19.8 then ends in "Some tensors share memory".
            convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(out), max_shard_size="200MB", tag="engine")
            _sync_files(out)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory_bytes("VmRSS")
    started = time.perf_counter()
    convert()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": _memory_bytes("VmHWM") - before}


def _child(what: str, checkpoint: Path, out: Path, processes: int = 1) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--measure", what, str(checkpoint), str(out), str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _copy(source: Path, out: Path) -> float:
    """Seconds of `cp` and fsync of the exported weights."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = [str(p) for p in sorted(source.glob("*.safetensors"))]
    started = time.perf_counter()
    subprocess.run(["cp", *files, str(out)], check=True)
    _sync_files(out)
    return time.perf_counter() - started


def run_size(size: str, folder: Path, repeats: int) -> dict[str, Any]:
    run = folder / size
    shutil.rmtree(run, ignore_errors=True)
    print(f"{size}: making a checkpoint", flush=True)
    made = subprocess.run([sys.executable, __file__, "--make", str(run), size], stdout=subprocess.PIPE, text=True, check=True)
    checkpoint = Path(made.stdout.splitlines()[-1])
    out = folder / "out"
    seconds: dict[str, list[float]] = {"export": [], "export, 4 processes": [], "zero_to_fp32": [], "cp": []}
    peaks: dict[str, int] = {}
    for _ in range(repeats):
        for what, processes in (("export", 1), ("export", 4), ("zero_to_fp32", 1)):
            name = what if processes == 1 else f"{what}, {processes} processes"
            result = _child(what, checkpoint, out, processes)
            seconds[name].append(result["seconds"])
            peaks[name] = max(peaks.get(name, 0), int(result["peak_bytes"]))
            if name == "export":
                seconds["cp"].append(_copy(out, folder / "copy"))
                data = sum(p.stat().st_size for p in out.glob("*.safetensors"))
                largest = max(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)
    shutil.rmtree(folder / "copy")
    shutil.rmtree(run)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    limit = 1.5 * max(SHARD_BYTES, largest) + 100e6
    row = {
        "model": size,
        "bytes": data,
        "largest_file_bytes": largest,
        "seconds": seconds,
        "median_seconds": median,
        "speed_of_cp": {name: median["cp"] / value for name, value in median.items()},
        "peak_bytes_above_imports": peaks,
        "memory_limit_bytes": limit,
        "within_limit": peaks["export"] <= limit,
    }
    print(json.dumps({k: v for k, v in row.items() if k != "seconds"}, indent=1), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model, once, nothing written")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="models (135M 1B)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each kind; the median counts (3)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-export", help="where the files go; emptied")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        print(make_checkpoint(Path(arguments.make[0]), arguments.make[1]))
        return 0
    if arguments.measure:
        what, checkpoint, out, processes = arguments.measure
        print(json.dumps(measure(what, Path(checkpoint), Path(out), int(processes))))
        return 0
    sizes = arguments.sizes or (["10M"] if arguments.quick else ["135M", "1B"])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [run_size(size, arguments.folder, 1 if arguments.quick else arguments.repeats) for size in sizes]
    lines = []
    for row in rows:
        for name, seconds in row["median_seconds"].items():
            peak = row["peak_bytes_above_imports"].get(name)
            memory = "-" if peak is None else f"{peak / 1e6:.0f}"
            lines.append([row["model"], name, f"{seconds:.2f}", f"{row['speed_of_cp'][name]:.2f}", memory])
    repeats = 1 if arguments.quick else arguments.repeats
    text = f"ZeRO-3 checkpoints of 2 ranks, fp32, files of at most {SHARD_BYTES / 1e6:.0f} MB, medians of {repeats}.\n\n"
    text += Table(["model", "", "s", "of cp's speed", "peak above imports, MB"], lines).markdown()
    limits = ", ".join(f"{row['model']} {row['memory_limit_bytes'] / 1e6:.0f} MB" for row in rows)
    text += f"\n1.5 x the largest file + 100 MB: {limits}.\n"
    publish("export", "Export of a checkpoint", text, rows, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
