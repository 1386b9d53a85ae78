"""`rim-dist submit`: a job script from slurm/train.sbatch, the site's settings, the recipe and the flags."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.parallel.degrees import fit_degrees
from rim_dist.parallel.environment import shipped_folder


@dataclass(frozen=True)
class Request:
    """What the user asks for, beside the site's settings and the template."""

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


def _site_options(site: str | None) -> dict[str, str]:
    """sbatch options of a site's settings, as lib.sh reads them. `site`: their file; None: lib.sh finds it."""
    if site is not None and not Path(site).is_file():
        raise ConfigError(f"--site: {site}: no such file (slurm/site.env.example shows one)")
    environment = {**os.environ, **({"RIM_SITE": str(Path(site).resolve())} if site else {})}
    script = ["bash", "-c", 'source "$1" && rim_site && rim_site_arguments', "bash", str(shipped_folder("slurm") / "lib.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{site or os.environ.get('RIM_SITE', 'site.env')}: bash cannot read it ({done.stderr.strip()})")
    return parse_options(done.stdout.splitlines(), site or "site.env")


def _template() -> tuple[dict[str, str], str]:
    """The options of slurm/train.sbatch and what comes after them."""
    path = shipped_folder("slurm") / "train.sbatch"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); submit from a checkout or an installed package"
        ) from None
    header = [line.removeprefix("#SBATCH ").strip() for line in lines if line.startswith("#SBATCH ")]
    body = "".join(line for line in lines[1:] if not line.startswith("#SBATCH "))
    return parse_options(header, str(path)), body


def _options(recipe: Recipe, request: Request) -> tuple[dict[str, str], int, int]:
    """sbatch options by name, from template, site and request, the last one first; nodes, and ranks on each."""
    options, _ = _template()
    options["--job-name"] = f"rim-{recipe.run.name}"
    options["--output"] = f"{recipe.folder.resolve()}/logs/slurm-%j.out"
    given = {**_site_options(request.site), **request.options}
    if given.get("--gpus-per-node", "0").isdigit() and int(given.get("--gpus-per-node", 0)):
        options["--ntasks-per-node"] = given["--gpus-per-node"]  # a rank a GPU
    options.update(given)
    for name in ("--nodes", "--ntasks-per-node"):
        if not options[name].isdigit() or int(options[name]) < 1:
            raise ConfigError(f"{name}: {options[name]!r} is not allowed; allowed: 1 or more")
    gpus = options.get("--gpus-per-node", "")
    if gpus.isdigit() and 0 < int(gpus) < int(options["--ntasks-per-node"]):
        raise ConfigError(
            f"--ntasks-per-node: {options['--ntasks-per-node']} ranks do not fit --gpus-per-node {gpus}: one a GPU"
        )
    return options, int(options["--nodes"]), int(options["--ntasks-per-node"])


def planned(recipe: Recipe, request: Request, gpu_memory: int) -> Request:
    """The request with overrides from the planner for what the recipe leaves open. Raises ConfigError if nothing fits."""
    from rim_dist.planning.request import recommended_overrides

    _, nodes, ranks_per_node = _options(recipe, request)
    added = recommended_overrides(recipe, nodes * ranks_per_node, gpu_memory, ranks_per_node)
    return replace(request, overrides=[*request.overrides, *added])


def render(recipe: Recipe, request: Request, chain: str = "") -> str:
    """The complete job script. Raises ConfigError if the ranks do not fit the recipe.

    `chain`: the name that all jobs of a chain have in common; the next job then continues the run, and none is requeued.
    """
    options, nodes, ranks_per_node = _options(recipe, request)
    fit_degrees(recipe, nodes * ranks_per_node)
    settings = {"RIM_SLURM": str(shipped_folder("slurm"))}
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
    return "\n".join(lines) + "\n" + _template()[1]


def submit(recipe: Recipe, request: Request, jobs: int) -> list[str]:
    """Submit a run as one job that requeues itself, or as a chain of jobs, each continuing where the one before stopped.

    Returns the job ids. Raises ConfigError with the reason if sbatch is not there or refuses a job.
    """
    script = render(recipe, request, secrets.token_hex(4) if jobs > 1 else "")
    try:
        (recipe.folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{recipe.folder}: cannot be written ({error.strerror or error})") from None
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not found; submit on a login node of the cluster, or look at the script with --dry-run")
    ids: list[str] = []
    for _ in range(jobs):
        command = ["sbatch", "--parsable", *([f"--dependency=afterany:{ids[-1]}"] if ids else [])]
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
        ids.append(done.stdout.strip().partition(";")[0])
    return ids
