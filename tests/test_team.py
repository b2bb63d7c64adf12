"""The set-up of docs/team.md for real: Prefect and MLflow on PostgreSQL, artifacts and DVC's data in an S3 store.

A version is registered, and verified in a clone that has nothing but git, the S3 store and MLflow's server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from rlhf.feedback.database import Database, Kept
from rlhf.feedback.recorder import Recorder
from rlhf.feedback.tables import Answer, Pair
from tests.feedback.test_recorder import row
from tests.feedback.test_tables import pair, rating
from tests.stage_runs import free_port

PROJECT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
PASSWORDS = {"prefect": "geheim-prefect", "mlflow": "geheim-mlflow", "rlhf": "geheim-rlhf"}
METRICS = {
    "gold": None,
    "win_rate": {"value": 0.8, "ci95": [0.76, 0.84], "judge": "second reward model"},
    "reward_model": {"accuracy": 0.9, "n": 500, "ci95": [0.5, 0.7]},
    "kl": 12.0,
    "perplexity": {"sft": 10.0, "ppo": 10.5, "ratio": 1.05},
    "eos_rate": {"sft": 0.95, "ppo": 0.99},
    "answer_tokens": {"sft": 20.0, "ppo": 22.0},
    "heldout": "abc",
    "judge": "def",
}
RETRAIN = "import json, pathlib; from flows.retrain import retrain; print(json.dumps(retrain(pathlib.Path())))"


def eventually(what: str, condition: Callable[[], object]) -> None:
    """Wait for a condition; the limit only bounds a failing test."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.2)
    pytest.fail(f"{what} did not come up")


def answers(address: str) -> bool:
    with urllib.request.urlopen(address, timeout=5):
        return True


class Servers:
    """What a team runs on machines of its own, here on the loopback: PostgreSQL, an S3 store, Prefect's server, MLflow's server."""

    def __init__(self, logs: Path, stack: ExitStack) -> None:
        self._logs, self._stack = logs, stack
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "AWS_", "RLHF_"))}
        self.ports = {name: free_port() for name in ("postgres", "s3", "prefect", "mlflow")}
        self.common = kept | {
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            "PREFECT_HOME": str(logs / "prefect"),
            "DO_NOT_TRACK": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "geheim-s3",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self, name: str, *words: str, user: str | None = None, **environment: str) -> None:
        log = self._stack.enter_context((self._logs / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            words, env=self.common | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd="/", user=user
        )
        self._stack.callback(self._stop, process)

    @staticmethod
    def _stop(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def postgres(self, programs: Path) -> None:
        # it refuses to run as root, whose temporary folders are closed to others
        user = "postgres" if os.geteuid() == 0 else None
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-postgres-", ignore_cleanup_errors=True)))
        if user:
            shutil.chown(folder, user)
        making: list[str | Path] = [programs / "initdb", "--pgdata", folder / "data", "--username=admin", "--auth=trust", "--no-sync"]
        subprocess.run(making, check=True, capture_output=True, user=user, cwd="/")
        port = str(self.ports["postgres"])
        # from here on, each connection of a role needs its password
        (folder / "data/pg_hba.conf").write_text("host all admin 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        place = ("-D", str(folder / "data"), "-p", port, "-h", "127.0.0.1", "-k", str(folder))
        self.start("postgres", str(programs / "postgres"), *place, user=user)
        eventually("PostgreSQL", lambda: self.psql(programs, "-c", "select 1") == 0)
        passwords = [word for role, password in PASSWORDS.items() for word in ("-v", f"{role}_password={password}")]
        assert self.psql(programs, *passwords, "-f", str(PROJECT / "deploy/postgresql.sql")) == 0

    def psql(self, programs: Path, *words: str) -> int:
        address = ("-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", "admin", "-d", "postgres")
        return subprocess.run([programs / "psql", *address, *words], capture_output=True, check=False, cwd="/").returncode

    def database(self, role: str, driver: str = "") -> str:
        return f"postgresql{driver}://{role}:{PASSWORDS[role]}@127.0.0.1:{self.ports['postgres']}/{role}"

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if missing := [name for name in ("dvc_s3", "psycopg2", "moto") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -c constraints.txt -e '.[dev]'")
    places = [Path(found).parent for found in [shutil.which("initdb")] if found] + sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not places:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if os.geteuid() == 0 and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with ExitStack() as stack:
        servers = Servers(tmp_path_factory.mktemp("servers"), stack)
        s3 = servers.address("s3")
        servers.start("s3", str(PROGRAMS / "moto_server"), "-H", "127.0.0.1", "-p", str(servers.ports["s3"]))
        servers.postgres(places[-1])
        # as deploy/servers.env.example has it
        prefect = {"PREFECT_API_DATABASE_CONNECTION_URL": servers.database("prefect", "+asyncpg"), "PREFECT_SERVER_API_HOST": "127.0.0.1"}
        servers.start("prefect", str(PROGRAMS / "prefect"), "server", "start", "--port", str(servers.ports["prefect"]), **prefect)
        mlflow = {"MLFLOW_BACKEND_STORE_URI": servers.database("mlflow", "+psycopg2"), "MLFLOW_ARTIFACTS_DESTINATION": "s3://rlhf/mlflow"}
        mlflow |= {"MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_HOST": "127.0.0.1"}
        servers.start("mlflow", str(PROGRAMS / "mlflow"), "server", "--port", str(servers.ports["mlflow"]), "--workers", "1", **mlflow)
        eventually("the S3 store", lambda: answers(f"{s3}/moto-api/"))
        store(servers).create_bucket(Bucket="rlhf")
        eventually("Prefect", lambda: answers(f"{servers.address('prefect')}/api/health"))
        eventually("MLflow", lambda: answers(f"{servers.address('mlflow')}/health"))
        yield servers


def store(servers: Servers) -> Any:
    import boto3

    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "geheim-s3", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=servers.address("s3"), **keys)


def workspace(root: Path, environment: Mapping[str, str], s3: str) -> None:
    """A committed workspace, whose stages hand on a model and an evaluation that were made beforehand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = root / "made"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(made)
    (made / "lineage.json").write_text(json.dumps({"fingerprint": "f00d"}), encoding="utf-8")
    (root / "evaluate.json").write_text(json.dumps(METRICS), encoding="utf-8")
    (root / "answers.jsonl").write_text("{}\n", encoding="utf-8")
    (root / ".gitignore").write_text("/mlruns\n/runs\n", encoding="utf-8")
    shutil.copy(PROJECT / "params.yaml", root)
    stages = {
        "ppo": {"cmd": "mkdir -p models && cp -r made models/ppo", "deps": ["made"], "outs": ["models/ppo"]},
        "evaluate": {
            "cmd": "mkdir -p metrics data; cp evaluate.json metrics/; cp answers.jsonl data/",
            "deps": ["models/ppo"],
            "outs": ["data/answers.jsonl"],
            "metrics": [{"metrics/evaluate.json": {"cache": False}}],
        },
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    call(root, environment, "git", "init", "--quiet")
    remote = (("add", "--default", "team", "s3://rlhf/dvc"), ("modify", "team", "endpointurl", s3))
    for words in (("init",), *(("remote", *word) for word in remote)):
        call(root, environment, "dvc", *words, "--quiet")
    call(root, environment, "git", "add", "--all")
    call(root, environment, "git", "-c", "user.name=user", "-c", "user.email=user@localhost", "commit", "--quiet", "--message", "first")


def call(root: Path, environment: Mapping[str, str], program: str, *words: str) -> str:
    place = PROGRAMS / program
    name = str(place) if place.exists() else program
    done = subprocess.run(
        [name, *words], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{program} {words}\n{done.stdout}"
    return done.stdout


def test_a_version_made_on_the_servers_is_verified_elsewhere(team: Servers, tmp_path: Path) -> None:
    import psycopg2

    # as deploy/workers.env.example has it
    environment = team.common | {
        "PREFECT_API_URL": f"{team.address('prefect')}/api",
        "MLFLOW_TRACKING_URI": team.address("mlflow"),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }
    root, clone = tmp_path / "root", tmp_path / "clone"
    root.mkdir()
    workspace(root, environment, team.address("s3"))
    said = call(root, environment, sys.executable, "-c", RETRAIN)
    outcome = json.loads(said.splitlines()[-1])
    assert (outcome["version"], outcome["champion"]) == (1, 1), said

    # it is where a team keeps it
    stored = [entry["Key"] for entry in store(team).list_objects_v2(Bucket="rlhf")["Contents"]]
    assert all(any(key.startswith(place) for key in stored) for place in ("dvc/files/", "dvc/runs/", "mlflow/")), stored
    with psycopg2.connect(team.database("mlflow")) as database, database.cursor() as cursor:
        cursor.execute("select name, version from model_versions")
        assert cursor.fetchall() == [("assistant", 1)]
    with psycopg2.connect(team.database("prefect")) as database, database.cursor() as cursor:
        cursor.execute("select state_type from flow_run")
        assert [state for (state,) in cursor.fetchall()] == ["COMPLETED"]

    # git and the servers are all that another machine needs
    call(tmp_path, environment, "git", "clone", "--quiet", str(root), str(clone))
    call(clone, environment, "git", "checkout", "--quiet", "assistant-v1")
    call(clone, environment, "dvc", "pull", "--quiet")
    assert (clone / "models/ppo/model.safetensors").read_bytes() == (root / "made/model.safetensors").read_bytes()
    verified = call(clone, environment, "rlhf", "verify", "1")
    assert "version 1 is verified" in verified
    assert "geheim" not in said + verified


def test_the_record_of_answers_lies_in_postgresql(team: Servers) -> None:
    with ExitStack() as stack:
        record = Database(team.database("rlhf"))
        stack.callback(record.close)
        recorder = Recorder(Kept(lambda: Database(team.database("rlhf"))))
        for reply in ("0", "1", "0"):
            recorder.put(row(reply, user="u", text="a\0b"))
        recorder.stop()
        with record.writing() as session:
            session.add(pair("one", first_answer=session.scalar(select(Answer.id).where(Answer.reply == "0"))))
            session.flush()
            session.add(rating("t1", session.scalars(select(Pair.id)).one()))
        with pytest.raises(IntegrityError), record.writing() as session:
            session.add(rating("t2", session.scalars(select(Pair.id)).one()))
        assert recorder.dropped == 0
        assert record.forget("u") == {"answers": 2, "opinions": 0, "pairs": 1, "ratings": 1}
