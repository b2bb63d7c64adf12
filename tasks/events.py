"""Events to Prefect's server, on which deployments may be triggered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from rlhf.workspace import served
from tasks import server

DATASET_UPDATED = "dataset.updated"


def announce(root: Path, source: str, parts: Sequence[str], rows: int) -> bool:
    """Tell the server of new rows in some files of a source; whether there is a server (PREFECT_API_URL) to tell.

    Raises:
        UserError: it does not answer.
    """
    if not PREFECT_API_URL.value():
        return False
    server.check()
    resource = {"prefect.resource.id": f"rlhf.dataset.{served.name(root)}.{source}", "prefect.resource.name": source}
    emit_event(event=DATASET_UPDATED, resource=resource, payload={"parts": list(parts), "rows": rows})
    return True
