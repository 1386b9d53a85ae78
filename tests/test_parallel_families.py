"""Every family, kernel and head count under tensor and sequence ranks against unrolled plain runs; no leak between readouts."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from parallel_families import DOCS, LEAK_CALLS, LOSS_CALLS, OTHER_CALLS, QUICK_CALLS, SEQUENCE, SLOW_CALLS, run_calls
from parallel_matrix import TOLERANCE

REFUSED = {
    "Qwen3-MoE": "experts is split 'moe_tp_experts'",
    "Mixtral": "experts is split 'moe_tp_experts'",
    "GPT-2": "no tensor parallel plan",
    "OPT": "no tensor parallel plan",
}


@pytest.fixture(scope="module", params=[2, 4])
def returned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, Any]]]:
    """What was called on so many ranks, by function: (arguments, result). One process group for all."""
    ranks = request.param
    calls = [*(QUICK_CALLS if ranks == 2 else ()), *OTHER_CALLS[ranks], *LEAK_CALLS[ranks], *LOSS_CALLS[ranks]]
    results = run_calls(calls, ranks, tmp_path_factory.mktemp("calls"))
    found: dict[str, list[tuple[str, Any]]] = {"measure": [], "leak": [], "vocabulary_loss": []}
    for (name, arguments), result in zip(calls, results, strict=True):
        found[name.partition(":")[2]].append((", ".join(map(str, arguments)), result))
    return found


@pytest.mark.timeout(600)
def test_parallel_equals_unrolled(returned: dict[str, list[tuple[str, Any]]]) -> None:
    check(returned["measure"])


@pytest.mark.timeout(600)
@pytest.mark.thorough
def test_every_path_of_every_family(tmp_path: Path) -> None:
    names = [", ".join(map(str, arguments)) for _, arguments in SLOW_CALLS]
    check(list(zip(names, run_calls(SLOW_CALLS, 2, tmp_path), strict=True)))


def check(measured: list[tuple[str, Any]]) -> None:
    """Loss and gradients on 2 and 4 ranks, relative to the loss and to the model's largest gradient entry; or refused."""
    for name, result in measured:
        if "refused" in result:
            family = name.partition(",")[0]
            assert "TP2" in name
            assert REFUSED[family] in result["refused"]
        else:
            assert result["loss"] <= TOLERANCE, (name, result)
            assert result["gradient"] <= TOLERANCE, (name, result)


def test_no_readout_sees_another(returned: dict[str, list[tuple[str, Any]]]) -> None:
    """Not one bit of another token's logits moves, wherever ranks have the tokens."""
    for name, result in returned["leak"]:
        assert result["others"] == 0.0, name
        assert result["own"] > 1e-3, name  # the change itself is seen


def test_loss_on_vocabulary_parallel_logits(returned: dict[str, list[tuple[str, Any]]]) -> None:
    """As torch's cross-entropy on whole logits: a scale, a softcap, a bias, trained rows, padding rows, no targets."""
    for name, result in returned["vocabulary_loss"]:
        assert result <= TOLERANCE, (name, result)


def test_the_table_says_what_is_measured() -> None:
    """docs/families.md lists every family (`python tests/parallel_families.py --write`)."""
    page = DOCS.read_text(encoding="utf-8").partition("<!-- parallel -->")[2]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", page.partition("<!-- end of parallel -->")[0], re.MULTILINE))
    for family, (number, way) in itertools.product(FAMILIES, enumerate(("TP2", *SEQUENCE))):
        word = "refused" if way == "TP2" and family in REFUSED else "exact"
        assert rows[family].split(" | ")[number].startswith(word), (family, way)
