"""The weights of a given model by the heads of their files alone: whether they are whole, and whether they are those of its config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
from transformers.utils import logging

from rlhf.errors import UserError, first_line
from rlhf.models.attention import attend_to_pieces
from rlhf.models.policy import ATTENTION

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
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
Heads = dict[str, torch.Tensor]  # by name, without data


def shards(folder: Path) -> list[str]:
    """Names of the files of weights that transformers reads; none where there are no safetensors.

    Raises:
        UserError: the index cannot be read, or names files that are not there.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{INDEX} cannot be read: {first_line(error)}", remedy=AGAIN) from None
    # a name with a folder in it would be read, and written, elsewhere
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        what = f"{INDEX} names {len(absent)} of {len(names)} files that are not there: {some(absent)}"
        raise UserError(what, remedy="bring the missing files from where the model was published")
    return names


def local(folder: Path) -> Heads:
    """The heads of all weights in a folder.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    names = shards(folder)
    if not names:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5"})
        raise UserError(f"has no weights as safetensors{f', but {some(there)}' if there else ''}", remedy=CONVERT)
    heads: Heads = {}
    for name in names:
        try:
            heads |= load_state_dict(str(folder / name), map_location="meta")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(damage(folder / name, first_line(error)), remedy=AGAIN) from None
    return heads


def damage(path: Path, otherwise: str) -> str:
    """What is wrong with a file that is no whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(length)) if length < size else {}
        except ValueError:
            return f"{path.name} is no safetensors file ({otherwise})"
    ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    return f"{path.name} is cut off or damaged: {size:,} bytes{f' of {whole:,}' if ends and whole > size else ''} ({otherwise})"


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


def problems(heads: Heads, config: PreTrainedConfig, *, trust_remote_code: bool) -> list[UserError]:
    """What is wrong with weights for a language model of a config: transformers' own loader is asked, on a device without memory."""
    if packed := sorted(name for name, head in heads.items() if name.endswith((".qweight", ".weight_packed", "_blocks"))):
        return [UserError(f"its weights are quantised: {some(packed)}", remedy=DEQUANTISE)]
    try:
        with silence(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code)
            model, report = type(model).from_pretrained(
                None, config=config, state_dict=heads, device_map={"": "meta"}, ignore_mismatched_sizes=True, output_loading_info=True
            )
            attend_to_pieces(model)
        return [*_differences(report, heads, config, type(model).__name__), *_scalar(config)]
    except UserError as error:
        return [error]
    except Exception as error:  # a config of wrong values fails wherever they are first used
        return [UserError(f"cannot be loaded as a language model: {first_line(error)}", remedy=WHOLE)]


@contextmanager
def silence() -> Iterator[None]:
    """Have transformers say nothing: what it would warn of is returned."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _differences(report: dict[str, Any], heads: Heads, config: PreTrainedConfig, form: str) -> list[UserError]:
    """What the files hold otherwise than the config says."""
    missing, spare = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    # buffers that older versions saved are no weights
    spare = [name for name in spare if heads[name].is_floating_point() and heads[name].ndim]
    if missing and (prefix := _prefix(missing[0], spare)):
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


def _prefix(missing: str, spare: Iterable[str]) -> str | None:
    return next((name.removesuffix(missing) for name in spare if name.endswith(f".{missing}")), None)


def _scalar(config: PreTrainedConfig) -> list[UserError]:
    """A reward model is made of the same config."""
    if getattr(config, "auto_map", None):
        return []
    what = f"a model of type {config.model_type} cannot be made a reward model: transformers has no such form with a head `score`"
    refused = UserError(what, remedy="choose a model of another family (docs/own-model.md)")
    try:
        with silence(), torch.device("meta"):
            return [] if hasattr(AutoModelForSequenceClassification.from_config(config), "score") else [refused]
    except ValueError:
        return [refused]


def some(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
