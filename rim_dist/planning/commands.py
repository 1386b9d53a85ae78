"""`rim-dist plan`: arguments and call."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rim_dist.errors import EXIT_DONE, ConfigError
from rim_dist.planning.links import INTERCONNECTS


def add_plan_command(
    command: Callable[..., argparse.ArgumentParser], recipe_arguments: Callable[[argparse.ArgumentParser], Any]
) -> None:
    plan = command(
        "plan",
        _plan,
        "Memory of a GPU, what is sent and which degrees to use, without GPUs and without building the model.",
        "rim-dist plan recipes/gsm8k-aug-llama-3.2-1b.yaml --gpus 8 --gpu-memory 80GiB",
        "rim-dist plan recipes/gsm8k-aug-llama-3.2-1b.yaml model.lora=null --gpus 64 --gpu-memory 80GiB --model llama-3.1-70b",
        "rim-dist plan RECIPE.yaml --gpus 16 --gpu-memory 40GiB --interconnect ethernet-25g --output plan/",
    )
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    plan.add_argument("--gpu-memory", required=True, metavar="SIZE", help="memory of a GPU with its unit: 80GiB")
    plan.add_argument("--node-memory", default="1TiB", metavar="SIZE", help="CPU memory of a node, for offload (1TiB)")
    plan.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a node (8, or all if fewer)")
    plan.add_argument(
        "--interconnect", default="nvlink+ib-400g", metavar="NAME", help=f"one of {', '.join(INTERCONNECTS)} (nvlink+ib-400g)"
    )
    plan.add_argument("--model", metavar="NAME|PATH", help="another model: a known name or a config.json")
    plan.add_argument("--question-tokens", type=int, default=128, metavar="N", help="length of a question (128)")
    plan.add_argument("--target-tokens", type=int, default=16, metavar="N", help="length of what a readout predicts (16)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--output", metavar="DIR", help="write plan.json and plan.png here")
    recipe_arguments(plan)


def _plan(arguments: argparse.Namespace) -> int:
    from rim_dist.planning.report import Plan, draw_plan, print_plan
    from rim_dist.planning.request import make_planner, parse_memory
    from rim_dist.recipe import load_recipe

    memory = parse_memory(arguments.gpu_memory)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    planner = make_planner(
        recipe,
        arguments.gpus,
        memory,
        arguments.model,
        arguments.gpus_per_node,
        arguments.interconnect,
        parse_memory(arguments.node_memory, "--node-memory"),
        arguments.question_tokens,
        arguments.target_tokens,
    )
    written, refusal = None, ""
    try:
        written = planner.as_written()
    except ConfigError as error:
        refusal = str(error)
    plan = Plan(planner, written, refusal)
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        print_plan(plan)
    if arguments.output:
        folder = Path(arguments.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plan.json").write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")
            (folder / "plan.png").write_bytes(draw_plan(plan))
        except OSError as error:
            raise ConfigError(f"--output: {folder} cannot be written ({error.strerror or error})") from None
        if not arguments.json:
            print(f"{folder / 'plan.json'}, {folder / 'plan.png'}")
    return EXIT_DONE
