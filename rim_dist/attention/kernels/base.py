"""What an attention kernel declares, and what a run demands of it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rim_dist.config import Recipe, StageName
from rim_dist.planning.workload import Workload

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Demands:
    """What a run demands of its attention.

    `dropout`: of attention weights. `sequence_mode`: None without sequence parallelism. `local`: the run
    is on this machine, so that the packages installed here count.
    """

    model_type: str
    head_dim: int
    sliding_window: int | None
    softcap: float | None
    device: str
    dtype: str
    dropout: float
    bidirectional: bool
    sequence_mode: str | None
    micro_batch_tokens: int
    local: bool = False

    @staticmethod
    def of(
        recipe: Recipe, config: Any, device: str, sequence_mode: str, stage: StageName | None = None, local: bool = False
    ) -> Demands:
        """The demands of a stage with a model (its transformers config) on a type of device; without `stage` those of all."""
        text = config.get_text_config()
        return Demands(
            config.model_type,
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None,
            getattr(text, "attn_logit_softcapping", None),
            device,
            recipe.model.dtype,
            (recipe.largest_dropouts if stage is None else recipe.dropouts(stage)).attention,
            recipe.memory.inside_block == "bidirectional",
            sequence_mode if recipe.parallel.sequence > 1 else None,
            recipe.optimizer.micro_batch_tokens,
            local,
        )


class Kernel:
    """A way to compute attention under the RiM mask. The first line of a kernel's docstring describes it to users.

    A feature counts as missing until a kernel declares it. Everything missing is refused before a run, with the reason.
    """

    # Module of the function `attend`, imported when the kernel is used; empty: the kernel's own file, where the function then
    # imports torch inside, so that reading declarations does not load it.
    module: ClassVar[str] = ""
    # Types of device with a forward and a backward pass.
    devices: ClassVar[tuple[str, ...]] = ()
    # `model.dtype`s it computes in.
    dtypes: ClassVar[tuple[str, ...]] = ()
    # Smallest and largest number of channels of a head; None: no limit.
    head_dims: ClassVar[tuple[int, int | None]] = (1, None)
    # What a layer may ask for (`rim_dist.attention.dense.ScoreRule`).
    dropout: ClassVar[bool] = False
    sliding_window: ClassVar[bool] = False
    softcap: ClassVar[bool] = False
    sinks: ClassVar[bool] = False
    # `memory.inside_block: bidirectional`.
    bidirectional: ClassVar[bool] = False
    # `parallel.sequence_mode`s. Under `ulysses` it gets whole rows, under `allgather_kv` the queries in `RowLayout.chunks`.
    sequence_modes: ClassVar[tuple[str, ...]] = ()
    # Whether it runs on layouts without `RowLayout.spans`: decoding with a cache, continuous thoughts.
    decoding: ClassVar[bool] = False
    # Python packages that must be installed where it runs.
    packages: ClassVar[tuple[str, ...]] = ()
    # `model.attention: auto` tries kernels in this order, the highest first; None: never.
    precedence: ClassVar[int | None] = None
    # `auto` takes it for micro-batches of at most so many tokens; None: of any size.
    auto_tokens: ClassVar[int | None] = None
    # Why `auto` takes it; empty: because those of higher precedence cannot be used.
    auto_reason: ClassVar[str] = ""
    # For the planner: whether its output is joined from the outputs of several calls, which takes another copy.
    joins_outputs: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name of the kernel's file."""
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def description(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    @functools.cached_property
    def attend(self) -> Callable[..., torch.Tensor]:
        """The function `attend(query, key, value, layout, rule)` of its module.

        Takes `query` `[rows, heads, queries, head_dim]`, key/value with KV heads, a `RowLayout` and a `ScoreRule`; returns
        `[rows, queries, heads, head_dim]`.
        """
        return importlib.import_module(self.module or type(self).__module__).attend

    def mask_bytes(self, load: Workload, entry: int, device: str, dropout: float, gathered: int) -> int:  # noqa: ARG002 - no masks
        """Bytes of the masks that it builds once per micro-batch for all layers, for the planner.

        `entry`: bytes of an activation's entry. `gathered`: ranks that share the row's queries (`allgather_kv`), else 1.
        """
        return 0

    def refusal(self, demands: Demands) -> str | None:
        """Why the kernel cannot do what a run demands; None if it can."""
        d, model, (least, most) = demands, demands.model_type, self.head_dims
        missing = [name for name in self.packages if d.local and importlib.util.find_spec(name) is None]
        window = d.sliding_window is not None and not self.sliding_window
        softcap = d.softcap is not None and not self.softcap
        bidirectional = d.bidirectional and not self.bidirectional
        mode = d.sequence_mode not in (None, *self.sequence_modes)
        reasons = (
            (d.dropout and not self.dropout, f"it has no dropout, and attention_dropout is {d.dropout:g}"),
            (d.device not in self.devices, f"it has no backward pass on {d.device}"),
            (missing, f"it needs packages that are not installed: {', '.join(missing)}"),
            (d.dtype not in self.dtypes, f"it computes in {', '.join(self.dtypes)}, and model.dtype is {d.dtype}"),
            (d.head_dim < least, f"its kernels need heads of at least {least} channels, {model} has {d.head_dim} here"),
            (most and d.head_dim > most, f"its kernels take heads of at most {most} channels, {model} has {d.head_dim} here"),
            (window, f"it has no sliding window, and {model} has one of {d.sliding_window} tokens"),
            (softcap, f"it has no softcap, and {model} caps scores at {d.softcap}"),
            (bidirectional, "its blocks are causal inside, and memory.inside_block is bidirectional"),
            (mode, f"it cannot run under parallel.sequence_mode {d.sequence_mode}"),
        )
        return next((reason for refused, reason in reasons if refused), None)
