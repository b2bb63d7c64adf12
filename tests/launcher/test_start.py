"""What a stage's process and its launcher load before the first step: seconds, in every stage of every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from rlhf.launcher import command

ROOT = Path(__file__).parents[2]


def loaded(program: str, folder: Path) -> str:
    """What a program prints that starts as a stage's process does."""
    (folder / "sitecustomize.py").write_text(command.HIDDEN)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_a_stage_loads_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    program = """
        import sys
        import rlhf.stages.evaluate, rlhf.stages.ppo
        print([name for name in ("mlflow", "sklearn", "scipy", "pandas", "boto3", "h2", "datasets", "peft") if sys.modules.get(name)])
    """
    assert loaded(program, tmp_path) == "[]"


def test_a_launcher_reaches_mlflow_without_its_models(tmp_path: Path) -> None:
    program = """
        import sys
        from contextlib import suppress
        del sys.modules["mlflow"]  # it is hidden from the stage alone
        from rlhf.cli import main
        from rlhf.errors import UserError

        with suppress(UserError):  # there is no workspace here
            main.launch("sft")
        from mlflow.tracking import MlflowClient
        print([name for name in ("mlflow.pyfunc",) if sys.modules.get(name)])
    """
    assert loaded(program, tmp_path) == "[]"


def test_a_chat_opens_its_model_without_what_transformers_finds_beside(tmp_path: Path) -> None:
    program = """
        import sys
        for name in ("sklearn", "scipy", "boto3", "h2"):
            del sys.modules[name]  # hidden from the stage alone
        import scipy.sparse  # as MLflow does
        from pathlib import Path
        from rlhf.cli import chat

        chat.converse(chat.Partner("none", Path.cwd() / "none"), [], print, 0.0, 1)
        assert sys.modules["scipy"] is scipy and "rlhf.cli.speaker" in sys.modules
        print([name for name in ("sklearn", "scipy.optimize", "boto3", "h2", "peft") if sys.modules.get(name)])
    """
    assert loaded(program, tmp_path) == "[]"
