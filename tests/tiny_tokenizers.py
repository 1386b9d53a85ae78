"""Tokenizers of known ids for tests, made without training."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(template: str | dict | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with BOS and EOS and without UNK; its post-processor adds BOS if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    if bos:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", chat_template=template)


def word_tokenizer(words: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with BOS and EOS; words it lacks are errors unless `special` names `unk_token`."""
    vocabulary = {word: i for i, word in enumerate(words.split())}
    plain = Tokenizer(models.WordLevel(vocabulary, special.get("unk_token")))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", **special)
