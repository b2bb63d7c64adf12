"""Faults of bench/faults/run.py that come to runs of `rlhf serve`: its parts are killed, its runs cancelled, and new rows come in."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from functools import partial
from typing import Any

from bench.faults.cases import Case, send
from bench.faults.disturbed import Bench, Inject, Row, Run, disturbed
from bench.faults.workspace import LONGEST_STOP, Workspace, free_port, until
from rlhf.workspace.served import deployment as nightly

PARTS = ("worker", "prefect", "mlflow")
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


# a tiny model on a file of pairs
PAIRS = [
    *("data.sources.0.name=pairs", "data.sources.0.format=pairs", "data.sources.0.columns.prompt=prompt"),
    *("base.vocab_size=400", "base.hidden_size=64", "base.intermediate_size=64", "base.layers=2", "base.epochs=1"),
    *("sft.epochs=1", "reward.epochs=1", "ppo.steps=4", "ppo.rollout_batch_size=16", "ppo.mini_batch_size=8", "ppo.max_answer_tokens=12"),
    *("evaluate.prompts=20", "evaluate.pairs=20", "evaluate.texts=8", "evaluate.bootstrap_samples=100", "evaluate.shown=2"),
    *(f"launch.jobs.{stage}.threads=1" for stage in ("base", "sft", "reward", "ppo", "evaluate")),
    "launch.accelerator=cpu",
]


class Served(Run):
    """A run of deployment `nightly`, by the worker of `rlhf serve`."""

    def __init__(self, place: Workspace) -> None:
        self._ports = free_port(), free_port()
        self._api = f"http://127.0.0.1:{self._ports[0]}/api"
        self._id = ""
        super().__init__(place)

    def start(self) -> None:
        if not self.place.find("serve"):
            self.serve()
        self.starts += 1
        # under load the server leaves a request without an answer; the key makes one run of however many
        wanted = {"state": {"type": "SCHEDULED"}, "idempotency_key": f"start {self.starts}"}
        made: dict[str, Any] = {}

        def create() -> bool:
            if deployment := self.ask(f"deployments/name/retrain/{nightly(self.place.root)}"):
                made.update(self.ask(f"deployments/{deployment['id']}/create_flow_run", wanted) or {})
            return bool(made)

        until(create, "Prefect does not make a run")
        self._id = made["id"]

    def serve(self) -> None:
        before = self.place.said().count("worker    of pool")
        prefect, mlflow = self._ports
        self.process = self.place.start("rlhf", "serve", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow))
        until(lambda: self.place.said().count("worker    of pool") > before, "`rlhf serve` does not start")

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's server; None where it does not answer."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self._api}/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except OSError:
            return None

    def state(self) -> str:
        found = self.ask(f"flow_runs/{self._id}")
        return found["state"]["type"] if found else "UNKNOWN"

    def ended(self) -> bool:
        time.sleep(0.2)
        return self.process.poll() is not None or self.state() in OVER

    def cancel(self) -> None:
        self.ask(f"flow_runs/{self._id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False})

    def gone(self) -> None:
        # the server and the worker stay
        kinds = ("rank", "deepspeed", "launcher", "dvc", "flow")
        until(lambda: not any(map(self.place.find, kinds)), f"the run's processes are left after {LONGEST_STOP} s", LONGEST_STOP)

    def finish(self) -> list[str]:
        until(self.ended, "the run does not end")
        return [] if (state := self.state()) == "COMPLETED" else [f"the last run ended as {state}"]

    def close(self) -> list[str]:
        self.gone()
        self.process.send_signal(signal.SIGTERM)
        until(lambda: self.process.poll() is not None, "`rlhf serve` does not stop", LONGEST_STOP)
        self.place.gone()
        return [] if self.process.returncode == 0 else [f"`rlhf serve` ended with exit code {self.process.returncode}"]


def served(bench: Bench, name: str, inject: Inject, *, stops: float) -> list[Row]:
    place = bench.fresh(name)
    place.environment.pop("PREFECT_API_URL")
    return disturbed(bench, name, inject, stops=stops, run=Served(place))


def cancel(_place: Workspace, _stage: str, run: Run) -> None:
    assert isinstance(run, Served)
    run.cancel()


def ingest(bench: Bench, name: str) -> list[Row]:
    """500 new pairs come in by `rlhf ingest`; the event starts a run, which decides on a second version, without a hand on it."""
    place, began = bench.fresh(name), time.monotonic()
    place.environment.pop("PREFECT_API_URL")
    for number, start in enumerate((0, 500)):
        rows = [_pair(row) for row in range(start, start + 500)]
        (place.folder / f"pairs-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place.run("rlhf", "use", "hh", *PAIRS, f"data.sources.0.path={place.folder / 'pairs-0.jsonl'}")
    run = Served(place)
    wrong = run.finish()
    api = place.environment | {"PREFECT_API_URL": run._api}
    place.environment.update(api)
    came = time.monotonic()
    place.run("rlhf", "ingest", str(place.folder / "pairs-1.jsonl"))
    place.environment.pop("PREFECT_API_URL")

    def runs() -> list[Any]:
        return run.ask("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 100}) or []

    def said() -> list[str]:
        lines = run.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run._id]}}, "sort": "TIMESTAMP_DESC"}) or []
        return [found for line in lines for found in re.findall(r"version 2 is (champion|candidate)", line["message"])]

    until(lambda: any(one["created_by"] and one["created_by"]["type"] == "AUTOMATION" for one in runs()), "the event starts no run")
    automatic = next(one for one in runs() if one["created_by"] and one["created_by"]["type"] == "AUTOMATION")
    started = time.monotonic() - came
    run._id = automatic["id"]
    wrong += run.finish()
    until(said, "nothing was decided on version 2", LONGEST_STOP)  # the last lines come to Prefect after the run's end
    decision = said()[-1]
    nightly = any(one["auto_scheduled"] for one in runs())
    wrong += run.close()
    wrong += [] if nightly else ["no run is scheduled for the night"]
    note = f"run after {started:.0f} s, version 2 is {decision}"
    return [Row(name, "all", not wrong, note, time.monotonic() - began, "; ".join(wrong))]


def _pair(number: int) -> dict[str, str]:
    one, other = number % 40, number // 40
    return {"prompt": f"What is {one} plus {other}?", "chosen": f"It is {one + other}.", "rejected": f"It is {one + other + 7}, or so."}


CASES: dict[str, Case] = {
    **{f"SIGKILL {part} of serve": partial(served, inject=send(part, signal.SIGKILL), stops=0) for part in PARTS},
    "SIGTERM worker": partial(served, inject=send("worker", signal.SIGTERM), stops=LONGEST_STOP),
    "cancelled in Prefect": partial(served, inject=cancel, stops=LONGEST_STOP),
    "ingest of 500 rows": ingest,
}
