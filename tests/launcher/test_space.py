"""Room on the disk: the estimate, the refusal before a stage starts, and a disk that fills up all the same."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from rlhf import config
from rlhf.config.training import BuiltBase
from rlhf.data import files
from rlhf.errors import UserError, full_disk
from rlhf.launcher import space
from rlhf.launcher.console import Console
from rlhf.launcher.launch import launch
from tests.stage_runs import make_workspace, run, set_params, tiny_params

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PROJECT = Path(__file__).parents[2]


def params(**changes: Any) -> config.Params:
    raw = yaml.safe_load((PROJECT / "presets/sandbox.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        holder, (*parents, last) = raw, key.split("__")
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    return config.validate(raw, "params.yaml")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_estimate_by_hand(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    count = sum(parameter.numel() for parameter in llama.parameters())
    sizes = {"vocab_size": llama.config.vocab_size, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    built = params(base=params().base.model_dump() | sizes)
    assert isinstance(built.base, BuiltBase)
    # keep 2, the best one, and the one being written; weights and two moments in fp32
    assert space.estimate(tmp_path, "base", built) == space.Estimate(4, 12 * count, 4 * count, 0)

    for name in ("base", "sft", "reward"):
        llama.save_pretrained(tmp_path / "models" / name)
    assert space.estimate(tmp_path, "sft", params()) == space.Estimate(4, 12 * count, 4 * count, 0)
    # bf16 weights; their fp32 copy and two moments
    half = params(launch__precision="bf16", launch__checkpoints__keep=1)
    assert space.estimate(tmp_path, "dpo", half) == space.Estimate(3, 14 * count, 2 * count, 0)
    adapters = {"rank": 4, "alpha": 8, "targets": "all-linear", "learning_rate": 1e-3}
    assert space.estimate(tmp_path, "reward", params(reward__lora=adapters)).checkpoints == 4 * count
    # actor and critic, the actor's average besides; a token is four bytes, and each answer may have an end besides
    rollouts = params().ppo.steps * 64 * (128 + 48 + 1) * 4
    ppo = space.estimate(tmp_path, "ppo", params(ppo__ema_decay=0.99))
    assert ppo == space.Estimate(4, (12 + 12 + 4) * count, 4 * count, rollouts)
    # the gold score is no model
    assert space.estimate(tmp_path, "evaluate", params()).total == 0

    (tmp_path / "models/base/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"models/base/model\.safetensors: damaged safetensors file"):
        space.estimate(tmp_path, "sft", params())


def test_raw_files_are_counted_for_prepare(tmp_path: Path) -> None:
    raw = tiny_params()
    (tmp_path / "data/raw").mkdir(parents=True)
    for name, size in (("pairs.jsonl", 1000), ("pairs.jsonl.gz", 10_000), ("pairs.csv.xz", 10_000)):
        (tmp_path / "data/raw" / name).write_bytes(b"0" * 1000)
        raw["data"]["sources"][0] |= {"path": f"data/raw/{name}", "weight": 1}
        assert space.estimate(tmp_path, "prepare", config.validate(raw, "")).total == 2 * size
    raw["data"]["sources"][0] |= {"path": "data/raw", "weight": 2.5}
    assert space.estimate(tmp_path, "prepare", config.validate(raw, "")).total == 3.5 * 21_000


def test_every_packing_of_a_data_file_counts_as_compressed() -> None:
    assert set(files.PACKED) < set(space.COMPRESSED)


def test_a_stage_without_room_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params(operations__spare_gib=1e9).model_dump(mode="json")), encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text("stages: {prepare: {outs: [data/prepared]}}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        launch("prepare", tmp_path)
    assert "1000000000.0 GiB are to stay free (operations.spare_gib)" in caught.value.what
    assert "rlhf gc --dry-run" in caught.value.remedy
    assert not (tmp_path / "mlflow.db").exists()


def test_what_a_stage_has_on_the_disk_already_is_not_needed_again(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "models/base")
    needed = space.estimate(tmp_path, "sft", params()).total
    folder = tmp_path / "runs/sft/0123"
    folder.mkdir(parents=True)
    spare = (shutil.disk_usage(folder).free - needed / 2) / space.GIB
    tight = params(operations__spare_gib=spare)
    with pytest.raises(UserError, match="4 checkpoints of"):
        space.check(tmp_path, "sft", tight, folder)
    (folder / "checkpoint").write_bytes(b"0" * needed)
    space.check(tmp_path, "sft", params(operations__spare_gib=spare - 2 * needed / space.GIB), folder)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    raw = tiny_params()
    raw["sft"] |= {"epochs": 2.0}
    make_workspace(tmp_path / "calm", raw, 240)
    run(tmp_path / "calm", "base")
    root = small_disk / "root"
    shutil.copytree(tmp_path / "calm", root)
    run(tmp_path / "calm", "sft")

    said = run(root, "sft:filled", code=1)
    assert f"the disk of {root / 'runs/sft/checkpoints/step-4'} is full" in said
    assert [folder.name for folder in (root / "runs/sft/checkpoints").iterdir()] == ["step-2"]
    (root / "filler").unlink()
    assert "goes on from step 2" in run(root, "sft")
    weights = Path("models/sft/model.safetensors")
    assert (root / weights).read_bytes() == (tmp_path / "calm" / weights).read_bytes()


STAGE = """
import os
from rlhf.job import run

def main(job):
    if not (job.root / "room").exists():
        job.output("data/prepared/rows.txt").write_bytes(b"0" * (64 << 20))
    job.output("data/prepared/rows.txt").write_text("rows")

run("prepare", main)
"""


def test_a_disk_that_fills_up_is_told_and_leaves_nothing_behind(
    small_disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = small_disk
    (root / "toys").mkdir()
    (root / "toys/prepare.py").write_text(STAGE, encoding="utf-8")
    set_params(root, params(operations__spare_gib=0).model_dump(mode="json"))
    (root / "dvc.yaml").write_text("stages: {prepare: {outs: [data/prepared]}}", encoding="utf-8")
    assert launch("prepare", root, "toys") == 1
    said = capfd.readouterr()
    assert "error: the disk of" in said.out
    assert "remedy: make room" in said.out
    assert shutil.disk_usage(root).used < 1 << 20
    (root / "room").touch()
    assert launch("prepare", root, "toys") == 0
    assert (root / "data/prepared/rows.txt").read_text(encoding="utf-8") == "rows"


def test_a_log_that_cannot_be_written_does_not_hold_up_the_stage(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Console("sft", small_disk / "log.txt") as console:
        (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free))
        for number in range(3):
            console.show(f"line {number}")
    said = capfd.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert said.err.count("its lines are shown here only") == 1


def test_a_full_disk_is_known_by_what_libraries_say(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")):
        assert full_disk(error, tmp_path)
    assert full_disk(ValueError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert full_disk(RuntimeError("PytorchStreamWriter failed writing file data/0"), tmp_path) is None
    assert full_disk(OSError(errno.EACCES, "Permission denied"), tmp_path) is None
