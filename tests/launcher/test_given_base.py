"""The folder of a given model: what is told where it is none, or one that stages write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf import config
from rlhf.errors import UserError
from rlhf.launcher.given import check_base, check_base_is_apart
from tests.stage_runs import tiny_params

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(PROJECT / "dvc.yaml", tmp_path)
    (tmp_path / "models/base/inner").mkdir(parents=True)
    return tmp_path


def given(model: str) -> config.Params:
    base = {"source": "pretrained", "model": model, "revision": None, "trust_remote_code": False, "chat_template": "turns"}
    return config.validate(tiny_params() | {"base": base}, "params.yaml")


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ("model.gguf", "base.model model.gguf is a file, or a link that leads nowhere, and no folder"),
        ("link", "base.model link is a file, or a link that leads nowhere, and no folder"),
        ("~/mine", "base.model ~/mine: no such folder .~ is not read as your home"),
        ("models/of/mine", "base.model models/of/mine: no such folder"),
    ],
)
def test_what_is_no_folder_is_named(root: Path, model: str, wrong: str) -> None:
    (root / "model.gguf").touch()
    (root / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=wrong):
        check_base(root, "base", given(model))


@pytest.mark.parametrize("model", ["", " ", "a" * 300, "é" * 200, "a/" * 3000])
def test_what_can_be_no_path_is_refused_with_params(model: str) -> None:
    with pytest.raises(UserError, match=r"base.model: .*it is empty, or longer than a path can be"):
        given(model)


@pytest.mark.parametrize("model", ["models/base", "./models/base/inner", "models", ".", "mine"])
def test_a_folder_that_stages_write_is_refused(root: Path, model: str) -> None:
    (root / "mine").symlink_to("models/base")
    with pytest.raises(UserError, match=r"stages write .* there, and it would be another model after each run"):
        check_base_is_apart(root, given(model))


def test_a_folder_beside_those_is_not(root: Path) -> None:
    (root / "models/mine").mkdir()
    check_base_is_apart(root, given("models/mine"))
    check_base_is_apart(root, given("owner/name"))
