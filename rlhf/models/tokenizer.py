"""The tokenizer: built from the text slice, or the given model's, with a chat template and a known end of turn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import UserError, first_line
from rlhf.models import templates

PROBE = "What is the capital of France? 123"
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def build_tokenizer(texts: Iterable[str], vocab_size: int, context_tokens: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every string can be written in it, and decoding gives the string back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=context_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template("special")
    return fast


def template(name: str) -> str:
    """A chat template of the project: special (role tokens) or turns (plain Human/Assistant text, for any tokenizer)."""
    return Path(__file__).with_name(f"chat_{name}.jinja").read_text(encoding="utf-8").strip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the chat template writes after an assistant turn; the end-of-text token where it writes none.

    Raises:
        UserError: it writes none, and the tokenizer has no end of text.
    """
    answer = "An answer"
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # templates.problems says what it stumbles over
        rendered = ""
    after = rendered.rpartition(answer)[2].strip() if answer in rendered else ""
    # not only special ones: some tokenizers list the end of a turn among their added tokens alone
    tokens = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if found := [token for token in tokens if after.startswith(token)]:
        return max(found, key=len)
    if tokenizer.eos_token is None:
        what = "its tokenizer has no end token, and its chat template writes none after an answer"
        raise UserError(what, remedy="name the end of a text as `eos_token` in the model's tokenizer_config.json")
    return str(tokenizer.eos_token)


def given_tokenizer(
    folder: Path, chat_template: Literal["keep", "turns"], *, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """A given model's tokenizer, with what later stages rely on: a chat template, a pad token, the end of a turn as its end.

    Returns:
        It, and what was changed of its templates, for people.

    Raises:
        UserError: it cannot be read, writes no text, or has no chat template or end token.
    """
    try:
        tokenizer = as_its_file_says(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), folder)
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        # half of a surrogate pair can be read, and not written again
        json.dumps([tokenizer.init_kwargs, tokenizer.chat_template], ensure_ascii=False, default=str).encode()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # readers of damaged files raise what they stumble over, tokenizers' one even what is no Exception
        if "custom code" in str(error):
            what = "its tokenizer comes with code of its own, which would be run"
            raise UserError(what, remedy="read it, and if you trust it set base.trust_remote_code to true") from None
        there = any(path.name.startswith(("tokenizer", "vocab", "spiece")) for path in folder.iterdir())
        what = f"its tokenizer cannot be read: {first_line(error)}" if there else "no tokenizer is in its folder"
        raise UserError(what, remedy="give a folder with the tokenizer's files: tokenizer.json and tokenizer_config.json") from None
    if tokenizer.init_kwargs.pop("auto_map", None):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            what = "its tokenizer is one that only code of its own can read, which no later stage runs"
            raise UserError(what, remedy="give the model with a tokenizer.json, which needs no code")
        tokenizer = plain(tokenizer)
    if set(ids) <= {tokenizer.unk_token_id}:
        what = "its tokenizer has no words: the folder lacks the tokenizer's files"
        raise UserError(what, remedy="copy tokenizer.json and tokenizer_config.json of the model into it")
    if chat_template == "turns":
        tokenizer.chat_template = template("turns")
    elif tokenizer.chat_template is None:
        raise UserError("its tokenizer has no chat template", remedy="set base.chat_template: turns")
    notes = templates.settle(tokenizer)
    tokenizer.eos_token = end_of_turn(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, notes


def as_its_file_says(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json, where the one that transformers made by its class loses text that the file's keeps.

    It makes those of class LlamaTokenizerFast anew, from their words. Models that have the class but not the tokenizer it knows by their
    names on the hub alone (DeepSeek's distilled Llamas), not in a folder.
    """
    file = folder / "tokenizer.json"
    if not (file.exists() and isinstance(tokenizer, PreTrainedTokenizerFast)) or keeps_text(tokenizer.backend_tokenizer):
        return tokenizer
    core = Tokenizer.from_file(str(file))
    return plain(tokenizer, core) if keeps_text(core) else tokenizer


def keeps_text(core: Tokenizer) -> bool:
    return bool(core.decode(core.encode(PROBE, add_special_tokens=False).ids).strip() == PROBE)


def plain(tokenizer: PreTrainedTokenizerFast, core: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """The same tokenizer, as it is saved: of a class that transformers knows, for which no code of its own is needed.

    Args:
        core: what is to take the place of its core.
    """
    core = core or tokenizer.backend_tokenizer
    named = tokenizer.special_tokens_map.items()  # with those that a class takes for granted
    special = {name: token for name, token in named if not isinstance(token, str) or core.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=tokenizer.chat_template, **special)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder of this pipeline.

    Raises:
        UserError: there is none, or it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no tokenizer could be read ({str(error).splitlines()[0]})", remedy="give a Hugging Face model folder"
        ) from None
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template", remedy="set base.chat_template: turns")
    return tokenizer
