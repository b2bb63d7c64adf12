"""Going on with another number of ranks or another ZeRO stage, by DeepSpeed's universal checkpoints (arXiv 2406.18820).

Converting puts the shares of all ranks together, one file per parameter and state; each rank then cuts its own share out of them.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal

from rlhf.job import Job


def load(job: Job, folder: Path, name: str, engine: DeepSpeedEngine) -> None:
    """Restore an engine from the checkpoint of one that was shared out differently. All ranks must call it."""
    target = folder.parent / f"universal-{folder.name}" / name
    if job.is_main:
        shutil.rmtree(target.parent, ignore_errors=True)
        _convert(folder / name, target)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(target.parent), tag=name)
    engine._config.load_universal_checkpoint = False
    # under ZeRO-3 DeepSpeed gives all groups the same tensor to count Adam's steps in: each group's step would count for all
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()
    dist.barrier()
    if job.is_main:
        shutil.rmtree(target.parent)


def _convert(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # it reports to the terminal
        ds_to_universal.main(Namespace(input_folder=str(source), output_folder=str(target), **options))
