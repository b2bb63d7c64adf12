"""Where a flow run belongs, and who or what started it: a person, a schedule, or an event such as new rows."""

from __future__ import annotations

from prefect import runtime
from prefect.client.orchestration import get_client

from rlhf.registry.history import person


def tag(*names: str) -> None:
    """Add tags to the flow run that this is called in, and to none of its tasks."""
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(runtime.flow_run.id).tags
        client.update_flow_run(runtime.flow_run.id, tags=sorted({*known, *names}))


def starter() -> str:
    """Who or what started the flow run that this is called in, as Prefect knows it."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(runtime.flow_run.id)
        deployment = client.read_deployment(run.deployment_id).name if run.deployment_id else None
    maker = run.created_by
    if maker and maker.type == "SCHEDULE":
        return f"schedule of deployment {deployment} ({maker.display_value})"
    if maker and maker.type == "AUTOMATION":
        return f"an event, by automation {maker.display_value}"
    return f"a person, by deployment {deployment}" if deployment else f"{person()}, by hand"
