"""The verbs of `rim-dist convert`: arguments and calls. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rim_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from rim_dist.messages import say
from rim_dist.parallel.mesh import Degrees

if TYPE_CHECKING:
    from rim_dist.checkpoint.workers import Workers

Command = Callable[..., argparse.ArgumentParser]
_CHECKPOINT = "a checkpoint folder, or a run's folder (its newest checkpoint)"


def add_export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help=_CHECKPOINT)
    sub.add_argument("out_dir", help="folder to write; must not hold anything else")
    sub.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: the recipe's model.dtype)")
    _shard_size(sub)
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--stage", type=int, choices=[1, 2], help="the last checkpoint of this stage")
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this optimizer step")
    which.add_argument("--best", action="store_true", help="the best checkpoint by the recipe's checkpoint.metric")
    sub.add_argument(
        "--pad-vocabulary",
        type=int,
        default=1,
        metavar="N",
        help="rows of embedding and head as a multiple of N, for servers that split them (1: no padding)",
    )
    lora = sub.add_mutually_exclusive_group()
    lora.add_argument(
        "--no-merge-lora", action="store_true", help="base with the trained memory rows, and the adapter beside it in adapter/"
    )
    lora.add_argument("--adapter-only", action="store_true", help="an unmerged PEFT adapter and the tokenizer, no base")
    sub.add_argument(
        "--verify",
        action="store_true",
        help="load the folder with plain transformers in a new process and compare the logits after every block",
    )
    _processes(sub)


def _shard_size(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights, such as 200MB (5GB)")


def _degrees(sub: argparse.ArgumentParser, data_required: bool) -> None:
    sub.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor parallel degree (1)")
    sub.add_argument("--sequence", type=int, default=1, metavar="S", help="sequence parallel degree (1)")
    sub.add_argument("--data", type=int, required=data_required, default=1, metavar="D", help="data parallel degree")


def _processes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that write (1); mpirun's ranks do as well"
    )


def add_verbs(command: Command) -> None:
    """`command(name, function, description, *examples)` makes a verb's parser."""
    add_export_arguments(
        command(
            "to-hf",
            export,
            "Write a checkpoint as a plain HF folder.",
            "rim-dist convert to-hf runs/demo exported/",
            "mpirun -n 8 tools/convert_checkpoint.py to-hf runs/large exported/ --dtype bf16",
        )
    )
    from_hf = command(
        "from-hf",
        _from_hf,
        "Make an HF folder (a RiM export or a plain model) the start of a run: its weights, a fresh optimizer.",
        "rim-dist convert from-hf exported/ runs/again --data 4",
        "rim-dist convert from-hf llama/ runs/new --recipe recipes/mine.yaml --stage 2",
    )
    from_hf.add_argument("hf_dir", type=Path, help="an HF folder with safetensors")
    from_hf.add_argument("out_dir", type=Path, help="run folder to make; `rim-dist train OUT_DIR/recipe.yaml` goes on from it")
    from_hf.add_argument("--recipe", type=Path, metavar="YAML", help="recipe of the run (default: the one in a RiM export)")
    from_hf.add_argument("--stage", type=int, choices=[1, 2], help="stage to begin (default: the recipe's first)")
    _degrees(from_hf, data_required=False)
    _processes(from_hf)
    reshape = command(
        "reshape",
        _reshape,
        "Make a checkpoint one for other degrees: weights, optimizer, stage, schedule and position go on.",
        "rim-dist convert reshape runs/demo runs/demo-on-4 --data 4",
    )
    reshape.add_argument("checkpoint", help=_CHECKPOINT)
    reshape.add_argument("out_dir", type=Path, help="run folder to make; `rim-dist train OUT_DIR/recipe.yaml` goes on from it")
    _degrees(reshape, data_required=True)
    _processes(reshape)
    inspect = command(
        "inspect",
        _inspect,
        "Say what a checkpoint or HF folder is: stage, step, degrees, size, integrity, recipe.",
        "rim-dist convert inspect runs/demo",
        "rim-dist convert inspect exported/ --json",
    )
    inspect.add_argument("path", help="a checkpoint, run or HF folder")
    inspect.add_argument("--json", action="store_true", help="everything as one JSON object")
    diff = command(
        "diff",
        _diff,
        "Compare two checkpoints or HF folders: configuration and weights. Status 0: the same, 1: they differ.",
        "rim-dist convert diff runs/a/hf runs/b/hf",
    )
    diff.add_argument("a", help="a checkpoint, run or HF folder")
    diff.add_argument("b", help="another one")
    merge = command(
        "merge-lora",
        _merge,
        "Merge a PEFT adapter into its base.",
        "rim-dist convert merge-lora adapter/ base/ merged/",
    )
    merge.add_argument("adapter", type=Path, help="a PEFT LoRA adapter folder")
    merge.add_argument("base", type=Path, help="the HF folder it was trained on")
    merge.add_argument("out_dir", type=Path, help="folder to write")
    merge.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: the base's)")
    _shard_size(merge)
    _processes(merge)
    extract = command(
        "extract-lora",
        _extract,
        "Write the difference between a fine-tuned folder and its base as a PEFT adapter.",
        "rim-dist convert extract-lora exported/ base/ adapter/ --rank 128",
    )
    extract.add_argument("tuned", type=Path, help="the fine-tuned HF folder")
    extract.add_argument("base", type=Path, help="the HF folder it started from")
    extract.add_argument("out_dir", type=Path, help="folder to write")
    extract.add_argument("--rank", type=int, default=128, metavar="R", help="rank of the adapter (128)")


def _workers(arguments: argparse.Namespace) -> Workers:
    from rim_dist.checkpoint.workers import Workers

    return Workers(_at_least_one("--processes", arguments.processes), mpi=True)


def _shard_bytes(text: str) -> int:
    """Bytes of a size as transformers writes it: `5GB`, `200MB`, `64MiB`."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:([KMG])(I?)B)?\s*", text.upper())
    if not match or not int(match[1]):
        raise ConfigError(f"--max-shard-size: {text!r} is not a size; write for example 5GB, 200MB or 64MiB")
    return int(match[1]) * (1024 if match[3] else 1000) ** ("KMG".index(match[2]) + 1 if match[2] else 0)


def export(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.hf_export import ExportOptions, export_checkpoint
    from rim_dist.checkpoint.retention import choose

    options = ExportOptions(
        arguments.dtype,
        _shard_bytes(arguments.max_shard_size),
        not arguments.no_merge_lora,
        arguments.adapter_only,
        _at_least_one("--pad-vocabulary", arguments.pad_vocabulary),
    )
    if arguments.verify and arguments.adapter_only:
        raise ConfigError("--verify: an adapter alone is no model; verify with --no-merge-lora or the merged folder")
    workers = _workers(arguments)
    checkpoint = choose(arguments.checkpoint, arguments.stage, arguments.step, arguments.best)
    out = export_checkpoint(checkpoint, arguments.out_dir, options, workers)
    if workers.is_first:
        print(out)
        if arguments.verify:
            from rim_dist.evaluation.verify import verify_export

            print(verify_export(checkpoint, out).text())
    return EXIT_DONE


def _from_hf(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.reshape import from_hf

    a = arguments
    return _make_run(a, lambda degrees, workers: from_hf(a.hf_dir, a.out_dir, a.recipe, a.stage, degrees, workers))


def _reshape(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.reshape import reshape
    from rim_dist.checkpoint.store import find_checkpoint

    source = find_checkpoint(arguments.checkpoint)
    return _make_run(arguments, lambda degrees, workers: reshape(source, arguments.out_dir, degrees, workers))


def _make_run(arguments: argparse.Namespace, convert: Callable[[Degrees, Workers], Path]) -> int:
    workers, degrees = _workers(arguments), Degrees(arguments.tensor, arguments.sequence, arguments.data)
    run = convert(degrees, workers)
    if workers.is_first:
        print(f"{run}: go on with `rim-dist train {run / 'recipe.yaml'}` on {degrees.ranks} rank(s) ({degrees})")
    return EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.describe import describe, inspect_path

    fields = inspect_path(arguments.path)
    print(json.dumps(fields, indent=1) if arguments.json else describe(fields))
    return EXIT_FAILED if fields["damage"] else EXIT_DONE


def _diff(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.diff import differences

    lines = differences(arguments.a, arguments.b)
    for line in lines:
        print(line)
    if not lines:
        say("the same configuration and weights")
    return EXIT_FAILED if lines else EXIT_DONE


def _merge(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.hf_export import merge_adapter

    workers = _workers(arguments)
    size = _shard_bytes(arguments.max_shard_size)
    merge_adapter(arguments.adapter, arguments.base, arguments.out_dir, arguments.dtype, size, workers)
    if workers.is_first:
        print(arguments.out_dir)
    return EXIT_DONE


def _extract(arguments: argparse.Namespace) -> int:
    from rim_dist.checkpoint.hf_export import extract_adapter

    rank = _at_least_one("--rank", arguments.rank)
    errors = extract_adapter(arguments.tuned, arguments.base, arguments.out_dir, rank)
    worst = max(errors.values(), default=0.0)
    print(f"{arguments.out_dir}: {len(errors)} matrices, largest relative error {worst:.2e}")
    return EXIT_DONE


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name}: {value} is not allowed; allowed: 1 or more")
    return value
