"""Proof on a tiny model that a family honours the RiM visibility, before anything large is built."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.data.rows import pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError
from rim_dist.objective.forward import install_readout_loss, run_batch

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
    """The same family with the smallest sizes: fields that the config has are set, the others stay.

    `tensor`, `sequence`: degrees that the heads must divide by; a vocabulary that is split is odd, so that it needs padding.
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


def tiny_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a `tiny_config`, the same in every process. Raises ModelError if the family has none so small."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).float().eval()
    except Exception as error:
        raise ModelError(
            f"model family {config.model_type}: no small copy could be built to prove the RiM mask ({error})"
        ) from error


def tiny_row() -> tuple[Row, list[int]]:
    """A row with two readouts for a tiny model, and the tokens of its memory blocks."""
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(0, 64, (5,), generator=generator).tolist()
    block = [60, 61, 61, 62]
    readouts = tuple(Readout(k, torch.randint(0, 60, (4,), generator=generator).tolist(), 1.0) for k in (1, 2))
    return Row(question, 2, len(block), readouts), block


def prove_family(config: PretrainedConfig, trust_remote_code: bool = False) -> float:
    """Largest logit difference between a packed row and its unrolled runs on a tiny model of the family.

    Raises ModelError, with the family's name and the reason, if the attention of any layer was not called with
    the layout, if the two differ by more than fp32 rounding explains, or if the readout loss is not that of the logits.
    """
    family = config.model_type
    model = tiny_model(tiny_config(config), trust_remote_code)
    row, block = tiny_row()
    batch = pack([row], block)
    try:
        use_rim_attention(model, "split")
        with torch.no_grad():
            packed = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False
            ).logits[0]
            install_readout_loss(model)
            _, losses = run_batch(model, batch)
    except ModelError as error:
        raise ModelError(f"model family {family}: {error}") from None
    except Exception as error:
        raise ModelError(f"model family {family}: its attention cannot take the RiM mask ({error})") from error
    seen = batch.layout.attended
    if len(seen) < model.config.num_hidden_layers:
        raise ModelError(
            f"model family {family}: {len(seen)} of {model.config.num_hidden_layers} layers use an attention that can "
            "take the RiM mask; the family is not supported"
        )
    packed = packed[batch.targets.column]
    wanted = F.cross_entropy(packed, batch.targets.label, reduction="none")
    if not float((losses - wanted).abs().max()) < 1e-3:
        raise ModelError(
            f"model family {family}: its forward does something to the logits that the readout loss does not know of; the "
            "family is not supported"
        )
    use_plain_attention(model)
    worst = 0.0
    for readout in row.readouts:
        plain = list(row.question) + block * readout.block + list(readout.target[:-1])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([plain]), use_cache=False).logits[0, -len(readout.target) :]
        own = packed[batch.targets.block == readout.block]
        worst = max(worst, float((own - expected).abs().max() / expected.abs().max().clamp_min(1.0)))
    if not worst < 1e-3:
        raise ModelError(
            f"model family {family}: a packed row differs from its unrolled runs (largest logit difference {worst:.1e}); "
            "the family is not supported"
        )
    return worst


def prove_thoughts(config: PretrainedConfig, trust_remote_code: bool = False) -> float:
    """Largest difference of a token loss between the passes of continuous thoughts and slow runs without a cache.

    On a tiny model of the family. Raises ModelError, with its name and the reason, if it cannot take hidden states as inputs.
    """
    family = config.model_type
    model = tiny_model(tiny_config(config), trust_remote_code)
    rows = [Row([5, 6, 7], 1, 4, (Readout(1, [8, 9], 1.0),), latent=True), Row([9], 1, 3, (Readout(1, [4], 1.0),), latent=True)]
    batch = pack(rows, [60, 61, 62], thoughts=2)
    install_readout_loss(model)
    worst = 0.0
    try:
        with torch.no_grad():
            use_rim_attention(model, "split")
            _, losses = run_batch(model, batch)
            use_plain_attention(model)
            embed = model.get_input_embeddings()
            for number, row in enumerate(rows[i] for i in batch.order):
                states = embed(torch.tensor([[*row.question, 60]]))
                for _ in range(row.thoughts):
                    last = model.base_model(inputs_embeds=states, use_cache=False)[0][:, -1:]
                    states = torch.cat([states, last], dim=1)
                target = row.readouts[0].target
                states = torch.cat([states, embed(torch.tensor([[62, *target[:-1]]]))], dim=1)
                logits = model(inputs_embeds=states, use_cache=False).logits[0, -len(target) :]
                wanted = F.cross_entropy(logits, torch.tensor(target), reduction="none")
                own = losses[batch.layout.queries.segment[0, batch.targets.column] == number]
                worst = max(worst, float((own - wanted).abs().max()))
    except Exception as error:
        raise ModelError(f"model family {family}: it cannot take hidden states as inputs ({error})") from error
    if not worst < 1e-3:
        raise ModelError(
            f"model family {family}: hidden states fed back differ from plain runs (largest loss difference {worst:.1e}); "
            "method coconut does not support the family"
        )
    return worst
