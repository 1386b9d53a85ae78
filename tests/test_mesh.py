"""The mesh without processes: coordinates, groups, the table, and degrees that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from rim_dist.errors import ConfigError
from rim_dist.parallel.degrees import check_tensor_degree, choose_mode, fit_degrees
from rim_dist.parallel.mesh import Coordinates, Degrees, Mesh, describe, groups_of
from rim_dist.recipe import load_recipe

Make = Callable[..., Path]
MESHES = [Degrees(*d) for d in ((1, 1, 1), (2, 1, 1), (1, 3, 2), (2, 2, 2), (4, 3, 5), (8, 1, 16))]


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_every_rank_has_its_own_coordinates(degrees: Degrees) -> None:
    coordinates = [degrees.coordinates(rank) for rank in range(degrees.ranks)]
    assert [degrees.rank_of(at) for at in coordinates] == list(range(degrees.ranks))
    assert len(set(coordinates)) == degrees.ranks == degrees.tensor * degrees.shards
    assert coordinates == sorted(coordinates)  # tensor innermost, then sequence, then data
    for kind in ("tensor", "sequence", "data"):
        groups = groups_of(degrees, kind)
        assert sorted(rank for group in groups for rank in group) == list(range(degrees.ranks))
        for group in groups:
            assert [getattr(degrees.coordinates(rank), kind) for rank in group] == list(range(getattr(degrees, kind)))
            assert len({degrees.coordinates(rank)._replace(**{kind: 0}) for rank in group}) == 1


def test_tensor_ranks_are_consecutive() -> None:
    degrees = Degrees(tensor=2, sequence=3, data=2)
    assert groups_of(degrees, "tensor")[:2] == [[0, 1], [2, 3]]
    assert groups_of(degrees, "sequence")[:2] == [[0, 2, 4], [1, 3, 5]]
    assert groups_of(degrees, "data")[:2] == [[0, 6], [1, 7]]
    assert degrees.coordinates(9) == Coordinates(data=1, sequence=1, tensor=1)


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_what_counts_once_and_what_draws_alike(degrees: Degrees) -> None:
    """Tensor ranks have the same number among the shards, others different ones; one of them counts."""
    meshes = [Mesh(degrees, rank, degrees.coordinates(rank)) for rank in range(degrees.ranks)]
    for group in groups_of(degrees, "tensor"):
        assert len({meshes[rank].shard for rank in group}) == 1
        assert [meshes[rank].counts for rank in group] == [True] + [False] * (degrees.tensor - 1)
    assert {mesh.shard for mesh in meshes} == set(range(degrees.shards))


def test_table() -> None:
    degrees = Degrees(tensor=2, sequence=2, data=4)
    nodes = [f"n{rank // 8}" for rank in range(16)]
    table = describe(degrees, nodes).splitlines()
    assert [line.split() for line in table] == [
        ["degree", "groups", "nodes", "ranks", "of", "the", "first", "group"],
        ["tensor", "2", "8", "1", "0,", "1"],
        ["sequence", "2", "8", "1", "0,", "2"],
        ["data", "4", "4", "2", "0,", "4,", "8,", "12"],
    ]
    assert "0, 1, 2, 3, 4, 5, 6, 7, ... 15" in describe(Degrees(data=16), nodes)


@pytest.mark.parametrize(
    ("degrees", "nodes", "named"),
    [
        (Degrees(tensor=4, data=1), ["a", "a", "b", "b"], "0 on a, 1 on a, 2 on b, 3 on b"),
        (Degrees(tensor=2, data=2), ["a", "b", "a", "b"], "0 on a, 1 on b"),  # ranks assigned in turn
        (Degrees(tensor=2, data=3), ["a", "a", "a", "b", "b", "b"], "2 on a, 3 on b"),  # an odd number on a node
    ],
    ids=["wide", "in turn", "odd"],
)
def test_tensor_groups_over_nodes_are_warned_of(degrees: Degrees, nodes: list[str], named: str) -> None:
    *_, warning = describe(degrees, nodes).splitlines()
    assert warning.startswith("warning: ranks of a tensor group are on several nodes")
    assert f"({named})" in warning
    assert "warning" not in describe(degrees, ["a"] * degrees.ranks)


@pytest.mark.parametrize(
    ("tensor", "sequence", "ranks", "message"),
    [
        (2, 2, 6, "takes 4; the nearest that can: 4 or 8 ranks, or parallel.tensor 2 with parallel.sequence 1 on 6 ranks"),
        (4, 1, 2, "takes 4; the nearest that can: 4 ranks, or parallel.tensor 2 with parallel.sequence 1 on 2 ranks"),
        (3, 4, 8, "takes 12; the nearest that can: 12 ranks, or parallel.tensor 1 with parallel.sequence 4 on 8 ranks"),
        (2, 1, 7, "takes 2; the nearest that can: 6 or 8 ranks, or parallel.tensor 1 with parallel.sequence 1 on 7 ranks"),
    ],
)
def test_ranks_that_cannot_be_divided(recipe_file: Make, tensor: int, sequence: int, ranks: int, message: str) -> None:
    recipe = load_recipe(recipe_file(parallel={"tensor": tensor, "sequence": sequence}))
    with pytest.raises(ConfigError, match=f"^{ranks} ranks cannot be divided: .*({message})$"):
        fit_degrees(recipe, ranks)


def test_ranks_that_fit(recipe_file: Make) -> None:
    recipe = load_recipe(recipe_file(parallel={"tensor": 2, "sequence": 3}))
    assert fit_degrees(recipe, 24) == Degrees(tensor=2, sequence=3, data=4)
    with pytest.raises(ConfigError, match="16 samples cannot be spread over 17 data ranks; allowed: 17 or more"):
        fit_degrees(recipe, 2 * 3 * 17)


@pytest.mark.parametrize(
    ("tensor", "heads", "kv_heads", "width", "message"),
    [
        (3, 8, 4, 66, "3 ranks cannot share 8 attention heads and 4 key/value heads of llama; the nearest that can: 2"),
        (8, 8, 4, 64, "8 ranks cannot share 4 key/value heads of llama; the nearest that can: 4 (allowed: 1, 2, 4)"),
        (4, 8, 8, 66, "4 ranks cannot share 66 MLP channels of llama; the nearest that can: 2 (allowed: 1, 2)"),
        (2, 9, 3, 64, "9 attention heads and 3 key/value heads of llama; the nearest that can: 1 (allowed: 1)"),
    ],
)
def test_heads_that_ranks_cannot_share(tensor: int, heads: int, kv_heads: int, width: int, message: str) -> None:
    config = LlamaConfig(
        hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=width
    )
    with pytest.raises(ConfigError) as error:
        check_tensor_degree(tensor, config)
    assert message in str(error.value)
    check_tensor_degree(1, config)


def test_heads_that_ranks_can_share() -> None:
    check_tensor_degree(4, LlamaConfig(num_attention_heads=32, num_key_value_heads=8, intermediate_size=11008))
    check_tensor_degree(6, GPT2Config(n_head=12))


def test_sequence_mode() -> None:
    assert choose_mode("auto", 4, 8, 8) == "ulysses"
    assert choose_mode("auto", 4, 8, 2) == "ulysses"  # key heads are copied
    assert choose_mode("auto", 3, 8, 8) == "allgather_kv"
    assert choose_mode("auto", 16, 8, 8) == "allgather_kv"
    assert choose_mode("allgather_kv", 7, 9, 3) == "allgather_kv"
    assert choose_mode("auto", 1, 9, 3) == "ulysses"
    for degree, nearest in ((3, "2 (allowed: 1, 2, 4, 8)"), (7, "8 (allowed"), (64, "8 (allowed")):
        with pytest.raises(ConfigError) as error:
            choose_mode("ulysses", degree, 8, 2)
        assert f"parallel.sequence: {degree} ranks cannot share the 8 heads (2 for keys)" in str(error.value)
        assert f"the nearest that can: {nearest}" in str(error.value)
        assert "parallel.sequence_mode allgather_kv" in str(error.value)
