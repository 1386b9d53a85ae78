"""Every model family under tensor and sequence ranks against unrolled plain runs; writes a table of docs/families.md.

python tests/parallel_families.py            # print the table (a minute or two on two cores)
python tests/parallel_families.py --write    # and put it into docs/families.md
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import BLOCK, FAMILIES, KERNELS, TRAINED_ON_CPU, Difference, build, expected, pack_samples, random_samples
from parallel_matrix import LAYOUTS, TOLERANCE, Layout

from rim_dist.attention.registration import use_rim_attention
from rim_dist.attention.visibility import READOUT
from rim_dist.data.rows import Batch, Targets, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError
from rim_dist.objective import loss as loss_module
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.objective.loss import HeadWeights, LogitRule, plain_cross_entropy, weighted_cross_entropy
from rim_dist.parallel.mesh import Degrees, Mesh, make_mesh
from rim_dist.parallel.sequence import shard_row
from rim_dist.parallel.tensor import Slice, TensorRank, Vocabulary, slice_of, split_model, sum_shared_gradients
from rim_dist.table import Table

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
SEQUENCE = ("SP2 ulysses", "SP2 allgather_kv")
SEQUENCE_4 = ("SP4 ulysses", "SP4 allgather_kv")
WAYS = {
    **{name: LAYOUTS[name] for name in ("TP2", *SEQUENCE)},
    **{name: Layout(name, sequence=4, mode=name.split()[1]) for name in SEQUENCE_4},
    "TP4": Layout("TP4", tensor=4),
}
Call = tuple[str, list[Any]]


# ---- what ranks call (tests/workers/call.py) -----------------------------------------------------------------


@functools.cache
def mesh_of(way: str) -> Mesh:
    layout = WAYS[way]
    assert layout.ranks == dist.get_world_size()
    return make_mesh(Degrees(layout.tensor, layout.sequence, 1), dist.get_rank(), "cpu")


def own_part(batch: Batch, way: str) -> Batch:
    mode: Any = WAYS[way].mode
    return shard_row(batch, mesh_of(way), mode)


def largest(values: Sequence[float]) -> list[float]:
    """The largest of each value over the ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def measure(family: str, way: str, kernel: str, bidirectional: bool = False, seed: int = 0) -> dict[str, Any]:
    """Loss and gradients of a packed batch on all ranks against the unrolled runs of one; or why the family is refused."""
    loss, wanted = expected(family, seed, bidirectional)
    mesh = mesh_of(way)
    model = build(family).train()
    try:
        if mesh.degrees.tensor > 1:
            split_model(model, TensorRank(mesh.coordinates.tensor, mesh.degrees.tensor, mesh.tensor_group))
    except ModelError as error:
        return {"refused": str(error)}
    sum_shared_gradients(model)
    install_readout_loss(model)
    use_rim_attention(model, kernel)
    batch = own_part(pack_samples(random_samples(seed), bidirectional), way)
    with torch.set_grad_enabled(kernel in TRAINED_ON_CPU):
        weighted_sum, token_losses = run_batch(model, batch)
    sums = torch.stack([weighted_sum.detach(), (token_losses * batch.targets.weight).sum()])
    if mesh.sequence_group is not None:
        dist.all_reduce(sums, group=mesh.sequence_group)
    off = max(abs(float(value) / loss - 1) for value in sums)
    gradient = 0.0
    if kernel in TRAINED_ON_CPU:
        weighted_sum.backward()
        entry = max(float(g.abs().max()) for g in wanted.values())
        names = [name for name, p in model.named_parameters() if p.grad is not None]
        assert names == list(wanted)
        for name, parameter in model.named_parameters():
            if (got := parameter.grad) is None:
                continue
            if mesh.sequence_group is not None:
                dist.all_reduce(got, group=mesh.sequence_group)
            split = slice_of(parameter)
            whole = wanted[name] if split is None else split.of(wanted[name])
            gradient = max(gradient, float((got - whole).abs().max()) / entry)
    return asdict(Difference(*largest([off, gradient])))


def leak(family: str, way: str, kernel: str) -> dict[str, float]:
    """A readout's tokens changed at equal lengths: how far the logits of all other tokens move, and its own."""
    pick = random.Random(1)
    question = [pick.randrange(94) for _ in range(7)]
    readouts = tuple(Readout(k, [pick.randrange(94) for _ in range(9)], 1.0) for k in range(1, 5))
    changed = (readouts[0], Readout(2, [pick.randrange(94) for _ in range(9)], 1.0), *readouts[2:])
    model = build(family).eval()
    use_rim_attention(model, kernel)
    found = []
    for some in (readouts, changed):
        batch = own_part(pack([Row(question, 4, len(BLOCK), some)], BLOCK), way)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False
            ).logits[0]
        found.append(logits)
    places = batch.layout.queries
    own = ((places.kind == READOUT) & (places.block == 2))[0]
    moved = (found[0] - found[1]).abs().amax(dim=1)
    others, itself = largest([float(moved[part].max()) if part.any() else 0.0 for part in (~own, own)])
    return {"others": others, "own": itself}


def vocabulary_loss(way: str, size: int, targets: int, options: Sequence[str]) -> float:
    """The loss on vocabulary-parallel logits against torch's on whole ones: sums, token losses and all gradients.

    `options`: `scale`, `softcap`, `bias`, `rows` (trained rows stand in for three of the head's). Relative difference.
    """
    mesh, generator = mesh_of(way), torch.Generator().manual_seed(0)
    ranks, channels = mesh.degrees.tensor, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight, bias, hidden = draw(size, channels), draw(size) if "bias" in options else None, draw(targets, channels)
    ids = (0, size // 2, size - 1) if "rows" in options else ()
    rows = draw(len(ids), channels) if ids else None
    rule = LogitRule(0.3 if "scale" in options else 1.0, 4.0 if "softcap" in options else None)
    some = torch.arange(targets)
    labels = torch.randint(0, size, (targets,), generator=generator)
    wanted = Targets(
        some, labels, torch.rand(targets, generator=generator), torch.zeros_like(some), torch.zeros_like(some).bool()
    )

    split = Slice(0, -(-size // ranks), size, mesh.coordinates.tensor)
    vocabulary = Vocabulary(split.start, split.size, split.real, size, mesh.tensor_group)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        own = split.of(tensor).clone()
        own[split.real :] = 50.0  # a padding row must not be part of the distribution, whatever is in it
        return own

    whole = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias, rows)]
    h, w, b, r = whole
    assert h is not None
    assert w is not None
    head = w if r is None else w.index_copy(0, torch.tensor(ids), r)
    total, losses = plain_cross_entropy(torch.nn.functional.linear(h, head, b), rule, wanted)
    (total * 0.7).backward()

    tensors = [hidden, part(weight), None if bias is None else part(bias), rows]
    parts = [None if t is None else t.clone().requires_grad_() for t in tensors]
    own_head = HeadWeights(parts[1], parts[2], parts[3], ids, vocabulary)  # type: ignore[arg-type]
    # Chunks of a few positions, and a gradient scale that the backward pass takes out again.
    before, loss_module.LOGITS_ENTRIES["cpu"] = loss_module.LOGITS_ENTRIES["cpu"], 3 * split.size
    got, got_losses = weighted_cross_entropy(parts[0], own_head, rule, wanted, gradient_scale=0.7)  # type: ignore[arg-type]
    loss_module.LOGITS_ENTRIES["cpu"] = before
    (got * 0.7).backward()
    pairs = [(got, total), (got_losses, losses)]
    for number, (mine, theirs) in enumerate(zip(parts, whole, strict=True)):
        if mine is not None and theirs is not None:
            assert mine.grad is not None
            assert theirs.grad is not None
            pairs.append((mine.grad, split.of(theirs.grad) if number in (1, 2) else theirs.grad))
    offs = [float((a - e).abs().max() / e.abs().max().clamp_min(1e-3)) for a, e in pairs if e.numel()]
    return largest([max(offs)])[0]


# ---- what there is to call -----------------------------------------------------------------------------------


def call(function: str, *arguments: Any) -> Call:
    return (f"parallel_families:{function}", list(arguments))


FAMILY_CALLS = {
    **{(family, "TP2", "split"): call("measure", family, "TP2", "split") for family in FAMILIES},
    **{
        (family, way, kernel): call("measure", family, way, kernel)
        for family, way, kernel in itertools.product(FAMILIES, SEQUENCE, KERNELS)
    },
}


def _quick(family: str, way: str, kernel: str) -> bool:
    """Every family in every way, by one of the two kernels that a CPU trains with, in turns; by flex those of two variants."""
    if way == "TP2":
        return True
    if kernel not in TRAINED_ON_CPU:
        return family in ("Llama", "Gemma 2")
    return (list(FAMILIES).index(family) + SEQUENCE.index(way) + TRAINED_ON_CPU.index(kernel)) % 2 == 0


QUICK_CALLS = [c for key, c in FAMILY_CALLS.items() if _quick(*key)]
SLOW_CALLS = [c for key, c in FAMILY_CALLS.items() if not _quick(*key)]
# Beside the families: key heads that several ranks get, head counts that do not divide, blocks bidirectional inside.
OTHER_CALLS = {
    2: [
        *(call("measure", "Llama, 4 heads, 1 for keys", way, kernel) for way in SEQUENCE for kernel in TRAINED_ON_CPU),
        *(call("measure", "Llama, 6 heads, 3 for keys", way, kernel) for way in SEQUENCE for kernel in TRAINED_ON_CPU),
        *(call("measure", "Llama, 3 heads, 1 for keys", "SP2 allgather_kv", kernel) for kernel in TRAINED_ON_CPU),
        *(
            call("measure", family, way, kernel, True)
            for family, way, kernel in itertools.product(("Llama", "GPT-2", "Phi-3"), SEQUENCE, KERNELS)
        ),
        call("measure", "Llama", "TP2", "dense", True),
        call("measure", "Gemma 2", "TP2", "dense"),
    ],
    4: [
        *(call("measure", "Llama, 8 heads, 2 for keys", way, kernel) for way in SEQUENCE_4 for kernel in TRAINED_ON_CPU),
        *(call("measure", "Llama, 4 heads, 1 for keys", way, "split") for way in SEQUENCE_4),
        *(call("measure", "Gemma 2", way, kernel) for way in SEQUENCE_4 for kernel in KERNELS),
        call("measure", "Llama, 6 heads, 3 for keys", "SP4 allgather_kv", "split"),
        call("measure", "Llama, 3 heads, 1 for keys", "SP4 allgather_kv", "split", True),
    ],
}
_PERTURBED = ("Llama", "Gemma 2", "Mistral, sliding window")
LEAK_CALLS = {
    2: [call("leak", *c) for c in itertools.product(_PERTURBED, SEQUENCE, KERNELS)],
    4: [call("leak", *c) for c in itertools.product(("Llama",), SEQUENCE_4, KERNELS)],
}
_OPTIONS = ((), ("scale",), ("softcap",), ("bias",), ("rows",), ("scale", "softcap", "bias", "rows"))
LOSS_CALLS = {
    2: [call("vocabulary_loss", "TP2", size, count, o) for o in _OPTIONS for size, count in ((97, 20), (8, 5), (97, 0))],
    4: [call("vocabulary_loss", "TP4", size, 7, o) for o in (_OPTIONS[0], _OPTIONS[-1]) for size in (5, 98)],
}


def run_calls(calls: Sequence[Call], ranks: int, folder: Path, timeout: float = 600) -> list[Any]:
    """What the calls return on so many ranks, in one process group."""
    from ranks import run

    todo, done = folder / f"calls-{ranks}.json", folder / f"returned-{ranks}.json"
    todo.write_text(json.dumps(calls))
    run("fork", ranks, ["tests/workers/call.py", str(todo), str(done)], timeout=timeout, OMP_NUM_THREADS="1")
    return json.loads(done.read_text())


def table(results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    rows = []
    for family in FAMILIES:
        cells = []
        for way in ("TP2", *SEQUENCE):
            found = [r for (f, w, _), r in results.items() if (f, w) == (family, way)]
            if "refused" in found[0]:
                cells.append("refused: " + found[0]["refused"].partition(": ")[2].partition(";")[0])
            else:
                loss, gradient = (max(r[field] for r in found) for field in ("loss", "gradient"))
                assert max(loss, gradient) <= TOLERANCE, (family, way, found)
                cells.append(f"exact ({loss:.0e}, {gradient:.0e})")
        rows.append([family, *cells])
    return Table(["family", "TP2", *SEQUENCE], rows, align="l").markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_calls(list(FAMILY_CALLS.values()), 2, Path(folder))
    text = table(dict(zip(FAMILY_CALLS, results, strict=True)))
    print(text)
    if arguments.write:
        before, start, rest = DOCS.read_text(encoding="utf-8").partition("<!-- parallel -->\n")
        _, end, after = rest.partition("<!-- end of parallel -->")
        DOCS.write_text(before + start + text + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
