"""Stage prepare on files in a folder of its own: what it writes, counts and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
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
    source = {"name": name, "format": "sandbox", "kind": name, "rows": rows, "label_noise": 0, "weight": 1}
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


def test_as_a_process(tmp_path: Path) -> None:
    raw = yaml.safe_load((REPOSITORY / "presets" / "sandbox.yaml").read_text(encoding="utf-8"))
    raw["data"]["sources"] = [of_file("mine", "pairs", "data/raw/gone.jsonl", **ALL)]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    environment = os.environ | {"RLHF_ROOT": str(tmp_path), "RLHF_JOB_DIR": str(tmp_path / "job"), "RLHF_DEVICE": "cpu"}
    environment["RLHF_PARAMS"] = str(tmp_path / "params.yaml")
    command = [sys.executable, "-m", "rlhf.stages.prepare"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: data.sources.0.path: no such file: {tmp_path}/data/raw/gone.jsonl\n")


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
