"""From a checkpoint to a plain HF folder that transformers, and every server, runs without rim_dist."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from rim_dist.checkpoint import store
from rim_dist.checkpoint.adapters import adapter_config, adapter_tensors, extract_lora, merge
from rim_dist.checkpoint.index import CheckpointIndex, index_checkpoint
from rim_dist.checkpoint.model_card import EXPORT_INFO, export_info, model_card, read_export_info
from rim_dist.checkpoint.pretrained import open_pretrained
from rim_dist.checkpoint.safetensors_files import OutputFile, plan_files, read_folder_index, write_folder, write_index
from rim_dist.checkpoint.store import find_checkpoint
from rim_dist.checkpoint.stored_tensors import ModelTensor, StoredTensor, read_tensor, rows_of
from rim_dist.checkpoint.workers import Workers
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.files import MANIFEST, FileRecord, damage_of, os_errors, read_manifest, write_manifest
from rim_dist.messages import say
from rim_dist.model.skeleton import DTYPES, add_adapters
from rim_dist.tokens import adds_bos
from rim_dist.unwrap import bare_model

DEFAULT_SHARD_BYTES = 5 * 10**9
ADAPTER = "adapter"


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported. `dtype`: fp32, bf16, fp16; None is the recipe's.

    `pad_vocabulary`: rows of embedding and head become a multiple of it. Training's padding for tensor ranks is never written.
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    merge_lora: bool = True
    adapter_only: bool = False
    pad_vocabulary: int = 1


def load_trained_model(checkpoint: Path, verify: bool = False) -> PreTrainedModel:
    """The trained model on the CPU in fp32, LoRA merged. Every tensor must be there by name and shape.

    `verify`: what is read is compared with its checksums. Raises CheckpointError naming missing, surplus, misshapen or damaged
    tensors.
    """
    return _load_merged(_verified_index(checkpoint, Workers()) if verify else index_checkpoint(checkpoint))


def _load_merged(index: CheckpointIndex) -> PreTrainedModel:
    module = load_module(index)
    return module.merge_and_unload() if _has_adapters(index) else module


def load_module(index: CheckpointIndex) -> Any:
    """The checkpoint's own module on the CPU in fp32, adapters beside their layers as in training."""
    recipe = index.recipe
    module: Any = AutoModelForCausalLM.from_config(index.config, trust_remote_code=recipe.model.trust_remote_code).float()
    if _has_adapters(index):
        module = add_adapters(module, recipe, index.tokens)
    bare_model(module).generation_config = index.generation
    own = module.state_dict()
    with torch.no_grad():
        for name, stored in index.module.items():
            own[name].copy_(read_tensor(stored))
    return module


def _has_adapters(index: CheckpointIndex) -> bool:
    return any(".lora_" in name for name in index.module)


def export_checkpoint(
    source: str | Path, out: str | Path, options: ExportOptions = ExportOptions(), workers: Workers | None = None
) -> Path:
    """Write the checkpoint meant by `source` as a plain HF folder (safetensors, tokenizer, chat template, model card).

    Written beside and renamed, so that `out` is whole or absent. Raises CheckpointError if `out` exists and is not an
    empty folder or an earlier export, if the checkpoint is damaged or incomplete, or if the disk is too small.
    """
    workers = workers or Workers()
    checkpoint, out = find_checkpoint(source), Path(out)
    workers.on_first(lambda: check_export_target(out))
    index = _verified_index(checkpoint, workers)
    if not index.recipe.exportable:
        raise CheckpointError(
            f"{checkpoint}: trained with memory.inside_block={index.recipe.memory.inside_block}, which no ordinary server "
            "can run; only causal blocks can be exported"
        )
    if not _has_adapters(index) and (options.adapter_only or not options.merge_lora):
        raise ConfigError(f"{checkpoint} was not trained with LoRA; leave out --adapter-only and --no-merge-lora")
    if options.adapter_only:
        _export_adapter(index, out, options, workers)
    else:
        _export_model(index, out, options, workers)
    return out


def _export_adapter(index: CheckpointIndex, out: Path, options: ExportOptions, workers: Workers) -> None:
    dtype = options.dtype or index.recipe.with_dtype("fp32").model.dtype
    files = plan_files(adapter_tensors(index, rows=True), DTYPES[dtype], options.shard_bytes, "adapter_model")
    note = "An unmerged PEFT adapter: resize the base's embeddings to the tokenizer's length before loading it.\n"

    def write_rest(folder: Path) -> None:
        _write_json(folder / "adapter_config.json", adapter_config(index, rows=True))
        _write_description(index, folder, dtype, note)

    write_folder(out, files, write_rest, workers)


def _export_model(index: CheckpointIndex, out: Path, options: ExportOptions, workers: Workers) -> None:
    dtype_name = options.dtype or index.recipe.with_dtype("fp32").model.dtype
    dtype, config, model = DTYPES[dtype_name], index.config, index.model
    padding = -config.get_text_config().vocab_size % options.pad_vocabulary
    config.get_text_config().vocab_size += padding
    unmerged = not options.merge_lora
    # Some families (mixtures of experts) have other tensors on disk than in the module; transformers knows how to write those.
    other_layout = bool(get_checkpoint_conversion_mapping(config.model_type))
    for option, used in (("--pad-vocabulary", padding), ("--no-merge-lora", unmerged)):
        if other_layout and used:
            raise ConfigError(f"{option}: not for {config.model_type}, whose files are laid out in another way")
    adapter: list[OutputFile] = []
    note = ""
    if unmerged:
        # Servers take no trained rows in an adapter: the rows go into the base, the adapter keeps to its matrices.
        model = {name: ModelTensor(t.stacked) for name, t in model.items()}
        adapter = plan_files(adapter_tensors(index, rows=False), dtype, options.shard_bytes, f"{ADAPTER}/adapter_model")
        note = f"The adapter is not merged: load `{ADAPTER}/` with peft on top of this folder.\n"
    if padding:
        # Copies of the memory token's row: no answer contains it, so none contains them.
        added = {name: (_row(model[name], index.tokens.memory),) * padding for name in index.embeddings}
        model = {name: replace(t, stacked=t.stacked + added.get(name, ())) for name, t in model.items()}
    files = [] if other_layout else plan_files(model, dtype, options.shard_bytes)

    def write_rest(folder: Path) -> None:
        if other_layout:
            say(f"{config.model_type}: written by transformers, the whole model in memory")
            _load_merged(index).to(dtype).save_pretrained(folder, max_shard_size=options.shard_bytes)
        else:
            write_index(folder, files)
        config.dtype = dtype
        config.architectures = [index.architecture]
        config.save_pretrained(folder)
        index.generation.save_pretrained(folder)
        if unmerged:
            _write_json(folder / ADAPTER / "adapter_config.json", adapter_config(index, rows=False))
        _write_description(index, folder, dtype_name, note)

    def finish(folder: Path, records: dict[str, FileRecord]) -> None:
        _check_rows(index, model, folder, dtype)
        write_manifest(folder, records)

    write_folder(out, files + adapter, write_rest, workers, finish)


def _write_description(index: CheckpointIndex, folder: Path, dtype: str, note: str) -> None:
    """rim_dist.json, the model card and the tokenizer."""
    rows = index.config.get_text_config().vocab_size
    info = export_info(index.recipe, index.state, index.tokens, rows, len(index.tokenizer), dtype)
    _write_json(folder / EXPORT_INFO, info)
    (folder / "README.md").write_text(model_card(index.recipe, info, note), encoding="utf-8")
    _save_tokenizer(index.tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with os_errors(folder):
        tokenizer.save_pretrained(folder)
    # transformers reads this from tokenizer.json and leaves it out; llama.cpp's converter then takes it for true.
    path = folder / "tokenizer_config.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "add_bos_token": adds_bos(tokenizer)})


def _verified_index(checkpoint: Path, workers: Workers) -> CheckpointIndex:
    """The index of a checkpoint, after what an export reads of it was compared with its checksums."""
    try:
        index = index_checkpoint(checkpoint)
    except CheckpointError:
        check_intact(checkpoint, workers)  # damage says more than what cannot be read because of it
        raise
    shards = [name for name in read_manifest(checkpoint) if name.startswith(f"{store.ENGINE}/")]
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shards}
    for stored in index.module.values():
        for piece in stored.regions:
            name = str(Path(piece.file).relative_to(checkpoint))
            ranges.setdefault(name, []).append((piece.offset, piece.offset + piece.length))
    check_intact(checkpoint, workers, ranges)
    return index


def check_intact(checkpoint: Path, workers: Workers, only: dict[str, list[tuple[int, int]]] | None = None) -> None:
    """Compare checksums, of files in `only` those of the byte ranges. Raises CheckpointError on every rank if one differs."""
    wrong = workers.run(damage_of, [(checkpoint, True, i, workers.count, only) for i in range(workers.count)])
    if damage := next((w for w in wrong if w), ""):
        raise CheckpointError(f"{checkpoint}: damaged: {damage}")


def _check_rows(index: CheckpointIndex, model: dict[str, ModelTensor], folder: Path, dtype: torch.dtype) -> None:
    """Compare the memory rows that were written, value by value, with those of the checkpoint."""
    written = read_folder_index(folder)
    for name in index.embeddings:
        for token in index.tokens.ids:
            expected = read_tensor(_row(model[name], token)).to(dtype)
            found = read_tensor(rows_of(written[name], token, token + 1))
            if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise CheckpointError(f"{folder}: row {token} of {name} (a memory token) was not written as it was trained")
            if not torch.isfinite(found).all() or not found.any():
                raise CheckpointError(f"{folder}: row {token} of {name} (a memory token) is empty or not finite")


def _row(tensor: ModelTensor, number: int) -> StoredTensor:
    for stored in tensor.stacked:
        if number < stored.shape[0]:
            return rows_of(stored, number, number + 1)
        number -= stored.shape[0]
    raise IndexError(number)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_export_target(out: Path) -> None:
    """Refuse to write over a folder that is not an earlier export."""
    if out.exists() and not (out / EXPORT_INFO).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already holds something else; choose another folder")


def _copy_others(source: Path, target: Path) -> None:
    """Copy an HF folder without its weights and the description of an earlier export."""
    skipped = {EXPORT_INFO, MANIFEST, "model.safetensors.index.json", "adapter_config.json"}
    for file in source.iterdir():
        if file.is_file() and file.name not in skipped and not file.name.endswith((".safetensors", ".bin", ".pt")):
            shutil.copy(file, target / file.name)


def merge_adapter(adapter: Path, base: Path, out: Path, dtype: str | None, shard_bytes: int, workers: Workers) -> None:
    """Write base + adapter as a plain folder. The adapter's tokenizer goes before the base's.

    Raises CheckpointError or ModelError, also if what was written is not a whole model.
    """
    workers.on_first(lambda: check_export_target(out))
    merged = merge(base, adapter)
    files = plan_files(merged.tensors, DTYPES[dtype] if dtype else None, shard_bytes) if merged.tensors else []

    def write_rest(folder: Path) -> None:
        config = merged.config
        _copy_others(base, folder)
        if (adapter / "tokenizer_config.json").is_file():
            _copy_others(adapter, folder)
        if merged.load is not None:
            model = merged.load()
            model.to(DTYPES[dtype] if dtype else model.dtype).save_pretrained(folder, max_shard_size=shard_bytes)
            config = model.config
        else:
            write_index(folder, files)
        if dtype:
            config.dtype = DTYPES[dtype]
        config.save_pretrained(folder)
        info = read_export_info(adapter) or read_export_info(base)
        _write_json(folder / EXPORT_INFO, {**info, **({"dtype": dtype} if dtype else {}), "merged": [str(base), str(adapter)]})

    def finish(folder: Path, records: dict[str, FileRecord]) -> None:
        open_pretrained(folder)
        write_manifest(folder, records)

    write_folder(out, files, write_rest, workers, finish)


def extract_adapter(tuned: Path, base: Path, out: Path, rank: int) -> dict[str, float]:
    """Write the difference of two folders as an adapter; returns each matrix's relative error. Raises CheckpointError."""
    check_export_target(out)
    errors: dict[str, float] = {}

    def write_rest(folder: Path) -> None:
        with os_errors(folder):
            errors.update(extract_lora(base, tuned, folder, rank))
        _copy_others(tuned, folder)
        (folder / "config.json").unlink(missing_ok=True)
        if (tuned / EXPORT_INFO).is_file():
            shutil.copy(tuned / EXPORT_INFO, folder / EXPORT_INFO)

    write_folder(out, [], write_rest, Workers())
    return errors
