"""What a machine computes in: the precision that `auto` is there, and PyTorch's switches for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_recipe, write_recipe

from rim_dist.checkpoint.store import complete_checkpoints, read_recipe
from rim_dist.cli import main
from rim_dist.evaluation.loading import load_for_evaluation
from rim_dist.model.precision import switch_kernels, with_precision
from rim_dist.planning.request import make_planner
from rim_dist.recipe import load_recipe
from rim_dist.training.folder import check_run_folder

Make = Callable[..., Path]
AUTO = {"model": {"dtype": "auto"}}


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"), [(False, False, "fp32"), (False, True, "fp32"), (True, False, "fp32"), (True, True, "bf16")]
)
def test_auto_is_what_the_machine_has(
    cuda: bool, bf16: bool, expected: str, recipe_file: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 on a GPU that computes in it and does not emulate it; a precision that the recipe gives stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    assert with_precision(load_recipe(recipe_file(**AUTO))).model.dtype == expected
    for dtype in ("fp32", "bf16", "fp16"):
        assert with_precision(load_recipe(recipe_file(model={"dtype": dtype}))).model.dtype == dtype


def test_auto_is_the_default(recipe_file: Make) -> None:
    tree = yaml.safe_load(recipe_file().read_text())
    del tree["model"]["dtype"]
    path = write_recipe(recipe_file(), tree)
    assert load_recipe(path).model.dtype == "auto"
    # Plans are made for GPUs.
    planner = make_planner(load_recipe(path, ["model.config.vocab_size=64"]), 1, 1 << 30, None, question=9)
    assert planner.recipe.model.dtype == planner.as_written().setup.dtype == "bf16"


def test_cudnn_and_tf32_are_off_unless_asked(recipe_file: Make) -> None:
    """PyTorch's own defaults may be anything."""
    for cudnn, tf32, precision in ((False, False, "highest"), (True, False, "highest"), (False, True, "high")):
        torch.backends.cuda.enable_cudnn_sdp(not cudnn)
        torch.set_float32_matmul_precision("medium")
        switch_kernels(cudnn, tf32)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.get_float32_matmul_precision() == precision


def test_a_run_keeps_what_auto_was(tmp_path: Path) -> None:
    """In its folder and checkpoints. Machines that do not train find the same run, a start in another precision does not.

    Training and evaluation set the switches.
    """
    recipe = tiny_recipe(tmp_path, **AUTO, evaluation={"at_end": False})
    recipe["model"]["tf32"] = True
    recipe["curriculum"] = {"stage1": {"samples": 16, "learning_rate": 1e-3, "max_steps": 4}}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert main(["train", str(path)]) == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "high"
    run = tmp_path / "tiny"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["dtype"] == "fp32"
    assert read_recipe(complete_checkpoints(run / "checkpoints")[-1]).model.dtype == "fp32"
    check_run_folder(load_recipe(path))
    assert main(["train", str(path), "model.dtype=bf16"]) == 2
    assert main(["train", str(path)]) == 0
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert load_for_evaluation(run / "hf").model.dtype == torch.float32
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
