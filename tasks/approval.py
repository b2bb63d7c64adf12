"""A person's word before a version goes into service: the flow run is paused in Prefect, and goes on with what he fills in."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput

from rlhf.config.operations import Approval
from rlhf.registry import Verdict
from tasks import server

SECONDS_BETWEEN_LOOKS = 2  # whether somebody has answered


class Answer(RunInput):
    """What Prefect's page asks for."""

    approve: bool
    name: str
    why: str


@dataclass(frozen=True)
class Word:
    """Who decided and why; `declined` says why the version is not promoted, or is None."""

    by: str
    why: str
    declined: str | None = None


def ask(verdict: Verdict, approval: Approval) -> Word:
    """Pause the flow run until somebody answers, or the time is over."""
    version = verdict.version
    by_hand = f"`rlhf promote {version.number}` puts it into service"
    if not server.lasts():
        return Word("", "", f"it needs an approval, and there is no Prefect server to ask on: {by_hand}")
    gates = "\n".join(f"- {gate.line}" for gate in verdict.gates)
    champion = f"version {verdict.champion}" if verdict.champion else "none"
    text = (
        f"**{version.model} version {version.number}** passed all gates. The champion is {champion}. Shall it go into service?\n\n{gates}"
    )
    get_run_logger().info("version %d waits for an approval, for %g minutes at most", version.number, approval.wait_minutes)
    try:
        asked = Answer.with_initial_data(description=text)
        answer = pause_flow_run(wait_for_input=asked, timeout=int(approval.wait_minutes * 60), poll_interval=SECONDS_BETWEEN_LOOKS)
    except FlowPauseTimeout:
        return Word("", "", f"nobody approved it within {approval.wait_minutes:g} minutes: {by_hand}")
    if not answer.approve:
        return Word(answer.name, answer.why, f"{answer.name} declined: {answer.why}")
    return Word(answer.name, f"approved: {answer.why}")
