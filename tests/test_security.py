"""What must not happen: code or files from elsewhere, secrets where others read them, servers that anybody reaches."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from rlhf import config
from rlhf.cli import main as cli
from rlhf.cli.ingest import ingest
from rlhf.config.training import PretrainedBase
from rlhf.data.formats import read
from rlhf.errors import UserError
from rlhf.launcher import command
from rlhf.launcher.console import Console
from rlhf.launcher.launch import check_places
from rlhf.redact import redact
from rlhf.workspace import fingerprint, presets
from tests.stage_runs import make_workspace, run, tiny_params

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).parents[1]


def given(folder: Path, *, trust: bool = False) -> PretrainedBase:
    return PretrainedBase(source="pretrained", model=str(folder), revision=None, trust_remote_code=trust, chat_template="turns")


# ---------------------------------------------------------------------------------------------------- code from elsewhere


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    import torch

    from rlhf.models.given import check
    from rlhf.models.policy import load_policy

    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert check(given(tmp_path)) == []
    (tmp_path / "model.safetensors").unlink()
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    (error,) = check(given(tmp_path))
    assert "has no weights as safetensors, but pytorch_model.bin" in error.what
    assert "save_pretrained" in error.remedy
    with pytest.raises(UserError, match="cannot be a causal language model"):
        load_policy(tmp_path, "fp32")


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_model_runs_only_where_params_allow_it(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.models.given import check, pin
    from rlhf.models.policy import load_policy

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "ran"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n\n\n"
    code += "class Model(LlamaForCausalLM):\n    config_class = Mine\n\n\n"
    (folder / "mine.py").write_text(f"{code}open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    pin(given(folder, trust=trust), tmp_path / "to")  # of a type that transformers knows: its own code computes it
    assert load_policy(tmp_path / "to", "fp32")
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mine"}), encoding="utf-8")
    assert "but only code that comes with it, which no stage runs" in check(given(folder, trust=trust))[0].what
    with pytest.raises(UserError, match="custom code"):
        load_policy(folder, "fp32")
    assert marker.exists() == trust  # what the tokenizer is read with


def test_code_of_a_tokenizer_runs_once_where_params_allow_it(
    tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.models.given import pin
    from rlhf.models.tokenizer import load_tokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "ran"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n\n\n"
    (folder / "own.py").write_text(f"{code}open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"its tokenizer comes with code of its own.*trust_remote_code"):
        pin(given(folder), tmp_path / "to")
    assert not marker.exists()
    pin(given(folder, trust=True), tmp_path / "to")
    assert marker.exists()
    kept = load_tokenizer(tmp_path / "to")
    assert kept("What is 2+2?<|end|>")["input_ids"] == tokenizer("What is 2+2?<|end|>")["input_ids"]


def test_no_preset_trusts_code_of_a_model() -> None:
    for path in (PROJECT / "presets").glob("*.yaml"):
        assert not yaml.safe_load(path.read_text(encoding="utf-8"))["base"].get("trust_remote_code")


def test_no_command_goes_through_a_shell() -> None:
    shells = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
    for path in (path for folder in ("rlhf", "tasks", "flows", "bench") for path in (PROJECT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "attr", None) not in shells, f"{path}:{node.lineno}"
                assert all(keyword.arg != "shell" for keyword in node.keywords), f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------------- paths from data or params


def source(path: str) -> Any:
    raw = tiny_params()
    raw["data"]["sources"][0]["path"] = path
    return config.validate(raw, "params.yaml").data.sources[0]


@pytest.mark.parametrize("path", ["../rows.jsonl", "/etc/hostname", "data/raw/link.jsonl", "data/raw/folder"])
def test_a_source_cannot_read_outside_the_workspace(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "data/raw/folder").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    (root / "data/raw/link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (root / "data/raw/folder/part.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: .* leads out of"):
        list(read(source(path), "data.sources.0", root, 0))


@pytest.mark.parametrize(
    ("name", "content"),
    [("state.json", {"_data_files": [{"filename": "../../../rows.arrow"}]}), ("dataset_dict.json", {"splits": ["../../.."]})],
)
def test_a_folder_of_datasets_names_its_own_files_only(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / "data/raw/folder").mkdir(parents=True)
    (tmp_path / "data/raw/folder" / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: .* leads out of"):
        list(read(source("data/raw/folder"), "data.sources.0", tmp_path, 0))


def test_files_brought_in_come_without_links_out_of_them(tmp_path: Path) -> None:
    root, delivered = tmp_path / "root", tmp_path / "delivered"
    (root / "presets").mkdir(parents=True)
    (root / "data/raw").mkdir(parents=True)
    (root / "presets/hh.yaml").write_text((PROJECT / "presets/hh.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "graphs").symlink_to(PROJECT / "graphs")
    delivered.mkdir()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (delivered / "rows.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: rows\.jsonl leads out of"):
        presets.use(root, "hh", [f"data.sources.0.path={delivered}"])
    assert not (root / "data/raw/hh").exists()
    # the place itself is a link
    (delivered / "rows.jsonl").unlink()
    (delivered / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (root / "data/raw/hh").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: hh leads out of"):
        presets.use(root, "hh", [f"data.sources.0.path={delivered}"])
    raw = tiny_params()
    raw["data"]["sources"][0] |= {"name": "hh", "path": "data/raw/hh"}
    with pytest.raises(UserError, match=r"data\.sources\.0: data/raw/hh leads out of"):
        ingest(root, config.validate(raw, "params.yaml"), [delivered / "rows.jsonl"], None)


@pytest.mark.parametrize("path", ["../elsewhere", "/tmp/elsewhere", "models/../../elsewhere"])
@pytest.mark.parametrize("kind", ["deps", "outs", "metrics", "plots"])
def test_the_graph_stays_in_the_workspace(tmp_path: Path, kind: str, path: str) -> None:
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sft": {kind: [path]}}}), encoding="utf-8")
    with pytest.raises(UserError, match=f"dvc.yaml: stage sft: {path} leads out of the workspace"):
        fingerprint.read_graph(tmp_path)


def test_a_link_does_not_lead_a_stage_out_of_the_workspace(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "models").symlink_to(tmp_path)
    node = fingerprint.Node("sft", ("models/base",), ("models/sft",), (), {})
    with pytest.raises(UserError, match=r"output models/sft of stage sft: models leads out of"):
        check_places(root, node)
    with pytest.raises(UserError, match=r"input of stage sft: models/base leads out of"):
        fingerprint.check_inputs(root, "sft", {"sft": node})


# ------------------------------------------------------------------------------------------------------------------ secrets


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("SHORT_KEY", "models")
    cases = {
        "postgresql://rlhf:pass:w@rd@db.local:5432/mlflow": "postgresql://rlhf:***@db.local:5432/mlflow",
        "see http://user:geheim@127.0.0.1:5000, or http://other:5000/a@b": "see http://user:***@127.0.0.1:5000, or http://other:5000/a@b",
        "postgresql://db/mlflow?user=me&password=geheim&sslmode=on": "postgresql://db/mlflow?user=me&password=***&sslmode=on",
        "key wJalrXUtnFEMI is wrong": "key *** is wrong",
        "sqlite:////srv/models/mlflow.db": "sqlite:////srv/models/mlflow.db",
        "http://localhost:4200/api": "http://localhost:4200/api",
    }
    assert {text: redact(text) for text in cases} == cases


def test_an_address_with_a_password_does_not_go_into_params() -> None:
    raw = yaml.safe_load((PROJECT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    raw["tracking"]["uri"] = "postgresql://rlhf:geheim@db/mlflow"
    with pytest.raises(UserError, match=r"tracking: uri holds a password.*MLFLOW_TRACKING_URI") as caught:
        config.validate(raw, "params.yaml")
    assert "geheim" not in str(caught.value)
    raw["tracking"]["uri"] = "http://mlflow.local:5000"
    config.validate(raw, "params.yaml")


def test_an_address_with_a_password_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://rlhf:geheim@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(sys, "argv", ["rlhf", "models"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capfd.readouterr()
    assert "MLflow at http://rlhf:***@127.0.0.1:9" in said.err
    assert "geheim" not in said.out + said.err


def test_what_a_stage_prints_is_logged_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    with Console("base", tmp_path / "log.txt") as console:
        console.show("401 for token hf_0123456789")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "401 for token ***\n"
    assert "hf_0123456789" not in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------------------------ servers


def test_ranks_listen_on_the_loopback_only(tmp_path: Path) -> None:
    make_workspace(tmp_path, tiny_params(), 120)
    said = run(tmp_path, "base:watched", ranks=2)
    assert "listens on ['127.0.0.1']" in said
    (tmp_path / "runs/sft").mkdir()
    params = config.load(tmp_path / "params.yaml")
    assert command.environment("sft", params, tmp_path, tmp_path / "runs/sft", "cpu")["GLOO_SOCKET_IFNAME"] == "lo"
