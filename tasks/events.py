"""Events to Prefect's server, on which deployments may be triggered."""

from __future__ import annotations

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from rlhf.ingest import Ingested

DATASET_UPDATED = "dataset.updated"


def announce(ingested: Ingested) -> bool:
    """Tell the server of new rows; whether there is a server (PREFECT_API_URL) to tell."""
    if not PREFECT_API_URL.value():
        return False
    resource = {"prefect.resource.id": f"rlhf.dataset.{ingested.source}", "prefect.resource.name": ingested.source}
    emit_event(event=DATASET_UPDATED, resource=resource, payload={"parts": ingested.parts, "rows": ingested.rows})
    return True
