"""A model that params name, before anything is made of it: found, and looked at as far as that goes without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.config.training import PretrainedBase
from rlhf.errors import UserError, first_line
from rlhf.models import headers, templates
from rlhf.models.dialogues import Messages, encode_dialogue, render
from rlhf.models.options import ANOTHER
from rlhf.models.supported import unsupported
from rlhf.models.tokenizer import given_tokenizer

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")  # all files of a hub model but its weights
SHORT = (
    {"role": "user", "content": "What is one and two?"},
    {"role": "assistant", "content": "The sum is three."},
    {"role": "user", "content": "And four?"},
    {"role": "assistant", "content": "Seven."},
)
FIND = "give a folder with config.json, tokenizer and weights, or a hub id and revision that can be reached"


def check(params: PretrainedBase, dialogues: Iterable[Messages] = ()) -> list[UserError]:
    """All that is wrong with a given model: family, config, tokenizer, chat template, names and shapes of weights; none are loaded.

    Args:
        dialogues: that its chat template is to render besides some small ones, for example a sample of the data.
    """
    try:
        folder = find(params)
        config = read_config(folder)
    except UserError as error:
        return [named(params, error)]
    why = unsupported(config)
    found = [UserError(why, remedy=ANOTHER)] if why else []
    # a pad token beyond the embedding fails in a model's making, and those of the tokenizer are looked at by themselves
    config.pad_token_id = None
    try:
        tokenizer, _ = given_tokenizer(folder, params.chat_template, trust_remote_code=params.trust_remote_code)
        found += templates.problems(tokenizer, dialogues)
        found += _beyond(tokenizer, config)
    except UserError as error:
        found.append(error)
    try:
        heads = read_heads(folder, params)
        found += headers.problems(heads, config)
    except UserError as error:
        found.append(error)
    return [named(params, error) for error in found]


def pin(params: PretrainedBase, to: Path) -> list[str]:
    """Write the given model to a folder, with what later stages rely on: chat template, pad token, end of turn; its weights as they are.

    Returns:
        What was changed, for people.

    Raises:
        UserError: something is wrong with it.
    """
    from rlhf.models import saving  # with DeepSpeed, for which those who only check a model need not wait

    for error in check(params):
        raise error
    names = headers.shards(find(params)) or [headers.SINGLE]
    folder = find(params, [*SMALL, *names])
    names += [headers.INDEX] if names != [headers.SINGLE] else []
    config = read_config(folder)
    tokenizer, notes = given_tokenizer(folder, params.chat_template, trust_remote_code=params.trust_remote_code)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]  # as it is loaded, and other programs may rely on it
    vars(config).pop("auto_map", None)  # transformers knows the type, and would ask whether to run the model's own code
    saving.copy_model(folder, names, config, tokenizer, to)
    return notes + in_pieces(tokenizer)


def in_pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where a dialogue as a whole has other tokens than its turns have one by one, as stages learn and sample them."""
    ids, _ = encode_dialogue(tokenizer, SHORT)
    text = render(tokenizer, SHORT, answer_follows=False).rpartition(str(tokenizer.eos_token))[0] + str(tokenizer.eos_token)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids == whole:
        return []
    at = next((i for i, (own, other) in enumerate(zip(ids, whole, strict=False)) if own != other), min(len(ids), len(whole)))
    own, other = (tokenizer.convert_ids_to_tokens(found[at : at + 2]) for found in (ids, whole))
    what = "the tokenizer writes a dialogue's turns, which are learnt and sampled one by one, otherwise than the whole dialogue"
    rather = "a chat template whose turns begin with special tokens has none of it"
    return [f"{what}: {' '.join(own)} in the place of {' '.join(other)}; {rather}"]


def named(params: PretrainedBase, error: UserError) -> UserError:
    """The same error, of the model that params name."""
    revision = f" (revision {params.revision})" if params.revision else ""
    colon = "" if error.what.startswith(("has ", "is ", "lacks ", "cannot ")) else ":"
    return UserError(f"base.model '{params.model}'{revision}{colon} {error.what}", remedy=error.remedy)


def find(params: PretrainedBase, files: Iterable[str] = SMALL) -> Path:
    """The folder of a given model; of one on the hub these files alone are sure to be there.

    Raises:
        UserError: there is none, what stands in it are pointers or links to files, or it is no whole model but an adapter.
    """
    folder = Path(params.model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(params.model, revision=params.revision, allow_patterns=list(files)))
        except Exception as error:  # of the network, or an answer that is not the hub's
            raise UserError(f"cannot be found: {first_line(error)}", remedy=FIND) from None
    if pointers := sorted(path.name for path in folder.iterdir() if path.is_file() and _is_pointer(path)):
        what = f"has git-lfs pointers in the place of files: {headers.some(pointers)}"
        raise UserError(what, remedy=f"run `git lfs install && git lfs pull` in {params.model}")
    if broken := sorted(path.name for path in folder.iterdir() if not path.exists()):
        what = f"has links to files that are not there: {headers.some(broken)}"
        raise UserError(what, remedy="copy the folder with what its links lead to (cp -rL), as of a snapshot in the hub's cache")
    if (folder / "adapter_config.json").is_file():
        what = "is a LoRA adapter (adapter_config.json), which is no model by itself"
        merge = "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
        remedy = f"merge it: peft's {merge}, the same tokenizer beside it, and base.model=FOLDER; where it is merged, remove that file"
        raise UserError(what, remedy=remedy)
    return folder


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(headers.POINTER)) == headers.POINTER
    except OSError:  # whoever needs the file says so
        return False


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a given model.

    Raises:
        UserError: it cannot be read, needs code of its own, or is not that of a language model whose weights can be trained.
    """
    if not (folder / "config.json").exists():
        raise _without_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file of wrong values fails wherever they are first used
        if "custom code" in str(error):
            what = "is of a type that transformers does not know, but only code that comes with it, which no stage runs"
            raise UserError(what, remedy="choose a model of another family (docs/own-model.md)") from None
        raise UserError(f"has no config.json that can be read: {first_line(error)}", remedy=FIND) from None
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        raise UserError(
            f"is quantised ({method or 'quantization_config in config.json'}), and cannot be trained", remedy=headers.DEQUANTISE
        )
    forms = getattr(config, "architectures", None) or []
    if scalar := next(
        (form for form in forms if form.endswith(("ForSequenceClassification", "RewardModel", "ForTokenClassification"))), None
    ):
        raise UserError(
            f"is a {scalar}, a reward model or classifier, and no language model", remedy="give the language model that it was made from"
        )
    return config


def _without_config(folder: Path) -> UserError:
    """What stands in a folder instead of a model."""
    files = sorted(path.name for path in folder.iterdir())
    if gguf := [name for name in files if name.endswith(".gguf")]:
        return headers.of_llama_cpp(gguf)
    if below := sorted(path.parent.name for path in folder.glob("*/config.json")):
        what = f"has no config.json, but folders in it have: {headers.some(below)}"
        return UserError(what, remedy=f"give the folder of the model itself, base.model=…/{below[0]}")
    return UserError(f"has no config.json{f', but {headers.some(files)}' if files else ': it is empty'}", remedy=FIND)


def read_heads(folder: Path, params: PretrainedBase) -> headers.Heads:
    """Names, shapes and types of the weights: of the folder, or, where they are not downloaded yet, of the hub.

    Raises:
        UserError: there are none as safetensors, or they are damaged.
    """
    if Path(params.model).is_dir() or (headers.shards(folder) and not headers.absent(folder)):
        return headers.local(folder)
    try:
        return headers.published(params.model, params.revision)
    except NotASafetensorsRepoError:
        raise UserError("has no weights as safetensors", remedy=headers.CONVERT) from None
    except Exception as error:  # of the network, or of a file there that is no safetensors file
        raise UserError(f"cannot be found: {first_line(error)}", remedy=FIND) from None


def _beyond(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[UserError]:
    """Whether the tokenizer has tokens that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    words = tokenizer.get_vocab()
    last = max(words, key=lambda word: words[word])
    if size is None or words[last] < size:
        return []
    what = f"its tokenizer has {words[last] + 1} tokens, the last {last!r}, and config.json says vocab_size {size}"
    remedy = "give the tokenizer that the model was trained with, or embed the tokens and save both: model.resize_token_embeddings(N)"
    return [UserError(what, remedy=remedy)]
