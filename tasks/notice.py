"""A notice of each flow run that failed, crashed or came to no promotion, from Prefect's server to a web address.

`rlhf serve` sets it up; `python -m tasks.notice` does so on a server that PREFECT_API_URL names. The server sends it: no run waits for it,
or fails because of it, and a run whose process is gone is told of as well.
"""

from __future__ import annotations

import os
from typing import cast
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.types import SecretDict
from pydantic import SecretStr

from rlhf import config
from rlhf.workspace import served
from rlhf.workspace.find import workspace

# of the states that the flow ends in (flows/retrain.py) and Prefect's own
STATES = ("refused", "declined", "Failed", "Crashed", "TimedOut")
# `text` is what Slack, Mattermost and their like show
PAYLOAD = """{
  "text": {{ ("WORKSPACE: run " ~ flow_run.name ~ " is " ~ event.resource["prefect.state-name"] ~ ": "
             ~ event.resource["prefect.state-message"] ~ " — " ~ (flow_run | ui_url)) | tojson }},
  "workspace": "WORKSPACE",
  "run": {{ flow_run.name | tojson }},
  "state": {{ event.resource["prefect.state-name"] | tojson }},
  "message": {{ event.resource["prefect.state-message"] | tojson }},
  "page": {{ flow_run | ui_url | tojson }}
}"""


def set_up(name: str, address: str | None) -> None:
    """Have the server send notices to an address from now on, or to none; what was set up before holds no more.

    Args:
        name: of the workspace.
        address: where they are sent by POST, as JSON.
    """
    label = f"notice-{name}"
    with get_client(sync_client=True) as client:
        for old in client.read_automations_by_name(label):
            client.delete_automation(old.id)
    if address is None:
        return
    headers = {"Content-Type": "application/json"}
    receiver = Webhook(method="POST", url=SecretStr(address), headers=SecretDict(headers)).save(label, overwrite=True)  # kept encrypted
    trigger = EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in STATES},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=[
            {"prefect.resource.role": "flow", "prefect.resource.name": "retrain"},
            {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{name}"},  # of this workspace: a server may have several
        ],
        posture=Posture.Reactive,
        threshold=1,
    )
    action = CallWebhook(block_document_id=cast(UUID, receiver), payload=PAYLOAD.replace("WORKSPACE", name))
    Automation(name=label, description="tells of runs that failed or were refused", trigger=trigger, actions=[action]).create()


def main() -> None:
    root = workspace()
    params = config.load(root / "params.yaml")
    set_up(served.name(root), os.environ.get("RLHF_NOTIFY_URL") or params.operations.notify)


if __name__ == "__main__":
    main()
