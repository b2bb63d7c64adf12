"""An empty record, and what stands in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf import config
from rlhf.config import Params
from rlhf.feedback import database
from rlhf.feedback.database import Database

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Database]:
    found = database.connect(tmp_path, config.load(PROJECT / "params.yaml"))
    yield found
    found.close()


def params_with(**values: Any) -> Params:
    """The sandbox's, with other values of section feedback."""
    params = config.load(PROJECT / "params.yaml")
    return params.model_copy(update={"feedback": params.feedback.model_copy(update=values)})


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'feedback.db'}"
