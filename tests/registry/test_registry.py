"""Versions and promotion, with a real MLflow database and a real (tiny) model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from prefect.logging import disable_run_logger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config, registry, tracking
from rlhf.errors import UserError
from rlhf.registry import gates
from rlhf.workspace.fingerprint import Node
from tasks import registry as registering
from tests.registry.workspaces import GOOD, PROJECT, changed
from tests.stage_runs import free_port

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


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
