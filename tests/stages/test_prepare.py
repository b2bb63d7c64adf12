"""Stage prepare on files in a folder of its own: what it writes, counts and refuses."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config
from rlhf.config.data import SLICES
from rlhf.errors import UserError
from rlhf.job import Job, read_lines
from rlhf.stages.prepare import main

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "messages": "messages"}
COLUMNS |= {"question": "question", "answer": "answer", "text": "text"}
FILES = ("text", "heldout_text", "sft", "reward", "judge", "heldout_pairs", "ppo", "heldout_prompts", "examples", "quarantine")


def of_file(name: str, form: str, path: str, **split: float) -> dict[str, Any]:
    place = {"path": path, "hub": None, "revision": None, "hub_split": None}
    return {"name": name, "format": form, "columns": COLUMNS, "split": dict.fromkeys(SLICES, 0) | split, "weight": 1, **place}


def of_sandbox(name: str, rows: int, **split: float) -> dict[str, Any]:
    source = {"name": name, "format": "sandbox", "kind": name, "kinds": None, "rows": rows, "label_noise": 0, "weight": 1}
    return source | {"split": dict.fromkeys(SLICES, 0) | split}


def job_in(root: Path, sources: list[dict[str, Any]], seed: int = 1, **prepare: Any) -> Job:
    raw = yaml.safe_load((REPOSITORY / "presets" / "sandbox.yaml").read_text(encoding="utf-8"))
    raw |= {"seed": seed, "data": {"sources": sources}}
    raw["prepare"] |= prepare
    folder = root / "job"
    folder.mkdir(exist_ok=True)
    return Job("prepare", config.validate(raw, "params.yaml"), root, folder, "cpu", 0, 1, 0)


def prepared(job: Job) -> dict[str, list[dict[str, Any]]]:
    return {name: read_lines(job.folder / "out" / "data" / "prepared" / f"{name}.jsonl") for name in FILES}


def metrics(job: Job) -> dict[str, Any]:
    return json.loads((job.folder / "out" / "metrics" / "prepare.json").read_text(encoding="utf-8"))


def digests(job: Job) -> dict[str, str]:
    files = sorted(path for path in (job.folder / "out").rglob("*") if path.is_file())
    return {str(path.relative_to(job.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_pairs(path: Path, count: int, *more: bytes) -> str:
    rows = [{"prompt": f"What is {n}?", "chosen": f"A number, {n}.", "rejected": "No idea."} for n in range(count)]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"".join(line + b"\n" for line in more))
    return path.name


ASK = {"role": "user", "content": "What is 0?"}
ALL = {"text": 2.0, "sft": 2.0, "reward": 2.0, "ppo": 2.0, "judge": 1.0, "heldout": 1.0}


# ---------------------------------------------------------------------------------------------------------------- outputs


def test_every_row_goes_to_just_one_place(tmp_path: Path) -> None:
    bad = [b"{oops", b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', b'{"prompt": "x", "chosen": "a", "rejected": "a"}']
    path = write_pairs(tmp_path / "pairs.jsonl", 100, *bad)
    (tmp_path / "qa.jsonl").write_text('{"question": "What is 7?", "answer": "Seven."}\n{"question": "Who?", "answer": "Ada."}\n')
    sources = [of_file("mine", "pairs", path, **ALL), of_file("asked", "qa", "qa.jsonl", sft=1)]
    job = job_in(tmp_path, sources, max_quarantined_share=0.1)
    main(job)

    files, counts = prepared(job), metrics(job)
    of_mine = counts["sources"]["mine"]
    assert of_mine["slices"] == {"text": 20, "sft": 20, "reward": 20, "ppo": 20, "judge": 10, "heldout": 10}
    assert of_mine["reasons"] == {"chosen equals rejected": 1, "malformed": 1, "not UTF-8": 1}
    for source in counts["sources"].values():
        assert source["rows"] == source["quarantined"] + source["leaked"] + sum(source["slices"].values())
    assert (counts["rows"], counts["quarantined"]) == (105, 3)
    assert counts["files"] == {name: len(lines) for name, lines in files.items() if name not in ("examples", "quarantine")}
    assert [(row["file"], row["line"]) for row in files["quarantine"]] == [(path, 101), (path, 102), (path, 103)]
    assert files["quarantine"][1]["row"]["prompt"] == "\udcff"

    prompts = [row["messages"][0]["content"] for row in files["sft"]]
    prompts += [row["prompt"][0]["content"] for name in ("reward", "ppo", "judge", "heldout_pairs") for row in files[name]]
    prompts += [row["text"].removeprefix("Human: ").partition("\n\n")[0] for row in files["text"]]
    assert sorted(set(prompts) - {"Who?", "What is 7?"}) == sorted(f"What is {n}?" for n in range(100) if n != 7)


def test_shapes_of_the_lines(tmp_path: Path) -> None:
    job = job_in(tmp_path, [of_file("mine", "pairs", write_pairs(tmp_path / "pairs.jsonl", 40), **ALL)])
    main(job)
    files = prepared(job)
    question = files["text"][0]["text"].removeprefix("Human: ").partition("?")[0]
    assert files["text"][0] == {"text": f"Human: {question}?\n\nAssistant: A number, {question.rpartition(' ')[2]}."}
    assert [turn["role"] for turn in files["sft"][0]["messages"]] == ["user", "assistant"]
    assert set(files["reward"][0]) == set(files["judge"][0]) == set(files["heldout_pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert files["ppo"][0]["gold"] is None
    # no passages are held out: the held-out dialogues stand in for them
    assert len(files["heldout_text"]) == len(files["heldout_prompts"]) == 4
    assert files["quarantine"] == []
    assert files["examples"] == [{"row": "pairs.jsonl:1", "messages": [ASK, {"role": "assistant", "content": "A number, 0."}]}]


def test_what_turns_hold_goes_on_to_the_stages_and_what_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"role": "assistant", "content": "Zero."}
    call = {"type": "function", "function": {"name": "count", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"id": 7, "messages": [ASK, answer | {"weight": 0, "mood": "glad"}, ASK, answer]})
        + "\n"
        + json.dumps({"messages": [ASK, calling], "tools": [call["function"]]})
        + "\n"
        + json.dumps({"messages": [ASK, answer | {"weight": 0}]})
        + "\n"
    )
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    job = job_in(tmp_path, [of_file("mine", "pairs", pairs, **ALL), of_file("chat", "messages", "chat.jsonl", sft=1)])
    main(job)
    files = prepared(job)
    asking = ASK | {"tools": [{"type": "function", "function": call["function"]}]}
    found = [row["messages"] for row in files["sft"] if row["messages"][0] in (ASK, asking)]
    assert [ASK, answer | {"weight": 0}, ASK, answer] in found
    assert [asking, calling] in found
    assert [row["row"] for row in files["examples"]] == ["pairs.jsonl:1", "chat.jsonl:1", "chat.jsonl:2"]
    assert "chat: 2 rows, 1 in quarantine (no answer 1); not read: 'id' (1), 'turns.mood' (1)" in capsys.readouterr().out
    assert metrics(job)["sources"]["chat"]["unread"] == {"id": 1, "turns.mood": 1}


def test_held_out_prompts_leave_training_and_are_counted(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    asked = [{"question": f"What is {n}?", "answer": "Seven."} for n in range(40)]
    (tmp_path / "qa.json").write_text(json.dumps(asked), encoding="utf-8")
    job = job_in(tmp_path, [of_file("mine", "pairs", pairs, **ALL), of_file("asked", "qa", "qa.json", sft=1)])
    main(job)
    files = prepared(job)
    assert metrics(job)["leaked"] == metrics(job)["sources"]["asked"]["leaked"] == 4
    held_out = {row["prompt"][0]["content"] for row in files["heldout_prompts"]}
    assert len(held_out) == 4
    assert not held_out & {row["messages"][0]["content"] for row in files["sft"]}


def test_sandbox_prompts_are_held_out_once_with_their_gold(tmp_path: Path) -> None:
    sources = [of_sandbox("text", 50, text=0.9, heldout=0.1), of_sandbox("messages", 30, sft=1)]
    sources += [of_sandbox("pairs", 60, reward=0.5, heldout=0.5), of_sandbox("prompts", 60, ppo=0.5, heldout=0.5)]
    job = job_in(tmp_path, sources)
    main(job)
    files = prepared(job)
    assert len(files["heldout_text"]) == 5
    assert all(row["gold"] for row in files["heldout_prompts"] + files["ppo"])
    prompts = [json.dumps(row["prompt"]) for row in files["heldout_prompts"]]
    assert len(prompts) == len(set(prompts)) > 30
    assert files["judge"] == []


def test_same_params_same_bytes_and_another_seed_other_rows(tmp_path: Path) -> None:
    sources = [of_file("mine", "pairs", "pairs.jsonl", **ALL)]
    jobs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name / "pairs.jsonl", 60)
        jobs.append(job_in(tmp_path / name, sources, seed))
        main(jobs[-1])
    first, again, other = map(digests, jobs)
    assert len(first) == 11
    assert first == again
    assert first["out/data/prepared/sft.jsonl"] != other["out/data/prepared/sft.jsonl"]


def several_sources(root: Path) -> list[dict[str, Any]]:
    """Files of all kinds of rows, good and bad, that overlap each other; the largest takes several batches."""
    draw = random.Random(7)

    def pair(number: int) -> dict[str, Any]:
        asked = f"Frage {number % 1900}, wieso? {' ' * draw.randrange(2)}"
        chosen, rejected = draw.sample(["Ja – ä.", "Nein.", "日本。", 'So "it" is.\n\tYes.', "Hm \u2028"], 2)
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}

    def lines(rows: list[Any]) -> bytes:
        return b"".join((json.dumps(row, ensure_ascii=bool(draw.randrange(2))) + "\n").encode() for row in rows)

    bad = [{"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "x"}, 7, "\ud800"]
    (root / "parts").mkdir()
    (root / "parts/a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines([pair(n) for n in range(2300)]) + b"\n{oops\n\xff\n" + lines(bad))
    (root / "parts/b.jsonl.gz").write_bytes(gzip.compress(lines([pair(n) for n in range(1500, 2200)])))
    with (root / "parts/c.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["rejected", "prompt", "chosen"])
        writer.writeheader()
        writer.writerows(pair(n) for n in range(300))
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in map(pair, range(1850, 2000))]
    (root / "other.json").write_text(json.dumps({"data": [*swapped, *map(pair, range(1800, 2100))]}), encoding="utf-8")
    (root / "asked.jsonl").write_bytes(lines([{"question": pair(n)["prompt"], "answer": "So."} for n in range(100, 1300, 3)]))
    (root / "told.jsonl").write_bytes(lines([{"text": f"Passage {n % 300}. {'long ' * (n % 250)}"} for n in range(400)]))
    said = [
        {"instruction": f"Tell {n}.", "input": "Of it." * (n % 2), "output": "" if n % 40 == 1 else None if n % 9 == 0 else "Told."}
        for n in range(200)
    ]
    (root / "said.jsonl").write_bytes(lines(said))
    (root / "chat.json").write_bytes(lines(list(map(chat, range(2500)))))
    names = ("helpfulness", "correctness", "coherence")
    rated = [{"prompt": f"Frage {n // 3}?", "response": f"So {n}."} | {name: draw.randrange(5) for name in names} for n in range(2600)]
    (root / "rated.csv").write_bytes(lines(rated))
    return [
        of_file("mine", "pairs", "parts", **ALL) | {"weight": 2.5},
        of_file("other", "pairs", "other.json", reward=1, judge=1, heldout=0.5),
        of_file("asked", "qa", "asked.jsonl", sft=1) | {"weight": 0.3},
        of_file("told", "text", "told.jsonl", text=0.9, heldout=0.1),
        of_dataset("said", "alpaca", "said.jsonl", sft=1, ppo=2) | {"weight": 1.7},
        of_file("chat", "messages", "chat.json", sft=1, text=0.5, heldout=0.2),
        of_dataset("rated", "helpsteer", "rated.csv", reward=1),
    ]


def of_dataset(name: str, form: str, path: str, **split: float) -> dict[str, Any]:
    return {key: value for key, value in of_file(name, form, path, **split).items() if key != "columns"}


def chat(number: int) -> dict[str, Any]:
    """A dialogue: of ever other forms, with fields that nothing reads, answers that are not to be learnt, calls of tools."""
    asking, answer = {"role": "user", "content": f"Frage {number % 2300}, wieso?"}, {"role": "assistant", "content": "Ja – ä."}
    earlier = [asking, answer | {"weight": 0}] * (number % 4)
    if number % 5 == 0:
        call = {"function": {"name": "nachschlagen", "arguments": json.dumps({"n": number, "wo": "日本"})}}
        earlier += [asking, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "Nichts."}, answer]
    last = answer | ({"mood": "froh"} if number % 3 == 0 else {}) | ({f"extra {number // 500}": 1} if number % 7 == 0 else {})
    row = {"messages": [*earlier, asking, last if number % 11 else last | {"weight": 0}], "system": "Be brief." if number % 2 else None}
    return row | ({"tools": [{"name": "nachschlagen", "parameters": {}}]} if number % 5 == 0 else {})


@pytest.mark.parametrize("cores", [1, 2])
def test_the_same_bytes_as_ever_on_any_number_of_cores(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    job = job_in(tmp_path, several_sources(tmp_path), max_quarantined_share=0.5, max_characters=1000)
    main(job)
    counts = metrics(job)
    assert {reason for source in counts["sources"].values() for reason in source["reasons"]} == {
        "chosen equals rejected",
        "contradiction",
        "duplicate",
        "empty",
        "in another source",
        "malformed",
        "no answer",
        "not UTF-8",
        "over-long",
    }
    assert counts["leaked"] > 0
    # those of the first way of preparing, which held all rows as objects: a change here changes every run
    found = hashlib.sha256(json.dumps(digests(job), sort_keys=True).encode()).hexdigest()
    assert found == "7d10db826fc72b26e4a9286b27bc0355cf43b59cf5f414e73df3729655753440"
    assert not (job.folder / "rows").exists()


# --------------------------------------------------------------------------------------------------------------- refusals


def test_too_many_bad_rows_fail_and_can_be_read(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 16, b"{oops", b"{again", b"3", b'{"prompt": "x", "chosen": " ", "rejected": "\xff"}')
    job = job_in(tmp_path, [of_file("mine", "pairs", path, **ALL)], max_quarantined_share=0.19)
    with pytest.raises(UserError) as error:
        main(job)
    quarantine = job.folder / "quarantine.jsonl"
    assert "source 'mine' has 4 bad rows of 20 (20.0%): malformed (3), not UTF-8 (1)" in error.value.what
    assert "the first: pairs.jsonl:17, pairs.jsonl:18, pairs.jsonl:19. prepare.max_quarantined_share allows 19.0%" in error.value.what
    assert str(quarantine) in error.value.remedy
    assert [row["line"] for row in read_lines(quarantine)] == [17, 18, 19, 20]
    assert not (job.folder / "out").exists()
    main(job_in(tmp_path, [of_file("mine", "pairs", path, **ALL)], max_quarantined_share=0.2))


@pytest.mark.parametrize("slice_name", ["text", "sft", "reward", "ppo", "judge", "heldout"])
def test_a_slice_without_rows_is_refused(slice_name: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 20)
    job = job_in(tmp_path, [of_file("mine", "pairs", path, **(ALL | {slice_name: 0.001}))])
    with pytest.raises(UserError, match=rf"would be empty: no row of mine was left for split\.{slice_name}"):
        main(job)


def test_rows_of_one_prompt_are_told(tmp_path: Path) -> None:
    rows = ({"prompt": "Write a poem.", "chosen": f"Poem {number}", "rejected": "No."} for number in range(100))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"\(different prompts: 1; all rows of one go to one slice\)"):
        main(job_in(tmp_path, [of_file("mine", "pairs", "pairs.jsonl", **ALL)]))


def process_in(root: Path, path: str) -> subprocess.Popen[str]:
    """The stage by itself, on a file of pairs."""
    raw = yaml.safe_load((REPOSITORY / "presets" / "sandbox.yaml").read_text(encoding="utf-8"))
    raw["data"]["sources"] = [of_file("mine", "pairs", path, **ALL)]
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    environment = os.environ | {"RLHF_ROOT": str(root), "RLHF_JOB_DIR": str(root / "job"), "RLHF_DEVICE": "cpu"}
    environment["RLHF_PARAMS"] = str(root / "params.yaml")
    command = [sys.executable, "-m", "rlhf.stages.prepare"]
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_as_a_process(tmp_path: Path) -> None:
    process = process_in(tmp_path, "data/raw/gone.jsonl")
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.startswith(f"error: data.sources.0.path: no such file: {tmp_path}/data/raw/gone.jsonl\n")
    assert list((tmp_path / "job").iterdir()) == []


def test_a_killed_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 30_000)
    job, packed = job_in(tmp_path, [of_file("mine", "pairs", path, **ALL)]), tmp_path / "job/rows"
    process = process_in(tmp_path, path)
    while not packed.exists() or packed.stat().st_size < 1 << 20:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()  # ends when the processes of the other cores have closed it, too
    assert not (job.folder / "FINISHED").exists()
    assert process_in(tmp_path, path).wait() == 0
    assert (job.folder / "FINISHED").exists()
    assert not packed.exists()
    after = digests(job)
    shutil.rmtree(job.folder)
    main(job)
    assert digests(job) == after


def test_real_preferences(tmp_path: Path) -> None:
    path = SHARED / "hh-rlhf-harmless-1500.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    shutil.copy(path, tmp_path)
    job = job_in(tmp_path, [of_file("hh", "hh", path.name, **ALL)], max_characters=4000)
    main(job)
    files, counts = prepared(job), metrics(job)
    assert 0 < counts["quarantined"] < 30
    assert {name: len(files[name]) > 100 for name in ("text", "sft", "reward", "ppo", "judge", "heldout_pairs")} == dict.fromkeys(
        ("text", "sft", "reward", "ppo", "judge", "heldout_pairs"), True
    )
    training = {json.dumps(row["prompt"]) for name in ("reward", "ppo", "judge") for row in files[name]}
    assert not training & {json.dumps(row["prompt"]) for row in files["heldout_pairs"]}
