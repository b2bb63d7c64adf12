"""A sample of the rows that the stages will read: whether they can be read, what the chat template makes of them, and how long they are."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import Params
from rlhf.config.data import FileSource, Source
from rlhf.data.examples import dialogue, first_of_each
from rlhf.data.foreign import TO_UTF8, mend
from rlhf.data.formats import BY_DESIGN, Quarantined, Row, read
from rlhf.data.turns import Turns
from rlhf.data.validate import Checker
from rlhf.errors import UserError
from rlhf.job import read_lines
from rlhf.plan import slices
from rlhf.plan.findings import Findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ = 20_000  # rows of a source, at most
MADE = 2_000  # rows of a source that the project makes itself, at most
RENDERED = 200  # of these, drawn by lot, and the first of each form of dialogue
NOTED = 0.1  # share of rows that are too long
# files of data/prepared with dialogues, and which limit theirs is
PREPARED = {"sft": "sft", "reward": "reward", "judge": "judge", "ppo": "ppo", "heldout_pairs": "reward", "heldout_prompts": "ppo"}


@dataclass(frozen=True)
class Example:
    """A row as a stage reads it: where it stands, by which limit it is too long, and its dialogues."""

    place: str
    limit: str
    dialogues: tuple[Turns, ...]


def limits(params: Params) -> dict[str, tuple[str, int]]:
    """By name: the key of params.yaml, and its tokens. Pairs are the reward model's, or dpo's."""
    dpo = params.policy == "dpo"
    return {
        "sft": ("sft.max_tokens", params.sft.max_tokens),
        "reward": ("dpo.max_tokens", params.dpo.max_tokens) if dpo else ("reward.max_tokens", params.reward.max_tokens),
        "ppo": (f"{params.answering_key}.max_prompt_tokens", params.answering.max_prompt_tokens),
        "judge": ("evaluate.judge.max_tokens", params.evaluate.judge.max_tokens),
    }


def of_sources(root: Path, params: Params, findings: Findings) -> list[Example]:
    """Examples out of the raw data, which is checked as stage prepare does it, as far as it is read."""
    checker = Checker(params.prepare.max_characters)
    found: list[Example] = []
    known: dict[int, list[Row]] = {}  # all good rows of a source, by its number, where so many were read
    for number, source in enumerate(params.data.sources):
        if not isinstance(source, FileSource):
            findings.seen.append((f"source {source.name}", f"{source.rows:,} rows, made by the project"))
            if source.rows <= MADE:
                made = read(source, f"data.sources.{number}", root, slices.job(root, params).seed("sandbox", source.name))
                known[number], _ = checker.divide(made)
            if params.base.source == "pretrained":  # else there is no template yet
                found += _examples(source, islice(read(source, f"data.sources.{number}", root, 0), RENDERED), params)
            continue
        with findings.collecting():
            _check_place(root, source, f"data.sources.{number}.path")
            rows = islice(read(source, f"data.sources.{number}", root, 0), READ + 1)
            good, bad = checker.divide(rows)
            whole = len(good) + len(bad) <= READ
            findings.seen.append((f"source {source.name}", _counted(good, bad, whole=whole)))
            found += _examples(source, _drawn(good, random.Random(params.seed)), params)
            if whole:
                _check_quarantine(source, good, bad, params.prepare.max_quarantined_share)
                known[number] = good
            if other := sum(row.category == "not UTF-8" for row in bad):
                findings.notes.append(f"source '{source.name}': {other:,} rows are not UTF-8, and would be left out; {TO_UTF8}")
    slices.check(root, params, known, findings)
    return found


def _check_place(root: Path, source: FileSource, key: str) -> None:
    """A file elsewhere is no input of stage prepare, whose graph has data/raw: DVC would not see that it changes."""
    if source.path is not None and not Path(os.path.normpath(root / source.path)).is_relative_to(root / "data" / "raw"):
        remedy = f"`rlhf use params.yaml {key}={source.path}` copies it there, and versions it"
        raise UserError(f"{key}: {source.path} is not under data/raw, and the runs would not see that it changes", remedy=remedy)


def _counted(good: Sequence[Row], bad: Sequence[Quarantined], *, whole: bool) -> str:
    total = len(good) + len(bad)
    said = f"{total:,} rows" if whole else f"more than {READ:,} rows"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(row.category for row in bad).most_common(3))
    said += f", {len(bad):,} {'' if whole else 'of the first ones '}for quarantine ({reasons})" if bad else ""
    unread = Counter(name for row in good for name in row.unread)
    return said + ("; not read: " + ", ".join(f"'{name}' ({count:,})" for name, count in sorted(unread.items())) if unread else "")


def _check_quarantine(source: Source, good: Sequence[Row], bad: Sequence[Quarantined], limit: float) -> None:
    damaged = [row for row in bad if row.category not in BY_DESIGN]
    total = len(good) + len(bad)
    if len(damaged) > limit * total:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(row.category for row in damaged).most_common(3))
        places = ", ".join(f"{row.file}:{row.line}" for row in damaged[:3])
        share = f"{len(damaged)} bad rows of {total} ({len(damaged) / total:.1%})"
        what = f"source '{source.name}' has {share}: {reasons}; the first: {places}, the first of these {damaged[0].reason[:200]}. "
        what += f"prepare.max_quarantined_share allows {limit:.1%}"
        raise UserError(what, remedy=mend({row.category for row in damaged}, all_rows=not good))


def _drawn(rows: Sequence[Row], generator: random.Random) -> list[Row]:
    drawn = generator.sample(rows, min(RENDERED, len(rows)))
    return list({(row.file, row.line): row for row in (*first_of_each(rows).values(), *drawn)}.values())


def _examples(source: Source, rows: Iterable[Row | Quarantined], params: Params) -> list[Example]:
    uses = source.split.uses
    found = []
    for row in rows:
        if isinstance(row, Quarantined) or row.kind == "text":
            continue
        place = f"{row.file}:{row.line} (source '{source.name}')"
        answered = (dialogue(row), *([(*row.prompt, {"role": "assistant", "content": row.rejected})] if row.rejected is not None else []))
        if uses("sft"):
            found.append(Example(place, "sft", answered[:1]))
        if uses("reward") or (uses("heldout") and row.rejected is not None):
            found.append(Example(place, "reward", answered))
        if uses("judge") and params.trains_judge:
            found.append(Example(place, "judge", answered))
        if uses("ppo") or uses("heldout"):
            found.append(Example(place, "ppo", (row.prompt,)))
    return found


def of_prepared(root: Path, params: Params, findings: Findings) -> list[Example]:
    """Examples out of data/prepared, where stage prepare is up to date."""
    found = []
    for name, limit in PREPARED.items():
        path = root / "data" / "prepared" / f"{name}.jsonl"
        with findings.collecting():
            lines = read_lines(path) if path.is_file() else []
            chosen = random.Random(params.seed).sample(range(len(lines)), min(RENDERED, len(lines)))
            found += [Example(f"data/prepared/{name}.jsonl:{number + 1}", limit, _dialogues(lines[number])) for number in sorted(chosen)]
    with findings.collecting():
        slices.check_prepared(root, params, findings)
    return found


def _dialogues(line: dict[str, Any]) -> tuple[Turns, ...]:
    if "messages" in line:
        return (tuple(line["messages"]),)
    answers = [line[name] for name in ("chosen", "rejected") if name in line]
    return tuple((*line["prompt"], {"role": "assistant", "content": answer}) for answer in answers) or (tuple(line["prompt"]),)


# ------------------------------------------------------------------------------------------------------------- rendered


def render(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, model: str, params: Params, findings: Findings) -> None:
    """Have the chat template write the examples, and count their tokens.

    Args:
        model: what it is called, for messages.
    """
    from rlhf.models import templates

    dialogues = {json.dumps(dialogue): dialogue for example in examples for dialogue in example.dialogues}
    tried = {text: templates.problems(tokenizer, [dialogue]) for text, dialogue in dialogues.items()}
    said: dict[tuple[str, str], dict[str, None]] = {}  # what is wrong and its remedy: the places
    fine = []
    for example in examples:
        wrong = [problem for dialogue in example.dialogues for problem in tried[json.dumps(dialogue)]]
        if wrong and not any(example.place in places for places in said.values()):  # a row is named once
            said.setdefault((wrong[0].what, wrong[0].remedy), {})[example.place] = None
        fine += [] if wrong else [example]
    for (what, remedy), places in said.items():
        if not any(what in problem.what for problem in findings.problems):  # of the model itself, which has said it
            first, *others = places
            more = f", and of {len(others):,} more of the rows looked at" if others else ""
            findings.problems.append(UserError(f"{first}{more}: {model}: {what}", remedy=remedy))
    _measure(fine, tokenizer, limits(params), findings)
    _note_controls(examples, tokenizer, findings)


def _note_controls(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    """Tell of texts that hold the words of control tokens: they may have been written by a chat template already."""
    from rlhf.models.contents import controls

    words = controls(tokenizer)
    within = {example.place: set(words.within(example.dialogues)) for example in examples}
    holding = [place for place, found in within.items() if found]
    if holding:
        named = ", ".join(sorted({word for found in within.values() for word in found})[:3])
        said = f"{len(holding)} of {len(within)} rows looked at hold words of control tokens ({named}), the first {holding[0]}"
        findings.notes.append(f"{said}: they are read as text; if a chat template wrote them, bring the turns as a message list instead")


def _measure(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limits: dict[str, tuple[str, int]], findings: Findings
) -> None:
    from rlhf.models.dialogues import encode_dialogues

    encoded = iter(encode_dialogues(tokenizer, (dialogue for example in examples for dialogue in example.dialogues)))
    lengths: dict[str, list[int]] = {}
    for example in examples:
        lengths.setdefault(example.limit, []).append(max(len(next(encoded)[0]) for _ in example.dialogues))
    for name, found in lengths.items():
        key, most = limits[name]
        too_long = sum(length > most for length in found)
        said = f"{too_long} of {len(found)} rows looked at ({too_long / len(found):.1%}); the longest has {max(found):,} tokens"
        findings.seen.append((f"longer than {key}", said))
        if too_long == len(found):
            what = f"{key}: none of {len(found)} rows looked at fits in {most} tokens"
            findings.problems.append(UserError(what, remedy=f"raise {key}"))
        elif too_long > NOTED * len(found):
            findings.notes.append(f"{key}: {too_long / len(found):.0%} of the rows looked at have more tokens, and would be left out")
