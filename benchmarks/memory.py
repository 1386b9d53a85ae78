"""Peak memory of a training step: against padded rows and full logits, and as memory blocks grow.

    python benchmarks/memory.py [--quick]

Every figure is the peak resident memory of a fresh process above what it holds with model and gradients in place, so that
only what the step needs is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import VOCABULARIES, block_ids, llama, publish, real_rows
from step_time import SAMPLES, PaddedRows, padded_step, rim_step

from rim_dist.data.samples import Readout, Row
from rim_dist.model.build import recompute_layers
from rim_dist.objective.forward import install_readout_loss
from rim_dist.table import Table

GROWTH = [(4, 1024), (8, 1024), (16, 1024), (32, 1024), (64, 1024)]
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


def peak_of(step: Any, model: torch.nn.Module) -> int:
    """Bytes above model and gradients while the step runs."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign,assignment]  # noqa: ARG005
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = resident(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        step()
    finally:
        done = True
        thread.join()
    return peak - before


def against_padded(which: str, vocabulary: str, layers: int) -> int:
    size = VOCABULARIES[vocabulary]
    model = llama(size, num_hidden_layers=layers).train()
    ids = block_ids(size, 2)
    rows = real_rows(SAMPLES, "stage2", 8, len(ids), size, seed=1)
    if which == "rim":
        install_readout_loss(model)
        return peak_of(rim_step(model, rows, ids), model)
    return peak_of(padded_step(model, PaddedRows(rows, ids)), model)


def large_blocks(blocks: int, memory: int, checkpointing: bool) -> tuple[int, float]:
    """Peak bytes and seconds of one sample with `blocks` blocks of `memory` tokens, a tiny model, one rank."""
    vocabulary = 1000
    model = llama(vocabulary, **TINY, max_position_embeddings=1 << 17).train()
    if checkpointing:
        recompute_layers(model, offload=False)
    install_readout_loss(model)
    ids = block_ids(vocabulary, memory)
    row = Row(list(range(80)), blocks, len(ids), tuple(Readout(k, [1, 2, 3, 4, 5], 1.0) for k in range(1, blocks + 1)))
    start = time.perf_counter()
    peak = peak_of(rim_step(model, [row], ids), model)
    return peak, time.perf_counter() - start


def in_a_process(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers, memory blocks up to 16 x 1,024, nothing written")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, *rest = options.one
        if kind == "large":
            result: Any = large_blocks(int(rest[0]), int(rest[1]), rest[2] == "True")
        else:
            result = against_padded(kind, rest[0], int(rest[1]))
        print(json.dumps(result))
        return
    layers = 4 if options.quick else 30
    figures: dict[str, Any] = {"padded": {}, "blocks": []}
    lines = []
    for vocabulary in VOCABULARIES:
        rim, padded = (in_a_process(which, vocabulary, layers) for which in ("rim", "padded"))
        figures["padded"][vocabulary] = {"rim": rim, "padded": padded}
        lines.append([vocabulary, f"{rim / 2**20:.0f}", f"{padded / 2**20:.0f}", f"{rim / padded:.2f}"])
    text = f"Stage 2, K = 8, M = 2, {SAMPLES} samples with GSM8K's lengths, {layers} layers of SmolLM2-135M, fp32.\n\n"
    text += Table(["vocabulary", "rim, MiB", "padded rows and full logits, MiB", "ratio"], lines).markdown()
    lines = []
    for checkpointing in (False, True):
        points = []
        for blocks, memory in GROWTH[:3] if options.quick else GROWTH:
            peak, seconds = in_a_process("large", blocks, memory, checkpointing)
            points.append((blocks * memory, peak))
            figures["blocks"].append(
                {"K": blocks, "M": memory, "checkpointing": checkpointing, "peak": peak, "seconds": seconds}
            )
            lines.append(
                [blocks * memory, checkpointing, f"{peak / 2**20:.0f}", f"{peak / (blocks * memory):.0f}", f"{seconds:.1f}"]
            )
        x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
        a = torch.stack([x, torch.ones_like(x)], dim=1)
        fit = torch.linalg.lstsq(a, y.unsqueeze(1)).solution.squeeze(1)
        left = 1 - float(((a @ fit - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        figures.setdefault("fit", []).append({"bytes_per_token": float(fit[0]), "constant": float(fit[1]), "r2": left})
        lines.append(["linear fit", checkpointing, f"{fit[1] / 2**20:.0f} + {fit[0]:.0f} B a token", f"R2 {left:.4f}", ""])
    text += "\nOne sample, question of 80 tokens, M = 1,024, a 2-layer 64-wide model:\n\n"
    text += Table(["K x M", "checkpointing", "peak, MiB", "bytes a memory token", "seconds"], lines).markdown()
    publish("memory", "Memory of a step", text, figures, options.quick)


if __name__ == "__main__":
    main()
