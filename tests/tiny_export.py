"""A model to ask in tests, without training: a lively random Llama on the embedded task's words, exported with K blocks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import TINY_MODEL
from transformers import AutoConfig, AutoModelForCausalLM

from rim_dist.config import MemorySection
from rim_dist.data.synthetic import synthetic_tokenizer
from rim_dist.tokens import add_memory_tokens, set_chat_template

BLOCKS = 3


def write_model(folder: Path, blocks: int = BLOCKS, method: str = "rim", seed: int = 0) -> Path:
    """An HF folder as the export writes it. Its answers differ from question to question and from block to block."""
    memory = MemorySection(blocks=blocks)
    tokenizer = synthetic_tokenizer()
    add_memory_tokens(tokenizer, memory)
    set_chat_template(tokenizer, memory, blocks)
    fields = {k: v for k, v in TINY_MODEL.items() if k not in ("model_type", "initializer_range", "tie_word_embeddings")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), initializer_range=0.3, **fields)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"method": method, "blocks": blocks, "synthetic_steps": 4}
    (folder / "rim_dist.json").write_text(json.dumps(about), encoding="utf-8")
    return folder
