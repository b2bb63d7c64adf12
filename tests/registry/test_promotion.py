"""Which version is in service: by several processes at once, cut off half-way, and with files that were tampered with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from rlhf import config, registry
from rlhf.cli import main as cli
from rlhf.errors import UserError
from rlhf.registry import history, promotion, serving
from rlhf.registry.versions import connect

PROJECT = Path(__file__).parents[2]
PROCESSES, MOVES = 4, 50

# one of several that decide at the same time; it prints what it did, and how often it was told that another one was first
DECIDER = """
import random, sys
from pathlib import Path
from typing import Any
from rlhf import config, registry
from rlhf.errors import UserError
root, number, moves = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
params, generator = config.load(root / "params.yaml"), random.Random(number)
done = told = 0
while done < moves:
    known = registry.aliases(root, params)
    try:
        if generator.random() < 0.3:
            registry.rollback(known["champion"], root, params, by=f"process {number}", why="test")
        else:
            target = generator.choice([n for n in (1, 2, 3) if n != known["champion"]])
            registry.promote(registry.find(root, params, target), known["champion"], root, params, by=f"process {number}", why="test")
        done += 1
    except UserError as error:
        assert "by now" in error.what, error.what
        told += 1
print(told)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with three versions; their files are small, and none of them is a model."""
    tmp_path = tmp_path_factory.mktemp("workspace")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": {"cmd": "true", "outs": ["models/ppo"]}}}), encoding="utf-8")
    lock = {"ppo": {"cmd": "true", "outs": [{"path": "models/ppo", "md5": "0123.dir"}]}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}), encoding="utf-8")
    for folder in ("models/ppo", "metrics", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/ppo/config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "models/ppo/lineage.json").write_text(json.dumps({"fingerprint": "f00d"}), encoding="utf-8")
    (tmp_path / "data/answers.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "metrics/evaluate.json").write_text("{}", encoding="utf-8")
    for number in (1, 2, 3):
        (tmp_path / "models/ppo/model.safetensors").unlink(missing_ok=True)
        (tmp_path / "models/ppo/model.safetensors").write_bytes(bytes(number))
        assert registry.register(tmp_path, load(tmp_path)).number == number
    return tmp_path


@pytest.fixture
def root(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace with none of the versions in service, and none ever having been."""
    monkeypatch.chdir(workspace)
    client = connect(workspace, load(workspace))
    for alias in registry.aliases(workspace, load(workspace)):
        client.delete_registered_model_alias("assistant", alias)
    for key in client.get_registered_model("assistant").tags:
        client.delete_registered_model_tag("assistant", key)
    for version in registry.versions(workspace, load(workspace)):
        if "promoted" in version.tags:
            client.delete_model_version_tag("assistant", str(version.number), "promoted")
    return workspace


def load(root: Path) -> config.Params:
    return config.load(root / "params.yaml")


def put(root: Path, number: int, seen: int | None) -> registry.Move:
    return registry.promote(registry.find(root, load(root), number), seen, root, load(root), by="me", why="for a test")


def test_processes_that_decide_at_once_leave_one_champion_at_every_moment(root: Path) -> None:
    put(root, 1, None)
    put(root, 2, 1)
    shares = [MOVES // PROCESSES + (number < MOVES % PROCESSES) for number in range(PROCESSES)]
    deciders = [
        subprocess.Popen(
            [sys.executable, "-c", DECIDER, str(root), str(number), str(share)],
            stdout=subprocess.PIPE,
            stderr=(root / f"decider-{number}.txt").open("w"),
            text=True,
        )
        for number, share in enumerate(shares)
    ]
    client, seen = connect(root, load(root)), []
    while any(decider.poll() is None for decider in deciders):
        # raises where there is none
        time.sleep(0.05)
        seen.append(int(client.get_model_version_by_alias("assistant", "champion").version))
    said = [decider.communicate()[0] for decider in deciders]
    for number, decider in enumerate(deciders):
        assert decider.returncode == 0, (root / f"decider-{number}.txt").read_text(encoding="utf-8")
    told = sum(map(int, said))
    assert set(seen) == {1, 2, 3}
    assert told > 0

    moves = registry.moves(root, load(root))
    assert [move.number for move in moves] == list(range(1, MOVES + 3))
    # nobody replaced a champion that he had not seen
    assert [move.replaces for move in moves] == [None, *(move.version for move in moves[:-1])]
    for before, move in pairwise(moves):
        assert move.previous == before.replaces
        assert move.action == "promoted" or move.version == move.previous
    assert registry.aliases(root, load(root)) == {"champion": moves[-1].version, "previous": moves[-1].replaces}


def test_whoever_comes_second_is_told_by_whom_and_since_when(root: Path) -> None:
    put(root, 1, None)
    first = put(root, 2, 1)
    with pytest.raises(UserError) as caught:
        put(root, 3, 1)
    assert caught.value.what == f"assistant: version 2 is champion by now, promoted at {first.at} by me; nothing was changed"
    assert registry.aliases(root, load(root)) == {"champion": 2, "previous": 1}
    with pytest.raises(UserError, match="version 2 of assistant is champion already"):
        put(root, 2, 2)


@pytest.mark.parametrize("reached", [1, 2, 3, 4, 5])
def test_a_move_that_is_cut_off_is_undone_or_finished_by_the_next(root: Path, reached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, 1, None)
    put(root, 2, 1)
    calls = 0

    def dying(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: str) -> None:
            nonlocal calls
            calls += 1
            if calls > reached:
                raise KeyboardInterrupt
            method(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("set_registered_model_tag", "set_registered_model_alias", "set_model_version_tag"):
            method = getattr(MlflowClient, name)
            patch.setattr(MlflowClient, name, lambda self, *words, method=method: dying(lambda *rest: method(self, *rest))(*words))
        if reached < 5:
            with pytest.raises(KeyboardInterrupt):
                put(root, 3, 2)
        else:
            put(root, 3, 2)
    # entry, previous, champion, tag of the version, entry again
    champion = 2 if reached < 3 else 3
    if reached == 4:  # the flow that was cut off, once more
        registry.carry_out(registry.Verdict(registry.find(root, load(root), 3), [], 3), root, load(root), by="flow", why="")
        assert registry.moves(root, load(root))[2].state == "done"
    assert registry.aliases(root, load(root))["champion"] == champion
    move = registry.rollback(champion, root, load(root), by="me", why="to see where it goes")
    assert move.version == (1 if reached < 3 else 2)
    assert registry.moves(root, load(root))[2].state == ("cut off" if reached < 3 else "done")
    # one that was in service does not come back by itself
    assert ("promoted" in registry.find(root, load(root), 3).tags) == (reached >= 3)


def test_a_rollback_is_refused_where_the_champion_went_and_came_back_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, seen in ((1, None), (2, 1), (1, 2)):
        put(root, number, seen)
    look = promotion.model_folder

    def meanwhile(*arguments: Any) -> Path:
        monkeypatch.setattr(promotion, "model_folder", look)
        put(root, 3, 1)
        put(root, 1, 3)
        return look(*arguments)

    monkeypatch.setattr(promotion, "model_folder", meanwhile)
    with pytest.raises(UserError, match="version 3 was in service before by now, not version 2; nothing was changed"):
        registry.rollback(1, root, load(root), by="me", why="for a test")
    assert registry.aliases(root, load(root)) == {"champion": 1, "previous": 3}


def test_a_changed_byte_is_refused_and_named(root: Path, tmp_path: Path) -> None:
    put(root, 1, None)
    folder = registry.model_folder("models:/assistant@champion", root, load(root))
    weights = folder / "model.safetensors"
    assert {
        path.stat().st_mode & 0o222 for path in folder.parent.rglob("*") if path.is_file() and path.name != "registered_model_meta"
    } == {0}

    backup = shutil.copytree(folder.parent, tmp_path / "version")
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(b"\1" + content[1:])
    changed = f"{weights} was changed after it was registered"
    with pytest.raises(UserError) as caught:
        registry.model_folder("models:/assistant/1", root, load(root))
    assert caught.value.what == f"models:/assistant/1 (version 1) is refused: {changed}"
    with pytest.raises(ValueError, match=r"this version is refused: .*safetensors was changed"):
        mlflow.pyfunc.load_model("models:/assistant@champion")
    put(root, 2, 1)
    with pytest.raises(UserError, match="was changed"):
        registry.rollback(2, root, load(root), by="me", why="back to a damaged one")
    assert registry.aliases(root, load(root))["champion"] == 2

    # to write the list anew does not help: the registry knows its hash
    listed = folder.parent / serving.LIST
    listed.chmod(0o644)
    listed.write_text(json.dumps(serving.hashes(folder.parent)), encoding="utf-8")
    with pytest.raises(UserError, match=r"files\.json is not the one that was registered"):
        registry.model_folder("models:/assistant/1", root, load(root))
    weights.unlink()
    (folder / "more.py").touch()
    assert [what.rpartition("/")[2] for what in serving.differences(folder.parent)] == [
        "model.safetensors is missing after it was registered",
        "more.py was added after it was registered",
    ]
    shutil.rmtree(folder.parent)
    shutil.copytree(backup, folder.parent)
    assert registry.model_folder("models:/assistant/1", root, load(root)) == folder


def test_commands_tell_who_when_and_why(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def rlhf(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlhf", *words])
        try:
            cli.main()
        except SystemExit as leave:
            if leave.code:
                return capsys.readouterr().err
        return capsys.readouterr().out

    assert "no version was in service before this one" in rlhf("rollback")
    rlhf("promote", "1")
    said = rlhf("promote", "2", "--why", "answers in full sentences")
    assert said.startswith(f"version 2 is champion, previous is version 1; promoted by {history.person()} at 20")
    assert said.splitlines()[0].endswith(": answers in full sentences [gates not checked]")
    assert rlhf("rollback", "--why", "too slow").startswith("version 1 is champion, previous is version 2; rolled back by ")
    shown = rlhf("models").splitlines()
    assert [line.split()[:2] for line in shown[1:4]] == [["3", shown[1].split()[1]], ["2", "previous"], ["1", "champion"]]
    assert shown[4].endswith("rolled back: version 1 in place of version 2 — too slow")
    assert len(shown) == 7
    assert "'next' is neither the number of a version of assistant nor an alias" in rlhf("promote", "next")
    assert "version 9 of assistant" in rlhf("promote", "9")
    assert "at most 2000" in rlhf("promote", "3", "--why", "x" * 2001)


def test_a_verdict_on_another_champion_is_not_carried_out(root: Path) -> None:
    put(root, 1, None)
    verdict = registry.Verdict(registry.find(root, load(root), 3), [], 1)
    put(root, 2, 1)
    with pytest.raises(UserError, match="version 2 is champion by now"):
        registry.carry_out(verdict, root, load(root), by="flow", why="all gates passed")
    declined = registry.carry_out(replace(verdict, champion=2), root, load(root), by="flow", why="", declined="nobody approved")
    assert declined.lines == ["version 3 is candidate, champion is version 2; nobody approved"]
    assert registry.aliases(root, load(root)) == {"champion": 2, "previous": 1, "candidate": 3}
