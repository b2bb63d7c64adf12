"""`launch.precision=auto`: written into params.yaml as what this machine is quick at."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import config
from rlhf.plan import launching
from rlhf.plan.findings import Findings
from rlhf.workspace import precision, presets
from tests.workspace.test_presets import workspace  # noqa: F401  # fixture

PRESET = Path(__file__).parents[2] / "presets/sandbox.yaml"


@pytest.mark.parametrize(
    ("flags", "preset", "expected", "why"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16 amx_tile", "sandbox", "bf16", "this processor has AMX"),
        ("fpu avx512f avx512_bf16", "sandbox", "fp32", "the model is a small one, and this processor has no AMX"),
        ("fpu avx512f avx512_bf16", "qwen2.5-0.5b", "bf16", "this processor has AVX512-BF16"),
        ("fpu avx2", "qwen2.5-0.5b", "fp32", "this processor has no products of bfloat16"),
        (None, "sandbox", "fp32", "this processor has no products of bfloat16"),
    ],
)
def test_the_processors_own(
    flags: str | None,
    preset: str,
    expected: str,
    why: str,
    workspace: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(precision, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    done = presets.use(workspace, preset, ["launch.precision=auto"])
    assert f"launch.precision auto → {expected} ({why})" in done
    assert config.load(workspace / "params.yaml").launch.precision == expected


def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    assert precision.best(built=True) == ("bf16", "there is a GPU")


@pytest.mark.parametrize(
    ("flags", "launch", "told"),
    [
        ("fpu avx2", {"precision": "bf16"}, True),
        ("fpu avx2", {"precision": "bf16", "accelerator": "cpu"}, True),
        ("fpu avx2", {"precision": "fp32"}, False),
        ("fpu avx2", {"precision": "bf16", "accelerator": "cuda"}, False),
        ("fpu avx2", {"precision": "bf16", "hostfile": "hosts"}, False),  # other machines may be of another kind
        ("fpu avx512_bf16", {"precision": "bf16"}, False),
        ("fpu amx_bf16", {"precision": "bf16"}, False),
        (None, {"precision": "bf16"}, False),  # nothing is known
    ],
)
def test_who_asks_for_what_is_slow_is_told(
    flags: str | None, launch: dict[str, str], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    given = config.load(PRESET).launch.model_copy(update=launch)
    assert bool(precision.doubt(given)) == told


def test_use_and_check_say_so(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2\n")
    monkeypatch.setattr(precision, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    said = f"launch.precision is bf16, {precision.SLOW}"
    assert f"note: {said}" in presets.use(workspace, "sandbox", ["launch.precision=bf16"])
    params, findings = config.load(workspace / "params.yaml"), Findings()
    launching.check(workspace, ["sft"], params, findings)
    assert said in findings.notes
