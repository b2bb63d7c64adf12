"""The whole flow on real, tiny DVC workspaces: what it registers, decides and shows, and what it refuses before it trains."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.retrain import retrain
from rlhf import config, registry, tracking
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.registry.history import person
from rlhf.workspace import served
from tests.flows.workspaces import PROJECT, artifacts, pipeline, walk, whole_pipeline

DVC = str(Path(sys.executable).with_name("dvc"))


def work_of_the_user(root: Path) -> str:
    """Have a file staged and changed again, and another one that git does not know; what git says of the two."""
    (root / "staged.py").write_text("staged\n")
    subprocess.run(["git", "add", "staged.py"], cwd=root, check=True)
    (root / "staged.py").write_text("and changed again\n")
    (root / "notes.txt").write_text("private\n")
    return git_status(root)


def git_status(root: Path) -> str:
    words = ["git", "status", "--porcelain=v2", "--branch", "--", "staged.py", "notes.txt"]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout


def test_the_whole_flow_registers_and_decides_once(root: Path) -> None:
    whole_pipeline(root)
    remote = root.parent / f"{root.name}-remote"
    subprocess.run([DVC, "remote", "add", "--quiet", "--default", "here", str(remote)], cwd=root, check=True)
    before = work_of_the_user(root)
    first = retrain(root)
    assert first["stages"] == {"ppo": "done", "evaluate": "done"}
    assert (first["version"], first["champion"], first["promoted"]) == (1, 1, True)
    assert git_status(root) == before
    # what the run made is in the DVC remote (git has metrics and plots), and the run cache with it
    outs = [out for locked in yaml.safe_load((root / "dvc.lock").read_text())["stages"].values() for out in locked["outs"]]
    named = {out["md5"] for out in outs if not out["path"].startswith(("metrics/", "plots/"))}
    assert named <= {path.parent.name + path.name for path in remote.glob("files/md5/*/*")}
    assert len(list(remote.glob("runs/*/*/*"))) == 2
    second = retrain(root)
    assert set(second["stages"].values()) == {"up to date"}
    assert (second["version"], second["champion"], second["promoted"]) == (1, 1, True)

    params = config.load(root / "params.yaml")
    [version] = registry.versions(root, params)
    assert version.tags["md5.models/ppo"].endswith(".dir")
    page, again = (str(found.data) for found in artifacts("evaluation"))
    assert "**version 1 is champion already**" in again
    for line in (
        "**version 1 is champion, the one before is none**",
        "| user: a\\|b\\<i\\> | x | y |",
        "| min_win_rate | yes |",
        f"by {person()}, by hand; it took",
        "- `rlhf verify 1`",
    ):
        assert line in page
    [table, _] = artifacts("metrics")
    rows = {row["metric"]: row for row in json.loads(str(table.data))}
    assert rows["win_rate.value"] == {"metric": "win_rate.value", "this version": "0.8", "champion": "—", "difference": "—"}
    assert rows["eos_rate.policy"]["this version"] == "0.99"
    assert str(artifacts("plot-gold-against-kl")[0].data).startswith("data:image/png;base64,iVBOR")

    first_run, second_run = (str(found.data).rpartition("/")[2].partition("?")[0] for found in artifacts("mlflow"))
    assert f"/runs/{first_run}" in page
    assert version.tags["report"] == f"runs:/{first_run}/report.html"
    client = tracking.client(root, params)
    tags = client.get_run(first_run).data.tags
    assert (tags["decision"], tags["version"], tags["champion.before"], tags["gates"]) == ("promoted", "1", "none", "passed")
    assert f"by {person()}, by hand; it took" in tags["mlflow.note.content"]
    assert tags["mlflow.source.name"] == f"{person()}, by hand"
    assert client.get_run(second_run).data.tags["decision"] == "champion already"
    assert client.get_run(second_run).data.metrics["final/win_rate.value"] == 0.8
    assert {artifact.path for artifact in client.list_artifacts(first_run)} == {"metrics", "plots", "report.html"}
    web = Path(client.download_artifacts(first_run, "report.html")).read_text()
    assert "<td>user: a|b&lt;i&gt;</td>" in web
    assert '<img src="data:image/png;base64,' in web

    with lock(root, "flow"), pytest.raises(UserError, match="another retraining flow is running"):
        retrain(root)

    # what Prefect's pages show
    with get_client(sync_client=True) as reader:
        made = {run.id: run for run in reader.read_flow_runs() if run.name in (web_name(client, one) for one in (first_run, second_run))}
        ran = reader.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(made))))
    states = {(run.state_name, run.state.message) for run in made.values() if run.state}
    assert states == {
        ("promoted", "version 1 is champion, the one before is none"),
        ("champion already", "version 1 is champion already"),
    }
    assert {"check", "ppo", "evaluate", "register", "gates", "push", "evidence", "promote", "report"} == {run.name for run in ran}
    assert [set(run.tags) for run in made.values() if run.state_name == "promoted"] == [
        {"assistant-v1", "ppo", "promoted", served.name(root)}
    ]
    assert not any(run.tags for run in ran)  # of each, Prefect would ask its server for a limit


def web_name(client: Any, run: str) -> str:
    """What Prefect called the flow run of an MLflow run."""
    return str(client.get_run(run).info.run_name)


def test_a_refused_run_says_first_which_gates_failed(root: Path) -> None:
    whole_pipeline(root)
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace("min_reward_accuracy: 0.85", "min_reward_accuracy: 0.95"))
    state: Any = retrain(root, return_state=True)
    assert (state.is_completed(), state.name) == (True, "refused")
    measured = "reward model's accuracy: 0.9, short of 0.95 by 0.05"
    assert state.message == f"version 1 is candidate, champion is none; min_reward_accuracy: {measured}"
    decision = artifacts("decision")[-1]
    # Prefect shows what is the flow run's own before what is its tasks'
    assert decision.task_run_id is None
    page = str(decision.data)
    assert page.startswith("# refused\n\nversion 1 is candidate")
    assert f"## Failed\n\n- **min_reward_accuracy**: {measured}\n\n## Passed\n\n- **min_win_rate**: " in page


def test_nothing_is_trained_that_could_not_be_compared_with_the_champion(root: Path) -> None:
    whole_pipeline(root)
    walk(root)
    params = config.load(root / "params.yaml")
    registry.promote(registry.register(root, params), None, root, params, by="me", why="a model without a tokenizer")
    pipeline(
        root,
        {
            "prepare": {"cmd": "mkdir -p data/prepared && touch data/prepared/heldout_prompts.jsonl", "outs": ["data/prepared"]},
            "base": {"cmd": "touch trained", "deps": ["data/prepared"], "outs": ["trained"]},
        },
    )
    with pytest.raises(UserError) as caught:
        walk(root)
    assert caught.value.what.startswith("version 1 of assistant, the champion, cannot be compared with: ")
    assert "rlhf use params.yaml promote.model=NAME" in caught.value.remedy
    assert (root / "data/prepared").exists()
    assert not (root / "trained").exists()
    # another line of models, whose champion this is not
    assert walk(root, "assistant-new") == {"prepare": "up to date", "base": "done"}
    # with nothing to train, there is nothing to refuse
    assert set(walk(root).values()) == {"up to date"}


def test_a_source_file_that_is_missing_is_named_before_anything_runs(root: Path) -> None:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    columns = dict.fromkeys(("prompt", "chosen", "rejected", "messages", "question", "answer", "text"), "x")
    split = {"text": 0, "sft": 1, "reward": 1, "ppo": 1, "judge": 0, "heldout": 1}
    source = {"name": "mine", "format": "pairs", "path": "data/raw/mine.jsonl", "hub": None, "revision": None, "hub_split": None}
    params["data"]["sources"].append(source | {"columns": columns, "split": split | {"judge": 1}, "weight": 1})
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    pipeline(root, {"prepare": {"cmd": "touch ran"}})
    with pytest.raises(UserError, match=r"data\.sources\.\d+\.path: no such file: .*data/raw/mine\.jsonl"):
        retrain(root)
    assert not (root / "ran").exists()
