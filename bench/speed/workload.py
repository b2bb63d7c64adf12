"""What the speed benchmarks work on: texts of varied length, a tokenizer, random models of some 12 million weights, a workspace of these.

The texts come from the sandbox, or from a file of Anthropic-style preference pairs: JSON lines with `chosen` and `rejected`, dialogues of
Human and Assistant that differ in the last answer.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf import config
from rlhf.config.operations import Jobs
from rlhf.data.sandbox import make_rows
from rlhf.job import Job, write_lines
from rlhf.models.dialogues import encode_dialogues
from rlhf.models.packed import pad_rows
from rlhf.models.policy import DTYPES, disable_dropout
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, initialise_head, load_scalar
from rlhf.models.tokenizer import build_tokenizer

VOCABULARY, CONTEXT = 4096, 512
SHORTEST, LONGEST = 10, 128  # prompts, in tokens
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": CONTEXT}
MODELS: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 1536, "word_embed_proj_dim": 384},
    "llama": {**SIZES, "intermediate_size": 1152, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-135m": {  # the shape of SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
SMALL = ("opt", "llama")  # of some 12 million weights
TINY: dict[str, dict[str, Any]] = {  # weights so large that what they predict is uneven
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2},
}
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-5,
    "schedule": "constant",
    "final_ratio": 1.0,
    "warmup_ratio": 0.0,
    "betas": [0.9, 0.95],
    "epsilon": 1e-5,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
NEVER = 10**9
PRESET = Path(__file__).resolve().parents[2] / "presets/sandbox.yaml"


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str

    def dialogue(self, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": answer}]


def read_pairs(path: Path | None) -> list[Pair]:
    """All pairs of a file; without one, pieces of the sandbox's passages in the place of prompts and answers."""
    if path is None:
        texts = passages()
        return [Pair(*three) for three in zip(texts[::3], texts[1::3], texts[2::3], strict=True)]
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    end = "\n\nAssistant:"
    begins = [row["chosen"].rindex(end) + len(end) for row in rows]
    return [
        Pair(row["chosen"][:begin], row["chosen"][begin:], row["rejected"][begin:])
        for row, begin in zip(rows, begins, strict=True)
        if row["rejected"][:begin] == row["chosen"][:begin]
    ]


def passages() -> list[str]:
    """One to three of the sandbox's passages in a row, cut at 40 to 600 characters."""
    rows = [row["text"] for row in make_rows("text", 3000, 1, 0.0)]
    generator = random.Random(1)
    return [" ".join(generator.sample(rows, generator.randint(1, 3)))[: generator.randint(40, 600)] for _ in rows]


def make_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerFast:
    return build_tokenizer((text for pair in pairs for text in (pair.prompt, pair.chosen)), VOCABULARY, CONTEXT)


def make_model(family: str, device: str = "cpu", precision: str = "fp32", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family.partition("-")[0], **MODELS[family] | changes), dtype=DTYPES[precision]
        )
    return cast(PreTrainedModel, model.eval())


def load_plain(folder: Path, precision: str, form: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """As a peer has it: transformers' own model, with torch's own attention and products."""
    model = form.from_pretrained(folder, dtype=DTYPES[precision])
    disable_dropout(model)
    return model


@torch.no_grad()
def last_values(model: ScalarModel, rows: Sequence[list[int]], pad_id: int) -> torch.Tensor:
    """What a reward model says at the end of each row (B,), as a peer has it: padded, and with an attention mask."""
    padded, count = pad_rows(rows, pad_id), torch.tensor([len(row) for row in rows])
    attention = (torch.arange(padded.shape[1]) < count[:, None]).long()
    return model(input_ids=padded, attention_mask=attention).view(padded.shape).gather(1, count[:, None] - 1).flatten()


@dataclass(frozen=True)
class Workspace:
    """A folder in which the stages' own code runs, their models and prepared data being there already."""

    root: Path
    tokenizer: PreTrainedTokenizerFast
    pairs: list[Pair]
    parameters: int  # of the policy

    def job(self, stage: str) -> Job:
        return job_in(self.root, stage)


def job_in(root: Path, stage: str, device: str = "cpu") -> Job:
    """The job of a stage that runs alone in a workspace."""
    return Job(stage, config.load(root / "params.yaml"), root, root / "runs" / stage, device, 0, 1, 0)


@contextmanager
def workspace(
    family: str,
    file: Path | None,
    rows: int,
    answer_tokens: int,
    params: dict[str, dict[str, Any]],
    *,
    times: int = 1,
    system: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    critic: dict[str, Any] | None = None,
    **sizes: Any,
) -> Iterator[Workspace]:
    """A workspace of so many pairs, whose prompts are of SHORTEST to LONGEST tokens, their answers of `answer_tokens` at most.

    Args:
        params: by section, what differs from the sandbox's params.
        times: how often stage ppo finds each prompt in its data.
        system: about so many tokens of a system prompt stand before each of stage ppo's.
        device, precision: where the models are made, and what they are kept in and computed with.
        critic: sizes of the reward model, and so of the critic, where they are not the policy's.
        sizes: of the model, where they are not those of MODELS.
    """
    pairs = read_pairs(file)
    tokenizer = make_tokenizer(pairs)
    random.Random(1).shuffle(pairs)
    chosen = fitting(tokenizer, pairs, answer_tokens)[:rows]
    assert len(chosen) == rows, f"{len(chosen)} pairs are of the lengths wanted, {rows} are needed"
    root = Path(tempfile.mkdtemp(prefix="rlhf-bench-"))
    try:
        model = make_model(family, device, precision, **sizes)
        for stage in ("base", "sft"):
            save_model(model, tokenizer, root / "models" / stage)
        if critic:
            save_model(make_model(family, device, precision, **sizes | critic), tokenizer, root / "models/critic")
        scalar = load_scalar(root / "models" / ("critic" if critic else "base"), tokenizer, precision)
        initialise_head(scalar, 1)
        scalar.model.config.reward_mean, scalar.model.config.reward_std = 0.0, 1.0
        save_model(scalar.model, tokenizer, root / "models/reward")
        raw = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
        raw["base"] |= {"context_tokens": CONTEXT}
        raw["launch"]["precision"] = precision
        for section, values in params.items():
            raw[section] |= values
        (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        asked = [{"prompt": [{"role": "user", "content": pair.prompt}]} for pair in chosen]
        told = [{"role": "system", "content": tokenizer.decode(tokenizer(" ".join(passages()))["input_ids"][:system])}] if system else []
        answered = [{**row, "chosen": pair.chosen, "rejected": pair.rejected} for row, pair in zip(asked, chosen, strict=True)]
        lines: dict[str, list[Any]] = {
            "sft": [{"messages": pair.dialogue(pair.chosen)} for pair in chosen],
            "reward": answered,
            "heldout_pairs": answered[:2],
            "ppo": [{"prompt": told + row["prompt"], "gold": None} for row in asked for _ in range(times)],
        }
        for name, made in lines.items():
            write_lines(root / f"data/prepared/{name}.jsonl", made)
        yield Workspace(root, tokenizer, chosen, model.num_parameters())
    finally:
        shutil.rmtree(root, ignore_errors=True)


def fitting(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], answer_tokens: int) -> list[Pair]:
    """The pairs of the lengths wanted, no prompt twice."""
    first = list({pair.prompt: pair for pair in reversed(pairs)}.values())[::-1]
    sides = encode_dialogues(tokenizer, (pair.dialogue(answer) for pair in first for answer in (pair.chosen, pair.rejected)))
    return [
        pair
        for pair, (_, chosen), (_, rejected) in zip(first, sides[::2], sides[1::2], strict=True)
        if SHORTEST <= chosen.index(1) <= LONGEST and max(sum(chosen), sum(rejected)) <= answer_tokens
    ]


def jobs(ranks: int = 1, tokens: int = 4096) -> dict[str, Any]:
    """`launch.jobs`, alike for all stages; `tokens` of a micro-batch."""
    return {stage: {"processes": ranks, "threads": 1, "micro_batch_tokens": tokens} for stage in Jobs.model_fields}


def planned_lengths(count: int, limit: int, plan: str) -> list[int]:
    """Tokens of each answer, in random order: `full`, all at the limit; `varied`, limit · u^1.5 for evenly spread u, 40% on average."""
    lengths = [limit if plan == "full" else max(1, round(limit * ((i + 0.5) / count) ** 1.5)) for i in range(count)]
    random.Random(2).shuffle(lengths)
    return lengths
