"""LoRA: what is trained and what stays frozen, what is saved, and that each stage learns, resumes and hands on ordinary models."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config
from rlhf.config.training import Lora, peak
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.models.lora import Adapters, attach, reference
from rlhf.models.policy import load_policy
from rlhf.models.saving import save_model
from rlhf.models.scalar import initialise_head, load_scalar
from tests.stage_runs import make_workspace, run, set_params, table, tiny_params

IDS = torch.tensor([[5, 9, 70, 33, 200, 41]])


def settings(**changes: Any) -> Lora:
    return Lora.model_validate({"rank": 4, "alpha": 8.0, "targets": "all-linear", "learning_rate": 0.01} | changes)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("sft", config.validate(tiny_params(), "params.yaml"), tmp_path, tmp_path / "runs", "cpu", 0, 1, 0)


def stir(model: torch.nn.Module) -> None:
    """Set what is trained to something else than its start, where an adapter does nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


def attached(model: Any, job: Job, **changes: Any) -> Adapters:
    adapters = attach(model, settings(**changes), "models/base", "sft.lora", job)
    assert adapters
    return adapters


# --------------------------------------------------------------------------------------------------------------- the adapters


@torch.no_grad()
def test_adapters_start_at_nothing_and_switch_off(llama: LlamaForCausalLM, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    before = llama(IDS).logits
    adapters = attached(llama.train(), job)
    assert torch.equal(llama(IDS).logits, before)
    stir(llama)
    after = llama(IDS).logits
    assert not torch.allclose(after, before, atol=0.1)
    trained = [name for name, parameter in llama.named_parameters() if parameter.requires_grad]
    with torch.enable_grad(), reference(adapters, job, job.root, torch.device("cpu"))() as model:
        assert torch.equal(model(IDS).logits, before)
        assert not model.training
        assert not torch.is_grad_enabled()
    assert llama.training
    assert torch.equal(llama(IDS).logits, after)
    assert [name for name, parameter in llama.named_parameters() if parameter.requires_grad] == trained
    # two layers of width 32: adapters of rank 4 beside q, k, v, o and the three of the feed-forward
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    count = 2 * sum(4 * (one + other) for one, other in sizes)
    total = sum(parameter.numel() for parameter in llama.parameters())
    assert adapters.trainable_share == count / total
    assert f"sft: sft.lora: {count:,} of {total:,} parameters are trained" in capsys.readouterr().out


def test_only_adapters_move_and_the_seed_decides_where_they_start(llama: LlamaForCausalLM, job: Job) -> None:
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    attached(llama, job, targets=["q_proj", "v_proj"])
    optimizer = torch.optim.SGD([parameter for parameter in llama.parameters() if parameter.requires_grad], lr=1.0)
    started = {name: weight.clone() for name, weight in llama.state_dict().items()}
    llama(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, weight in llama.state_dict().items() if not torch.equal(weight, started[name])}
    # at first only B has a gradient, as it is zero and what A gives is multiplied by it
    assert moved == {f"model.layers.{i}.self_attn.{name}.lora_B.default.weight" for i in (0, 1) for name in ("q_proj", "v_proj")}
    assert all(
        torch.equal(llama.state_dict()[name.replace("_proj.weight", "_proj.base_layer.weight")], before[name])
        for name in before
        if "q_proj" in name or "v_proj" in name
    )
    again = attach_again(before, llama, job)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(again[name], started[name])


def attach_again(weights: dict[str, Tensor], llama: LlamaForCausalLM, job: Job) -> dict[str, Tensor]:
    fresh = type(llama)(llama.config)
    fresh.load_state_dict(weights)
    attached(fresh, job, targets=["q_proj", "v_proj"])
    return fresh.state_dict()


@torch.no_grad()
def test_merged_model_and_saved_adapter_say_the_same(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, job: Job, tmp_path: Path
) -> None:
    save_model(llama, tokenizer, tmp_path / "base")
    model = load_policy(tmp_path / "base", "fp32")
    adapters = attached(model, job)
    stir(model)
    expected = model(IDS).logits
    adapters.save_and_merge(tmp_path / "sft/adapter")
    save_model(model, tokenizer, tmp_path / "sft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert set(merged.state_dict()) == set(llama.state_dict())
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert {path.name for path in (tmp_path / "sft/adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "sft/adapter"))
    assert torch.equal(beside(IDS).logits, expected)
    # nothing of this machine or of chance is in it
    said = json.loads((tmp_path / "sft/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert said["base_model_name_or_path"] == "models/base"
    assert said["target_modules"] == sorted(said["target_modules"])


def test_the_head_of_a_reward_model_is_trained_as_well(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, job: Job, tmp_path: Path
) -> None:
    save_model(llama, tokenizer, tmp_path / "base")
    scalar = load_scalar(tmp_path / "base", tokenizer, "fp32")
    initialise_head(scalar, 1)
    before = scalar(input_ids=IDS)
    adapters = attached(scalar.model, job)
    assert torch.equal(scalar(input_ids=IDS), before)
    assert [name for name, parameter in scalar.named_parameters() if parameter.requires_grad and "lora" not in name] == [
        "model.score.modules_to_save.default.weight"
    ]
    stir(scalar)
    expected = scalar(input_ids=IDS)
    adapters.save_and_merge(tmp_path / "reward/adapter")
    save_model(scalar.model, tokenizer, tmp_path / "reward")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(opened(IDS).logits[0, 0], expected[-1], rtol=1e-5, atol=1e-5)
    assert torch.equal(opened.score.weight, scalar.head.weight)


def test_a_layer_that_the_model_lacks_is_named(llama: LlamaForCausalLM, job: Job) -> None:
    with pytest.raises(UserError, match=r"sft\.lora\.targets: .*query.*names of this model: down_proj, .*v_proj"):
        attached(llama, job, targets=["query"])
    for beside in ("query", "embed_tokens", "lm_head"):  # the last two are one in a tied model
        with pytest.raises(UserError, match=rf"sft\.lora\.targets: the model has no linear layer named {beside}"):
            attached(llama, job, targets=["q_proj", beside])


def test_adapters_have_their_own_learning_rate(job: Job) -> None:
    optimizer = job.params.sft.optimizer
    assert peak(optimizer, settings()) == optimizer.model_copy(update={"learning_rate": 0.01})
    assert peak(optimizer, None) == optimizer


# ----------------------------------------------------------------------------------------------------------- in the stages

STAGES = ("sft", "reward", "ppo", "dpo")


def lora_params() -> dict[str, Any]:
    raw = tiny_params()
    adapters = settings().model_dump()
    for section in (raw["sft"], raw["reward"], raw["dpo"], raw["evaluate"]["judge"]):
        section["lora"] = adapters
    raw["ppo"] |= {"actor_lora": adapters, "critic_lora": adapters}
    raw["dpo"] |= {"epochs": 1.0, "batch_size": 8, "checkpoint_every": 2}
    return raw


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage has trained adapters, run from beginning to end in one go."""
    root = tmp_path_factory.mktemp("lora") / "root"
    root.mkdir()
    make_workspace(root, lora_params(), pairs=240)
    run(root, "base", *STAGES)
    return root


def test_the_stages_train_adapters_and_write_ordinary_models(trained: Path) -> None:
    base, sft = (load_file(trained / f"models/{name}/model.safetensors") for name in ("base", "sft"))
    moved = {name for name in base if not torch.equal(base[name], sft[name])}
    assert moved == {name for name in base if name.endswith("_proj.weight")}
    for name, origin in {"sft": "base", "reward": "base", "ppo": "sft", "dpo": "sft"}.items():
        assert 0 < json.loads((trained / f"metrics/{name}.json").read_text(encoding="utf-8"))["trainable_share"] < 0.5
        said = json.loads((trained / f"models/{name}/adapter/adapter_config.json").read_text(encoding="utf-8"))
        assert (said["base_model_name_or_path"], said["r"]) == (f"models/{origin}", 4)
    rates = [row["loss"] for row in table(trained / "plots/sft.csv")]
    assert float(rates[-1]) < float(rates[0])


def test_the_reference_is_sft_and_rollouts_come_from_the_adapted_policy(trained: Path) -> None:
    steps = [{name: float(value or 0) for name, value in row.items()} for row in table(trained / "plots/ppo.csv")]
    # while only the critic learns, the policy is sft; then it moves away, and what it samples with is what is trained
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[1]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(abs(step["kl"]) > 1e-3 for step in steps[2:])
    assert all(step["ratio_error"] < 1e-4 for step in steps)
    first = table(trained / "plots/dpo.csv")[0]
    assert float(first["margin"]) == pytest.approx(0, abs=1e-5)


def test_killed_stages_go_on_to_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("runs", "sft", "ppo"))
    run(root, "sft:killed", code=-signal.SIGKILL)
    assert "sft: goes on from step 2" in run(root, "sft", "ppo:killed", code=-signal.SIGKILL)
    assert "ppo: goes on from step 2" in run(root, "ppo")
    files = ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    outputs = [f"models/{stage}/{file}" for stage in ("sft", "ppo") for file in files]
    outputs += [f"{kind}/{stage}.{ending}" for stage in ("sft", "ppo") for kind, ending in (("metrics", "json"), ("plots", "csv"))]
    assert [path for path in outputs if (root / path).read_bytes() != (trained / path).read_bytes()] == []


def test_two_ranks_that_share_the_weights_compute_what_one_does(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("runs", "metrics", "plots"))
    raw = lora_params()
    for layout in raw["launch"]["jobs"].values():
        layout |= {"processes": 2, "micro_batch_tokens": 300}
    raw["launch"]["engines"]["policy"]["zero_stage"] = 3
    raw["launch"]["engines"]["critic"]["zero_stage"] = 2
    set_params(root, raw)
    run(root, "ppo", "reward", "dpo", ranks=2)
    for name in ("ppo", "reward", "dpo"):
        for row, expected in zip(table(root / f"plots/{name}.csv"), table(trained / f"plots/{name}.csv"), strict=True):
            for key, value in expected.items():
                if value and key != "ratio_error":
                    assert float(row[key]) == pytest.approx(float(value), rel=2e-3, abs=2e-4), (name, row["step"], key)
        for file in ("model", "adapter/adapter_model"):
            saved, alone = (load_file(folder / f"models/{name}/{file}.safetensors") for folder in (root, trained))
            assert saved.keys() == alone.keys()
            for key, tensor in alone.items():
                torch.testing.assert_close(saved[key], tensor, rtol=0, atol=1e-3)
    # what rank 0 wrote is whole: sft's weights and alpha / rank times the product of the adapter's two matrices
    sft, merged, adapter = (
        load_file(root / f"models/{path}.safetensors") for path in ("sft/model", "dpo/model", "dpo/adapter/adapter_model")
    )
    low, high = (adapter[f"base_model.model.model.layers.0.mlp.up_proj.lora_{letter}.weight"] for letter in "AB")
    weight = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[weight], sft[weight] + 2.0 * high @ low)
    assert not torch.equal(merged[weight], sft[weight])
