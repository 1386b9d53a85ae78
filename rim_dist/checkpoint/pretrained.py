"""A model that rim_dist did not write: its configuration, and where every tensor of it lies in its files.

transformers' own loading, run on empty tensors, says what is missing and what is unexpected: it knows the families whose files
are laid out in another way. Headers are read, and values only of a head that the configuration ties to an embedding.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, get_hf_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from rim_dist.checkpoint.index import tied_names
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.stored_tensors import ModelTensor, StoredTensor, read_model_tensor, read_tensor
from rim_dist.errors import ModelError, RimError, first_line
from rim_dist.model.skeleton import empty_model
from rim_dist.model.weights import WeightSource

# A tensor of a file: a place in a safetensors file, or what torch maps from a .bin file.
Stored = StoredTensor | torch.Tensor

# What wrappers put into the names of the tensors of the model they wrap.
_WRAPPERS = {
    "_orig_mod.": r"(?<![^.])_orig_mod\.",
    "_fsdp_wrapped_module.": r"(?<![^.])_fsdp_wrapped_module\.",
    "_checkpoint_wrapped_module.": r"(?<![^.])_checkpoint_wrapped_module\.",
    "module.": r"^(module\.)+",
    "base_model.model.": r"^base_model\.model\.",
}
# Tensors that only quantised files have, and the schemes that write them.
_QUANTISED = {
    r"\.SCB$|\.weight_format$": "bitsandbytes 8-bit",
    r"\.absmax$|\.quant_map$|\.quant_state\.": "bitsandbytes 4-bit",
    r"\.g_idx$": "GPTQ",
    r"\.qweight$|\.qzeros$": "GPTQ or AWQ",
    r"\.weight_packed$|\.weight_zero_point$": "compressed-tensors",
    r"\.weight_scale(_inv|_2)?$|\.(input|output|activation)_scale$": "FP8 or compressed-tensors",
    r"\.W_q$": "HQQ",
    r"_blocks$": "MXFP4",
    r"\.codebooks$": "AQLM",
    r":(qdata|scale)$|_weight_(qdata|scale)$": "torchao",
}
_SHOWN = 3  # names of tensors in a message


@dataclass(frozen=True)
class Pretrained:
    """A model as its folder describes it.

    `config`: of the model that is trained: of text, not quantised, tied as its files are. `tensors`: every tensor by its first
    name in the model; None where transformers has to make them, or where they are not on this machine yet. `loading`: what
    `from_pretrained` needs for it. `renamed`: the files' tensors by other names than they have there. `notes`: what a user
    should know of how the folder is read. `masks`: causal masks in old files, which no model has any more. `here`: whether the
    files are on this machine.
    """

    source: Path | str
    config: PretrainedConfig
    tensors: dict[str, Stored] | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, Stored] | None = None
    notes: tuple[str, ...] = ()
    masks: frozenset[str] = frozenset()
    here: bool = True

    def load(self, dtype: torch.dtype | str) -> PreTrainedModel:
        """The model as transformers loads it. Raises ModelError naming tensors that its report has missing or unexpected."""
        given: dict[str, Any] = {"config": copy.deepcopy(self.config), **self.loading}
        kind: Any = AutoModelForCausalLM
        source: Path | str | None = self.source
        if self.renamed is not None:
            given["state_dict"] = {name: _as_stored(stored) for name, stored in self.renamed.items()}
            dtype = self.config.dtype or torch.float32 if dtype == "auto" else dtype
            kind, source = type(empty_model(self.config, self.loading["trust_remote_code"])), None
        try:
            with _no_progress_bar():
                model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **given)
            if self.renamed is not None and (Path(self.source) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.source)
        except Exception as error:
            raise ModelError(f"{self.source}: cannot be loaded ({first_line(error)})") from error
        integers = {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
        _Account(report["missing_keys"], report["unexpected_keys"] - self.masks, {}, integers).check(self.source)
        return model

    def weights(self) -> WeightSource:
        """Its tensors in fp32, by their names in the model; those of a hub id are fetched first. Raises ModelError."""
        if not self.here:
            return self._fetched().weights()
        if (tensors := self.tensors) is not None:
            return lambda name: _read(tensors[name]) if name in tensors else None
        loaded = self.load(torch.float32).state_dict()
        return lambda name: loaded[name].detach().float() if name in loaded else None

    def _fetched(self) -> Pretrained:
        from huggingface_hub import snapshot_download

        revision = self.loading["revision"]
        try:
            snapshot_download(str(self.source), revision=revision, allow_patterns=["*.safetensors", "*.json"])
        except Exception as error:
            raise ModelError(f"{self.source}: cannot be fetched ({first_line(error)})") from error
        found = open_pretrained(self.source, revision, self.loading["trust_remote_code"])
        if not found.here:
            raise ModelError(f"{self.source}: has no safetensors files; fetch it into a folder and start from that")
        if found.config.to_dict() != self.config.to_dict():
            raise ModelError(f"{self.source}: was fetched ({'; '.join(found.notes)}); start the same command again")
        return found


def open_pretrained(source: Path | str, revision: str | None = None, trust_remote_code: bool = False) -> Pretrained:
    """Read what an HF folder, or a hub id, has. Raises ModelError for files that are not what the model needs.

    The files of a hub id that are not on this machine yet are compared when the model is loaded.
    """
    refuse_adapter(source)
    given: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **given)
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error
    try:
        if Path(source).is_dir():
            stored = _read_files(Path(source))
            if stored is None:
                raise ModelError(
                    f"{source}: has no weights: no model.safetensors, no pytorch_model.bin, and no index of either"
                )
        elif (stored := _read_cached(str(source), revision)) is None:
            return Pretrained(source, _text_config(source, config), None, given, here=False)
        return _compared(Pretrained(source, config, None, given), stored)
    except RimError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error


def refuse_adapter(source: Path | str) -> None:
    """Raise ModelError for a folder with an adapter: transformers would load another model for it, the adapter's base."""
    if (Path(source) / "adapter_config.json").is_file():
        raise ModelError(
            f"{source}: holds a PEFT adapter, not a model of its own; merge it first: "
            f"rim-dist convert merge-lora {source} BASE OUT"
        )


# ---- the files ---------------------------------------------------------------------------------------------------


def _read_cached(name: str, revision: str | None) -> dict[str, Stored] | None:
    """`_read_files` of a hub id; None if not all of its files are on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return _read_files(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    except (OSError, ValueError, RimError):
        return None


def _read_files(folder: Path) -> dict[str, Stored] | None:
    """The tensors of the files that transformers would read, by their names there. None if there are none."""
    if any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        return dict(read_folder_index(folder))
    files = [folder / "pytorch_model.bin"]
    if not files[0].is_file():
        index = folder / "pytorch_model.bin.index.json"
        if not index.is_file():
            return None
        files = [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    found: dict[str, Stored] = {}
    for file in files:
        try:
            try:
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # written by a torch before 1.6
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelError(f"{file}: cannot be read ({first_line(error)})") from error
        found |= {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    return found


def _read(stored: Stored) -> torch.Tensor:
    return read_model_tensor(ModelTensor((stored,)), torch.float32) if isinstance(stored, StoredTensor) else stored.float()


def _as_stored(stored: Stored) -> torch.Tensor:
    return read_tensor(stored) if isinstance(stored, StoredTensor) else stored


def _without_wrappers(stored: dict[str, Stored]) -> tuple[dict[str, Stored], str]:
    """The tensors by their names without what wrappers added, and a note of it; the same and nothing if none did."""
    found, used = {}, set()
    for name, tensor in stored.items():
        plain = name
        for text, pattern in _WRAPPERS.items():
            plain, count = re.subn(pattern, "", plain)
            used |= {text} if count else set()
        found[plain] = tensor
    if not used or len(found) < len(stored):
        return stored, ""
    return found, f"the tensors are named {' and '.join(f'`{text}...`' for text in sorted(used))} by a wrapper; read without it"


# ---- the account of all tensors ------------------------------------------------------------------------------------


@dataclass
class _Account:
    """Tensors that the model has and the files have not, and the other way round; those of another shape (what of them), or
    that hold integers where the model computes. `tensors`: those that are in the model as they are in the files, by their names
    there. `computed`: transformers makes some of the model's tensors from others.
    """

    missing: set[str]
    unexpected: set[str]
    misshapen: dict[str, str]
    integers: set[str]
    tensors: dict[str, Stored] = field(default_factory=dict)
    computed: bool = False
    masks: frozenset[str] = frozenset()

    def problems(self) -> list[str]:
        found = [
            f"{len(names)} {what} ({', '.join(sorted(names)[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("not of floating point", self.integers),
            )
            if names
        ]
        return [*found, *(f"{name} {what}" for name, what in list(self.misshapen.items())[:1])]

    def check(self, source: Path | str) -> None:
        """Raise ModelError if there is anything that has no counterpart."""
        if not (problems := self.problems()):
            return
        hint = ""
        if any(".lora_" in name or ".base_layer." in name for name in self.unexpected):
            hint = "; merge the adapter first (peft: merge_and_unload, then save_pretrained)"
        elif self.integers:
            hint = "; are they codes of a quantised model? Start from the plain model that it was made from"
        elif not self.missing and not self.misshapen:
            hint = "; what the model does not have would not be trained: leave it out of the files"
        raise ModelError(f"{source}: its tensors are not those of the model: {'; '.join(problems)}{hint}")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _account(model: Any, stored: Mapping[str, Stored], quantizer: HfQuantizer | None = None) -> _Account:
    """Compare files with an empty model, as transformers would load them into it. The model is used up."""
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    tensors, computed = _places(model.base_model_prefix, own, stored, mapping)
    empty = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in stored.items()}
    loading = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping, hf_quantizer=quantizer)
    with _no_progress_bar():
        report, _ = convert_and_load_state_dict_in_model(model, empty, loading)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    missing = report.missing_keys & parameters  # no parameter may be left out, whatever the family says
    model._adjust_missing_and_unexpected_keys(report)
    wrong = {name: f"has shape {tuple(a)}, the model's is {tuple(b)}" for name, a, b in report.mismatched_keys}
    wrong |= dict.fromkeys(report.conversion_errors, "cannot be brought into the model's layout")
    integers = {name for name, s in tensors.items() if own[name].is_floating_point() and not s.dtype.is_floating_point}
    masks = frozenset(name for name in report.unexpected_keys if _is_mask(stored.get(name)))
    return _Account(missing | report.missing_keys, report.unexpected_keys - masks, wrong, integers, tensors, computed, masks)


def _is_mask(stored: Stored | None) -> bool:
    """Whether a tensor is a causal mask, or the number that stands for what is masked: files of GPT-2's time have both."""
    shape = None if stored is None else tuple(stored.shape)
    return shape == () or (shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def _places(
    prefix: str, own: Mapping[str, torch.Tensor], stored: Mapping[str, Stored], mapping: list[Any]
) -> tuple[dict[str, Stored], bool]:
    """The files' tensors by their names in the model, without those that transformers computes; whether there are such."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, Stored] = {}
    computes = False
    for name, tensor in stored.items():
        known, converted = rename_source_key(name, renamings, converters, prefix, dict(own))
        if known not in own and name in own:
            known, converted = name, None
        if converted is not None:
            computes = True
        elif known in own:
            found[known] = tensor
    return found, computes


def _compared(found: Pretrained, files: dict[str, Stored]) -> Pretrained:
    """`found` with its configuration and tensors, after they were compared. Raises ModelError."""
    source, notes = found.source, []
    stored, note = _without_wrappers(files)
    scheme = _scheme(source, found.config)
    marks = {name: scheme_of for name in stored for pattern, scheme_of in _QUANTISED.items() if re.search(pattern, name)}
    config = _text_config(source, found.config)
    if config is not found.config and not marks:
        stored, count = _of_text(found, stored)
        notes.append(f"{found.config.model_type} is read as its text model; {count} tensors of its other parts are left out")
    plain = _without_quantisation(config)
    account = _account(empty_model(plain, found.loading["trust_remote_code"]), stored)
    marks = {name: of for name, of in marks.items() if name in account.unexpected}
    if marks or (scheme and account.problems()):
        return _dequantised(replace(found, config=config, notes=(note,) if note else ()), stored, scheme, marks)
    account.check(source)
    if note:
        notes.append(note)
    if scheme:
        notes.append(f"the configuration says quantised ({scheme}), the tensors are plain; they are taken as they are")
    model = empty_model(plain, found.loading["trust_remote_code"])
    for second, first in model.all_tied_weights_keys.items():
        if {first, second} <= account.tensors.keys() and not _equal(account.tensors[first], account.tensors[second]):
            plain = copy.deepcopy(plain)
            plain.tie_word_embeddings = False
            notes.append(f"the configuration ties {second} to {first}, the files have both and they differ; not tied")
            model = empty_model(plain, found.loading["trust_remote_code"])
            break
    tensors = dict(account.tensors)
    for first, *others in tied_names(model):
        here = next((name for name in (first, *others) if name in tensors), None)
        if here is not None:
            tensors = {name: t for name, t in tensors.items() if name not in others} | {first: tensors[here]}
    renamed = None if stored == files else stored
    return Pretrained(source, plain, None if account.computed else tensors, found.loading, renamed, tuple(notes), account.masks)


def _equal(a: Stored, b: Stored) -> bool:
    return tuple(a.shape) == tuple(b.shape) and torch.equal(_as_stored(a), _as_stored(b))


# ---- models of text and more ----------------------------------------------------------------------------------------


def _text_config(source: Path | str, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text model in it: itself, if it has nothing else. Raises ModelError if none can be trained."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source}: {family} is an encoder and a decoder; only decoder models are trained")
    text = config.get_text_config(decoder=True)
    if text is config or getattr(config, "auto_map", None):
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{source}: {family} is a model of more than text, and transformers has no text model for its {text.model_type}"
        )
    text = copy.deepcopy(text)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    text.dtype = text.dtype or config.dtype
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    if (quantised := _quantisation(config)) is not None:
        text.quantization_config = quantised
    return text


def _of_text(found: Pretrained, stored: dict[str, Stored]) -> tuple[dict[str, Stored], int]:
    """The text model's tensors by its own names, and the number of others, after all were compared with the whole model."""
    name = (found.config.architectures or ["none"])[0]
    if (architecture := getattr(transformers, name, None)) is None:
        raise ModelError(f"{found.source}: its architecture {name} is not known to transformers")
    with torch.device("meta"):
        whole = architecture._from_config(_without_quantisation(found.config), dtype=torch.float32)
    _account(whole, stored).check(found.source)
    text = {}
    for name, tensor in stored.items():
        if (head := re.fullmatch(r"(?:model\.|language_model\.)*(lm_head\..*)", name)) is not None:
            text[head[1]] = tensor
        elif (inner := re.fullmatch(r"(?:model\.)?language_model\.(?:model\.)?(.*)", name)) is not None:
            text[f"model.{inner[1]}"] = tensor
    return text, len(stored) - len(text)


# ---- quantised models -----------------------------------------------------------------------------------------------


def _quantisation(config: PretrainedConfig) -> Any:
    """The settings of a quantisation in a configuration; None if it has none."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", "compression_config"):
            if settings := getattr(part, name, None):
                return settings
    return None


def _without_quantisation(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
    return config


def _method(settings: Any) -> str:
    """transformers' name of a quantisation."""
    tree = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(tree.get("quant_method") or tree.get("quant_algo") or "unnamed")
    for bits in ("4bit", "8bit"):
        if tree.get(f"load_in_{bits}") or tree.get(f"_load_in_{bits}"):
            return f"bitsandbytes_{bits}"
    return method


def _scheme(source: Path | str, config: PretrainedConfig) -> str:
    """The quantisation that a folder says it has; empty if it says none."""
    if (settings := _quantisation(config)) is not None:
        return _method(settings)
    files = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
    return next((scheme for file, scheme in files.items() if (Path(source) / file).is_file()), "")


def _dequantised(found: Pretrained, stored: dict[str, Stored], scheme: str, marks: dict[str, str]) -> Pretrained:
    """A quantised model that transformers dequantises on this machine. Raises ModelError, with what to do, if it does not."""
    settings = _quantisation(found.config)
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(scheme)
    why = "start from the plain model that it was made from"
    if (
        hasattr(AUTO_QUANTIZER_MAPPING.get(scheme), "_dequantize")
        and AUTO_QUANTIZER_MAPPING[scheme]._dequantize is not HfQuantizer._dequantize
    ):
        why = "where its package is installed: from_pretrained it with transformers, call dequantize(), save_pretrained that"
    if settings is not None and kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters:
        try:
            asked = kind(dequantize=True)
            quantizer, config, _ = get_hf_quantizer(copy.deepcopy(found.config), asked, None, True, {})
            model = empty_model(config, found.loading["trust_remote_code"])
            quantizer.preprocess_model(
                model=model, dtype=torch.float32, device_map=None, checkpoint_files=None, use_kernels=False
            )
            problems = _account(model, stored, quantizer).problems()
        except Exception as error:
            problems = [first_line(error)]
        if problems:
            why = f"transformers does not dequantise it here ({'; '.join(problems)})"
        else:
            loading = {**found.loading, "quantization_config": asked, "config": found.config}
            notes = (*found.notes, f"quantised ({scheme}); dequantised by transformers, the whole model in memory")
            return Pretrained(found.source, _without_quantisation(found.config), None, loading, None, notes)
    named = scheme or next(iter(marks.values()))
    first = f"; {len(marks)} tensors such as {next(iter(marks))}" if marks else ""
    raise ModelError(f"{found.source}: is quantised ({named}{first}), and a run needs plain weights; {why}")
