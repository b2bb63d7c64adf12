"""The tokenizer: built from the text slice, or the given model's, with a chat template and a known end of turn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import UserError

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
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = template("special")
    return fast


def template(name: str) -> str:
    """A chat template of the project: special (role tokens) or turns (plain Human/Assistant text, for any tokenizer)."""
    return Path(__file__).with_name(f"chat_{name}.jinja").read_text(encoding="utf-8").strip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes after an assistant turn; the end-of-text token where it writes none."""
    answer = "An answer"
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    after = rendered[rendered.rindex(answer) + len(answer) :].strip()
    found = [token for token in tokenizer.all_special_tokens if after.startswith(token)]
    return max(found, key=len) if found else str(tokenizer.eos_token)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder of this pipeline.

    Raises:
        UserError: there is none, or it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no tokenizer could be read ({str(error).splitlines()[0]})", remedy="give a Hugging Face model folder"
        ) from None
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template", remedy="set base.chat_template: turns")
    return tokenizer
