"""The job scripts beside the package, and what a site's `site.env` means for sbatch: asked from slurm/lib.sh itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rim_dist.errors import ConfigError


def slurm_folder() -> Path:
    """`slurm/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    beside = package.parent / "slurm"
    return beside if (beside / "lib.sh").is_file() else package / "slurm"


def site_arguments(site: str | None) -> list[str]:
    """sbatch arguments of a site's settings. `site`: path of its file; None: `RIM_SITE`, or site.env beside lib.sh if any."""
    if site is not None and not Path(site).is_file():
        raise ConfigError(f"--site: {site}: no such file (slurm/site.env.example shows one)")
    environment = {**os.environ, **({"RIM_SITE": str(Path(site).resolve())} if site else {})}
    done = subprocess.run(
        ["bash", "-c", 'source "$1" && rim_site && rim_site_arguments', "bash", str(slurm_folder() / "lib.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"{site or os.environ.get('RIM_SITE', 'site.env')}: bash cannot read it ({done.stderr.strip()})")
    return done.stdout.splitlines()
