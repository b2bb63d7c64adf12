"""Every move of alias `champion`: who, when, why. Kept in tags of the registered model, where MLflow's pages show them.

An entry is written before the aliases are moved and again after, so that a move cut off half-way is seen and undone by the next one.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient

from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.registry.versions import connect

PREFIX = "history."
LONGEST_REASON = 2000  # characters; MLflow takes 5000 for the whole entry


@dataclass(frozen=True)
class Move:
    """One move: `version` came in the place of `replaces`, while alias `previous` stood at `previous`."""

    number: int
    at: str
    by: str
    action: Literal["promoted", "rolled back"]
    version: int
    replaces: int | None
    previous: int | None
    why: str
    state: Literal["begun", "done", "cut off"] = "begun"

    @property
    def line(self) -> str:
        before = f" in place of version {self.replaces}" if self.replaces else ""
        ending = "" if self.state == "done" else f" ({self.state})"
        return f"{self.at} {self.by} {self.action}: version {self.version}{before}{ending} — {self.why}"


@dataclass(frozen=True)
class State:
    """Where the aliases of a registered model point, and the moves that brought them there, oldest first."""

    aliases: Mapping[str, int]
    moves: list[Move]


def moves(root: Path, params: Params) -> list[Move]:
    """All moves, oldest first; none where nothing was registered yet."""
    return read(connect(root, params), params.promote.model).moves


def read(client: MlflowClient, model: str) -> State:
    """The state of a registered model; an empty one where there is none yet."""
    found = client.search_registered_models(f"name = '{model}'")
    if not found:
        return State({}, [])
    entries = [(key, value) for key, value in sorted(found[0].tags.items()) if key.startswith(PREFIX)]
    aliases = {alias: int(number) for alias, number in found[0].aliases.items()}
    return State(aliases, [Move(number=int(key.removeprefix(PREFIX)), **json.loads(value)) for key, value in entries])


def write(client: MlflowClient, model: str, move: Move) -> None:
    """Enter a move, or its new state."""
    entry = {name: value for name, value in asdict(move).items() if name != "number"}
    client.set_registered_model_tag(model, f"{PREFIX}{move.number:06}", json.dumps(entry, ensure_ascii=False))


def finish(client: MlflowClient, model: str, move: Move, candidate: int | None) -> Move:
    """All that is left to do once `champion` points at the version. The entry comes last: what is cut off here is begun still."""
    if "promoted" not in client.get_model_version(model, str(move.version)).tags:
        client.set_model_version_tag(model, str(move.version), "promoted", f"{move.at} by {move.by}: {move.why}")
    if candidate == move.version:
        client.delete_registered_model_alias(model, "candidate")
    done = replace(move, state="done")
    write(client, model, done)
    return done


def settle(client: MlflowClient, model: str) -> State:
    """The state, once a last move that was cut off is dealt with: one that did not come as far as `champion` leaves nothing behind."""
    state = read(client, model)
    if not state.moves or state.moves[-1].state != "begun":
        return state
    last = state.moves[-1]
    if state.aliases.get("champion") == last.version:
        finish(client, model, last, state.aliases.get("candidate"))
        return read(client, model)
    if last.previous is not None:
        client.set_registered_model_alias(model, "previous", str(last.previous))
    elif last.replaces is not None:
        client.delete_registered_model_alias(model, "previous")
    write(client, model, replace(last, state="cut off"))
    return read(client, model)


def person() -> str:
    """Who runs this: user and machine."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_reason(why: str) -> None:
    """Refuse a reason that would not fit into an entry.

    Raises:
        UserError: it is too long.
    """
    if len(why) > LONGEST_REASON:
        raise UserError(f"--why has {len(why)} characters, at most {LONGEST_REASON}", remedy="tell it in fewer words")
