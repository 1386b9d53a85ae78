"""The command line. Imports what a command needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rim_dist import __version__
from rim_dist.checkpoint.commands import add_export_arguments, add_verbs, export
from rim_dist.cluster.commands import add_cluster_commands
from rim_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, ConfigError, PeerLost, RimError, Stopped

if TYPE_CHECKING:
    from rim_dist.data.sources import Sample
    from rim_dist.parallel.rollcall import RollCall

_EXIT_STATUS = """exit status:
  0  done
  1  failed; starting again would not help
  2  what was given is wrong: recipe, file, option
  75 saved and stopped, or lost a peer: start the same command again"""


def _example(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) + "\n\n" + _EXIT_STATUS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rim-dist",
        description="Train language models to reason in memory blocks (RiM), export and evaluate them.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rim_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        *examples: str,
        under: argparse._SubParsersAction = commands,
    ) -> argparse.ArgumentParser:
        sub = under.add_parser(
            name, help=text, description=text, epilog=_example(*examples), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    def recipe_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", help="YAML recipe (docs/configuration.md lists every field)")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to override")

    train = command(
        "train",
        _train,
        "Train a recipe through its stages; goes on by itself where an earlier start stopped.",
        "rim-dist train recipes/demo.yaml run.seed=1",
        "deepspeed --num_gpus 8 --module rim_dist train recipes/gsm8k-aug-llama-3.2-1b.yaml",
        "torchrun --nproc_per_node 8 -m rim_dist train recipes/gsm8k-aug-gpt2.yaml",
        "srun --ntasks-per-node 8 python -m rim_dist train recipes/gsm8k-aug-llama-3.2-3b.yaml",
    )
    recipe_arguments(train)
    train.add_argument("--until", choices=["stage1"], help="end after this stage; the same command without it goes on")

    recipe_arguments(
        command(
            "prefetch",
            _prefetch,
            "Fetch a recipe's model and data and tokenise the data, where there is internet, before compute nodes need them.",
            "rim-dist prefetch recipes/gsm8k-aug-llama-3.2-1b.yaml data.cache_dir=/scratch/tokenised",
        )
    )
    data = command(
        "data",
        _data,
        "Show what a recipe's data becomes: counts, lengths, skipped rows, and samples drawn row by row.",
        "rim-dist data recipes/demo.yaml --show 2",
        "rim-dist data recipes/gsm8k-smollm2-135m.yaml data.path=train.jsonl",
    )
    data.add_argument("--show", type=int, default=0, metavar="N", help="draw the rows of the first N samples of each stage")
    recipe_arguments(data)

    add_export_arguments(
        command(
            "export",
            export,
            "Write a checkpoint as a plain HF folder (short for `convert to-hf`).",
            "rim-dist export runs/demo exported/",
            "rim-dist export runs/demo exported/ --dtype bf16 --best --verify",
        )
    )
    convert = commands.add_parser(
        "convert",
        help="Convert, inspect and compare checkpoints and HF folders.",
        description="Convert, inspect and compare checkpoints and HF folders.",
        epilog=_example("rim-dist convert to-hf runs/demo exported/", "rim-dist convert inspect runs/demo"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = convert.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_verbs(lambda *given: command(*given, under=verbs))
    generate = command(
        "generate",
        _generate,
        "Answer questions with an exported folder; without a question, one a line from standard input.",
        'rim-dist generate runs/demo/hf "From the attic take red blue pink."',
        "rim-dist generate runs/demo/hf --every-block < questions.txt",
    )
    generate.add_argument("hf_dir", help="an exported folder (any HF causal LM folder works)")
    generate.add_argument("question", nargs="?", help="the question")
    generate.add_argument("--blocks", type=int, metavar="K", help="memory blocks (default: as trained)")
    generate.add_argument("--every-block", action="store_true", help="the answer after every block")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (256)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends before this text too (repeatable)"
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "Accuracy after every block and latency of an exported folder.",
        "rim-dist evaluate runs/demo/hf synthetic:1 --samples 512",
        "rim-dist evaluate exported/ gsm8k/test.jsonl --output report/",
    )
    evaluate.add_argument("hf_dir", help="an exported folder (any HF causal LM folder works)")
    evaluate.add_argument("data", help="a file of questions, or synthetic[:SEED]")
    evaluate.add_argument("--output", metavar="DIR", help="write evaluation.json and answers.jsonl here")
    evaluate.add_argument(
        "--format",
        default="auto",
        choices=["auto", "gsm8k", "gsm8k_aug", "gsm_hard", "prosqa", "jsonl", "parquet"],
        help="format of the file (auto)",
    )
    evaluate.add_argument("--samples", type=int, default=264, metavar="N", help="questions to ask (264)")
    evaluate.add_argument("--blocks", type=int, metavar="K", help="memory blocks (default: as trained)")
    evaluate.add_argument("--batch", type=int, default=64, metavar="N", help="questions answered together (64)")
    evaluate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (32; 512 for chains of thought)"
    )
    evaluate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends before this text too (repeatable)"
    )
    evaluate.add_argument("--timed", type=int, default=32, metavar="N", help="questions timed one by one (32)")
    add_cluster_commands(command, recipe_arguments)
    return parser


# ---- commands ----------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    from rim_dist.config import load_recipe
    from rim_dist.training.heartbeat import listen

    listen()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from rim_dist.parallel.launch import join, leave
    from rim_dist.training.trainer import Trainer, finished_state, prepare_run

    if arguments.until and not recipe.curriculum.stage(arguments.until).enabled:
        raise ConfigError(f"--until {arguments.until}: the recipe leaves this stage out (curriculum.{arguments.until})")
    if (state := finished_state(recipe)) is not None:
        _say(f"{recipe.folder}: finished after {state.step} steps ({state.samples} samples); nothing to do", first_only=True)
        return EXIT_DONE
    foundation, data = prepare_run(recipe)
    process = join(recipe.parallel.timeout_seconds)
    Trainer(recipe, process, foundation, data).run(arguments.until)
    leave()
    return EXIT_DONE


def _prefetch(arguments: argparse.Namespace) -> int:
    from rim_dist.config import load_recipe
    from rim_dist.model import fetch_weights
    from rim_dist.training.trainer import prepare_run

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    foundation, data = prepare_run(recipe)
    fetch_weights(recipe, foundation)
    print(f"model: {foundation.source or 'from scratch'}; data: {data.report.used} of {data.report.rows} rows")
    return EXIT_DONE


def _data(arguments: argparse.Namespace) -> int:
    from rim_dist.config import load_recipe
    from rim_dist.data.show import show_data

    if arguments.show < 0:
        raise ConfigError(f"--show: {arguments.show} is not allowed; allowed: 0 or more")
    show_data(load_recipe(arguments.recipe, arguments.overrides), arguments.show)
    return EXIT_DONE


def _blocks(given: int | None, trained: int) -> int:
    """The block budget of a command: the trained one unless given. Raises ConfigError if it makes no sense."""
    if given is None:
        return trained
    if trained == 0:
        raise ConfigError(f"--blocks: {given} is not allowed; this model has no memory blocks")
    if given < 1:
        raise ConfigError(f"--blocks: {given} is not allowed; allowed: 1 or more")
    return given


def _generate(arguments: argparse.Namespace) -> int:
    from rim_dist.evaluation.evaluate import block_answers, open_export
    from rim_dist.evaluation.generation import Decoding, answer_questions

    _at_least_one("--max-new-tokens", arguments.max_new_tokens)
    export = open_export(arguments.hf_dir)
    blocks = _blocks(arguments.blocks, export.blocks)
    if arguments.every_block and not blocks:
        raise ConfigError("--every-block: this model has no memory blocks")
    questions = [arguments.question] if arguments.question is not None else (line.strip() for line in sys.stdin)
    decoding = Decoding(arguments.max_new_tokens, stop=tuple(arguments.stop))
    asked = 0
    for question in questions:
        if not question.strip():
            continue
        asked += 1
        if arguments.every_block:
            for k, text in enumerate(block_answers(export.model, export.tokenizer, [question], blocks, decoding)[0], 1):
                print(f"block {k}: {text}", flush=True)
        else:
            print(answer_questions(export.model, export.tokenizer, [question], blocks or None, decoding)[0], flush=True)
    if not asked:
        raise ConfigError("question: there is none; give one, or one a line on standard input")
    return EXIT_DONE


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: {value} is not allowed; allowed: 1 or more")


def _evaluate(arguments: argparse.Namespace) -> int:
    from rim_dist.config import ColumnsSection
    from rim_dist.evaluation.evaluate import COT_FACTOR, evaluate_export, evaluation_samples, open_export, write_evaluation
    from rim_dist.evaluation.generation import Decoding
    from rim_dist.evaluation.table import print_evaluation

    for name in ("samples", "batch", "timed"):
        _at_least_one(f"--{name}", getattr(arguments, name))
    export = open_export(arguments.hf_dir)
    blocks = _blocks(arguments.blocks, export.blocks)
    samples: list[Sample] = evaluation_samples(
        arguments.data, arguments.format, arguments.samples, ColumnsSection(), export.synthetic_steps
    )
    limit = arguments.max_new_tokens or 32 * (COT_FACTOR if export.method == "cot" else 1)
    result = evaluate_export(
        export, samples, blocks, Decoding(limit, arguments.batch, stop=tuple(arguments.stop)), arguments.timed
    )
    print_evaluation(result, arguments.hf_dir)
    if arguments.output:
        try:
            write_evaluation(result, Path(arguments.output), {"model": arguments.hf_dir, "data": arguments.data})
        except OSError as error:
            raise ConfigError(f"--output: {arguments.output} cannot be written ({error.strerror})") from None
    else:
        figures = {k: v for k, v in vars(result).items() if k != "answers"}
        print(json.dumps(figures))
    return EXIT_DONE


# ---- the way out -------------------------------------------------------------------------------------------


def _say(text: str, first_only: bool = False) -> None:
    if first_only and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    print(text, file=sys.stderr, flush=True)


def _roll_call() -> RollCall | None:
    """The roll call of the ranks, if this process is one of several."""
    module = sys.modules.get("rim_dist.parallel.rollcall")
    return module.current() if module is not None else None


def _lost_a_peer(error: BaseException) -> bool:
    """Whether an error says that another rank went away (gloo and NCCL word it differently)."""
    text = str(error).lower()
    signs = (
        "connection closed by peer",
        "connection reset by peer",
        "connection refused",
        "broken pipe",
        "timed out",
        "timeout",
        "remote process exited",
        "likely closed",
        "recvbytes failed",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _loss(error: BaseException) -> PeerLost | None:
    """The error as another rank's failure, named by the roll call; None if the ranks are all there or nobody calls them."""
    roll_call = _roll_call()
    if roll_call is None:
        return None
    from torch.distributed import DistError

    failure = roll_call.failure
    if failure is None and (_lost_a_peer(error) or isinstance(error, DistError)):
        failure = roll_call.find_lost()
    return roll_call.loss(failure) if failure is not None else None


def _end_of_rank(status: int, failed: str = "") -> int:
    """With other ranks around, tell them what `failed` here and leave at once: a destructor could wait for a collective."""
    if (roll_call := _roll_call()) is not None:
        if failed:
            roll_call.fail(failed, status)
        else:
            roll_call.leave()
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """The deepspeed launcher puts `--local_rank=N` before the command; LOCAL_RANK says the same."""
    return [argument for argument in argv if not argument.startswith("--local_rank=")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    # Threads that spin while they wait take a shared core from those that work: a step became 25 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that ended with its rank is worth a line, not a stack
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    arguments = build_parser().parse_args(_without_local_rank(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except Stopped as error:
        _say(f"rim-dist: {error}")
        return _end_of_rank(error.exit_status)
    except RimError as error:
        _say(f"rim-dist: {error}")
        return _end_of_rank(error.exit_status, str(error))
    except KeyboardInterrupt:
        _say("rim-dist: interrupted")
        return _end_of_rank(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        rank, said = os.environ.get("RANK", "0"), (str(error).splitlines() or [""])[0]
        if (loss := _loss(error)) is not None:
            _say(f"rim-dist: {loss}")
            return _end_of_rank(loss.exit_status)
        if _lost_a_peer(error):
            _say(f"rim-dist: rank {rank}: lost a peer ({said}); start the same command again")
            return _end_of_rank(EXIT_TRY_AGAIN, said)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            text = f"{error.strerror}{where}; what was complete is kept; make room and start the same command again"
            _say(f"rim-dist: {text}")
            return _end_of_rank(EXIT_FAILED, text)
        traceback.print_exc()
        _say(f"rim-dist: rank {rank}: failed; this is a bug or a fault of the machine")
        return _end_of_rank(EXIT_FAILED, f"{type(error).__name__}: {said}")
