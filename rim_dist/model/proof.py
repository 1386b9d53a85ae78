"""A check, on a tiny model of the family, that its attention computes the RiM mask; before anything large is built."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rim_dist.attention.registration import use_plain_attention, use_recording_attention, use_rim_attention
from rim_dist.config import Dropouts
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError, first_line
from rim_dist.model.dropout import dropout_places, set_dropout
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.unwrap import backbone

_TOLERANCE = 1e-3
_LAYERS = 8  # most layers of a small copy whose layers are of different kinds
_TRIES = 16  # forward passes in training mode of a family that draws random numbers there
_TINY = {
    "max_position_embeddings": 128,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,  # the second layer has experts
    "sliding_window": 4,  # shorter than the row of the proof
    "attention_chunk_size": 4,
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_WIDTHS = re.compile(r"(^|_)(intermediate_size|ffn_dim)(_mlp)?$")


def tiny_config(config: PretrainedConfig, tensor: int = 1, sequence: int = 1) -> PretrainedConfig:
    """The same family with small sizes. Only fields that the config has are set, and heads keep their size: others fit it.

    Of layers that differ (a list with an entry for each) every kind is kept. `tensor`, `sequence`: degrees that the heads must
    divide by. A vocabulary that is split is odd, so that it needs padding.
    """
    small = copy.deepcopy(config)
    fields = config.to_dict()
    heads = int(getattr(config, "num_attention_heads", 4))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    own = 4 * tensor * sequence
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden = head_dim * own if head_dim * heads == config.hidden_size else 32
    width = 64 * tensor
    by_layer = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and len(v) == config.num_hidden_layers}
    layers = _kinds_of_layers(list(by_layer.values()))
    sizes: dict[str, Any] = dict(
        _TINY,
        num_hidden_layers=len(layers),
        num_attention_heads=own,
        num_key_value_heads=own if kv_heads == heads else 2 * tensor,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        vocab_size=64 + (tensor > 1),
    )
    for name in fields:
        if _WIDTHS.search(name) and isinstance(fields[name], int):
            sizes[name] = width
    for name, values in by_layer.items():
        sizes[name] = [width if _WIDTHS.search(name) else values[i] for i in layers]
    for name, value in sizes.items():
        if getattr(small, name, None) is not None:
            # Fields that the family derives from others, and those that it checks against others which are not set yet.
            with contextlib.suppress(AttributeError, StrictDataclassError):
                setattr(small, name, value)
    for name in _TOKENS:
        for value in (None, 0):
            with contextlib.suppress(StrictDataclassError):
                setattr(small, name, value)
                break
    return small


def _kinds_of_layers(lists: list[Sequence[Any]]) -> list[int]:
    """Numbers of the layers that a small copy has, for lists with an entry a layer: the first of every kind, at least two."""
    first: dict[str, int] = {}
    for number, kind in enumerate(zip(*lists, strict=True)):
        first.setdefault(repr(kind), number)
    kinds = list(first.values())[:_LAYERS] or [0]
    return (kinds * 2)[: max(2, len(kinds))]


@contextlib.contextmanager
def _family_errors(config: PretrainedConfig, meaning: str) -> Iterator[None]:
    """Raise errors as ModelErrors that name the family and what the error means."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"model family {config.model_type}: {error}") from None
    except Exception as error:
        raise ModelError(f"model family {config.model_type}: {meaning} ({first_line(error)})") from error


def tiny_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a `tiny_config`, the same in every process, all drawn at random. Raises ModelError if it cannot be built."""
    with _family_errors(config, "no small copy could be built to prove the RiM mask"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).float().eval()
        _draw_all(model)
        return model


def _draw_all(model: PreTrainedModel) -> None:
    """Draw every parameter and saved buffer, as large as a trained one: zeros and ones would hide what they stand for."""
    saved = model.state_dict().keys()
    buffers = [b for name, b in model.named_buffers() if name in saved and b.is_floating_point()]
    with torch.no_grad():
        for tensor in [*model.parameters(), *buffers]:
            if tensor.ndim >= 2:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
            else:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _small_copy(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with _family_errors(config, "no small copy could be built to prove the RiM mask"):
        small = tiny_config(config)
    return tiny_model(small, trust_remote_code)


def tiny_row() -> tuple[Row, list[int]]:
    """A row with two readouts for a tiny model, and the tokens of a memory block."""
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(0, 64, (5,), generator=generator).tolist()
    block = [60, 61, 61, 62]
    readouts = tuple(Readout(k, torch.randint(0, 60, (4,), generator=generator).tolist(), 1.0) for k in (1, 2))
    return Row(question, 2, len(block), readouts), block


def prove_family(config: PretrainedConfig, trust_remote_code: bool = False, kernel: str = "split") -> float:
    """Largest logit difference, on a tiny model of the family, between a packed row under a kernel and its unrolled runs.

    Raises ModelError, with the family's name and the reason, if the attention of any layer was not called with
    the layout, if the two differ by more than fp32 rounding explains, or if the readout loss is not that of the logits.
    """
    model = _small_copy(config, trust_remote_code)
    row, block = tiny_row()
    batch = pack([row], block)
    with _family_errors(config, "its attention cannot take the RiM mask"), torch.no_grad():
        use_rim_attention(model, kernel)
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False)
        packed = output.logits[0, batch.targets.column]
        changes = _changes_in_training(model, batch, packed)
        install_readout_loss(model)
        _, losses = run_batch(model, batch)
    wrong = ""
    if changes:
        wrong = changes
    elif (seen := len(batch.layout.attended)) < (layers := model.config.num_hidden_layers):
        wrong = f"{seen} of {layers} layers use an attention that can take the RiM mask"
    elif not float((losses - F.cross_entropy(packed, batch.targets.label, reduction="none")).abs().max()) < _TOLERANCE:
        wrong = "its forward does something to the logits that the readout loss does not know of"
    elif (
        not (worst := _largest_difference(model, row, block, packed.split([len(r.target) for r in row.readouts]))) < _TOLERANCE
    ):
        wrong = f"a packed row differs from its unrolled runs (largest logit difference {worst:.1e})"
    if wrong:
        raise ModelError(f"model family {config.model_type}: {wrong}; the family is not supported")
    return worst


def _changes_in_training(model: PreTrainedModel, batch: Batch, expected: torch.Tensor) -> str:
    """What a family does in training mode besides dropout; empty if that is nothing."""
    model.train()
    set_dropout(model, Dropouts())
    before, tries = torch.get_rng_state(), 1
    worst = 0.0
    try:
        while tries <= _TRIES:
            output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False)
            worst = max(worst, float((output.logits[0, batch.targets.column] - expected).abs().max()))
            if not worst < _TOLERANCE or torch.equal(before, torch.get_rng_state()):
                break
            tries += 1
        drew = not torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
        model.eval()
    if worst < _TOLERANCE:
        return ""
    what = "draws at random" if drew else "computes something else"
    return f"in training mode it {what}, and not as dropout (logits change by {worst:.1e})"


Kinds = frozenset[tuple[str, str]]


def dropout_kinds(config: PretrainedConfig, trust_remote_code: bool = False) -> tuple[Kinds, Kinds]:
    """Kinds of a family's `dropout_places`: of attention weights, as its layers hand their values to the attention function;
    and the others, of hidden states.

    Names do not tell: OPT calls both of its own `dropout`, and GPT-NeoX' `post_attention_dropout` drops hidden states.
    """
    model = _small_copy(config, trust_remote_code)
    places = list(dropout_places(model))
    for number, place in enumerate(places, start=1):
        setattr(place.owner, place.attribute, number / (len(places) + 1))
    with _family_errors(config, "its dropouts cannot be told apart"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        given = use_recording_attention(model)
        model.train()
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    attention = frozenset(place.kind for place in places if getattr(place.owner, place.attribute) in given)
    return attention, frozenset(place.kind for place in places) - attention


def _largest_difference(model: PreTrainedModel, row: Row, block: list[int], packed: Sequence[torch.Tensor]) -> float:
    """Largest difference of each readout's logits from a plain causal run, relative to the largest logit if above 1."""
    use_plain_attention(model)
    worst = 0.0
    for readout, own in zip(row.readouts, packed, strict=True):
        plain = list(row.question) + block * readout.block + list(readout.target[:-1])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([plain]), use_cache=False).logits[0, -len(readout.target) :]
        worst = max(worst, float((own - expected).abs().max() / expected.abs().max().clamp_min(1.0)))
    return worst


def prove_thoughts(config: PretrainedConfig, trust_remote_code: bool = False, kernel: str = "split") -> float:
    """Largest token loss difference, on a tiny model, between `thought_states` and plain runs without a cache.

    Raises ModelError, with the family's name and the reason, if the family cannot take hidden states as inputs.
    """
    model = _small_copy(config, trust_remote_code)
    rows = [Row([5, 6, 7], 1, 4, (Readout(1, [8, 9], 1.0),), latent=True), Row([9], 1, 3, (Readout(1, [4], 1.0),), latent=True)]
    batch = pack(rows, [60, 61, 62], thoughts=2)
    install_readout_loss(model)
    with _family_errors(config, "it cannot take hidden states as inputs"), torch.no_grad():
        use_rim_attention(model, kernel)
        _, losses = run_batch(model, batch)
        use_plain_attention(model)
        expected = torch.cat([_slow_losses(model, rows[i]) for i in batch.order])
    if not (worst := float((losses - expected).abs().max())) < _TOLERANCE:
        raise ModelError(
            f"model family {config.model_type}: hidden states fed back differ from plain runs (largest loss difference "
            f"{worst:.1e}); method coconut does not support the family"
        )
    return worst


def _slow_losses(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """Token losses of a latent row's readout: every thought is the end of a run over all that precedes it."""
    embed = model.get_input_embeddings()
    states = embed(torch.tensor([[*row.question, 60]]))
    for _ in range(row.thoughts):
        last = backbone(model)(inputs_embeds=states, use_cache=False)[0][:, -1:]
        states = torch.cat([states, last], dim=1)
    target = row.readouts[0].target
    states = torch.cat([states, embed(torch.tensor([[62, *target[:-1]]]))], dim=1)
    logits = model(inputs_embeds=states, use_cache=False).logits[0, -len(target) :]
    return F.cross_entropy(logits, torch.tensor(target), reduction="none")
