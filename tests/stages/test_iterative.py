"""Training on answers that were sampled before: rounds of DPO, best of n, RRHF; stages as a whole on tiny models."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bench.learning import algorithms
from rlhf import config
from rlhf.algorithms.rrhf import better, rrhf_loss
from rlhf.config.stored import RoundPairs
from rlhf.errors import UserError
from rlhf.job import Job, read_lines, write_lines
from rlhf.models.policy import load_policy
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.answers import round_prompts
from rlhf.stages.round import as_pair, make_pairs
from rlhf.stages.rounds import Ranked, read_ranked
from rlhf.stages.rrhf import laid_out
from rlhf.stages.sampled import read_prompts
from rlhf.sweep import tasks
from rlhf.workspace import dag, fingerprint
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

ROOT = Path(__file__).parents[2]
WORST = RoundPairs(rejected="worst", length_penalty=0.0, rounds="all")


def params_of(algorithm: str, **answers: Any) -> dict[str, Any]:
    raw = tiny_params() | {"algorithm": algorithm}
    raw["answers"] |= answers
    raw["iterative"] |= {"rounds": 2}
    raw["rrhf"] |= {"epochs": 1.5}
    return raw


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def copied(start: Path, place: Path, raw: dict[str, Any], *without: str) -> Path:
    shutil.copytree(start, place, ignore=shutil.ignore_patterns("runs", *without))
    set_params(place, raw)
    return place


def found_before(root: Path, reward: float) -> None:
    """Have sft's held-out reward be another one."""
    path = root / "metrics/answers-1.json"
    path.write_text(json.dumps(read(path) | {"heldout_reward": reward}), encoding="utf-8")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspaces: `on`, in which two rounds have run; `over`, where the first made it worse; `rrhf`; and `best`, of best-of-n."""
    root = tmp_path_factory.mktemp("rounds")
    make_workspace(root / "on", params_of("iterative"), pairs=240)
    run(root, *(f"on/{stage}" for stage in ("base", "sft", "reward", "answers-1", "round-1")))
    copied(root / "on", root / "over", params_of("iterative"))
    copied(root / "on", root / "rrhf", params_of("rrhf", pairs=4), "rounds")
    copied(root / "on", root / "best", params_of("best-of-n"), "rounds")
    found_before(root / "on", -1e9)
    found_before(root / "over", 1e9)
    rest = ("answers-2", "round-2", "iterative", "evaluate")
    words = [f"{name}/{stage}" for name in ("on", "over") for stage in rest]
    (root / "said.txt").write_text(
        run(
            root,
            *words,
            *(f"{name}/{stage}" for name, own in (("rrhf", "rrhf"), ("best", "best_of_n")) for stage in ("answers", own, "evaluate")),
        )
    )
    return root


def test_each_round_answers_prompts_of_its_own_and_learns_from_all_pairs(places: Path) -> None:
    root = places / "on"
    first, second = (read_lines(root / f"data/rounds/{number}/answers.jsonl") for number in (1, 2))
    heldout = read_lines(root / "data/rollouts.jsonl")
    prompts = [{json.dumps(row["prompt"]) for row in rows} for rows in (first, second, heldout)]
    assert [len(own) for own in prompts] == [8, 8, 6]
    assert not prompts[0] & prompts[1] | prompts[1] & prompts[2] | prompts[0] & prompts[2]
    assert {len(row["answers"]) for row in first + second} == {4}
    temperatures = [one["temperature"] for one in first[0]["answers"]]
    assert temperatures == [1.0, 1.0, 0.7, 0.7]
    assert [row["step"] for row in heldout] == [0] * 6 + [1] * 6 + [2] * 6
    one, two = (read(root / f"metrics/round-{number}.json") for number in (1, 2))
    assert one["pairs"] == one["new_pairs"] == len(read_lines(root / "data/rounds/1/pairs.jsonl")) == 8 - one["ties"] - one["cut_off"]
    assert one["cut_off"] >= sum(not any(answer["ended"] for answer in row["answers"]) for row in first) > 0
    assert two["pairs"] == one["pairs"] + two["new_pairs"]
    assert (root / "models/round-1/model.safetensors").read_bytes() != (root / "models/round-2/model.safetensors").read_bytes()


def test_the_best_round_is_handed_on_and_evaluated(places: Path) -> None:
    root = places / "on"
    found = read(root / "metrics/iterative.json")
    rewards = {number: row["heldout_reward"] for number, row in found["rounds"].items()}
    assert found["rounds"].keys() == {"0", "1", "2"}
    assert rewards[str(found["best"])] == max(rewards.values())
    handed, made = (root / f"models/{name}/model.safetensors" for name in ("iterative", f"round-{found['best']}"))
    assert handed.read_bytes() == made.read_bytes()
    rates, lines = read(root / "metrics/evaluate.json")["eos_rate"], read_lines(root / "data/answers.jsonl")
    assert rates.keys() == {"sft", "iterative"}
    assert {name: pytest.approx(sum(line["ended"][name] for line in lines) / len(lines)) for name in rates} == rates
    assert [row["step"] for row in table(root / "plots/gold_against_kl.csv")] == ["0", "1", "2"]


def test_the_bench_shows_the_gold_of_each_round(places: Path) -> None:
    course = algorithms.by_round(places / "on")
    assert course == [float(row["gold"]) for row in table(places / "on/plots/gold_against_kl.csv")]
    measured = dict.fromkeys(("answers", *algorithms.MEASURED, "seconds", "processor_seconds", "peak_gib"), 1.0)
    rows = [{"algorithm": "iterative", "seed": seed, **measured, "gold_by_round": course} for seed in (1, 2)]
    rows.append({"algorithm": "ppo", "seed": 1, **measured, "gold_by_round": []})
    console = Console(width=400, file=io.StringIO())
    with console.capture() as shown:
        console.print(algorithms.table(rows), algorithms.means(rows))
    assert shown.get().count(" ".join(f"{score:.3f}" for score in course)) == 3


def test_a_worse_round_ends_the_iteration_and_the_policy_before_goes_on(places: Path) -> None:
    root = places / "over"
    said = (places / "said.txt").read_text(encoding="utf-8")
    assert "the iteration is over, and the policy of 0 rounds stays" in said
    assert "round-2: the iteration was over before round 2" in said
    assert read(root / "metrics/answers-2.json")["over"]
    assert read_lines(root / "data/rounds/2/answers.jsonl") == read_lines(root / "data/rounds/2/pairs.jsonl") == []
    found = read(root / "metrics/iterative.json")
    assert (found["best"], found["stopped_by"], found["rounds"].keys()) == (0, 1, {"0", "1"})
    weights = [(root / f"models/{name}/model.safetensors").read_bytes() for name in ("iterative", "sft", "round-1", "round-2")]
    assert weights[0] == weights[1] != weights[2] == weights[3]


def test_rrhf_ranks_the_given_answers_too_and_best_of_n_learns_the_best(places: Path) -> None:
    rows = read_lines(places / "rrhf/data/rounds/1/answers.jsonl")
    assert len(rows) == 8 + 4
    assert {one["by"] for row in rows[8:] for one in row["answers"]} == {"policy", "chosen", "rejected"}
    assert {one["by"] for row in rows[:8] for one in row["answers"]} == {"policy"}
    own = read_lines(places / "best/data/rounds/1/answers.jsonl")
    # both ask the same prompts the same way, whatever algorithm will learn from that
    assert [row["answers"] for row in own] == [row["answers"] for row in rows[:8]]
    losses = [float(row["loss"]) for row in table(places / "rrhf/plots/rrhf.csv")]
    assert len(losses) == 3
    # what a sweep takes for the cost of a point
    logged = read_lines(places / "rrhf/runs/rrhf/metrics.jsonl")
    assert all(0 < line["seconds"] < 600 for line in logged)
    assert tasks.taken(places / "rrhf/runs/rrhf/metrics.jsonl") == pytest.approx(sum(line["seconds"] for line in logged))
    for name in ("rrhf", "best"):
        weights = [
            (places / name / f"models/{model}/model.safetensors").read_bytes() for model in ("sft", {"best": "best_of_n"}.get(name, name))
        ]
        assert weights[0] != weights[1]


def test_a_prompt_whose_answers_were_all_cut_off_teaches_nothing(places: Path, tmp_path: Path) -> None:
    said = (places / "said.txt").read_text(encoding="utf-8")
    for name, stage, left in (("best", "best_of_n", "rows"), ("rrhf", "rrhf", "prompts")):
        rows = read_lines(places / name / "data/rounds/1/answers.jsonl")
        cut_off = sum(not any(one["ended"] for one in row["answers"]) for row in rows)
        found = read(places / name / f"metrics/{stage}.json")
        assert (found["cut_off"], found[left]) == (cut_off, len(rows) - cut_off)
        assert f"{stage}: {cut_off} of {len(rows)} prompts teach nothing, as their best answers were cut off" in said
    root = copied(places / "best", tmp_path / "root", params_of("best-of-n"))
    job = Job("best_of_n", config.load(root / "params.yaml"), root, root / "runs/best_of_n", "cpu", 0, 1, 0)
    ranked, _ = read_ranked(job)
    assert all(row.ended[row.best] for row in ranked)
    for row in rows:
        row["answers"] = [one | {"ended": False} for one in row["answers"]]
    write_lines(root / "data/rounds/1/answers.jsonl", rows)
    with pytest.raises(UserError, match=r"all answers to all of 12 prompts were cut off"):
        read_ranked(job)


def test_any_cut_of_the_answers_and_of_rrhf_comes_to_the_same(places: Path, tmp_path: Path) -> None:
    def cut(name: str, tokens: int) -> Path:
        raw = params_of("rrhf", pairs=4)
        for stage in ("answers", "rrhf"):
            raw["launch"]["jobs"][stage] |= {"micro_batch_tokens": tokens}
        return copied(places / "rrhf", tmp_path / name, raw, "rounds")

    cut("small", 100)
    cut("ranks", 4096)
    run(tmp_path, "small/answers", "small/rrhf")
    run(tmp_path, "ranks/answers", "ranks/rrhf", ranks=2)
    expected = [{name: float(value) for name, value in row.items()} for row in table(places / "rrhf/plots/rrhf.csv")]
    answers = read_lines(places / "rrhf/data/rounds/1/answers.jsonl")
    for name in ("small", "ranks"):
        rows = read_lines(tmp_path / name / "data/rounds/1/answers.jsonl")
        assert [[one["tokens"] for one in row["answers"]] for row in rows] == [[one["tokens"] for one in row["answers"]] for row in answers]
        found = [{key: float(value) for key, value in row.items()} for row in table(tmp_path / name / "plots/rrhf.csv")]
        assert found == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in expected]


def test_rewards_that_differ_by_little_are_ranked_as_they_are_counted(places: Path) -> None:
    """A sum of rewards may miss another one by its last bit: where that makes a pair, it does so in the loss as in its denominator."""
    row = Ranked([1, 2], [[3, 4], [5], [6]], [0.3, 0.1 + 0.2, 0.3], [True] * 3)
    log_probs, lengths, rewards, there, ended = laid_out(load_policy(places / "rrhf/models/sft", "fp32"), [row])
    _, stats = rrhf_loss(log_probs, lengths, rewards, there, ended, 1.0, 1.0, ranked_prompts=1, best_tokens=1)
    assert stats["best_loss"].item() == pytest.approx(-log_probs[0, row.best].item())
    assert better(rewards, there, ended).sum() == 2


def test_no_pair_is_asked_whose_prompt_is_a_rounds_or_held_out(places: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(places / "rrhf/data/prepared", root / "data/prepared")
    pairs, prompts = (read_lines(root / f"data/prepared/{name}.jsonl") for name in ("reward", "ppo"))
    write_lines(root / "data/prepared/reward.jsonl", [{**pair, "prompt": row["prompt"]} for pair, row in zip(pairs, prompts, strict=True)])
    set_params(root, params_of("iterative", pairs=4))
    job = Job("answers-1", config.load(root / "params.yaml"), root, root / "runs/answers-1", "cpu", 0, 1, 0)
    tokenizer = load_tokenizer(places / "rrhf/models/sft")
    with pytest.raises(UserError, match="4 prompts of pairs from number 0 on are asked for, but 0 different ones are short enough"):
        round_prompts(job, read_prompts(job, tokenizer), tokenizer)


def test_killed_stages_go_on_to_the_same_bytes(places: Path, tmp_path: Path) -> None:
    copied(places / "rrhf", tmp_path / "root", params_of("rrhf", pairs=4), "rounds")
    whole = (places / "rrhf/data/rounds/1/answers.jsonl").read_bytes()
    (tmp_path / "root/runs/answers").mkdir(parents=True)
    lines = whole.splitlines(keepends=True)
    (tmp_path / "root/runs/answers/answers.jsonl").write_bytes(b"".join(lines[:11]) + lines[11][:20])
    said = run(tmp_path, "root/answers", "root/rrhf:killed", code=-signal.SIGKILL)
    assert "answers: goes on from batch 1 of 2" in said
    assert (tmp_path / "root/data/rounds/1/answers.jsonl").read_bytes() == whole
    assert "rrhf: goes on from step 2" in run(tmp_path, "root/rrhf")
    for path in ("models/rrhf/model.safetensors", "plots/rrhf.csv", "metrics/answers.json"):
        assert (tmp_path / "root" / path).read_bytes() == (places / "rrhf" / path).read_bytes()


# ------------------------------------------------------------------------------------------------------- pairs and the graph


def answers(*scores: float, texts: Sequence[str] = ("a", "bb", "ccc")) -> dict[str, Any]:
    rows = [
        {"answer": text, "score": score, "tokens": [7, number], "ended": True}
        for number, (text, score) in enumerate(zip(texts, scores, strict=False))
    ]
    return {"prompt": [{"role": "user", "content": "?"}], "prompt_tokens": [1, 2], "answers": rows}


def test_pairs_are_the_sampled_tokens_and_ties_are_counted() -> None:
    rows = [answers(0.0, 2.0, 1.0), answers(1.0, 1.0, 1.0)]
    cut_off = [one | {"ended": False} for one in rows[0]["answers"]]
    better = [rows[0]["answers"][0], *cut_off[1:]]  # only what was cut off is better than another one
    (made,), without = make_pairs([*rows, rows[0] | {"answers": cut_off}, rows[0] | {"answers": better}], WORST)
    assert (made["chosen"], made["rejected"], made["scores"], without) == ("bb", "a", [2.0, 0.0], {"ties": 1, "cut_off": 2})
    assert as_pair(made) == (([1, 2, 7, 1], [0, 0, 1, 1]), ([1, 2, 7, 0], [0, 0, 1, 1]))
    # 0.8 a character: 0 − 0.8, 2 − 1.6, 1 − 2.4
    (made,), _ = make_pairs(rows[:1], WORST.model_copy(update={"length_penalty": 0.8}))
    assert (made["chosen"], made["rejected"]) == ("bb", "ccc")


def graph(rounds: int) -> dict[str, Any]:
    raw = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8")) | {"algorithm": "iterative"}
    raw["iterative"] |= {"rounds": rounds}
    return dict(yaml.safe_load(dag.text(ROOT, config.validate(raw, "params.yaml")))["stages"])


def test_one_more_round_leaves_the_stages_of_those_before_as_they_are() -> None:
    two, three = graph(2), graph(3)
    assert three.keys() - two.keys() == {"answers-3", "round-3"}
    kept = [stage for stage in two if stage != "iterative"]
    assert {stage: two[stage] for stage in kept} == {stage: three[stage] for stage in kept}
    assert not any("iterative.rounds" in entry["params"] or "iterative" in entry["params"] for name, entry in three.items() if "-" in name)
    assert "models/round-2" in three["answers-3"]["deps"]
    assert {"data/rounds/1/pairs.jsonl", "data/rounds/2/pairs.jsonl"} <= set(three["round-3"]["deps"])


def test_a_graph_of_other_rounds_is_refused(tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8")) | {"algorithm": "iterative"}
    two, three = (config.validate(raw | {"iterative": raw["iterative"] | {"rounds": rounds}}, "params.yaml") for rounds in (2, 3))
    (tmp_path / "dvc.yaml").write_text(dag.text(ROOT, two), encoding="utf-8")
    nodes = fingerprint.read_graph(tmp_path)
    fingerprint.check_algorithm(nodes, two)
    with pytest.raises(UserError, match=r"dvc\.yaml lacks stage answers-3 and round-3, .* iterative\.rounds: 3"):
        fingerprint.check_algorithm(nodes, three)
