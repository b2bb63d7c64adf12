"""What is told of a stage that ended badly: one sentence, whatever it wrote."""

from __future__ import annotations

from rlhf.launcher.failures import MAY_PASS
from tasks.stage import StageError

CRASH = """\
the last lines of stage sft:
  File "/rlhf/stages/sft.py", line 40, in main
    loss.backward()
    ^^^^^^^^^^^^^^^
torch.OutOfMemoryError: CUDA out of memory
stage sft ended with exit code 1; its log: /workspace/runs/sft/f00d/log.txt""".splitlines()


def test_a_crash_is_one_sentence_with_the_place_of_its_log() -> None:
    failure = StageError("sft", 255, CRASH)
    expected = "stage sft failed with exit code 255: torch.OutOfMemoryError: CUDA out of memory; its log: /workspace/runs/sft/f00d/log.txt"
    assert failure.what == expected
    assert failure.lasting
    ended = f"stage sft ended before its end: one of its processes was killed; {MAY_PASS}; its log: /x/log.txt"
    killed = StageError("sft", 255, ["sft 1/9 loss=3", ended])
    assert killed.what.endswith(f"255: {ended}")
    assert not killed.lasting
    assert StageError("sft", 9, ["one", "two"]).what == "stage sft failed with exit code 9: two"


def test_what_the_stage_says_itself_comes_first() -> None:
    failure = StageError("sft", 255, ["ValueError: x", "error: row 7: no prompt", "  remedy: give one", *CRASH[-1:]])
    assert failure.what == "stage sft failed with exit code 255: error: row 7: no prompt |   remedy: give one"
    assert failure.lasting


def test_a_stage_that_was_stopped_has_not_failed() -> None:
    metrics = [f"ppo {step}/9 reward=0.5 kl=2" for step in range(8)]
    for failure in (StageError("ppo", -15, metrics), StageError("ppo", 255, [*metrics, "ppo: stopped by SIGTERM; a rerun goes on …"])):
        assert (failure.stopped, failure.what) == (True, "stage ppo was stopped")
    assert not StageError("ppo", -9, metrics).stopped
