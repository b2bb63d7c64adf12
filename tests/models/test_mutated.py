"""Model folders with a change at random in one of their files: what is wrong is said, and what is not said can be pinned and opened."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.models.dialogues import encode_dialogue
from rlhf.models.given import check, pin
from rlhf.models.policy import load_policy
from rlhf.models.scalar import load_scalar
from rlhf.models.tokenizer import load_tokenizer
from tests.models.test_given import given
from tests.models.test_templates import ANSWER, ASKING, DATED, GUARDED, NO_SYSTEM, PARTS, SYSTEM, USER

FOLDERS = 30  # for each seed
STRANGE: tuple[Any, ...] = (
    None,
    -1,
    0,
    3,
    10**9,
    1.5,
    "",
    "x",
    "<|end|>",
    [],
    [1],
    {},
    {"a": 1},
    True,
    False,
    "../..",
    "gpt2",
    "float8_e4m3fn",
)


def mutated_values(content: bytes, chance: random.Random) -> bytes:
    """A JSON file with another value somewhere, or without it."""
    whole = place = json.loads(content)
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7):
            break
        place = place[key]
    if chance.random() < 0.3:
        del place[key]
    else:
        place[key] = chance.choice(STRANGE)
    return json.dumps(whole).encode()


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """A file with some bytes changed, left out or put in, or cut off."""
    start = chance.randrange(min(len(content), chance.choice([30, 3000, 10**6])))
    rest = content[start + chance.choice([0, 1, 20, len(content)]) :]
    return content[:start] + chance.randbytes(chance.choice([0, 1, 9])) + rest


@pytest.mark.parametrize("seed", range(3))
def test_no_change_gives_a_traceback(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seed: int) -> None:
    llama.save_pretrained(tmp_path / "whole", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "whole")
    chance = random.Random(seed)
    refused = 0
    for _ in range(FOLDERS):
        folder, to = tmp_path / "changed", tmp_path / "to"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        if chance.random() < 0.3:
            (folder / "chat_template.jinja").write_text(chance.choice([ASKING, GUARDED + DATED, NO_SYSTEM, PARTS]), encoding="utf-8")
        changed = chance.choice(sorted(folder.iterdir()))
        mutate = mutated_values if changed.suffix == ".json" and chance.random() < 0.7 else mutated_bytes
        changed.write_bytes(mutate(changed.read_bytes(), chance))
        errors = check(given(folder), [[SYSTEM, USER, ANSWER]])
        if errors:
            refused += 1
            assert all(error.what.startswith(f"base.model '{folder}'") and error.remedy for error in errors)
            continue
        pin(given(folder), to)
        kept = load_tokenizer(to)
        load_policy(to, "fp32")
        load_scalar(to, kept, "fp32")
        ids, mask = encode_dialogue(kept, [SYSTEM, USER, ANSWER])
        assert (ids[-1], any(mask)) == (kept.eos_token_id, True)
    assert FOLDERS > refused > FOLDERS / 5
