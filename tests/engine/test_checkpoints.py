"""Checkpoints: which are kept, which are not whole, what SIGTERM does, and going on with another number of ranks."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.stage_runs import free_port, make_workspace, run, set_params, start, table, tiny_params


def params(**launch: Any) -> dict[str, Any]:
    raw = tiny_params()
    raw["sft"] |= {"epochs": 2.0, "checkpoint_every": 2}
    raw["launch"] |= launch
    return raw


def sharded(stage: int) -> dict[str, Any]:
    engine = {"zero_stage": stage, "offload_optimizer": False, "offload_parameters": False}
    return params()["launch"]["engines"] | {"policy": engine, "critic": engine}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the outputs of prepare and base; stage sft has ten steps."""
    root = tmp_path_factory.mktemp("base") / "root"
    root.mkdir()
    make_workspace(root, params(), 240)
    run(root, "base")
    return root


def copy(base: Path, target: Path, raw: dict[str, Any]) -> Path:
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("runs"))
    set_params(target, raw)
    return target


def checkpoints(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("runs/sft/checkpoints/*/COMPLETE-0"))


def test_the_newest_and_the_best_are_kept_and_one_that_is_not_whole_is_passed_over(base: Path, tmp_path: Path) -> None:
    root = copy(base, tmp_path / "root", params(checkpoints={"keep": 2}))
    run(root, "sft")
    rows = table(root / "plots/sft.csv")
    best = min((2, 4, 6, 8), key=lambda step: float(rows[step - 1]["loss"]))
    assert set(checkpoints(root)) == {"step-6", "step-8", f"step-{best}"}
    weights = (root / "models/sft/model.safetensors").read_bytes()
    # one bit of the newest changes on the disk; a newer one was never finished
    broken = root / "runs/sft/checkpoints/step-8/model/mp_rank_00_model_states.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    (root / "runs/sft/checkpoints/step-9").mkdir()
    shutil.rmtree(root / "models/sft")
    said = run(root, "sft")
    assert "checkpoint step-9 is not whole (cut off while it was written): it is removed, and the one before it is used" in said
    assert "checkpoint step-8 is not whole (model/mp_rank_00_model_states.pt has changed)" in said
    assert "goes on from step 6\n" in said
    assert (root / "models/sft/model.safetensors").read_bytes() == weights


def test_sigterm_to_one_rank_ends_all_with_a_checkpoint(base: Path, tmp_path: Path) -> None:
    raw = params()
    raw["sft"] |= {"epochs": 200.0, "checkpoint_every": 100_000}
    root, port = copy(base, tmp_path / "root", raw), free_port()
    ranks = [start(root, "sft", rank=rank, ranks=2, port=port) for rank in range(2)]
    log = root / "runs/sft/metrics.jsonl"
    while not log.exists():
        assert all(rank.returncode is None for rank in ranks)
        time.sleep(0.05)
    ranks[1].process.terminate()
    said = [rank.end() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGTERM] * 2, "\n".join(said)
    done = json.loads(log.read_text().splitlines()[-1])["step"]
    assert f"sft: stopped after step {done}\n" in said[0]
    assert checkpoints(root) == [f"step-{done}"]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_a_stage_goes_on_with_another_number_of_ranks(base: Path, tmp_path: Path, ranks: tuple[int, int]) -> None:
    stages = [f"{stage}/sft" for stage in (0, 1, 3)]
    roots = [copy(base, tmp_path / str(stage), params(engines=sharded(stage))) for stage in (0, 1, 3)]
    run(tmp_path, *stages, ranks=ranks[0])
    found = [(table(root / "plots/sft.csv"), load_file(root / "models/sft/model.safetensors")) for root in roots]
    for root in roots:
        shutil.rmtree(root / "runs/sft/checkpoints/step-8")
    assert run(tmp_path, *stages, ranks=ranks[1]).count(f"goes on from step 6, on {ranks[1]} ranks instead of {ranks[0]}") == 3
    for root, (rows, weights) in zip(roots, found, strict=True):
        for expected, row in zip(rows, table(root / "plots/sft.csv"), strict=True):
            assert float(row["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
            assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
        # Adam's moments and the schedule went along, else the last four steps would have led elsewhere
        for name, tensor in load_file(root / "models/sft/model.safetensors").items():
            assert (tensor - weights[name]).abs().max() < 1e-6
