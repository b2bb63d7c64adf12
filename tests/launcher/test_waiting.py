"""How a stage's threads wait for each other: shortly, unless the user says otherwise, who is told where that slows the stage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf import config
from rlhf.launcher import command

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, False),
        ({"OMP_WAIT_POLICY": "passive"}, False),
        ({"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "500"}, False),
        ({"GOMP_SPINCOUNT": "500"}, False),
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"GOMP_SPINCOUNT": "INFINITY"}, True),
        ({"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "infinite"}, True),
    ],
)
def test_the_users_word_stands_and_its_price_is_told(
    given: dict[str, str], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in command.WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    params = config.load(PROJECT / "params.yaml")
    layout = params.launch.jobs.sft.model_copy(update={"processes": 2, "threads": len(os.sched_getaffinity(0))})
    jobs = params.launch.jobs.model_copy(update={"sft": layout})
    params = params.model_copy(update={"launch": params.launch.model_copy(update={"jobs": jobs})})
    made = command.environment("sft", params, tmp_path, tmp_path, "cpu")
    assert {name: made[name] for name in command.WAITING if name in made} == (given or command.OPENMP)
    said = capsys.readouterr().out
    assert ("threads wait awake on" in said) is told
    assert all(f"{name}={value}" in said for name, value in given.items()) or not told
