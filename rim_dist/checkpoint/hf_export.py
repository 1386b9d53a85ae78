"""From a checkpoint to a plain HF folder that transformers, and every server, runs without rim_dist."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from rim_dist.checkpoint import store
from rim_dist.checkpoint.adapters import adapter_config, adapter_tensors, extract_lora, merged_tensors
from rim_dist.checkpoint.assemble import OutputFile, Workers, index_text, plan_files, write_all
from rim_dist.checkpoint.card import ABOUT, about_export, model_card
from rim_dist.checkpoint.contents import Contents, read_contents
from rim_dist.checkpoint.store import find_checkpoint
from rim_dist.checkpoint.tensors import ModelTensor, StoredTensor, forget_files, read_folder_index, read_tensor, rows_of
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.files import (
    MANIFEST,
    ByteRange,
    FileRecord,
    damage_of,
    os_errors,
    read_manifest,
    record_of,
    require_room,
    sync_path,
    write_manifest,
)
from rim_dist.messages import say
from rim_dist.model.generation import generation_config
from rim_dist.model.skeleton import DTYPES
from rim_dist.tokens import adds_bos

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


def load_trained_model(checkpoint: Path) -> PreTrainedModel:
    """The trained model on the CPU in fp32, LoRA merged. Every tensor must be there by name and shape.

    Raises CheckpointError naming missing, surplus or misshapen tensors.
    """
    contents = read_contents(checkpoint)
    module = load_module(contents)
    return module.merge_and_unload() if hasattr(module, "merge_and_unload") else module


def load_module(contents: Contents) -> Any:
    """The checkpoint's own module on the CPU in fp32, adapters beside their layers as in training."""
    from rim_dist.model.skeleton import add_adapters  # that module starts from checkpoints and so imports this one

    recipe = contents.recipe
    model = AutoModelForCausalLM.from_config(contents.config, trust_remote_code=recipe.model.trust_remote_code).float()
    adapted = any(".lora_" in name for name in contents.module)
    module: Any = add_adapters(model, recipe, contents.tokens) if adapted else model
    own = module.state_dict()
    with torch.no_grad():
        for name, stored in contents.module.items():
            own[name].copy_(read_tensor(stored))
    return module


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in fp32 (the optimizer's own copy where there is one), by their names in the module."""
    return {name: read_tensor(stored).float() for name, stored in read_contents(checkpoint).module.items()}


def export_checkpoint(
    source: str | Path, out: str | Path, options: ExportOptions = ExportOptions(), workers: Workers | None = None
) -> Path:
    """Write the checkpoint meant by `source` as a plain HF folder `out` (safetensors, tokenizer, chat template, card).

    Written beside and renamed, so that `out` is whole or absent. Raises CheckpointError if `out` exists and is not an
    empty folder or an earlier export, if the checkpoint is damaged or incomplete, or if the disk is too small.
    """
    workers = workers or Workers()
    checkpoint, out = find_checkpoint(source), Path(out)
    workers.on_first(lambda: check_export_target(out))
    contents = _checked_contents(checkpoint, workers)
    if not contents.recipe.exportable:
        raise CheckpointError(
            f"{checkpoint}: trained with memory.inside_block={contents.recipe.memory.inside_block}, which no ordinary server "
            "can run; only causal blocks can be exported"
        )
    lora = contents.recipe.model.lora is not None and any(".lora_" in name for name in contents.module)
    if not lora and (options.adapter_only or not options.merge_lora):
        raise ConfigError(f"{checkpoint} was not trained with LoRA; leave out --adapter-only and --no-merge-lora")
    plan = _plan(contents, options, lora)
    write_folder(out, plan.files, plan.write_rest, workers, plan.check)
    return out


@dataclass(frozen=True)
class _Plan:
    files: dict[str, list[OutputFile]]  # by folder below the export
    write_rest: Callable[[Path], None]
    check: Callable[[Path], None] = lambda _: None


def _plan(contents: Contents, options: ExportOptions, lora: bool) -> _Plan:
    dtype_name = options.dtype or contents.recipe.model.dtype
    dtype = DTYPES[dtype_name]
    rows = contents.config.get_text_config().vocab_size
    padding = 0 if options.adapter_only else -rows % options.pad_vocabulary
    rows = contents.config.get_text_config().vocab_size = rows + padding
    about = about_export(contents.recipe, contents.state, contents.tokens, rows, len(contents.tokenizer), dtype_name)

    def card(folder: Path, note: str = "") -> None:
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(contents.recipe, about, note), encoding="utf-8")
        _save_tokenizer(contents.tokenizer, folder)

    if options.adapter_only:
        tensors = adapter_tensors(contents, with_rows=True)

        def write_adapter(folder: Path) -> None:
            _write_json(folder / "adapter_config.json", adapter_config(contents, with_rows=True))
            card(
                folder, "An unmerged PEFT adapter: resize the base's embeddings to the tokenizer's length before loading it.\n"
            )

        return _Plan({"": plan_files(tensors, dtype, options.shard_bytes, "adapter_model")}, write_adapter)

    model = contents.model
    files: dict[str, list[OutputFile]] = {}
    if lora and not options.merge_lora:
        # Servers take no trained rows in an adapter: the rows go into the base, the adapter keeps to its matrices.
        model = {name: t if t.low_rank is None else ModelTensor(t.parts, t.shape) for name, t in model.items()}
        files[ADAPTER] = plan_files(adapter_tensors(contents, with_rows=False), dtype, options.shard_bytes, "adapter_model")
    if padding:
        token = contents.tokens.memory
        model = {n: _padded(t, padding, token) if n in contents.embeddings else t for n, t in model.items()}
    # Some families (mixtures of experts) have other tensors on disk than in the module; transformers knows how to write those.
    other_layout = bool(get_checkpoint_conversion_mapping(contents.config.model_type))
    files[""] = [] if other_layout else plan_files(model, dtype, options.shard_bytes)
    unmerged = lora and not options.merge_lora
    if other_layout and padding:
        raise ConfigError(f"--pad-vocabulary: not for {contents.config.model_type}, whose files are laid out in another way")
    if other_layout and unmerged:
        raise ConfigError(f"--no-merge-lora: not for {contents.config.model_type}, whose files are laid out in another way")

    def write_rest(folder: Path) -> None:
        if other_layout:
            say(f"{contents.config.model_type}: written by transformers, the whole model in memory")
            whole = load_module(contents)
            whole = whole.merge_and_unload() if lora else whole
            whole.to(dtype).save_pretrained(folder, max_shard_size=options.shard_bytes)
        elif len(files[""]) > 1:
            (folder / "model.safetensors.index.json").write_text(index_text(files[""]), encoding="utf-8")
        config = contents.config
        config.dtype = dtype
        config.architectures = [contents.architecture]
        config.save_pretrained(folder)
        generation_config(contents.tokenizer).save_pretrained(folder)
        note = ""
        if unmerged:
            _write_json(folder / ADAPTER / "adapter_config.json", adapter_config(contents, with_rows=False))
            note = f"The adapter is not merged: load `{ADAPTER}/` with peft on top of this folder.\n"
        card(folder, note)

    return _Plan(files, write_rest, lambda folder: _check_rows(contents, model, folder, dtype))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with os_errors(folder):
        tokenizer.save_pretrained(folder)
    # transformers reads this from tokenizer.json and leaves it out; llama.cpp's converter then takes it for true.
    path = folder / "tokenizer_config.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "add_bos_token": adds_bos(tokenizer)})


def _checked_contents(checkpoint: Path, workers: Workers) -> Contents:
    """The contents of a checkpoint, after what an export reads of it was compared with its checksums."""
    try:
        contents = read_contents(checkpoint)
    except CheckpointError:
        check_intact(checkpoint, workers)  # damage says more than what cannot be read because of it
        raise
    spans: dict[str, list[ByteRange]] = {}
    for stored in contents.module.values():
        for extent in stored.regions:
            name = str(Path(extent.file).relative_to(checkpoint))
            spans.setdefault(name, []).append((extent.offset, extent.offset + extent.length))
    for shard in read_manifest(checkpoint):
        if shard.startswith(f"{store.ENGINE}/"):
            spans.setdefault(shard, [])
    check_intact(checkpoint, workers, spans)
    return contents


def check_intact(checkpoint: Path, workers: Workers, only: dict[str, list[ByteRange]] | None = None) -> None:
    """Raises CheckpointError on every rank unless the checksums are right: all, or of files in `only` those of the spans."""
    wrong = workers.run(damage_of, [(checkpoint, True, i, workers.count, only) for i in range(workers.count)])
    if damage := next((w for w in wrong if w), ""):
        raise CheckpointError(f"{checkpoint}: damaged: {damage}")


def write_folder(
    out: Path,
    files: dict[str, list[OutputFile]],
    write_rest: Callable[[Path], None],
    workers: Workers,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write tensors and, beside that, whatever else, with a manifest, next to `out`; check it, then put it in its place."""
    partial = out.with_name(out.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        for name in files:
            (partial / name).mkdir(parents=True, exist_ok=True)
        needed = sum(file.data_bytes for group in files.values() for file in group)
        require_room(needed, partial, out)

    try:
        workers.on_first(begin)
        records: dict[str, FileRecord] = {}
        for name, group in files.items():
            # The rest once, beside the model's own files: every export has that group, if only an empty one.
            written = write_all(partial / name, group, workers, None if name else lambda: write_rest(partial))
            records |= {f"{name}/{file}" if name else file: record for file, record in written.items()}

        def finish() -> None:
            check(partial)
            for file in (p for p in partial.rglob("*") if p.is_file()):
                name = str(file.relative_to(partial))
                if name not in records:
                    sync_path(file)
                    records[name] = record_of(file)
            for folder in [p for p in partial.rglob("*") if p.is_dir()]:
                sync_path(folder)
            write_manifest(partial, records)
            if out.exists():
                shutil.rmtree(out)
            os.replace(partial, out)
            sync_path(out.parent)

        workers.on_first(finish)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        forget_files()
        if workers.is_first:
            shutil.rmtree(partial, ignore_errors=True)


def _check_rows(contents: Contents, model: dict[str, ModelTensor], folder: Path, dtype: torch.dtype) -> None:
    """Compare the memory rows that were written, value by value, with those of the checkpoint."""
    written = read_folder_index(folder)
    for name in contents.embeddings:
        for token in contents.tokens.ids:
            expected = _row(model[name], token).to(dtype)
            found = read_tensor(rows_of(written[name], token, token + 1))
            if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise CheckpointError(f"{folder}: row {token} of {name} (a memory token) was not written as it was trained")
            if not torch.isfinite(found).all() or not found.any():
                raise CheckpointError(f"{folder}: row {token} of {name} (a memory token) is empty or not finite")


def _row(tensor: ModelTensor, number: int) -> torch.Tensor:
    return read_tensor(_stored_row(tensor, number))


def _stored_row(tensor: ModelTensor, number: int) -> StoredTensor:
    first = 0
    for part in tensor.parts:
        if number < first + part.shape[0]:
            return rows_of(part, number - first, number - first + 1)
        first += part.shape[0]
    raise IndexError(number)


def _padded(matrix: ModelTensor, rows: int, token: int) -> ModelTensor:
    """Embedding or head with rows that are copies of the memory token's: no answer contains it, so none contains them."""
    return replace(
        matrix,
        parts=(*matrix.parts, *[_stored_row(matrix, token)] * rows),
        shape=(matrix.shape[0] + rows, *matrix.shape[1:]),
    )


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_export_target(out: Path) -> None:
    """Refuse to write over a folder that is not an earlier export."""
    if out.exists() and not (out / ABOUT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already holds something else; choose another folder")


def _copy_others(source: Path, target: Path) -> None:
    """Everything of an HF folder but its weights and what an earlier export said of itself."""
    skipped = {ABOUT, MANIFEST, "model.safetensors.index.json", "adapter_config.json"}
    for file in source.iterdir():
        if file.is_file() and file.name not in skipped and not file.name.endswith((".safetensors", ".bin", ".pt")):
            shutil.copy(file, target / file.name)


def merge_adapter(adapter: Path, base: Path, out: Path, dtype: str | None, shard_bytes: int, workers: Workers) -> Path:
    """Write base + adapter as a plain folder. The adapter's tokenizer goes before the base's. Raises CheckpointError."""
    workers.on_first(lambda: check_export_target(out))
    config, tensors = merged_tensors(base, adapter)
    files = plan_files(tensors, DTYPES[dtype] if dtype else None, shard_bytes)

    def write_rest(folder: Path) -> None:
        _copy_others(base, folder)
        if (adapter / "tokenizer_config.json").is_file():
            _copy_others(adapter, folder)
        if len(files) > 1:
            (folder / "model.safetensors.index.json").write_text(index_text(files), encoding="utf-8")
        if dtype:
            config.dtype = DTYPES[dtype]
        config.save_pretrained(folder)
        about = {}
        for place in (adapter, base):
            if (place / ABOUT).is_file():
                about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
                break
        _write_json(folder / ABOUT, {**about, **({"dtype": dtype} if dtype else {}), "merged": [str(base), str(adapter)]})

    write_folder(out, {"": files}, write_rest, workers)
    return out


def extract_adapter(tuned: Path, base: Path, out: Path, rank: int) -> dict[str, float]:
    """Write the difference as an adapter folder; returns each matrix's relative error. Raises CheckpointError."""
    check_export_target(out)
    errors: dict[str, float] = {}

    def write_rest(folder: Path) -> None:
        with os_errors(folder):
            errors.update(extract_lora(base, tuned, folder, rank))
        _copy_others(tuned, folder)
        (folder / "config.json").unlink(missing_ok=True)
        if (tuned / ABOUT).is_file():
            shutil.copy(tuned / ABOUT, folder / ABOUT)

    write_folder(out, {"": []}, write_rest, Workers())
    return errors
