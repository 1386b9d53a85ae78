"""A check, on a tiny model of the family, that its attention computes the RiM mask; before anything large is built."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.data.rows import pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError
from rim_dist.objective.forward import install_readout_loss, run_batch

_TOLERANCE = 1e-3
_HEAD_DIM = 8
_TINY = {
    "num_hidden_layers": 2,
    "head_dim": _HEAD_DIM,
    "max_position_embeddings": 128,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_config(config: PretrainedConfig, tensor: int = 1, sequence: int = 1) -> PretrainedConfig:
    """The same family with the smallest sizes. Only fields that the config has are set.

    `tensor`, `sequence`: degrees that the heads must divide by. A vocabulary that is split is odd, so that it needs padding.
    """
    small = copy.deepcopy(config)
    heads = int(getattr(config, "num_attention_heads", 4))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    own = 4 * tensor * sequence
    hidden = _HEAD_DIM * (own if getattr(config, "head_dim", None) is None else 4)
    width = 64 * tensor
    sizes: dict[str, Any] = dict(
        _TINY,
        num_attention_heads=own,
        num_key_value_heads=own if kv_heads == heads else 2 * tensor,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        intermediate_size=width,
        ffn_dim=width,
        vocab_size=64 + (tensor > 1),
    )
    for name, value in sizes.items():
        if hasattr(small, name) and (getattr(small, name) is not None or name.endswith("_token_id")):
            with contextlib.suppress(AttributeError):  # a field that the family derives from others
                setattr(small, name, value)
    layer_types = getattr(small, "layer_types", None)
    if layer_types:
        kinds = list(dict.fromkeys(layer_types))
        with contextlib.suppress(AttributeError):  # as above
            small.layer_types = (kinds * 2)[: max(2, len(kinds))]
            small.num_hidden_layers = len(small.layer_types)
    return small


@contextlib.contextmanager
def _family_errors(config: PretrainedConfig, meaning: str) -> Iterator[None]:
    """Raise errors as ModelErrors that name the family and what the error means."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"model family {config.model_type}: {error}") from None
    except Exception as error:
        raise ModelError(f"model family {config.model_type}: {meaning} ({error})") from error


def tiny_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a `tiny_config`, the same in every process. Raises ModelError if it cannot be built."""
    with _family_errors(config, "no small copy could be built to prove the RiM mask"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).float().eval()


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
    model = tiny_model(tiny_config(config), trust_remote_code)
    row, block = tiny_row()
    batch = pack([row], block)
    with _family_errors(config, "its attention cannot take the RiM mask"), torch.no_grad():
        use_rim_attention(model, kernel)
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False)
        packed = output.logits[0, batch.targets.column]
        install_readout_loss(model)
        _, losses = run_batch(model, batch)
    wrong = ""
    if (seen := len(batch.layout.attended)) < (layers := model.config.num_hidden_layers):
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
    model = tiny_model(tiny_config(config), trust_remote_code)
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
        last = model.base_model(inputs_embeds=states, use_cache=False)[0][:, -1:]
        states = torch.cat([states, last], dim=1)
    target = row.readouts[0].target
    states = torch.cat([states, embed(torch.tensor([[62, *target[:-1]]]))], dim=1)
    logits = model(inputs_embeds=states, use_cache=False).logits[0, -len(target) :]
    return F.cross_entropy(logits, torch.tensor(target), reduction="none")
