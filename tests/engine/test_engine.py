"""Engines: the same losses however the ranks share a model out, and fp16 steps that are left out together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rlhf.config.operations import Engine, FrozenEngine
from rlhf.models.policy import DTYPES
from tests.stage_runs import REPOSITORY, free_port, make_workspace, run, set_params, table, tiny_params


def layout(stage: int, *, offload: bool = False) -> dict[str, Any]:
    trained = {"zero_stage": stage, "offload_optimizer": offload, "offload_parameters": offload and stage == 3}
    frozen = {"zero_stage": 3 if stage == 3 else 0, "offload_parameters": offload and stage == 3}
    return {"engines": {"policy": trained, "critic": trained, "reference": frozen, "reward": frozen}}


# bench/learning/zero.py compares all of them, for longer
LAYOUTS = {
    "0": layout(0),
    "1": layout(1),
    "2-offloaded": layout(2, offload=True),
    "3-offloaded": layout(3, offload=True) | {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the outputs of prepare and base."""
    root = tmp_path_factory.mktemp("base") / "root"
    root.mkdir()
    make_workspace(root, tiny_params(), 240)
    run(root, "base")
    return root


def variant(base: Path, target: Path, launch: dict[str, Any]) -> None:
    raw = tiny_params()
    raw["ppo"] |= {"steps": 3, "ema_decay": 0.9}
    raw["launch"] |= launch
    for job in raw["launch"]["jobs"].values():
        job |= {"processes": 2, "micro_batch_tokens": 150}
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("runs"))
    set_params(target, raw)


def test_losses_and_weights_do_not_depend_on_how_models_are_shared_out(base: Path, tmp_path: Path) -> None:
    for name, launch in LAYOUTS.items():
        variant(base, tmp_path / name, launch)
    run(tmp_path, *(f"{name}/{stage}" for name in LAYOUTS for stage in ("sft", "reward", "ppo")), ranks=2)
    for stage in ("sft", "reward", "ppo"):
        expected, weights = table(tmp_path / f"0/plots/{stage}.csv"), load_file(tmp_path / f"0/models/{stage}/model.safetensors")
        assert len(expected) >= 3
        for name in LAYOUTS:
            for row, other in zip(expected, table(tmp_path / name / f"plots/{stage}.csv"), strict=True):
                for key, value in row.items():
                    # explained variance is a quotient with a denominator near 0 here
                    if value and key != "explained_variance":
                        assert float(other[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), (stage, name, key)
            saved = load_file(tmp_path / name / f"models/{stage}/model.safetensors")
            assert saved.keys() == weights.keys()
            assert max(float((saved[key] - weights[key]).abs().max()) for key in weights) < 1e-6, (stage, name)


@pytest.mark.parametrize(("precision", "how", "ranks"), [("bf16", "", 1), ("bf16", "", 2), ("fp16", ":fp16", 1)])
def test_the_stages_train_in_half_precision(tmp_path: Path, precision: str, how: str, ranks: int) -> None:
    raw = tiny_params()
    raw["launch"]["precision"] = precision
    make_workspace(tmp_path, raw, 240)
    run(tmp_path, f"base{how}", "sft", "reward", "ppo", ranks=ranks)
    before = load_file(tmp_path / "models/sft/model.safetensors")
    after = load_file(tmp_path / "models/ppo/model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {DTYPES[precision]}
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    losses = [float(row["loss"]) for row in table(tmp_path / "plots/base.csv")]
    assert losses[-1] < losses[0]
    # sampling and training round differently, so the old log-probabilities come from a forward pass: the ratio starts at 1 all the same
    assert all(float(row["ratio_error"]) < 1e-3 for row in table(tmp_path / "plots/ppo.csv"))

    # the same bytes after a kill; the scale of the loss is part of a checkpoint
    undisturbed = (tmp_path / "models/ppo/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "models/ppo")
    shutil.rmtree(tmp_path / "runs/ppo")
    run(tmp_path, f"reward{how}", "ppo:killed", code=-signal.SIGKILL, ranks=ranks)
    assert "goes on from step 2" in run(tmp_path, f"reward{how}", "ppo", ranks=ranks)
    assert (tmp_path / "models/ppo/model.safetensors").read_bytes() == undisturbed


def test_models_in_parts_train_in_half_precision_like_whole_ones(base: Path, tmp_path: Path) -> None:
    for name, zero_stage in (("whole", 1), ("parts", 3)):
        variant(base, tmp_path / name, layout(zero_stage) | {"precision": "bf16"})
    run(tmp_path, *(f"{name}/{stage}" for name in ("whole", "parts") for stage in ("sft", "reward", "ppo")))
    for stage in ("sft", "reward", "ppo"):
        whole, parts = (table(tmp_path / name / f"plots/{stage}.csv") for name in ("whole", "parts"))
        assert len(whole) >= 3
        for row, other in zip(whole, parts, strict=True):
            for key, value in row.items():
                assert float(other[key] or 0) == pytest.approx(float(value or 0), rel=1e-4, abs=1e-4), (stage, key)


# fp16 needs a GPU: here the engines are fp32, and only the step takes them for fp16; the gradient of the first is infinite, then not
OVERFLOW = """
import math, os
from pathlib import Path
import torch
from rlhf import config
from rlhf.engine.distributed import start
from rlhf.engine.setup import backward, step_together, train_engine
from rlhf.job import Job

rank, root = int(os.environ["RANK"]), Path.cwd()
job = Job("sft", config.load(), root, root, "cpu", rank, 2, rank)
half = job.params.model_copy(update={"launch": job.params.launch.model_copy(update={"precision": "fp16"})})
device = start(job)
for name in ("policy", "critic"):
    models = [torch.nn.Linear(3, 3) for _ in range(2)]
    engines = [train_engine(model, job.params.sft.optimizer, job, name, 10) for model in models]
    for engine in engines:
        engine.optimizer.check_grad_overflow = True  # as DeepSpeed does under fp16
    for factor in (math.inf, 1.0):
        before = [model.weight.detach().clone() for model in models]
        for engine, scale in zip(engines, (factor if rank == 0 else 1.0, 1.0)):
            for last in (False, True):
                backward(engine, (engine(torch.ones(1, 3)) * scale).sum(), last=last)
        norms = step_together(Job("sft", half, root, root, "cpu", rank, 2, rank), engines)
        assert [math.isfinite(norm) for norm in norms] == [factor == 1.0] * 2, norms
        assert [torch.equal(old, model.weight) for old, model in zip(before, models)] == [factor != 1.0] * 2
"""


def test_an_overflow_of_one_model_holds_back_both(tmp_path: Path) -> None:
    raw = tiny_params()
    engines = {"policy": layout(1)["engines"]["policy"], "critic": layout(2, offload=True)["engines"]["critic"]}
    raw["launch"]["engines"] |= engines
    set_params(tmp_path, raw)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    quiet = os.environ | place | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", OVERFLOW],
            cwd=tmp_path,
            env=quiet | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [words.count("sft: computes in fp32 on 2 ranks, 1 threads each") for words in said] == [1, 0]


# bf16 on one rank, as DeepSpeed's ZeRO stage 1 has it
ALONE = """
import math
from pathlib import Path
import torch
from deepspeed import comm
from rlhf import config
from rlhf.engine.distributed import start
from rlhf.engine.setup import backward, step, train_engine
from rlhf.job import Job

root, sent = Path.cwd(), []
job = Job("sft", config.load(), root, root, "cpu", 0, 1, 0)
device = start(job)
model = torch.nn.Linear(3, 3).bfloat16()
engine = train_engine(model, job.params.sft.optimizer, job, "policy", 10)
add_up = comm.all_reduce
comm.all_reduce = lambda tensor, *given, **named: (sent.append(tensor.numel()), add_up(tensor, *given, **named))[1]
for factor in (math.inf, math.nan, 1.0):
    before = model.weight.detach().clone()
    for last in (False, True):
        backward(engine, (engine(torch.ones(1, 3).bfloat16()) * factor).sum(), last=last)
    norm = step(engine)
    assert math.isclose(norm, math.sqrt(48) if factor == 1.0 else math.inf, rel_tol=1e-6), norm
    assert torch.equal(before, model.weight) == (factor != 1.0)
assert max(sent) == 1, sent
"""


def test_one_rank_sends_no_gradient_and_leaves_out_an_infinite_one(tmp_path: Path) -> None:
    raw = tiny_params()
    raw["launch"]["precision"] = "bf16"
    set_params(tmp_path, raw)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    quiet = os.environ | place | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=quiet, check=True)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="offload_parameters needs zero_stage 3, but it is 2"):
        Engine(zero_stage=2, offload_optimizer=True, offload_parameters=True)
    with pytest.raises(ValidationError, match="offload_optimizer needs zero_stage 1, 2 or 3, but it is 0"):
        Engine(zero_stage=0, offload_optimizer=True, offload_parameters=False)
    with pytest.raises(ValidationError, match="offload_parameters needs zero_stage 3, but it is 0"):
        FrozenEngine(zero_stage=0, offload_parameters=True)
