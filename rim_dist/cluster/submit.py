"""`rim-dist submit`: a job script out of slurm/train.sbatch, the site's settings, the recipe and the flags."""

from __future__ import annotations

import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rim_dist.cluster.site import site_arguments, slurm_folder
from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.parallel.degrees import fit_degrees

LAUNCHERS = ("srun", "torchrun", "deepspeed", "mpi", "mpirun")


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster, beside what the site and the template say."""

    recipe: str
    overrides: list[str]
    site: str | None = None
    launcher: str | None = None
    options: dict[str, str] = field(default_factory=dict)  # sbatch options by name, as --nodes
    until: str | None = None


def parse_options(arguments: Sequence[str], origin: str) -> dict[str, str]:
    """`--name=value` words by name; a flag without a value has an empty one."""
    found: dict[str, str] = {}
    for argument in arguments:
        if not argument.startswith("--"):
            raise ConfigError(f"{origin}: {argument!r} is not an option of sbatch; write --name=value")
        name, _, value = argument.partition("=")
        found[name] = value
    return found


def _template() -> tuple[dict[str, str], str]:
    """The options of slurm/train.sbatch and what comes after them."""
    path = slurm_folder() / "train.sbatch"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); submit from a checkout or an installed package"
        ) from None
    header = [line.removeprefix("#SBATCH ").strip() for line in lines if line.startswith("#SBATCH ")]
    body = "".join(line for line in lines[1:] if not line.startswith("#SBATCH "))
    return parse_options(header, str(path)), body


def job_options(recipe: Recipe, request: Request) -> dict[str, str]:
    """sbatch options by name: the template's, then the site's, then those asked for. Raises ConfigError if ranks do not fit."""
    options, _ = _template()
    options["--job-name"] = f"rim-{recipe.run.name}"
    options["--output"] = f"{recipe.folder.resolve()}/logs/slurm-%j.out"
    options.update(parse_options(site_arguments(request.site), request.site or "site.env"))
    options.update(request.options)
    nodes, ranks_per_node = _counts(options)
    fit_degrees(recipe, nodes * ranks_per_node)
    return options


def _counts(options: dict[str, str]) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    counts = []
    for name in ("--nodes", "--ntasks-per-node"):
        if not options[name].isdigit() or int(options[name]) < 1:
            raise ConfigError(f"{name}: {options[name]!r} is not allowed; allowed: 1 or more")
        counts.append(int(options[name]))
    return counts[0], counts[1]


def planned(recipe: Recipe, request: Request, gpu_memory: int) -> Request:
    """The request with overrides from the planner for what the recipe leaves open. Raises ConfigError if nothing fits."""
    from rim_dist.planning.request import recommended_overrides

    options, _ = _template()
    options.update(parse_options(site_arguments(request.site), request.site or "site.env"))
    nodes, ranks_per_node = _counts({**options, **request.options})
    added = recommended_overrides(recipe, nodes * ranks_per_node, gpu_memory, ranks_per_node)
    return replace(request, overrides=[*request.overrides, *added])


def render(recipe: Recipe, request: Request, chain: str = "") -> str:
    """The whole job script. `chain`: the name all jobs of a chain share; the next job then goes on, none is requeued."""
    options = job_options(recipe, request)
    _, body = _template()
    settings = {"RIM_SLURM": str(slurm_folder())}
    if request.site:
        settings["RIM_SITE"] = str(Path(request.site).resolve())
    if request.launcher:
        settings["RIM_LAUNCHER"] = request.launcher
    if chain:
        settings.update(RIM_CHAIN=chain, RIM_REQUEUE="0")
        options.pop("--requeue", None)
        options["--no-requeue"] = ""
    command = [request.recipe, *request.overrides, *(["--until", request.until] if request.until else [])]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {name}{'=' if value else ''}{value}" for name, value in options.items()),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
        f"set -- {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n" + body


def submit_script(script: str, arguments: Sequence[str] = ()) -> str:
    """Hand a script to sbatch; returns the job id. Raises ConfigError with what sbatch said."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not found; submit on a login node of the cluster, or look at the script with --dry-run")
    done = subprocess.run(["sbatch", "--parsable", *arguments], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def submit(recipe: Recipe, request: Request, jobs: int) -> list[str]:
    """Submit a run as one job that requeues itself, or as a chain of jobs of which each goes on where the last stopped."""
    chain = secrets.token_hex(4) if jobs > 1 else ""
    script = render(recipe, request, chain)
    try:
        (recipe.folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{recipe.folder}: cannot be written ({error.strerror or error})") from None
    ids: list[str] = []
    for _ in range(jobs):
        ids.append(submit_script(script, [f"--dependency=afterany:{ids[-1]}"] if ids else []))
    return ids
