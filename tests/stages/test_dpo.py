"""DPO: the loss by hand, the log-probabilities that go into it, the stage as a whole, and the graph that `algorithm` chooses."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config
from rlhf.algorithms.dpo import dpo_loss
from rlhf.errors import UserError
from rlhf.job import read_lines
from rlhf.launcher import launch
from rlhf.stages.dpo import encode_pairs, log_probs_of, pair_log_probs
from rlhf.workspace import fingerprint, presets
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

REPOSITORY = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------------------------------------------------------- the loss

# Two pairs: the brackets log π − log π_ref are 0.5 and −0.5 (difference 1), then −1 and 1 (difference −2).
POLICY = (torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0]))
REFERENCE = (torch.tensor([-1.5, -2.0]), torch.tensor([-1.5, -2.0]))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("loss", "beta", "smoothing", "expected"),
    [
        # −log σ(x) = softplus(−x), with x = 0.5·1 and 0.5·(−2)
        ("sigmoid", 0.5, 0.0, softplus(-0.5) + softplus(1.0)),
        ("sigmoid", 0.5, 0.1, 0.9 * (softplus(-0.5) + softplus(1.0)) + 0.1 * (softplus(0.5) + softplus(-1.0))),
        # the target of the difference is 1 / (2·0.25) = 2
        ("ipo", 0.25, 0.0, (1 - 2) ** 2 + (-2 - 2) ** 2),
    ],
)
def test_the_loss_by_hand(loss: str, beta: float, smoothing: float, expected: float) -> None:
    value, sums = dpo_loss(POLICY, REFERENCE, loss, beta, smoothing, denominator=4)
    assert value.item() == pytest.approx(expected / 4)
    found = {name: total.item() for name, total in sums.items()}
    assert found == pytest.approx({"accuracy": 1, "margin": -beta, "chosen_reward": -0.5 * beta, "rejected_reward": 0.5 * beta})


def test_without_reference_the_policy_alone_counts() -> None:
    value, sums = dpo_loss(POLICY, (torch.zeros(2), torch.zeros(2)), "sigmoid", 1.0, 0.0, denominator=1)
    assert value.item() == pytest.approx(softplus(-1) + softplus(2))  # differences −1 + 2 and −3 + 1
    assert sums["margin"].item() == pytest.approx(-1)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_answer() -> None:
    chosen, rejected = (side.clone().requires_grad_() for side in POLICY)
    dpo_loss((chosen, rejected), REFERENCE, "sigmoid", 0.5, 0.0, denominator=2)[0].backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    # β·σ(−β·h) (arXiv 2305.18290, equation 8): the pair that is ordered wrongly pulls harder
    expected = [-0.5 / (1 + math.exp(0.5)) / 2, -0.5 / (1 + math.exp(-1.0)) / 2]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert torch.equal(rejected.grad, -chosen.grad)


# ---------------------------------------------------------------------------------------------------- what goes into the loss


def test_only_the_last_answer_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "What is the opposite of hot?")]
    row = {"prompt": [{"role": role, "content": text} for role, text in turns], "chosen": "Cold.", "rejected": "Hot."}
    (((ids, mask), _),) = encode_pairs(tokenizer, [row])
    assert tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted]) == "Cold.<|end|>"


@torch.no_grad()
def test_packed_pairs_give_each_answers_own_log_probability(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [{"role": "user", "content": "What is the opposite of hot?"}]
    texts = [("The opposite of hot is cold.", "Hot."), ("Cold.", "I do not know, and nobody does.")]
    pairs = encode_pairs(tokenizer, [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in texts])

    def alone(ids: list[int], mask: list[int]) -> float:
        log_probs = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_probs[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])

    expected = [[alone(*side) for side in pair] for pair in pairs]
    found = torch.stack(pair_log_probs(llama, pairs), dim=1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.tensor(log_probs_of(llama, pairs)), torch.tensor(expected), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- the stage, whole


def dpo_params(**changes: Any) -> dict[str, Any]:
    raw = tiny_params() | {"algorithm": "dpo"}
    raw["dpo"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2} | changes
    raw["dpo"]["optimizer"] |= {"learning_rate": 2e-3}  # five steps are to be more than noise
    return raw


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the stages of a DPO run have run."""
    root = tmp_path_factory.mktemp("dpo")
    make_workspace(root, dpo_params(), pairs=240)
    run(root, "base", "sft", "dpo", "evaluate")
    return root


def again(trained: Path, root: Path, **changes: Any) -> Path:
    """The same workspace with other values, before stage dpo."""
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("runs", "dpo"))
    set_params(root, dpo_params(**changes))
    return root


def same_curves(root: Path, other: Path) -> None:
    found, expected = ([{name: float(value) for name, value in row.items()} for row in table(r / "plots/dpo.csv")] for r in (root, other))
    # before the first step policy and reference agree: rounding alone decides which answer of a pair is ahead
    for rows in (found, expected):
        del rows[0]["accuracy"]
    assert found == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in expected]


def test_training_starts_at_the_reference_and_learns_the_pairs(trained: Path) -> None:
    steps = [{name: float(value) for name, value in row.items()} for row in table(trained / "plots/dpo.csv")]
    assert len(steps) >= 5
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-5)
    # each loss is of another batch, before its update
    assert statistics.fmean(step["loss"] for step in steps[1:]) < steps[0]["loss"]
    assert steps[-1]["margin"] == pytest.approx(steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"], abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_bytes_and_a_known_reference_changes_nothing(trained: Path, tmp_path: Path) -> None:
    root, unbroken = (again(trained, tmp_path / name, reference="precomputed") for name in ("root", "unbroken"))
    run(root, "dpo:killed", code=-signal.SIGKILL)
    assert "dpo: goes on from step 2" in run(tmp_path, "root/dpo", "unbroken/dpo")
    outputs = ("models/dpo/model.safetensors", "metrics/dpo.json", "plots/dpo.csv")
    assert [path for path in outputs if (root / path).read_bytes() != (unbroken / path).read_bytes()] == []
    same_curves(root, trained)


def test_two_ranks_in_small_pieces_compute_what_one_does_at_once(trained: Path, tmp_path: Path) -> None:
    root = again(trained, tmp_path / "root", reference="precomputed")
    raw = dpo_params(reference="precomputed")
    raw["launch"]["jobs"]["dpo"] |= {"processes": 2, "micro_batch_tokens": 300}
    set_params(root, raw)
    run(root, "dpo", ranks=2)
    same_curves(root, trained)


def test_the_evaluation_of_a_dpo_run(trained: Path) -> None:
    found = json.loads((trained / "metrics/evaluate.json").read_text(encoding="utf-8"))
    assert set(found["eos_rate"]) == set(found["answer_tokens"]) == {"sft", "dpo"}
    assert found["perplexity"]["ratio"] == pytest.approx(found["perplexity"]["dpo"] / found["perplexity"]["sft"])
    assert found["reward_model"]["n"] == len(read_lines(trained / "data/prepared/heldout_pairs.jsonl"))
    assert 0 <= found["reward_model"]["accuracy"] <= 1
    assert sum(row["n"] for row in found["reward_model"]["calibration"]["pairs"].values()) == found["reward_model"]["n"]
    assert found["win_rate"]["judge"].startswith("second reward model")
    assert set(read_lines(trained / "data/samples.jsonl")[0]) == {"prompt", "sft", "dpo", "scores"}
    assert not (trained / "plots/gold_against_kl.csv").exists()


# ------------------------------------------------------------------------------------------------------------------- the graph


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("presets", "graphs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_algorithm_chooses_the_graph(project: Path) -> None:
    def stages() -> tuple[str, ...]:
        return tuple(yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"])

    assert presets.use(project, "sandbox", ["algorithm=dpo"]) == [
        "algorithm ppo → dpo",
        "wrote dvc.yaml for algorithm dpo",
        "wrote params.yaml from presets/sandbox.yaml",
    ]
    assert stages() == config.STAGES_OF["dpo"] == ("prepare", "base", "sft", "dpo", "evaluate")
    assert presets.use(project, "params.yaml", ["dpo.beta=0.2"]) == ["dpo.beta 0.1 → 0.2", "wrote params.yaml from params.yaml"]
    presets.use(project, "sandbox", [])
    assert stages() == config.STAGES_OF["ppo"]
    assert (project / "dvc.yaml").read_bytes() == (REPOSITORY / "dvc.yaml").read_bytes()


def test_params_and_graph_that_disagree_are_refused(project: Path) -> None:
    presets.use(project, "sandbox", [])
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("algorithm: ppo", "algorithm: dpo"), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"dvc\.yaml has stage reward and ppo, but params\.yaml says algorithm: dpo .*rlhf use params\.yaml algor"
    ):
        launch.launch("sft", project)
    presets.use(project, "params.yaml", ["algorithm=dpo"])
    fingerprint.check_algorithm(fingerprint.read_graph(project), config.load(project / "params.yaml"))


def test_each_algorithm_asks_for_its_own_data() -> None:
    raw = yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8")) | {"algorithm": "dpo"}
    raw["data"]["sources"][3]["split"]["ppo"] = 0
    assert config.validate(raw, "params.yaml").algorithm == "dpo"
    with pytest.raises(UserError, match="ppo needs prompts"):
        config.validate(raw | {"algorithm": "ppo"}, "params.yaml")
    raw["data"]["sources"][2]["split"]["reward"] = 0
    with pytest.raises(UserError, match="dpo needs preference pairs"):
        config.validate(raw, "params.yaml")
