"""Who or what started a flow run: a person, a schedule, or an event such as new rows."""

from __future__ import annotations

from prefect import runtime
from prefect.client.orchestration import get_client

from rlhf.registry.history import person


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
