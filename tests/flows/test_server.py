"""What a server of Prefect does around the flow: it schedules runs, knows who started one, asks a person, and forgets the dead."""

import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from flows.retrain import retrain
from rlhf import registry
from rlhf.cli import serve
from rlhf.config.operations import Approval
from rlhf.registry.gates import Gate
from rlhf.registry.history import person
from tasks.approval import Word, ask
from tasks.origin import starter


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
            # Prefect says what is asked for a moment after it has paused, and refuses an answer before that
            while client.resume_flow_run(found[0].id, run_input=answer).status != SetStateStatus.ACCEPT:
                time.sleep(0.2)
            return found[0].state_name or ""

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(person)
        assert approved(verdict, 5) == word
        assert answering.result() == "Paused"


def test_who_does_not_answer_has_declined() -> None:
    verdict = registry.Verdict(registry.Version("assistant", 7, datetime.now(UTC), (), {}), [], 6)
    word = approved(verdict, 1 / 60)
    assert word.declined == "nobody approved it within 0.0166667 minutes: `rlhf promote 7` puts it into service"


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
