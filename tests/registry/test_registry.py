"""Versions, gates and promotion, with a real MLflow database and a real (tiny) model."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from prefect.logging import disable_run_logger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config, registry, tracking
from rlhf.errors import UserError
from rlhf.registry import gates
from rlhf.registry.remedies import remedy
from rlhf.workspace.fingerprint import Node
from tasks import registry as registering
from tests.stage_runs import free_port

PROJECT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
GOOD: dict[str, Any] = {
    "gold": {"sft": 0.4, "ppo": 0.7, "difference": 0.3, "ci95": [0.25, 0.35]},
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "gold"},
    "reward_model": {"accuracy": 0.9, "n": 500, "sft": 0.1, "ppo": 0.9, "ci95": [0.7, 0.9]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
    "heldout": "abc",
    "judge": "def",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    metrics = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = metrics
    for key in parents:
        place = place[key]
    place[last] = value
    return metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(
        ["hello there"], trainers.BpeTrainer(vocab_size=260, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1, bos_token_id=None, **sizes))
    llama.generation_config.max_new_tokens = 8
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "lineage.json").write_text(json.dumps({"fingerprint": "f00d"}))
    return folder


@pytest.fixture
def params(request: pytest.FixtureRequest) -> config.Params:
    # the tests share a database; each has a registered model of its own
    shipped = config.load(PROJECT / "params.yaml")
    bounds = {"min_gold_difference": 0.1, "min_win_rate": 0.55, "min_reward_accuracy": 0.7, "max_kl": 40.0}
    return shipped.model_copy(update={"promote": shipped.promote.model_copy(update=bounds | {"model": request.node.name})})


Evaluate = Callable[[Mapping[str, Any]], None]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def root(model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for folder in ("models", "metrics", "data"):
        shutil.rmtree(workspace / folder, ignore_errors=True)
    shutil.copytree(model, workspace / "models" / "ppo")
    for folder in ("metrics", "data"):
        (workspace / folder).mkdir()
    (workspace / "data/answers.jsonl").write_text("{}\n")
    shutil.copyfile(PROJECT / "params.yaml", workspace / "params.yaml")
    stage = {"cmd": "true", "deps": [], "outs": ["models/ppo"]}
    (workspace / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": stage}}))
    lock = {"ppo": {"cmd": "true", "outs": [{"path": "models/ppo", "hash": "md5", "md5": "0123.dir"}]}}
    (workspace / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    return workspace


@pytest.fixture
def evaluate(root: Path) -> Evaluate:
    def write(metrics: Mapping[str, Any]) -> None:
        (root / "metrics" / "evaluate.json").write_text(json.dumps(metrics))

    return write


def decide(root: Path, params: config.Params) -> registry.Decision:
    verdict = registry.check(registry.register(root, params, "flow-1"), root, params)
    return registry.carry_out(verdict, root, params, by="flow", why="all gates passed")


def test_a_version_that_passes_is_in_service_and_answers(root: Path, params: config.Params, evaluate: Evaluate) -> None:
    evaluate(GOOD)
    decision = decide(root, params)
    assert (decision.version.number, decision.champion, decision.is_champion) == (1, 1, True)
    assert all(gate.passed for gate in decision.gates)
    assert registry.aliases(root, params) == {"champion": 1}

    tags = decision.version.tags
    assert tags["md5.models/ppo"] == "0123.dir"
    assert tags["fingerprint.ppo"] == "f00d"
    assert tags["flow_run"] == "flow-1"
    assert tags["evaluate.gold.ppo"] == "0.7"
    # on MLflow's page few, with many facts in one
    entry = mlflow.MlflowClient().get_model_version(params.promote.model, "1")
    assert str(entry.description).startswith("Gates passed\n\n- pass min_gold_difference")
    kept = entry.tags
    assert json.loads(kept["evaluate"])["gold.ppo"] == "0.7"
    assert json.loads(kept["gate"]).keys() == {gate.name for gate in decision.gates}
    assert len(kept) <= 20
    assert tags["git.revision"] == tags["git.head"] == "none"
    assert tags["gates"] == "passed"

    # the version keeps its files when the stage's output is replaced
    uri = f"models:/{params.promote.model}@champion"
    folder = registry.model_folder(uri, root, params)
    weights = (folder / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").samefile(root / "models/ppo/model.safetensors")
    shutil.rmtree(root / "models")
    served = mlflow.pyfunc.load_model(uri)
    dialogue = [{"role": "user", "content": "hello"}]
    answers = served.predict(["hello", dialogue])
    assert len(answers) == 2
    assert answers[0] == answers[1] == served.predict(dialogue)[0]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


def test_the_same_again_changes_nothing(root: Path, params: config.Params, evaluate: Evaluate) -> None:
    evaluate(GOOD)
    first = decide(root, params)
    second = decide(root, params)
    assert second.version.number == first.version.number
    assert second.lines[-1] == "version 1 is champion already"
    assert [version.number for version in registry.versions(root, params)] == [1]
    assert registry.aliases(root, params) == {"champion": 1}


def test_registered_by_two_at_once_it_is_one_version(root: Path, params: config.Params, evaluate: Evaluate) -> None:
    evaluate(GOOD)
    with ThreadPoolExecutor(2) as pool:
        numbers = list(pool.map(lambda _: registry.register(root, params).number, range(2)))
    assert numbers == [1, 1]


def test_a_server_that_is_away_is_waited_for_and_told_first_of_the_stages(
    root: Path, params: config.Params, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(GOOD)
    (root / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": "waited"}))
    port = str(free_port())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(registering, "SECONDS_BETWEEN_LOOKS", 0.2)
    folder = root / "runs/ppo/waited"
    folder.mkdir(parents=True)
    with tracking.of_stage(root, params, Node("ppo", (), ("models/ppo",), (), {}), "waited", folder):
        pass
    with disable_run_logger():
        with monkeypatch.context() as patch:
            patch.setattr(registering, "SECONDS_TO_COME_BACK", 0.5)
            with pytest.raises(UserError, match=f"MLflow at http://127.0.0.1:{port}: "):
                registering.register.fn(root, params, "flow-1", {})
        stores = ("--backend-store-uri", tracking.own_uri(root), "--artifacts-destination", str(tmp_path / "artifacts"))
        words: list[str | Path] = [Path(sys.executable).with_name("mlflow"), "server", *stores, "--port", port, "--workers", "1"]
        # it answers after some seconds
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            version = registering.register.fn(root, params, "flow-1", {})
            assert (version.number, version.tags["run.ppo"]) == (1, tracking.run_of("waited", root, params))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_champions_candidates_and_a_rollback_that_the_flow_respects(root: Path, params: config.Params, evaluate: Evaluate) -> None:
    evaluate(GOOD)
    decide(root, params)
    worse = changed("answer_tokens.ppo", 45.0)
    evaluate(worse)
    failed = decide(root, params)
    assert not failed.is_champion
    assert registry.aliases(root, params) == {"champion": 1, "candidate": 2}
    assert failed.version.tags["gates"] == "failed: max_answer_tokens"
    assert failed.version.tags["gate.max_answer_tokens"].endswith("45, over 40 by 5")
    assert failed.lines[-1] == "version 2 is candidate, champion is version 1; failed: max_answer_tokens"

    # looser gates let the same version pass
    looser = params.model_copy(update={"promote": params.promote.model_copy(update={"max_answer_tokens": 50.0})})
    assert decide(root, looser).is_champion
    assert registry.aliases(root, params) == {"champion": 2, "previous": 1}
    assert registry.versions(root, params)[0].aliases == ("champion",)

    registry.rollback(2, root, params, by="me", why="too slow")
    assert registry.aliases(root, params) == {"champion": 1, "previous": 2}
    again = decide(root, looser)
    assert again.champion == 1
    assert registry.aliases(root, params)["champion"] == 1
    assert again.lines[-1] == "version 2 was champion before: alias champion stays with version 1"


@pytest.mark.parametrize(
    ("path", "value", "name", "distance"),
    [
        ("gold.ci95", [0.04, 0.2], "min_gold_difference", "short of 0.1 by 0.06"),
        ("win_rate.ci95", [0.5, 0.6], "min_win_rate", "short of 0.55 by 0.05"),
        ("reward_model.accuracy", 0.6, "min_reward_accuracy", "short of 0.7 by 0.1"),
        ("kl", 41.0, "max_kl", "over 40 by 1"),
        ("kl", float("nan"), "max_kl", "over 40 by nan"),
        ("perplexity.ratio", 1.25, "max_perplexity_ratio", "over 1.15 by 0.1"),
        ("eos_rate.ppo", 0.8, "min_eos_rate", "short of 0.9 by 0.1"),
        ("answer_tokens.ppo", 44.0, "max_answer_tokens", "over 40 by 4"),
    ],
)
def test_each_gate(params: config.Params, path: str, value: Any, name: str, distance: str) -> None:
    failed = [gate for gate in gates.check(changed(path, value), params, None) if not gate.passed]
    assert [gate.name for gate in failed] == [name]
    assert failed[0].text.endswith(distance)


def test_a_policy_that_wins_by_length_alone_can_be_refused(params: config.Params) -> None:
    shorter = changed("win_rate.length_controlled", {"value": 0.63, "ci95": [0.47, 0.76], "of_length": -2.2, "both_sides": 0.1})
    assert all(gate.passed for gate in gates.check(shorter, params, None))
    asked = params.model_copy(update={"promote": params.promote.model_copy(update={"min_length_controlled_win_rate": 0.5})})
    (failed,) = [gate for gate in gates.check(shorter, asked, None) if not gate.passed]
    assert failed.name == "min_length_controlled_win_rate"
    assert failed.text == "win rate against sft at equal length, lower end: 0.47, short of 0.5 by 0.03"
    assert "by the length of its answers" in remedy(failed.name, "ppo")
    # nothing was compared at equal length: what the regression says there is a guess
    guessed = {"value": 0.76, "ci95": [0.73, 0.81], "of_length": 0.9, "both_sides": 0.008}
    (failed,) = [gate for gate in gates.check(changed("win_rate.length_controlled", guessed), asked, None) if not gate.passed]
    assert failed.value is None
    assert "cannot be told: on 99.2% of the prompts the answers are all longer than sft's, or all shorter (at most 95%)" in failed.line


def beside(*kinds: str, wins: int, losses: int, ties: int, rise: float = 0.1) -> list[gates.Pair]:
    """So many prompts of each kind that this version's answer wins, loses or ties; the reward model prefers all of its answers."""
    scores = [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(0.5, 0.5)] * ties
    return [gates.Pair(kind, new, champion, rise, 0.0) for kind in kinds for new, champion in scores]


def test_the_champion_is_to_be_beaten_beyond_chance(params: config.Params) -> None:
    def gate(pairs: list[gates.Pair]) -> gates.Gate:
        return next(gate for gate in gates.against_champion(pairs, params) if gate.name == "min_champion_win_rate")

    better = gate(beside("a", wins=80, losses=20, ties=100))
    assert better.passed
    # half of 200 prompts are ties: 0.65 ± 1.96 · √(0.0775 / 200), by hand
    assert better.value == pytest.approx(0.65 - 1.96 * (0.0775 / 200) ** 0.5, abs=0.01)
    luck = gate(beside("a", wins=55, losses=45, ties=0))
    assert not luck.passed
    assert luck.text.startswith("win rate against the champion 0.55 (0.4")
    assert luck.text.endswith(f"short of 0.5 by {0.5 - (luck.value or 0):.4g}")


def test_a_champion_without_room_for_all_prompts_is_compared_on_the_others(params: config.Params) -> None:
    pairs = beside("a", wins=80, losses=20, ties=0)
    most = gates.against_champion(pairs, params, 110)
    assert all(gate.passed for gate in most)
    assert most[0].text.startswith("win rate against the champion 0.8 (0.7")
    assert "), on the 100 of 110 prompts that it has room for, lower end: " in most[0].text
    assert "room for" not in gates.against_champion(pairs, params, 100)[0].text
    for some in (pairs, []):
        [few] = gates.against_champion(some, params, 201)
        assert (few.name, few.passed) == ("min_champion_win_rate", False)
        assert few.text.startswith(f"the champion has room for {len(some)} of 201 prompts")


def test_a_kind_of_task_that_became_worse_is_named(params: config.Params) -> None:
    pairs = beside("capital", wins=70, losses=10, ties=0) + beside("colour", wins=10, losses=30, ties=0)
    failed = [gate for gate in gates.against_champion(pairs, params) if not gate.passed]
    assert [gate.name for gate in failed] == ["min_kind_win_rate"]
    assert "colour 0." in failed[0].text
    assert "short of 0.45 by 0." in failed[0].text
    assert "capital" not in failed[0].text
    # with few prompts, the same share may be chance
    few = beside("capital", wins=70, losses=10, ties=0) + beside("colour", wins=1, losses=3, ties=0)
    assert all(gate.passed for gate in gates.against_champion(few, params))
    # nor do kinds with two or three prompts refuse a version, however many of them it loses
    tail = [pair for number in range(30) for pair in beside(f"rare {number}", wins=0, losses=1 + number % 3, ties=0)]
    [gate] = [gate for gate in gates.against_champion(pairs[:80] + tail, params) if gate.name == "min_kind_win_rate"]
    assert gate.passed
    # rows without a kind are not divided
    unkind = [replace(pair, kind=None) for pair in pairs]
    assert "min_kind_win_rate" not in {gate.name for gate in gates.against_champion(unkind, params)}


def test_the_upper_end_of_a_few_values_knows_of_doubt() -> None:
    # one mean of 16 of 20: (16 + z²/2) / (20 + z²) ± z √(p (1 − p) / (20 + z²)), z = 1.959964 (Agresti and Coull 1998)
    wide = 20 + 3.841459
    p = (16 + 3.841459 / 2) / wide
    assert gates.upper_end(np.array([1.0] * 16 + [0.0] * 4), (0, 1), 1) == pytest.approx(p + 1.959964 * math.sqrt(p * (1 - p) / wide))
    # five of five lost are chance (1 in 32), six are not (1 in 64)
    assert [gates.upper_end(np.zeros(n), (0, 1), 1) < 0.45 for n in (1, 5, 6)] == [False, False, True]
    assert [gates.upper_end(-np.ones(n), (-1, 1), 1) < -0.05 for n in (1, 4, 6)] == [False, False, True]
    # of thirty kinds, one will lose six
    assert gates.upper_end(np.zeros(6), (0, 1), 30) > 0.45
    # of many, the bootstrap says the same
    draw = np.random.default_rng(1)
    rises = draw.choice([-1.0, 0.0, 1.0], 2000, p=[0.1, 0.85, 0.05])
    assert gates.upper_end(rises, (-1, 1), 1) == pytest.approx(gates.interval(rises, 2000)[1], abs=0.002)


def test_more_reward_and_no_better_answers_is_refused(params: config.Params) -> None:
    loose = params.model_copy(update={"promote": params.promote.model_copy(update={"min_champion_win_rate": 0.3})})

    def failed(pairs: list[gates.Pair]) -> list[str]:
        return [gate.name for gate in gates.against_champion(pairs, loose) if not gate.passed]

    assert failed(beside("a", wins=48, losses=52, ties=0)) == ["over_optimisation_champion"]
    assert failed(beside("a", wins=48, losses=52, ties=0, rise=-0.1)) == []
    assert failed(beside("a", wins=60, losses=40, ties=0)) == []
    against_sft = changed("win_rate", {"value": 0.5, "ci95": [0.6, 0.7]})
    assert [gate.name for gate in gates.check(against_sft, params, None) if not gate.passed] == ["over_optimisation"]
    fallen = gates.check(changed("reward_model.ci95", [-1.6, 0.1]), params, None)[-1]
    assert fallen.text == "against sft, reward model's score -1.6 (lower end), judge's win rate 0.8"
    # dpo has no reward model
    no_rewards = [replace(pair, new_reward=None, champion_reward=None) for pair in beside("a", wins=60, losses=40, ties=0)]
    assert "over_optimisation_champion" not in {gate.name for gate in gates.against_champion(no_rewards, params)}


def test_without_gold_score_the_win_rate_decides(params: config.Params) -> None:
    names = [gate.name for gate in gates.check(changed("gold", None), params, None)]
    assert "min_gold_difference" not in names
    assert "min_win_rate" in names


def test_what_is_missing_is_named(root: Path, params: config.Params, evaluate: Evaluate) -> None:
    with pytest.raises(UserError, match=r"metrics/evaluate\.json: no such file"):
        registry.register(root, params)
    with pytest.raises(UserError, match=r"no number at eos_rate\.ppo"):
        gates.check(changed("eos_rate", 0.9), params, None)
    evaluate(GOOD)
    assert registry.versions(root, params) == []
    uri = f"models:/{params.promote.model}@champion"
    with pytest.raises(UserError, match=uri):
        registry.model_folder(uri, root, params)
    (root / "models/ppo/model.safetensors").unlink()
    with pytest.raises(UserError, match="models/ppo: no model"):
        registry.register(root, params)


# ----------------------------------------------------------------------------------------------------------- right and wrong

ACCURACY = {
    "ppo": {"value": 0.6, "ci95": [0.5, 0.7]},
    "sft": {"value": 0.4, "ci95": [0.3, 0.5]},
    "difference": 0.2,
    "ci95": [0.1, 0.3],
}


@pytest.mark.parametrize(
    ("change", "bounds", "name", "distance"),
    [
        ({}, {"min_accuracy": 0.55}, "min_accuracy", "accuracy, lower end: 0.5, short of 0.55 by 0.05"),
        ({"ci95": [-0.1, 0.3]}, {}, "min_accuracy_difference", "accuracy of ppo − sft, lower end: -0.1, short of 0 by 0.1"),
        ({"difference": -0.1}, {}, "over_optimisation_accuracy", "more reward, but short of an accuracy above sft's by 0.1"),
    ],
)
def test_each_gate_of_accuracy(params: config.Params, change: dict[str, Any], bounds: dict[str, float], name: str, distance: str) -> None:
    given = params.model_copy(update={"promote": params.promote.model_copy(update=bounds)})
    passed = gates.check(changed("accuracy", ACCURACY), params, None)
    assert all(gate.passed for gate in passed)
    assert {"min_accuracy", "min_accuracy_difference"} <= {gate.name for gate in passed}
    failed = [gate for gate in gates.check(changed("accuracy", ACCURACY | change), given, None) if not gate.passed]
    assert [gate.name for gate in failed] == [name]
    assert failed[0].text.endswith(distance)


def test_accuracy_against_the_champion_and_by_kind(params: config.Params) -> None:
    def failed(good: float, bad: float) -> dict[str, str]:
        pairs = [replace(pair, new_right=good, champion_right=0.5) for pair in beside("sums", wins=90, losses=10, ties=0)]
        pairs += [replace(pair, new_right=bad, champion_right=0.5) for pair in beside("facts", wins=60, losses=10, ties=0)]
        return {gate.name: gate.text for gate in gates.against_champion(pairs, params) if not gate.passed}

    assert failed(0.75, 0.75) == {}
    worse_in_one = failed(0.75, 0.25)
    assert worse_in_one.keys() == {"min_kind_accuracy_difference"}
    # 70 times −0.25, z = 2.2414 of two kinds: −17.5 / 75.02 + z √(0.0709 / 75.02), by hand
    assert worse_in_one["min_kind_accuracy_difference"].endswith("upper end: facts -0.1644, short of -0.05 by 0.1144")
    assert failed(0.25, 0.75)["min_champion_accuracy_difference"].startswith("accuracy − the champion's -0.0")
    unchecked = [gate.name for gate in gates.against_champion(beside("a", wins=60, losses=10, ties=0), params)]
    assert "min_champion_accuracy_difference" not in unchecked
