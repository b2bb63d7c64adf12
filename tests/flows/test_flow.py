"""The flow on real, tiny DVC workspaces, whose stages are shell commands."""

import json
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import Artifact, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import ArtifactSort
from prefect.settings import PREFECT_API_URL
from prefect.states import Running
from transformers import LlamaConfig, LlamaForCausalLM

from flows.retrain import retrain, run_stages
from rlhf import config, registry, tracking
from rlhf.cli import serve
from rlhf.config.operations import Approval
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.registry.gates import Gate
from rlhf.registry.history import person
from rlhf.workspace import served
from tasks import progress, stage
from tasks.approval import Word, ask
from tasks.origin import starter

PROJECT = Path(__file__).parents[2]
DVC = str(Path(sys.executable).with_name("dvc"))
METRICS = {
    "gold": None,
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "second reward model"},
    "reward_model": {"accuracy": 0.9, "n": 500, "ci95": [0.5, 0.7]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
    "heldout": "abc",
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[stage.Progress]:
    seen: list[stage.Progress] = []
    monkeypatch.setattr(stage, "_watchers", [seen.append])
    return seen


def pipeline(root: Path, stages: dict[str, dict[str, Any]]) -> None:
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


@flow
def walk(root: Path, model: str = "assistant") -> dict[str, str]:
    shipped = config.load(PROJECT / "params.yaml")
    return run_stages(root, shipped.model_copy(update={"promote": shipped.promote.model_copy(update={"model": model})}))


def test_branches_run_side_by_side_and_a_second_run_has_nothing_to_do(root: Path, told: list[stage.Progress]) -> None:
    def meeting(own: str, other: str) -> dict[str, Any]:
        # each waits for the other: one after the other, the first would give up
        wait = f"for i in $(seq 200); do [ -e {other}.here ] && break; sleep 0.1; done"
        command = f"touch {own}.here; {wait}; [ -e {other}.here ] && cp start {own}"
        return {"cmd": command, "deps": ["start"], "outs": [own]}

    pipeline(
        root,
        {
            "prepare": {"cmd": "echo $RLHF_FLOW_RUN_ID > flow.txt; echo data > start", "outs": ["start"]},
            "sft": meeting("left", "right"),
            "reward": meeting("right", "left"),
            "ppo": {"cmd": "echo 'ppo 3/9 reward=0.5 kl=2'; cat left right > joined", "deps": ["left", "right"], "outs": ["joined"]},
        },
    )
    assert walk(root) == dict.fromkeys(("prepare", "sft", "reward", "ppo"), "done")
    assert (root / "joined").read_text() == "data\ndata\n"
    assert len((root / "flow.txt").read_text().strip()) == 36
    assert stage.Progress("ppo", "running", "reward=0.5 kl=2", 3, 9) in told
    assert [event.state for event in told if event.stage == "ppo"][-1] == "done"

    (root / "left.here").unlink()
    assert set(walk(root).values()) == {"up to date"}
    assert not (root / "left.here").exists()


def test_what_is_wrong_is_told_before_anything_runs_and_not_looked_for_where_nothing_runs(root: Path) -> None:
    pipeline(root, {"prepare": {"cmd": "touch ran; touch start", "outs": ["start"]}})
    shipped = config.load(PROJECT / "params.yaml")
    shared = shipped.model_copy(update={"launch": shipped.launch.model_copy(update={"hostfile": "hosts", "precision": "bf16"})})

    @flow
    def ask() -> dict[str, str]:
        return run_stages(root, shared)

    with pytest.raises(UserError, match=r"launch\.hostfile .*hosts: no such file"):
        ask()
    assert not (root / "ran").exists()
    assert walk(root) == {"prepare": "done"}
    assert ask() == {"prepare": "up to date"}


def test_a_failed_stage_is_named_with_its_reason_and_nothing_after_it_runs(root: Path) -> None:
    mistake = "echo x >> tries; echo 'error: row 7: no prompt' >&2; echo '  remedy: give one' >&2; exit 1"
    pipeline(
        root,
        {
            "prepare": {"cmd": mistake, "outs": ["start"], "meta": {"retries": 2}},
            "sft": {"cmd": "touch ran; touch out", "deps": ["start"], "outs": ["out"]},
        },
    )
    with pytest.raises(UserError) as caught:
        walk(root)
    assert caught.value.what.startswith("stage prepare failed with exit code ")
    assert caught.value.what.endswith("error: row 7: no prompt |   remedy: give one")
    assert "sft" not in caught.value.what
    assert not (root / "ran").exists()
    # what the user has to mend is not tried again
    assert (root / "tries").read_text() == "x\n"


LAUNCH = "import pathlib, sys; from rlhf.launcher.launch import launch; sys.exit(launch('prepare', pathlib.Path(), 'toys'))"
TOY = """
import os, signal
from rlhf.job import run

def main(job):
    tries = job.root / "tries"
    tries.open("a").write("x")
    if len(tries.read_text()) == 1:
        {mishap}
    job.output("out").write_text("ok")

run("prepare", main)
"""


@pytest.mark.parametrize(
    ("mishap", "tries"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 2),
        ("os.kill(os.getppid(), signal.SIGKILL)", 2),
        ("raise ConnectionResetError('Connection reset by peer')", 2),
        ("raise ValueError('row 7')", 1),
        ("os._exit(9)", 1),
    ],
    ids=["killed", "launcher killed", "lost connection", "exception", "exit code"],
)
def test_a_stage_is_tried_again_where_that_may_help(root: Path, monkeypatch: pytest.MonkeyPatch, mishap: str, tries: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{root}")
    (root / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    (root / "toys").mkdir()
    (root / "toys/prepare.py").write_text(TOY.format(mishap=mishap))
    pipeline(root, {"prepare": {"cmd": f'{sys.executable} -c "{LAUNCH}"', "outs": ["out"], "meta": {"retries": 2}}})
    if tries > 1:
        assert walk(root) == {"prepare": "done"}
    else:
        with pytest.raises(UserError, match="stage prepare failed with exit code"):
            walk(root)
    assert len((root / "tries").read_text()) == tries


def test_stopped_stages_leave_no_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: stage.Progress) -> None:
        if event.text == "started":
            stage.stop_all()

    monkeypatch.setattr(stage, "_watchers", [stop])
    pipeline(root, {"base": {"cmd": "echo $$ > pid; echo started; sleep 300; touch out", "outs": ["out"], "meta": {"retries": 3}}})
    with pytest.raises(UserError, match="stage base was stopped"):
        walk(root)
    shell = Path("/proc") / (root / "pid").read_text().strip() / "stat"
    assert not shell.exists() or shell.read_text().split()[2] == "Z"


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


def artifacts(key: str) -> list[Artifact]:
    """A key's artifacts, oldest first."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC)
    return found[::-1]


def test_a_stages_progress_moves_while_it_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_MOVES", 0.1)
    half_way = "echo 'moving 2/8 loss=2.5'; while [ ! -e go ]; do sleep 0.1; done; echo done > out"
    pipeline(root, {"moving": {"cmd": half_way, "outs": ["out"]}})

    def look() -> str:
        try:
            while not (found := artifacts("progress-moving")) or found[-1].data != 25:
                time.sleep(0.1)
            return found[-1].description or ""
        finally:
            (root / "go").touch()

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        walk(root)
        assert looking.result(60) == "moving: loss=2.5"
    assert [(found.data, found.description) for found in artifacts("progress-moving")] == [(100, "moving: done")]
    walk(root)
    assert [found.description for found in artifacts("progress-moving")] == ["moving: done", "moving: up to date"]


def whole_pipeline(root: Path) -> None:
    """Two stages that copy a model and its evaluation, which stand there from the start."""
    made = root / "made"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(made)
    (made / "lineage.json").write_text(json.dumps({"fingerprint": "f00d"}))
    (root / "evaluate.json").write_text(json.dumps(METRICS))
    (root / "samples.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "a|b<i>"}], "sft": "x", "ppo": "y"}) + "\n")
    (root / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    (root / "answers.jsonl").write_text("{}\n")
    (root / "gold_against_kl.csv").write_text("step,loss\n1,2\n2,1\n")
    copying = "mkdir -p metrics data plots; cp evaluate.json metrics; cp samples.jsonl answers.jsonl data; cp gold_against_kl.csv plots"
    pipeline(
        root,
        {
            "ppo": {"cmd": "mkdir -p models && cp -r made models/ppo", "deps": ["made"], "outs": ["models/ppo"]},
            "evaluate": {
                "cmd": copying,
                "deps": ["models/ppo"],
                "outs": ["data/samples.jsonl", "data/answers.jsonl"],
                "metrics": [{"metrics/evaluate.json": {"cache": False}}],
                "plots": [{"plots/gold_against_kl.csv": {"cache": False, "x": "step", "y": "loss"}}],
            },
        },
    )


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


def test_nothing_is_trained_that_could_not_be_compared_with_the_champion(root: Path, told: list[stage.Progress]) -> None:
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


@flow
def approved(verdict: registry.Verdict, minutes: float) -> Word:
    return ask(verdict, Approval(required=True, wait_minutes=minutes))


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ({"approve": True, "name": "Ada", "why": "reads well"}, Word("Ada", "approved: reads well")),
        ({"approve": False, "name": "Ada", "why": "too curt"}, Word("Ada", "too curt", "Ada declined: too curt")),
    ],
)
def test_a_person_has_the_last_word(answer: dict[str, Any], word: Word) -> None:
    version = registry.Version("assistant", 7, datetime.now(UTC), (), {})
    verdict = registry.Verdict(version, [Gate("max_kl", 1.0, 2.0, True, "KL to sft per answer: 1 ≤ 2")], 6)

    def person() -> str:
        with get_client(sync_client=True) as client:
            paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
            while not (found := client.read_flow_runs(flow_run_filter=paused)):
                time.sleep(0.2)
            client.resume_flow_run(found[0].id, run_input=answer)
            return found[0].state_name or ""

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(person)
        assert approved(verdict, 5) == word
        assert answering.result() == "Paused"


def test_who_does_not_answer_has_declined() -> None:
    verdict = registry.Verdict(registry.Version("assistant", 7, datetime.now(UTC), (), {}), [], 6)
    word = approved(verdict, 1 / 60)
    assert word.declined == "nobody approved it within 0.0166667 minutes: `rlhf promote 7` puts it into service"


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


def test_the_server_schedules_nightly_runs() -> None:
    with get_client(sync_client=True) as client:
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone="UTC"))
        deployment = client.create_deployment(client.create_flow(retrain), "nightly", schedules=[schedule])
        # what the server's own scheduler does, too: a release of SQLAlchemy broke it
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json={"max_runs": 2})
        runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
    assert [run.state_type for run in runs] == [StateType.SCHEDULED] * 2


@flow
def asked_who() -> str:
    return starter()


def test_who_started_a_run_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_who() == f"{person()}, by hand"
    with get_client(sync_client=True) as client:
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone="UTC"))
        deployment = client.create_deployment(client.create_flow(asked_who), "nightly", schedules=[schedule])
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json={"max_runs": 1})
        [scheduled] = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
        by_person = client.create_flow_run_from_deployment(deployment)
        # as an automation's action does
        headers = {"prefect-automation-id": str(deployment), "prefect-automation-name": b64encode(b"new rows").decode()}
        answer = client._client.post(f"/deployments/{deployment}/create_flow_run", json={}, headers=headers)
    said = []
    for run in (scheduled.id, by_person.id, UUID(answer.json()["id"])):
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", str(run))
        said.append(starter())
    assert said == ["schedule of deployment nightly (CronSchedule)", "a person, by deployment nightly", "an event, by automation new rows"]


def test_a_run_that_ended_with_its_worker_does_not_hold_the_one_place() -> None:
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(retrain), "nightly")
        dead, alive = (client.create_flow_run_from_deployment(deployment, state=Running()).id for _ in range(2))
        words = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "prefect.engine"]
        process = subprocess.Popen(words, env={"PREFECT__FLOW_RUN_ID": str(alive)})
        try:
            assert serve.end_dead_runs(str(PREFECT_API_URL.value()))
        finally:
            process.kill()
            process.wait()
        assert [client.read_flow_run(run).state_type for run in (dead, alive)] == [StateType.CRASHED, StateType.RUNNING]
    assert not serve.end_dead_runs("http://127.0.0.1:1/api")
