"""The weights of a given model by the heads of their files alone: whether they are whole, and whether they are those of its config."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype

from rlhf.errors import UserError, first_line
from rlhf.models.policy import ATTENTION, silence

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WHOLE = "give a folder with a whole model, as AutoModelForCausalLM's save_pretrained writes it"
AGAIN = "download it again, and compare its size with the publisher's"
CONVERT = (
    "other formats can run code when they are opened: find a revision with safetensors, or, where you trust the model, convert it: "
    "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), the same for the tokenizer, and base.model=FOLDER"
)
DEQUANTISE = (
    "give the model that it was quantised from, or write the weights out in full: "
    "AutoModelForCausalLM.from_pretrained(MODEL).dequantize().save_pretrained(FOLDER), and base.model=FOLDER"
)
FORMS = {".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack", ".onnx"}
Heads = dict[str, torch.Tensor]  # by name, without data


def shards(folder: Path) -> list[str]:
    """Names of the files of weights that transformers reads, by the index where there is one; none where there are no safetensors.

    Raises:
        UserError: the index cannot be read.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        read = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(read["metadata"], dict):
            raise TypeError("'metadata'")  # transformers asks for it
        names = sorted(set(read["weight_map"].values()))
        # one with a folder in it would be read, and written, elsewhere
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"'{strange[0]}' is no name of a file")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"has an index that cannot be read, {INDEX}: {first_line(error)}", remedy=AGAIN) from None
    return names


def absent(folder: Path) -> list[str]:
    """Those of them that are not there."""
    return [name for name in shards(folder) if not (folder / name).is_file()]


def local(folder: Path) -> Heads:
    """The heads of all weights in a folder.

    Raises:
        UserError: there are none, some are absent, or a file is damaged.
    """
    names = shards(folder)
    if not names:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in FORMS)
        if parts := [name for name in there if name.endswith(".safetensors")]:
            what = f"has neither {SINGLE} nor {INDEX}, which would say what stands in {some(parts)}"
            raise UserError(what, remedy="bring the index from where the model was published")
        if gguf := [name for name in there if name.endswith(".gguf")]:
            raise of_llama_cpp(gguf)
        raise UserError(f"has no weights as safetensors{f', but {some(there)}' if there else ''}", remedy=CONVERT)
    if lacking := absent(folder):
        what = f"lacks files of its weights: {INDEX} names {len(names)}, and {some(lacking)} {'are' if lacking[1:] else 'is'} not there"
        raise UserError(what, remedy="bring the missing files from where the model was published")
    heads: Heads = {}
    for name in names:
        try:
            heads |= load_state_dict(str(folder / name), map_location="meta")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(damage(folder / name, first_line(error)), remedy=AGAIN) from None
    return heads


def of_llama_cpp(names: Sequence[str]) -> UserError:
    """What is said of a folder whose weights are GGUF."""
    what = f"has its weights as GGUF ({some(names)}), which llama.cpp runs and nobody trains"
    remedy = "give the model that it was made from: a folder, or a repository of the hub, with config.json, tokenizer and safetensors"
    return UserError(what, remedy=remedy)


def damage(path: Path, otherwise: str) -> str:
    """What is wrong with a file that is no whole safetensors file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(length, size)))
        whole = 8 + length + max(head["data_offsets"][1] for name, head in tensors.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"has {path.name}, which is cut off at {size:,} bytes, or no safetensors file ({otherwise})"
    return f"has {path.name}, which is {f'cut off: {size:,} of {whole:,} bytes' if size < whole else f'damaged ({otherwise})'}"


def published(model: str, revision: str | None) -> Heads:
    """The heads of all weights of a model on the hub, which are not downloaded for it.

    Raises:
        OSError: the hub cannot be reached, or has no safetensors there.
    """
    files = get_safetensors_metadata(model, revision=revision).files_metadata.values()
    return {
        name: torch.empty(head.shape, dtype=str_to_torch_dtype[head.dtype], device="meta")
        for file in files
        for name, head in file.tensors.items()
    }


def problems(heads: Heads, config: PreTrainedConfig) -> list[UserError]:
    """What is wrong with weights for a language model of a config: transformers' own loader is asked, on a device without memory."""
    try:
        with silence(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
            own = dict(model.named_parameters())
            # names of gptq and awq, of compressed tensors, and of mxfp4; or a weight that stands there in other numbers
            forms = (".qweight", ".weight_packed", "_blocks")
            if packed := sorted(n for n, head in heads.items() if n.endswith(forms) or (n in own and head.dtype not in FLOATS)):
                return [UserError(f"has quantised weights, which cannot be trained: {some(packed)}", remedy=DEQUANTISE)]
            model, report = _load(type(model), heads, config)
        return _differences(report, heads, type(model).__name__) or _scalar(heads, config)
    except UserError as error:
        return [error]
    except Exception as error:  # a config of wrong values fails wherever they are first used
        if "conversion" in str(error):  # transformers puts experts together, and says no more than that it failed
            return [UserError("has weights that cannot be put together, as of experts that are not all there", remedy=WHOLE)]
        return [UserError(f"cannot be loaded as a language model: {first_line(error)}", remedy=WHOLE)]


def _differences(report: dict[str, Any], heads: Heads, form: str) -> list[UserError]:
    """What the files hold otherwise than the config says."""
    missing, spare = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    # buffers that older versions saved are no weights
    spare = [name for name in spare if name not in heads or (heads[name].is_floating_point() and heads[name].ndim)]
    if missing and (prefix := _prefix(set(missing), spare)):
        what = f"before the names of its weights stands '{prefix}', as torch.compile, DDP and FSDP put it: {some(spare)}"
        rename = "save_file({name.replace(PREFIX, ''): w for name, w in load_file(FILE).items()}, FILE, metadata={'format': 'pt'})"
        return [UserError(what, remedy=f"save the model inside the wrapper, or rename with safetensors.torch: {rename}")]
    found = []
    if missing:
        tie = ", or set tie_word_embeddings: true in config.json where the model ties them" if missing == ["lm_head.weight"] else ""
        found.append(UserError(f"has no weights for {some(missing)}, which would be random", remedy=WHOLE + tie))
    if spare:
        what = f"has weights that a {form} has no place for: {some(spare)}"
        found.append(UserError(what, remedy=f"{WHOLE}; it leaves out what is not needed, and its config.json fits the weights"))
    for name, size, expected in sorted(report["mismatched_keys"])[:3]:
        what = f"{name} has the shape {tuple(size)}, and by its config.json {tuple(expected)}"
        found.append(UserError(what, remedy="give the config.json that belongs to these weights"))
    return found


def _prefix(missing: set[str], spare: Iterable[str]) -> str | None:
    """What stands before the name of a missing weight in the files, if one does."""
    for name in spare:
        for place in (i for i, letter in enumerate(name) if letter == "."):
            if name[place + 1 :] in missing:
                return name[: place + 1]
    return None


def _scalar(heads: Heads, config: PreTrainedConfig) -> list[UserError]:
    """A reward model is made of the same weights, but for its head."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with silence(), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
            _, report = _load(type(model), heads, config)
    except ValueError:
        model = None
    if not hasattr(model, "score"):
        what = f"is of type {config.model_type}, of which no reward model can be made: transformers has no such form with a head `score`"
        return [UserError(what, remedy="choose a model of another family (docs/own-model.md)")]
    if lacking := sorted(report["missing_keys"] - {"score.weight"}):
        return [UserError(f"has no weights for {some(lacking)}, which would be random in a reward model", remedy=WHOLE)]
    return []


def _load(form: Any, heads: Heads, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model on the device without memory, and what transformers found in loading it."""
    return form.from_pretrained(
        None, config=config, state_dict=dict(heads), device_map={"": "meta"}, ignore_mismatched_sizes=True, output_loading_info=True
    )


def some(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
