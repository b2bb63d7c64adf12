"""How rows of several sources are dealt and blended: no two slices share a row, prompts stay together, weights count passes."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config.data import SLICES, SLICES_OF_KIND, ColumnSource, Split
from rlhf.data.formats import Quarantined, Row
from rlhf.data.split import Numbers, blend, deal, deal_sources, shared_prompts, trained, without_leaks
from rlhf.data.validate import Checker, key_of
from rlhf.stages.prepare import main
from tests.stages.test_prepare import ALL, job_in, metrics, of_file, prepared, write_pairs

Slices = dict[str, list[Row]]


def split(**shares: float) -> Split:
    return Split(**(dict.fromkeys(SLICES, 0.0) | shares))


def source(name: str, kind: str, shares: Split) -> ColumnSource:
    columns = dict.fromkeys(("prompt", "chosen", "rejected", "messages", "question", "answer", "text"), "x")
    place = {"path": "x", "hub": None, "revision": None, "hub_split": None}
    return ColumnSource.model_validate({"name": name, "format": kind, "columns": columns, "split": shares, "weight": 1, **place})


def row_of(name: str, kind: str, line: int, draw: random.Random, prompts: int) -> Row:
    """A row out of few prompts and answers, so that they often come again."""
    if kind == "text":
        return Row(name, "f", line, kind, text=f"passage {draw.randrange(prompts)}")
    chosen, rejected = draw.sample(range(3), 2)
    asked = ({"role": "user", "content": f"prompt {draw.randrange(prompts)}?{' ' * draw.randrange(2)}"},)
    return Row(name, "f", line, kind, asked, f"answer {chosen}", f"answer {rejected}" if kind == "pairs" else None)


def seeded(*purpose: object) -> random.Random:
    return random.Random(str(purpose))


class Numbered:
    """Rows of sources, by number, as `split` takes them."""

    def __init__(self, good: dict[str, list[Row]]) -> None:
        self.rows = [row for rows in good.values() for row in rows]
        starts = np.cumsum([0, *map(len, good.values())])
        self.good = {name: np.arange(start, start + len(rows)) for (name, rows), start in zip(good.items(), starts, strict=False)}
        self.source = np.repeat(np.arange(len(good), dtype=np.int16), [len(rows) for rows in good.values()])
        first: dict[tuple[str, ...], int] = {}
        self.prompts = np.array([first.setdefault(key_of(row), number) for number, row in enumerate(self.rows)], np.int64)

    def of(self, numbers: Numbers) -> list[Row]:
        return [self.rows[number] for number in numbers]

    def deal(self, name: str, shares: Split, generator: random.Random) -> dict[str, Numbers]:
        """One source by itself."""
        return deal(self.good[name], self.prompts, shares, generator, np.full(len(self.rows), -1, np.int8))

    def leaks(self, slices: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], list[Row]]:
        number = {id(row): number for number, row in enumerate(self.rows)}
        given = {name: np.array([number[id(row)] for row in rows], np.int64) for name, rows in slices.items()}
        kept, removed = without_leaks(given, self.prompts)
        return {name: self.of(rows) for name, rows in kept.items()}, self.of(removed)


def dealt(sources: list[ColumnSource], draw: random.Random) -> tuple[Numbered, dict[str, Numbers]]:
    """Checked rows of each source, and the slices that they were dealt to."""
    checker = Checker(1000)
    good = {s.name: checker.divide([row_of(s.name, s.kind, i, draw, 25) for i in range(draw.randrange(60))])[0] for s in sources}
    numbered = Numbered(good)
    return numbered, deal_sources(numbered.good, numbered.prompts, sources, partial(seeded, draw.random()))


# ----------------------------------------------------------------------------------------------------------------- dealing


def test_deepspeed_chats_split_gives_each_stage_rows_of_its_own() -> None:
    rows = [Row("mine", "f", i, "pairs", ({"role": "user", "content": f"{i}?"},), "a", "b") for i in range(1000)]
    numbered = Numbered({"mine": rows})
    dealt = numbered.deal("mine", split(sft=2, reward=4, ppo=4), random.Random(1))
    parts = {name: numbered.of(part) for name, part in dealt.items()}
    assert {name: len(part) for name, part in parts.items()} == {"sft": 200, "reward": 400, "ppo": 400}
    assert sorted(row.line for part in parts.values() for row in part) == list(range(1000))
    # shuffled before it is cut: each slice holds rows from the beginning and from the end
    assert all(min(row.line for row in part) < 50 and max(row.line for row in part) > 950 for part in parts.values())


@pytest.mark.parametrize("trial", range(4))
def test_no_two_slices_share_a_row_whatever_the_sources(trial: int) -> None:
    draw = random.Random(trial)
    for _ in range(50):
        sources = []
        for number in range(draw.randint(2, 4)):
            kind = draw.choice(("text", "messages", "pairs"))
            fed = draw.sample(sorted(SLICES_OF_KIND[kind]), draw.randint(1, len(SLICES_OF_KIND[kind])))
            sources.append(source(f"s{number}", kind, split(**{name: draw.choice((0.5, 1, 3)) for name in fed})))
        numbered, numbers = dealt(sources, draw)
        slices = {name: numbered.of(rows) for name, rows in numbers.items()}
        kept, removed = numbered.leaks(slices)

        assert Counter((row.source, row.line) for row in numbered.rows) == Counter(
            (row.source, row.line) for rows in (*kept.values(), removed) for row in rows
        )
        places: dict[str, set[str]] = {}
        for name, rows in kept.items():
            for row in rows:
                places.setdefault(json.dumps([row.kind, row.content]), set()).add(name)
        assert all(len(names) == 1 for names in places.values())
        held_out = {key_of(row) for row in kept["heldout"]}
        assert not held_out & {key_of(row) for name, rows in kept.items() if name != "heldout" for row in rows}
        for own in sources:
            of_prompt: dict[tuple[str, ...], set[str]] = {}
            for name, rows in slices.items():
                for row in rows:
                    if row.source == own.name:
                        of_prompt.setdefault(key_of(row), set()).add(name)
            assert all(len(names) == 1 for names in of_prompt.values())


def test_a_prompt_of_several_divided_sources_goes_to_one_training_slice() -> None:
    shared_before = 0
    for trial in range(100):
        draw = random.Random(trial)
        fed = draw.sample(["text", "sft", "reward", "ppo", "judge"], 5)
        # each source feeds the slices of the narrower ones and maybe more
        sources = [
            source(f"s{width}", "pairs", split(heldout=draw.choice((0, 1)), **dict.fromkeys(fed[:width], 1)))
            for width in (draw.randint(2, 5) for _ in range(3))
        ]
        sources = list({s.name: s for s in sources}.values())
        numbered, slices = dealt(sources, draw)
        assert shared_prompts(slices, numbered.prompts) == 0
        alone = [numbered.deal(s.name, s.split, seeded(trial, s.name)) for s in sources]
        together = {name: np.concatenate([part[name] for part in alone if name in part] or [slices[name][:0]]) for name in SLICES}
        shared_before += shared_prompts(together, numbered.prompts)
    # dealt one by one, they would have shared many
    assert shared_before > 100


def test_a_source_for_one_slice_is_used_there_whole() -> None:
    draw = random.Random(1)
    sources = [source("extra", "messages", split(sft=1)), source("mixed", "pairs", split(sft=2, reward=4, ppo=4))]
    numbered, slices = dealt(sources, draw)
    assert sorted(number for number in slices["sft"] if numbered.source[number] == 0) == numbered.good["extra"].tolist()
    assert trained(sources[0].split) == ["sft"]
    alone = numbered.deal("mixed", sources[1].split, random.Random(1))
    assert {name: int((numbered.source[slices[name]] == 1).sum()) for name in alone} == {name: len(part) for name, part in alone.items()}
    assert shared_prompts(slices, numbered.prompts) > 0


# ---------------------------------------------------------------------------------------------------------------- blending


def blended(counts: dict[str, int], weights: dict[str, float], seeds: Any = seeded) -> list[tuple[str, int]]:
    """Names of sources and numbers of their rows."""
    rows = [(name, line) for name, count in counts.items() for line in range(count)]
    source = np.repeat(np.arange(len(counts), dtype=np.int16), list(counts.values()))
    return [rows[number] for number in blend(np.arange(len(rows)), source, weights, seeds)]


def test_a_weight_counts_passes() -> None:
    counts, weights = {"a": 4, "b": 3, "c": 10}, {"a": 1.0, "b": 2.5, "c": 0.3}
    used = Counter(blended(counts, weights))
    assert [used["a", line] for line in range(4)] == [1] * 4
    # two passes, and half of three rows, rounded to even, once more
    assert sorted(used["b", line] for line in range(3)) == [2, 3, 3]
    assert sorted(used["c", line] for line in range(10)) == [0] * 7 + [1] * 3
    assert blended(counts, weights) == blended(counts, weights)
    chosen = {number: {row for row in blended(counts, weights, partial(seeded, number)) if row[0] == "c"} for number in range(5)}
    assert len(set(map(frozenset, chosen.values()))) > 1


def test_a_weight_of_one_leaves_everything_as_it_was_and_repetitions_stand_apart() -> None:
    counts = {"a": 5, "b": 5}
    rows = blended(counts, {"a": 1.0, "b": 1.0})
    assert rows == [(name, line) for name in "ab" for line in range(5)]
    assert blended(counts, {"a": 2.0, "b": 1.0}) == rows + rows[:5]
    assert blended({"a": 0}, {"a": 2.0}) == []


def test_weights_change_what_is_trained_on_and_nothing_that_is_measured(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 200)
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps({"question": f"Who {n}?", "answer": "Ada."}) + "\n" for n in range(50)))
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for weights in ((1.0, 1.0), (2.0, 0.5)):
        sources = [of_file("mine", "pairs", path, **ALL), of_file("asked", "qa", "qa.jsonl", sft=1)]
        job = job_in(tmp_path, [s | {"weight": weight} for s, weight in zip(sources, weights, strict=True)])
        main(job)
        found.append((prepared(job), metrics(job)))
    (plain, before), (weighted, after) = found
    assert before["sources"]["mine"]["used"] == before["sources"]["mine"]["slices"] == after["sources"]["mine"]["slices"]
    assert after["sources"]["mine"]["used"] == {"text": 80, "sft": 80, "reward": 80, "ppo": 80, "judge": 20, "heldout": 20}
    assert after["sources"]["asked"]["used"]["sft"] == 25
    assert {name: len(rows) for name, rows in weighted.items()} == after["files"] | {"examples": 1, "quarantine": 0}
    assert (len(plain["sft"]), len(weighted["sft"])) == (90, 105)
    assert set(Counter(map(json.dumps, weighted["reward"])).values()) == {2}
    for name in ("judge", "heldout_pairs", "heldout_prompts", "heldout_text"):
        assert weighted[name] == plain[name]


# ------------------------------------------------------------------------------------------------------------- by design


def test_a_row_of_two_sources_is_used_once_and_is_no_damage(tmp_path: Path) -> None:
    write_pairs(tmp_path / "whole.jsonl", 100)
    write_pairs(tmp_path / "part.jsonl", 60)
    sources = [of_file("part", "pairs", "part.jsonl", **ALL), of_file("whole", "pairs", "whole.jsonl", **ALL)]
    job = job_in(tmp_path, sources, max_quarantined_share=0.0)
    main(job)
    counts = metrics(job)
    assert counts["sources"]["whole"]["reasons"] == {"in another source": 60}
    assert sum(sum(source["slices"].values()) for source in counts["sources"].values()) == 100
    assert counts["shared_prompts"] == counts["leaked"] == 0
    assert prepared(job)["quarantine"][0]["reason"] == "in another source: same as line 1 of part.jsonl"


def test_ties_are_counted_but_are_no_damage(tmp_path: Path) -> None:
    def comparison(number: int, score: float) -> dict[str, Any]:
        question = {"dataset": "eli5", "id": str(number), "full_text": f"Why {number}?"}
        return {"question": question, "answer_0": "So.", "score_0": score, "answer_1": "Thus.", "score_1": -score}

    rows = [comparison(number, 0.5 if number % 2 else 0.0) for number in range(60)]
    (tmp_path / "webgpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = of_file("gpt", "webgpt", "webgpt.jsonl", **ALL)
    del named["columns"]
    job = job_in(tmp_path, [named], max_quarantined_share=0.0)
    main(job)
    counts = metrics(job)["sources"]["gpt"]
    assert (counts["reasons"], counts["quarantined_share"]) == ({"tie": 30}, 0.5)
    assert {row["reason"] for row in prepared(job)["quarantine"]} == {"tie: 'score_0' equals 'score_1'"}
    assert Quarantined("gpt", "f", 1, "tie: x", None).category == "tie"
