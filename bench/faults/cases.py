"""Faults of bench/faults/run.py that come to `rlhf run`: signals, servers that are away, full disks, damaged files, people at work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

from bench.faults.disturbed import Bench, Inject, Row, Run, disturbed
from bench.faults.workspace import DISTURBED, PATIENCE, Workspace, await_middle, until

Case = Callable[[Bench, str], list[Row]]
READ_BY = {"sft": "base", "ppo": "sft"}  # a model that each stage reads


# -------------------------------------------------------------------------------------------------------------- signals


def send(victim: str, number: signal.Signals) -> Inject:
    return lambda place, _stage, _run: place.send(victim, number)


def ctrl_c(_place: Workspace, _stage: str, run: Run) -> None:
    # a terminal sends it to all of its foreground
    os.killpg(run.process.pid, signal.SIGINT)


def power_cuts(bench: Bench, name: str) -> list[Row]:
    """SIGKILL of everything at random moments of a whole flow, from the raw data on."""
    place, chance, began = bench.fresh(name), random.Random(bench.seed), time.monotonic()
    place.environment.pop("PREFECT_API_URL")  # its own server is killed as well
    run, made, rounds = None, 0, 0
    wrong: list[str] = []
    while made < bench.cuts or run is None or not run.ended():
        if run is None or run.ended():
            if run is not None:  # it came to its end before the cuts were made: once more from the beginning
                wrong += run.finish() + run.close() + place.problems(bench.expected)
            _from_the_beginning(place)
            run, rounds = Run(place), rounds + 1
        deadline = time.monotonic() + chance.uniform(1, 60)
        while made < bench.cuts and time.monotonic() < deadline and not run.ended():
            time.sleep(0.05)
        if made < bench.cuts and not run.ended():
            place.kill_all()
            made += 1
            run.start()
        elif made == bench.cuts:
            wrong += run.finish()
    wrong += run.close() + place.problems(bench.expected)
    lost = f"{made} cuts, {rounds} {'run' if rounds == 1 else 'runs'} to the end"
    return [Row(name, "all", not wrong, lost, time.monotonic() - began, "; ".join(wrong))]


def _from_the_beginning(place: Workspace) -> None:
    for path in ("runs", "models", "mlruns", "data/prepared", "metrics", "plots", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(place.root / path, ignore_errors=True)
    (place.root / "dvc.lock").unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- servers


def server_away(bench: Bench, name: str, kind: str, seconds: float) -> list[Row]:
    """The server is killed in the middle of each stage, in a run of its own, and comes back some seconds later."""
    return [row for stage in bench.stages for row in _away_in(replace(bench, stages=[stage]), name, kind, seconds)]


def _away_in(bench: Bench, name: str, kind: str, seconds: float) -> list[Row]:
    place = bench.fresh(f"{name}, {bench.stages[0]}")
    server = bench.server(kind, place)
    server.start()
    back = threading.Timer(seconds, server.start)

    def away(_place: Workspace, _stage: str, _run: Run) -> None:
        server.kill()
        back.start()

    variable = {"mlflow": ("MLFLOW_TRACKING_URI", server.address), "prefect": ("PREFECT_API_URL", f"{server.address}/api")}[kind]
    place.environment[variable[0]] = variable[1]
    run = Run(place)
    try:
        return disturbed(bench, name, away, mend=lambda *_: back.join(), stops=0, run=run, uri=server.address if kind == "mlflow" else None)
    finally:
        if back.is_alive():
            back.join()


def mlflow_away_for_good(bench: Bench, name: str) -> list[Row]:
    """MLflow goes in the middle of sft and does not come back before the run has ended: all is trained, and the run says what it lacks."""
    place, began = bench.fresh(name), time.monotonic()
    server = bench.server("mlflow", place)
    server.start()
    place.environment["MLFLOW_TRACKING_URI"] = server.address
    run = Run(place)
    await_middle(place, "sft", run.ended)
    server.kill()
    until(run.ended, "the run does not end")
    wrong = [] if run.process.returncode else ["a run without a registry ended with exit code 0"]
    wrong += [] if "what is trained is not trained again" in place.said() else ["the run does not say that MLflow is away"]
    trained = [place.lines(stage) for stage in DISTURBED]
    server.start()
    run.start()
    wrong += run.finish() + run.close() + place.problems(bench.expected, server.address)
    wrong += [] if [place.lines(stage) for stage in DISTURBED] == trained else ["the second run trained again"]
    return [Row(name, "sft, ppo", not wrong, "0 steps", time.monotonic() - began, "; ".join(wrong))]


# ---------------------------------------------------------------------------------------------------------------- disks


def disk_full(bench: Bench, name: str, path: str, room: int) -> list[Row]:
    """A disk of its own for one folder is filled up but for `room` bytes; somebody makes room again when the run has failed."""
    place = bench.fresh(name)
    if os.geteuid():
        return [Row(name, "", True, "", None, "needs root, to mount a small disk", skipped=True)]
    bench.mount(place.root / path)
    ballast = place.root / path / "ballast"

    def fill(_place: Workspace, _stage: str, _run: Run) -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        if room:
            os.truncate(ballast, ballast.stat().st_size - room)

    return disturbed(bench, name, fill, mend=lambda _place, _stage, _run: ballast.unlink(), stops=PATIENCE, run=Run(place))


# ---------------------------------------------------------------------------------------------------------------- files


def flip(path: Path, *, through: bool = False) -> None:
    """Change a byte in the middle of a file; `through` a link also in what it is a link to."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if through:
        mode = path.stat().st_mode
        path.chmod(0o644)
        path.write_bytes(content)
        path.chmod(mode)
    else:
        path.unlink()
        path.write_bytes(content)


def corrupt_checkpoint(place: Workspace, stage: str, _run: Run) -> None:
    place.kill_all()
    newest = max(
        place.root.glob(f"runs/{stage}/*/checkpoints/step-*/COMPLETE-0"), key=lambda path: int(path.parent.name.split("-")[1])
    ).parent
    flip(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


def corrupt_model(place: Workspace, stage: str, _run: Run) -> None:
    place.kill_all()
    flip(place.root / "models" / READ_BY[stage] / "model.safetensors")


def corrupt_cache(place: Workspace, stage: str, _run: Run) -> None:
    """The file in the workspace and the one in the cache are the same, and both change."""
    place.kill_all()
    flip(place.root / "models" / READ_BY[stage] / "model.safetensors", through=True)


def as_told(place: Workspace, stage: str, _run: Run) -> None:
    """The remedy that the error of a damaged model names."""
    folder = READ_BY[stage]
    if f"models/{folder}/model.safetensors: not as stage {folder} wrote it" in place.said():
        subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], cwd=place.root, check=True)
        shutil.rmtree(place.root / "models" / folder)
        place.repeated.append(folder)


# --------------------------------------------------------------------------------------------------------------- people


def edited(bench: Bench, name: str, path: str, edit: Callable[[str], str]) -> list[Row]:
    """Somebody edits a file that the stage has read, and sets it back once the run has refused that."""
    place = bench.fresh(name)

    def aside(stage: str) -> tuple[Path, Path]:
        file = place.root / path.format(stage=stage)
        return file, file.with_name(f"{file.name}.aside")

    def change(_place: Workspace, stage: str, _run: Run) -> None:
        file, before = aside(stage)
        file.rename(before)
        file.write_text(edit(before.read_text(encoding="utf-8")), encoding="utf-8")

    def set_back(_place: Workspace, stage: str, _run: Run) -> None:
        file, before = aside(stage)
        before.rename(file)

    return disturbed(bench, name, change, mend=set_back, stops=PATIENCE, run=Run(place))


def other_params(text: str) -> str:
    """As text of params.yaml: checkpoints of sft and ppo more rarely."""
    params = yaml.safe_load(text)
    for stage in DISTURBED:
        params[stage]["checkpoint_every"] += 1
    return yaml.safe_dump(params)


def second_flow(place: Workspace, _stage: str, _run: Run) -> None:
    beside(place, "rlhf", "run", says="another retraining flow is running in this workspace")


def repro_beside(place: Workspace, _stage: str, _run: Run) -> None:
    beside(place, "dvc", "repro", says="is busy")


def beside(place: Workspace, *words: str, says: str) -> None:
    done = subprocess.run(words, cwd=place.root, env=place.environment, capture_output=True, text=True, check=False)
    until(
        lambda: done.returncode and says in done.stdout + done.stderr, f"`{' '.join(words)}` said {(done.stdout + done.stderr)[-300:]}", 1
    )


CASES: dict[str, Case] = {
    **{f"SIGKILL {who}": partial(disturbed, inject=send(who, signal.SIGKILL)) for who in ("rank", "deepspeed", "launcher", "dvc", "flow")},
    **{f"SIGTERM {who}": partial(disturbed, inject=send(who, signal.SIGTERM)) for who in ("launcher", "dvc", "flow")},
    "Ctrl-C": partial(disturbed, inject=ctrl_c),
    "MLflow away for 60 s": partial(server_away, kind="mlflow", seconds=60),
    "MLflow away for good": mlflow_away_for_good,
    "Prefect away for 20 s": partial(server_away, kind="prefect", seconds=20),
    "disk full, checkpoint": partial(disk_full, path="runs", room=1 << 17),
    "disk full, output": partial(disk_full, path="models", room=0),
    "disk full, dvc commit": partial(disk_full, path=".dvc/cache", room=0),
    "corrupt checkpoint": partial(disturbed, inject=corrupt_checkpoint),
    "corrupt safetensors": partial(disturbed, inject=corrupt_model),
    "corrupt cache object": partial(disturbed, inject=corrupt_cache, mend=as_told),
    "two flows at once": partial(disturbed, inject=second_flow, stops=0),
    "dvc repro beside": partial(disturbed, inject=repro_beside, stops=0),
    "params edited": partial(edited, path="params.yaml", edit=other_params),
    "data edited": partial(edited, path="data/prepared/{stage}.jsonl", edit=lambda text: text + "\n"),
    "power cuts": power_cuts,
}
