"""What the sections of gpu.py share: the result and the guard around whatever may fail, the clock, the card, the models."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import SMOLLM2_135M, VOCABULARIES
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from rim_dist.attention import flex

Step = Callable[[], Any]
PEAK_FLOPS = 989e12  # bf16 without sparsity, of an H100 and an H200 alike; MFU is a share of this whatever the card

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {**SMOLLM2_135M, "vocab_size": VOCABULARIES["49k"]},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,  # of 32: the other 24 cost what these cost
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
SMOKE_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


class OutOfTime(BaseException):
    """The section's time is spent. Not an Exception: neither a library nor `Context.attempt` may swallow it."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds; an alarm that was set around it (a test's) goes on."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    began = time.perf_counter()
    handler = signal.signal(signal.SIGALRM, ring)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, outer - (time.perf_counter() - began)))


def first_line(text: str, length: int) -> str:
    return text.strip().partition("\n")[0][:length]


def described(error: Exception) -> dict[str, str]:
    """An error as an entry of the result. To be called where it is caught."""
    return {"error": f"{type(error).__name__}: {str(error)[:600]}", "trace": traceback.format_exc()[-3000:]}


@dataclass
class Context:
    """One run of the check: the device it runs on, what it has found, and the time it has left.

    `smoke`: tiny sizes on the CPU, which test the check itself. `budget`: seconds in all. `path`: the JSON file.
    """

    device: torch.device
    smoke: bool
    budget: float
    path: Path
    began: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=lambda: {"sections": {}})
    rows: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def left(self) -> float:
        return self.budget - self.elapsed()

    def row(self, text: str) -> None:
        """A line of the table."""
        self.rows.append(text)
        print(f"[{self.elapsed():6.1f}s] {text}", flush=True)

    def save(self) -> None:
        """Write all that was found so far; whoever ends the run finds a whole file."""
        self.result |= {"seconds": self.elapsed(), "table": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.result, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def leave_out(self, name: str) -> None:
        """A section that was asked for and has no time left: an error like any other."""
        self.result["sections"][name] = {"error": f"left out: {self.left():.0f} s left"}
        self.row(f"{name}: LEFT OUT, {self.left():.0f} s left")
        self.save()

    @contextlib.contextmanager
    def guard(self, name: str, seconds: float) -> Iterator[dict[str, Any]]:
        """A section and its time limit, around its entry of the result; what goes wrong inside becomes the entry's `error`."""
        began = time.perf_counter()
        entry = self.result["sections"].setdefault(name, {})
        limit = min(seconds, max(1.0, self.left()))
        try:
            with alarm(limit):
                yield entry
        except OutOfTime:
            entry["error"] = f"stopped after {limit:.0f} s"
            self.row(f"{name}: STOPPED after its {limit:.0f} s")
        except Exception as error:
            entry |= described(error)
            self.row(f"{name}: FAILED {type(error).__name__}: {first_line(str(error), 150)}")
        finally:
            entry["seconds"] = round(time.perf_counter() - began, 2)
            self.save()

    @contextlib.contextmanager
    def attempt(self, entry: dict[str, Any], key: str, label: str) -> Iterator[None]:
        """One measurement of a section: if it fails, its own entry says so and the section goes on."""
        try:
            yield
        except Exception as error:
            entry[key] = described(error)
            self.row(f"{label} FAILED {type(error).__name__}: {first_line(str(error), 100)}")
        finally:
            self.save()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Give back what is no longer used, and measure the peak from here on."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def seconds_of(self, run: Step) -> float:
        """Seconds of one run that starts and ends with an idle device."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def mean_seconds(self, run: Step, times: int) -> float:
        """Seconds of a run, of so many in a row, after two to warm up."""
        run()
        run()
        return self.seconds_of(lambda: [run() for _ in range(times)]) / times


def open_context(smoke: bool, budget: float, path: Path, began: float) -> Context:
    """The context of a run, and the process made ready for it."""
    hide_cce()
    if smoke:
        torch.set_num_threads(1)
        # Uncompiled, FlexAttention's plain mathematics have a backward pass on a CPU as well; only this check forbids it.
        torch_flex._validate_device = lambda *_tensors: None
        return Context(torch.device("cpu"), smoke, budget, path, began)
    torch.cuda.set_device(0)
    return Context(torch.device("cuda:0"), smoke, budget, path, began)


def hide_cce() -> None:
    """Let the loss compute without cut-cross-entropy, which it takes wherever it can be imported."""
    sys.modules["cut_cross_entropy"] = None  # type: ignore[assignment]


@contextlib.contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """SDPA without cuDNN, which builds a plan for every new shape: its flash and math kernels serve."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def graphs() -> int:
    """Graphs that Dynamo has made so far."""
    return int(counters["stats"].get("unique_graphs", 0))


def reset_dynamo() -> None:
    """Forget what was compiled, the flex path's kernel included."""
    torch._dynamo.reset()
    flex._kernel.cache_clear()


def shape_of(cx: Context, name: str) -> dict[str, Any]:
    return {**SHAPES[name], **SMOKE_SHAPE} if cx.smoke else SHAPES[name]


def llama(cx: Context, name: str) -> Any:
    """A Llama of this shape in bf16 with random weights, made on the device, with no token of its own that ends a text."""
    torch.manual_seed(0)
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    fields = {**shape_of(cx, name), "max_position_embeddings": 131_072, **no_tokens}
    with cx.device:
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**fields), dtype=torch.bfloat16)
