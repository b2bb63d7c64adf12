"""Prefect of a workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.workspace import served


def test_a_fresh_workspace_has_its_home_before_prefect_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.setenv(name, "")  # so that what enter sets is undone
        monkeypatch.delenv(name)
    served.enter(tmp_path)
    assert (tmp_path / "runs" / "prefect").is_dir()  # Prefect makes no parent folders: it would warn, and go on without
