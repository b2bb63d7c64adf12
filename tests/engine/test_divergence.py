"""A run that has diverged stops, and says where to go on from: a folder that is there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf import config
from rlhf.engine import divergence
from rlhf.errors import UserError
from rlhf.job import Job

PARAMS = config.load(Path(__file__).parents[2] / "presets/sandbox.yaml")


def test_the_last_checkpoint_is_named_only_where_there_is_one(tmp_path: Path) -> None:
    job = Job("sft", PARAMS, tmp_path, tmp_path, "cpu", 0, 1, 0)
    with pytest.raises(UserError, match="loss is nan at step 3") as early:
        divergence.check(job, 3, {"loss": math.nan}, {})
    assert early.value.remedy.startswith("no checkpoint had been made; lower the learning rate of sft")
    (tmp_path / "checkpoints/step-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"kl is -7 at step 3, beyond sft\.stop\.kl = 5") as late:
        divergence.check(job, 3, {"kl": -7.0}, {"kl": 5.0})
    assert late.value.remedy.startswith(f"the last checkpoint is kept in {tmp_path / 'checkpoints'}; ")
