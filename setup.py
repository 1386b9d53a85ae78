"""Package metadata. Tested versions are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "rim_dist" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="rim_dist",
    version=VERSION,
    description="Distributed trainer for Reasoning in Memory (RiM): DeepSpeed ZeRO, a two-stage curriculum, plain HF export",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rim_dist", "rim_dist.*"]), "rim_dist.ds_configs", "rim_dist.slurm"],
    package_dir={"rim_dist.ds_configs": "ds_configs", "rim_dist.slurm": "slurm"},
    package_data={
        "rim_dist.evaluation.harness": ["*.yaml"],
        "rim_dist.planning": ["shapes/*.json"],
        "rim_dist.ds_configs": ["*.json"],
        "rim_dist.slurm": ["*.sh", "*.sbatch", "*.example"],
    },
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.8",
        "transformers>=5.23",
        "accelerate>=1.15",
        "datasets>=5.2",
        "peft>=0.21",
        "safetensors>=0.8",
        "sentencepiece>=0.2.3",
        "protobuf>=5",
        "mpi4py>=4.1",
        "wandb>=0.31",
        "pydantic>=2.14",
        "pyyaml>=6",
        "rich>=15",
        "matplotlib>=3.11",
        "numpy>=2",
        "scipy>=1.17",
        "scikit-learn>=1.9",
        "filelock>=3",
        "psutil>=6",
        "xxhash>=3.5",
    ],
    extras_require={
        "mpi": ["openmpi>=5"],
        "cuda": ["cut-cross-entropy>=25.1"],
        "tensorboard": ["tensorboard>=2.21"],
        "completion": ["argcomplete>=3.5"],
        "eval": ["lm_eval>=0.4.13"],
        "dev": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "coverage>=7.17",
            "ruff>=0.17",
            "mypy>=2.4",
            "types-PyYAML",
            "pre-commit>=4",
            "openmpi>=5",
            "tensorboard>=2.21",
            "gguf>=0.19",
        ],
    },
    entry_points={"console_scripts": ["rim-dist = rim_dist.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
