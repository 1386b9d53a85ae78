"""The command line. Imports what a command needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_dist import __version__
from rim_dist.checkpoint.commands import add_export_arguments, add_verbs, export
from rim_dist.cluster.commands import add_cluster_commands
from rim_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE, ConfigError, PeerLost, RimError, Stopped
from rim_dist.evaluation.commands import add_evaluation_commands, column_names
from rim_dist.messages import outlive_console, prepare_console, say
from rim_dist.planning.commands import add_plan_command
from rim_dist.report.commands import add_report_command
from rim_dist.versions import check_versions, version_lines

if TYPE_CHECKING:
    from rim_dist.parallel.liveness import LivenessMonitor

_EXIT_STATUS = """exit status:
  0  done
  1  failed; starting again would not help
  2  what was given is wrong: recipe, file, option
  75 saved and stopped, or lost a peer: start the same command again"""

_PEER_IS_LOST = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|timed out|timeout|remote process exited|likely closed|"
    r"recvbytes failed",
    re.IGNORECASE,
)
_AGAIN = "what was complete is kept; {} and start the same command again"
_OF_THE_FILE_SYSTEM = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _AGAIN.format("make room")),
    **dict.fromkeys((errno.EIO, errno.ESTALE), _AGAIN.format("look at the file system")),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _AGAIN.format("make it writable")),
    errno.ENAMETOOLONG: "choose a shorter name",
}
_COMMUNICATION = re.compile("gloo|nccl", re.IGNORECASE)  # who says so


def _example(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) + "\n\n" + _EXIT_STATUS


class _Parser(argparse.ArgumentParser):
    """Suggests what is near where a word is not known. argparse makes the commands' parsers of the same class."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), [str(choice) for choice in action.choices])
            allowed = f"did you mean {near}?" if near else f"choose from {', '.join(map(str, action.choices))}"
            raise argparse.ArgumentError(action, f"{value!r} is not known; {allowed}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. Overrides may stand after options too, which argparse alone does not take."""
        arguments, rest = self.parse_known_args(argv)
        own = getattr(arguments, "parser", self)
        if hasattr(arguments, "overrides"):
            arguments.overrides += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            near = nearest(rest[0].partition("=")[0], own._option_string_actions)
            own.error(f"unknown: {' '.join(rest)}" + (f"; did you mean {near}?" if near else ""))
        return arguments


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like another one; empty if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def build_parser() -> _Parser:
    parser = _Parser(
        prog="rim-dist",
        description="Train language models to reason in memory blocks (RiM), export and evaluate them.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rim_dist {__version__}")
    parser.set_defaults(run=_help, parser=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

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
        sub.set_defaults(run=run, parser=sub)
        return sub

    def recipe_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", help="YAML recipe (docs/configuration.md lists every field)")
        text = "fields of the recipe with other values, as in run.seed=1, method=cot or model.lora=null (YAML)"
        overrides = sub.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=text)
        overrides.completer = _field_completions  # type: ignore[attr-defined]  # argcomplete reads it

    train = command(
        "train",
        _train,
        "Train a recipe through its stages, evaluate and export it, all in the run's folder (run.output_dir/run.name); goes on "
        "by itself where an earlier start stopped.",
        "rim-dist train recipes/demo.yaml run.seed=1",
        "deepspeed --num_gpus 8 --module rim_dist train recipes/gsm8k-aug-llama-3.2-1b.yaml",
        "torchrun --nproc_per_node 8 -m rim_dist train recipes/gsm8k-aug-gpt2.yaml",
        "srun --ntasks-per-node 8 python -m rim_dist train recipes/gsm8k-aug-llama-3.2-3b.yaml",
    )
    recipe_arguments(train)
    train.add_argument(
        "--until",
        choices=["stage1"],
        help="save and end after this stage, without the last evaluation and the export; the same command without it goes on",
    )

    init = command(
        "init",
        _init,
        "Look at data (JSONL, Parquet, CSV, chat messages, each also as .gz, or a folder of them) and write a commented recipe "
        "that trains on it.",
        "rim-dist init gsm8k/train.jsonl --model SmolLM2-135M-Instruct/",
        "rim-dist init problems.csv --column question=Aufgabe --column answer=Antwort --output mine.yaml",
    )
    init.add_argument("data", help="the file, or a data set's folder")
    init.add_argument(
        "--model", metavar="FOLDER", default="", help="model to start from, a folder or hub id; lengths are measured"
    )
    init.add_argument("--column", action="append", default=[], metavar="FIELD=NAME", help="column of question, steps or answer")
    init.add_argument("--output", metavar="FILE", help="recipe to write (the data's name with .yaml, here)")
    init.add_argument("--ask", action="store_true", help="ask before each choice; Enter takes what is proposed")

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
        "Show what a recipe's data becomes: counts, lengths, skipped rows, and samples as text and as rows of each stage.",
        "rim-dist data recipes/demo.yaml --show",
        "rim-dist data recipes/demo.yaml --show 2 --ids --tokens",
        "rim-dist data recipes/gsm8k-smollm2-135m.yaml data.path=train.jsonl",
    )
    shows = "show the first N samples (1) as text, after chat template and formats, and what each stage asks of them"
    data.add_argument("--show", type=int, nargs="?", default=0, const=1, metavar="N", help=shows)
    data.add_argument("--ids", action="store_true", help="with --show: token ids too")
    data.add_argument("--tokens", action="store_true", help="with --show: each stage's row token by token")
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
    convert.set_defaults(parser=convert)
    verbs = convert.add_subparsers(dest="verb", metavar="VERB")
    add_verbs(lambda *given: command(*given, under=verbs))
    add_evaluation_commands(command)
    add_report_command(command)
    add_cluster_commands(command, recipe_arguments)
    add_plan_command(command, recipe_arguments)
    command("version", _version, "Versions of all that matters in a report of a bug.", "rim-dist version")
    return parser


def _field_completions(prefix: str, **_: Any) -> list[str]:
    from rim_dist.recipe import field_names

    return [f"{name}=" for name in field_names() if name.startswith(prefix)]


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell if it asks for completions, and end. Does nothing without argcomplete."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser, append_space=False)


# ---- commands ----------------------------------------------------------------------------------------------


def _help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help()
    return EXIT_DONE


def _version(arguments: argparse.Namespace) -> int:  # noqa: ARG001 - all commands have the same signature
    print("\n".join(version_lines()))
    return EXIT_DONE


def _train(arguments: argparse.Namespace) -> int:
    from rim_dist.heartbeat import dump_stacks_on_signal
    from rim_dist.recipe import load_recipe

    dump_stacks_on_signal()
    outlive_console()
    if not sys.warnoptions:  # given by the user: python -W, PYTHONWARNINGS
        warnings.simplefilter("ignore")  # libraries' warnings to programmers, between lines of progress
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from rim_dist.model.precision import with_precision
    from rim_dist.parallel.launch import join, leave
    from rim_dist.training.trainer import Trainer, finished_state, prepare_run

    recipe = with_precision(recipe)
    if arguments.until and not recipe.curriculum.stage(arguments.until).enabled:
        raise ConfigError(f"--until {arguments.until}: the recipe leaves this stage out (curriculum.{arguments.until})")
    if (state := finished_state(recipe)) is not None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            say(f"{recipe.folder}: finished after {state.step} steps ({state.samples} samples); nothing to do")
        return EXIT_DONE
    requirements, data = prepare_run(recipe)
    process = join(recipe.parallel.timeout_seconds)
    Trainer(recipe, process, requirements, data).run(arguments.until)
    leave()
    return EXIT_DONE


def _init(arguments: argparse.Namespace) -> int:
    from rim_dist.data.proposal import guessed_lengths, look_at, propose, write_converted
    from rim_dist.recipe import load_recipe

    data = Path(arguments.data)
    stem = data.resolve().name.partition(".")[0]
    if stem in ("train", "data", "test", ""):  # the folder says more
        stem = data.resolve().parent.name or "mine"
    output = Path(arguments.output or f"{stem}.yaml")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-._") or "mine"
    look = look_at(data, column_names(arguments.column))
    model, blocks = arguments.model or "HuggingFaceTB/SmolLM2-135M-Instruct", None
    if arguments.ask:
        model = _asked("model to start from", model)
        blocks = _asked_count("memory blocks (Enter: from the numbers of steps)")
        name = _asked("name of the run", name)
    path = output.with_name(f"{output.stem}.data.jsonl") if look.converted else look.path
    for file in (output, path) if look.converted else (output,):
        if file.exists():
            raise ConfigError(f"{file}: is there already; name another --output")
    if arguments.model or arguments.ask:
        from rim_dist.model.requirements import lengths_of

        lengths = lengths_of(model)
    else:
        lengths = guessed_lengths()
    text = propose(look, name, path, model, lengths, blocks)
    try:
        if look.converted:
            write_converted(look, path)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror or error})") from None
    load_recipe(output)
    print(f"{output}: {len(look.samples)} samples of {look.source}" + (f", written as {path}" if look.converted else ""))
    print(f"  rim-dist data {output} --show\n  rim-dist train {output}")
    return EXIT_DONE


def _asked(what: str, proposed: str) -> str:
    try:
        return input(f"{what} [{proposed}]: ").strip() or proposed
    except EOFError:
        raise ConfigError("--ask: nobody answers; leave it out to take what is proposed") from None


def _asked_count(what: str) -> int | None:
    answer = _asked(what, "")
    if answer and (not answer.isdigit() or not int(answer)):
        raise ConfigError(f"--ask: {answer!r} is not allowed; allowed: 1 or more")
    return int(answer) if answer else None


def _prefetch(arguments: argparse.Namespace) -> int:
    from rim_dist.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from rim_dist.model.requirements import fetch_weights
    from rim_dist.training.trainer import prepare_run

    requirements, data = prepare_run(recipe)
    fetch_weights(recipe, requirements)
    print(f"model: {requirements.start.source or 'from scratch'}; data: {data.report.used} of {data.report.rows} rows")
    for note in data.report.notes(recipe):
        print(note)
    return EXIT_DONE


def _data(arguments: argparse.Namespace) -> int:
    from rim_dist.recipe import load_recipe

    if arguments.show < 0:
        raise ConfigError(f"--show: {arguments.show} is not allowed; allowed: 0 or more")
    for option in ("ids", "tokens"):
        if getattr(arguments, option) and not arguments.show:
            raise ConfigError(f"--{option}: needs --show")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from rim_dist.training.show import show_data

    show_data(recipe, arguments.show, arguments.ids, arguments.tokens)
    return EXIT_DONE


# ---- the way out -------------------------------------------------------------------------------------------


def _monitor() -> LivenessMonitor | None:
    """The liveness monitor of this process, if it is one of several ranks."""
    module = sys.modules.get("rim_dist.parallel.liveness")
    return module.current_monitor() if module is not None else None


def _broke_communication(error: BaseException) -> bool:
    """Whether torch, gloo or NCCL, each in its words, says that another of several ranks went away."""
    if _monitor() is None or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    said = str(error)
    return isinstance(error, DistError) or (_COMMUNICATION.search(said) and _PEER_IS_LOST.search(said)) is not None


def _peer_failure(error: BaseException) -> PeerLost | None:
    """The failure of another rank that the error follows from; None if all ranks are alive, or nothing watches them."""
    monitor = _monitor()
    if monitor is None:
        return None
    failure = monitor.failure or (monitor.find_failure() if _broke_communication(error) else None)
    return monitor.error_for(failure) if failure is not None else None


def _has_other_ranks() -> bool:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return True
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.COMM_WORLD.Get_size() > 1


def _end_of_rank(status: int, failed: str = "") -> int:
    """With other ranks around, tell them what `failed` here and leave at once.

    Waiting in a destructor for a collective, or for MPI to close, would hang all.
    """
    if (monitor := _monitor()) is not None:
        monitor.claim_exit()
        if failed:
            monitor.fail(failed, status)
        else:
            monitor.leave()
    if _has_other_ranks():
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
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")  # peft calls it
    prepare_console()
    parser = build_parser()
    _complete(parser)
    arguments = parser.read(_without_local_rank(sys.argv[1:] if argv is None else argv))
    try:
        if arguments.run not in (_help, _version):
            check_versions()
        return arguments.run(arguments)
    except Stopped as error:
        say(f"rim-dist: {error}")
        return _end_of_rank(error.exit_status)
    except RimError as error:
        say(f"rim-dist: {error}")
        return _end_of_rank(error.exit_status, str(error))
    except KeyboardInterrupt:
        say("rim-dist: interrupted")
        return _end_of_rank(130, "interrupted")
    except ModuleNotFoundError as error:
        if (error.name or "rim_dist").partition(".")[0] == "rim_dist":
            raise
        text = f"{error.name} is not installed; `rim-dist version` lists what is needed"
        say(f"rim-dist: {text}")
        return _end_of_rank(EXIT_USAGE, text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        rank, said = os.environ.get("RANK", "0"), (str(error).splitlines() or [""])[0]
        if (lost := _peer_failure(error)) is not None:
            say(f"rim-dist: {lost}")
            return _end_of_rank(lost.exit_status)
        if _broke_communication(error):
            say(f"rim-dist: rank {rank}: lost a peer ({said}); start the same command again")
            return _end_of_rank(EXIT_TRY_AGAIN, said)
        if isinstance(error, OSError) and (next_step := _OF_THE_FILE_SYSTEM.get(error.errno or 0)):
            text = f"{error.strerror}{f' ({error.filename})' if error.filename else ''}; {next_step}"
            say(f"rim-dist: {text}")
            return _end_of_rank(EXIT_USAGE if error.errno == errno.ENAMETOOLONG else EXIT_FAILED, text)
        traceback.print_exc()
        say(f"rim-dist: rank {rank}: failed; this is a bug or a fault of the machine")
        return _end_of_rank(EXIT_FAILED, f"{type(error).__name__}: {said}")
