"""The command line: what it prints, what it refuses, and that it answers quickly because it imports late."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from rlhf import config, tracking
from rlhf.cli import main as cli
from rlhf.cli import progress
from rlhf.config.training import BuiltBase
from rlhf.models.policy import build_policy
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import build_tokenizer
from tasks import stage

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def mlruns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it: it takes seconds to make, and every workspace gets a copy."""
    root = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.initialise(root, config.load(ROOT / "presets/sandbox.yaml"))
    return root / "mlruns"


@pytest.fixture
def workspace(tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "workspace"
    for folder in ("presets", "graphs"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(root / "presets/sandbox.yaml", root / "params.yaml")
    (root / "dvc.yaml").write_text("stages:\n  prepare:\n    desc: reads rows\n    cmd: 'true'\n    outs: [data]\n", encoding="utf-8")
    shutil.copytree(mlruns, root / "mlruns")
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny assistant with random weights, in an ordinary model folder."""
    raw = yaml.safe_load((ROOT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    raw["base"] |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 1,
        "heads": 4,
        "kv_heads": 2,
        "vocab_size": 300,
    }
    base = config.validate(raw, "test").base
    assert isinstance(base, BuiltBase)
    tokenizer = build_tokenizer(["a question and its answer"], base.vocab_size, base.context_tokens)
    policy = build_policy(base, tokenizer, seed=3)
    for weights in policy.parameters():
        torch.nn.init.normal_(weights)  # far from what training starts with: each answer depends on all that came before it
    folder = tmp_path_factory.mktemp("model")
    save_model(policy, tokenizer, folder)
    return folder


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line, in this process: exit code, standard output, standard error."""

    def command(*arguments: str, questions: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        try:
            cli.main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        return code, *capsys.readouterr()

    return command


def test_help_lists_every_command_without_loading_a_framework() -> None:
    code = "import sys; from rlhf.cli import main; sys.argv = ['rlhf', '--help']\ntry: main.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'prefect', 'mlflow', 'dvc'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in (
        "use",
        "run",
        "status",
        "launch",
        "chat",
        "models",
        "promote",
        "rollback",
        "compare",
        "lineage",
        "verify",
        "ingest",
        "env",
        "reference",
    ):
        assert f"\n  {command} " in out
    assert out.endswith("[]\n")


@pytest.mark.parametrize(
    "command",
    [
        "use",
        "run",
        "status",
        "launch",
        "chat",
        "models",
        "promote",
        "rollback",
        "compare",
        "lineage",
        "verify",
        "ingest",
        "serve",
        "env",
        "reference",
    ],
)
def test_each_command_explains_itself(command: str, rlhf: Command) -> None:
    code, out, _ = rlhf(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: rlhf {command}")
    assert len(out.splitlines()[2].split()) >= 4  # what it does, in words


@pytest.mark.parametrize("command", ["run", "status", "models", "use sandbox", "launch sft", "chat"])
def test_outside_a_workspace(command: str, tmp_path: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = rlhf(*command.split())
    assert code == 1
    assert (
        err == f"error: {tmp_path}: no workspace (a folder with params.yaml and dvc.yaml) here or above — change to the project's folder\n"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("use sandbx", "unknown preset 'sandbx': did you mean 'sandbox'?"),
        ("use hh seeds=1", "unknown key 'seeds': did you mean 'seed'?"),
        ("launch train", "unknown stage 'train' — one of prepare, base, sft, reward, awac, ppo, "),
        ("chat --model nowhere", "nowhere: no such folder"),
        ("chat --model presets", "presets: no Hugging Face model"),
        ("chat", "assistant: no version is champion or candidate yet"),
        ("chat --model models:/assistant@champion", "models:/assistant@champion: "),
    ],
)
def test_mistakes_are_told_in_one_line(command: str, words: str, workspace: Path, rlhf: Command) -> None:
    code, out, err = rlhf(*command.split())
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert " — " in line
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [["reference"], ["chat", "--model", "nowhere/at/all"]])
def test_a_terminal_without_unicode_is_no_error(command: list[str]) -> None:
    program = [str(Path(sys.executable).with_name("rlhf")), *command]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, encoding="ascii", check=False)
    assert "Traceback" not in done.stderr
    assert (done.stdout.startswith("# "), done.returncode) == ((True, 0) if command == ["reference"] else (False, 1))
    assert " - " in done.stdout + done.stderr  # where a dash stands


def test_params_that_do_not_pass_stop_the_flow_before_it_starts(workspace: Path, rlhf: Command) -> None:
    text = (workspace / "params.yaml").read_text(encoding="utf-8")
    (workspace / "params.yaml").write_text(re.sub(r"(?<=sft:\n  epochs: )\S+", "-2", text), encoding="utf-8")
    code, _, err = rlhf("run")
    assert code == 1
    assert "sft.epochs: Input should be greater than 0, got -2" in err
    assert err.count("\n") == 1


def test_commands_find_the_workspace_from_below(workspace: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    below = workspace / "data/raw"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    (below / "mine.jsonl").write_text("{}\n", encoding="utf-8")
    assert rlhf("use", "hh", "data.sources.0.path=mine.jsonl")[0] == 0
    assert yaml.safe_load((workspace / "params.yaml").read_text())["data"]["sources"][0]["path"] == "data/raw/mine.jsonl"


def test_unwritable_workspace_is_told_in_one_line(workspace: Path, rlhf: Command) -> None:
    (workspace / ".params.yaml.new").mkdir()  # even root cannot write a file there
    code, _, err = rlhf("use", "sandbox")
    assert code == 1
    assert err == f"error: {workspace / '.params.yaml.new'}: Is a directory — set its permissions\n"


def test_version(rlhf: Command) -> None:
    assert rlhf("--version") == (0, f"rlhf {metadata.version('rlhf')}\n", "")


def test_report_of_the_environment_for_bug_reports(workspace: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://us:hidden-word@db/mlflow")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, out, err = rlhf("env")
    found = dict(line.split(":", 1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert {"rlhf", "python", "processor", "cores", "memory", "GPUs", "Prefect", "disk"} <= set(found)
    assert f"torch {torch.__version__}, transformers" in found["packages"]
    assert torch.backends.cpu.get_cpu_capability() in found["torch"]
    assert f"{workspace}, git revision" in found["workspace"]
    assert "postgresql://us:***@db/mlflow" in found["MLflow"]
    assert "OMP_NUM_THREADS=3" in found["variables"]
    assert all(value.strip() and "Error" not in value for name, value in found.items() if name != "GPUs")


def test_report_says_what_is_broken_and_goes_on(workspace: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "params.yaml").write_text("seed: [1\n", encoding="utf-8")
    assert "not valid YAML" in rlhf("env")[1].split("MLflow:")[1].splitlines()[0]
    monkeypatch.chdir("/")
    code, out, _ = rlhf("env")
    assert code == 0
    assert "none at / or above" in out


def test_completion_in_bash(workspace: Path, tmp_path: Path) -> None:
    words = "rlhf --install-completion && source ~/.bash_completions/rlhf.sh && COMP_WORDS=(rlhf {}) COMP_CWORD={} && _rlhf_completion rlhf"
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for typed, place, offered in (("sta", 1, ["status"]), ("use h", 2, ["hh"]), ("launch e", 2, ["evaluate"])):
        command = f'{words.format(typed, place)} && echo "offered: ${{COMPREPLY[@]}}"'
        out = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1].split()[1:] == offered
    assert ".bash_completions/rlhf.sh" in (tmp_path / ".bashrc").read_text(encoding="utf-8")


def test_completion_in_zsh(workspace: Path) -> None:
    environment = os.environ | {"_RLHF_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "rlhf sta"}
    out = subprocess.run([Path(sys.executable).with_name("rlhf")], env=environment, capture_output=True, text=True, check=True).stdout
    assert '"status"' in out


def test_status_tells_stages_metrics_and_aliases(workspace: Path, rlhf: Command) -> None:
    subprocess.run(
        [Path(sys.executable).with_name("dvc"), "init", "--no-scm", "-q"], env=os.environ | {"DVC_NO_ANALYTICS": "1"}, check=True
    )
    code, out, _ = rlhf("status")
    assert code == 0
    assert ["prepare", "to", "do", "reads", "rows"] in [line.split() for line in out.splitlines()]
    assert "no evaluation yet" in out
    (workspace / "metrics").mkdir()
    (workspace / "metrics/evaluate.json").write_text('{"gold": {"sft": 0.25, "ci95": [0.1, 0.12345678]}}', encoding="utf-8")
    lines = [line.split() for line in rlhf("status", "--all")[1].splitlines()]
    assert ["gold.sft", "0.25"] in lines
    assert ["gold.ci95", "0.1", "…", "0.1235"] in lines


def test_models_before_any_is_registered(workspace: Path, rlhf: Command) -> None:
    code, out, _ = rlhf("models")
    assert (code, out) == (0, "no version of assistant is registered yet: `rlhf run` registers one\n")


def test_reference_is_what_the_docs_hold(rlhf: Command) -> None:
    assert rlhf("reference")[1] == (ROOT / "docs/params.md").read_text(encoding="utf-8")


@pytest.fixture
def chat(rlhf: Command, model: Path) -> Callable[..., str]:
    def answers(questions: str, *options: str) -> str:
        code, out, _ = rlhf("chat", "--model", str(model), "--max-tokens", "16", *options, questions=questions)
        assert code == 0
        return out

    return answers


def test_chat_remembers_until_reset(chat: Callable[..., str]) -> None:
    one = chat("hello\n")
    assert one.strip()
    # the same question again is another dialogue, unless it is forgotten first
    assert chat("hello\nhello\n") != one + one
    assert chat("hello\n/reset\n\nhello\n/quit\nhello\n") == f"{one}(new dialogue)\n{one}"


def test_chat_samples_at_a_temperature(chat: Callable[..., str]) -> None:
    greedy = chat("hello\n")
    assert chat("hello\n") == greedy
    assert chat("hello\n", "--temperature", "2") != greedy


def test_chat_ends_an_answer_before_a_text(chat: Callable[..., str]) -> None:
    whole = chat("hello\n")
    text = whole[len(whole) // 2 :][:3]
    assert chat("hello\n", "--stop", "never written", "--stop", text) == whole[: whole.index(text)] + "\n"


def test_chat_forgets_the_oldest_when_its_context_is_full(chat: Callable[..., str]) -> None:
    assert "too long: the model takes 240 tokens" in chat("hello " * 400 + "\n")
    assert "too long" not in chat("hello\n" * 9)


def test_reward_model_is_no_partner(model: Path, tmp_path: Path, rlhf: Command) -> None:
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(tmp_path / "reward")
    code, _, err = rlhf("chat", "--model", str(tmp_path / "reward"))
    assert code == 1
    assert "a LlamaForSequenceClassification does not write text" in err


@pytest.mark.parametrize(("terminal", "parts"), [(True, ("up to date", "3/12", "loss=2.5")), (False, ())])
def test_bars_on_a_terminal_only(terminal: bool, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_watchers", [])
    written = io.StringIO()
    with progress.shown(Console(file=written, force_terminal=terminal, width=120), tmp_path):
        for watcher in stage._watchers:
            watcher(stage.Progress("base", "up to date"))
            watcher(stage.Progress("sft", "running", "loss=2.5", 3, 12))
    assert bool(written.getvalue()) == terminal
    assert [part for part in parts if part not in written.getvalue()] == []


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("print('all', end='')", 0, "all"),
        ("print('all', end=''); sys.exit()", 0, "all"),
        ("print('all', end=''); sys.exit(3)", 3, "all"),
        ("print('all', end=''); sys.exit('why')", 1, "all"),
        ("print('all', end=''); 1 / 0", 1, "all"),
    ],
)
def test_the_process_ends_with_the_command_and_says_all(ends: str, code: int, said: str) -> None:
    program = f"import sys\nfrom rlhf.cli import __main__ as command\ndef main(): {ends}\ncommand.main = main\ncommand.start()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (code, said)
    assert ("ZeroDivisionError" in done.stderr) == ("1 / 0" in ends)
    assert ("why" in done.stderr) == ("why" in ends)
