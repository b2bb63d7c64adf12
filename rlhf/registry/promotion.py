"""Which version is in service: by the gates (`check`, then `carry_out`), by hand (`promote`), and back again (`rollback`).

Alias `champion` is moved, never deleted: whoever loads it finds the old version or the new one. Whoever decides says which champion he saw;
if another one is in service by then, nothing is moved and he is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.config import Params
from rlhf.errors import UserError
from rlhf.locks import lock
from rlhf.registry import gates, history
from rlhf.registry.card import described
from rlhf.registry.gates import Pair
from rlhf.registry.history import Move
from rlhf.registry.versions import Version, aliases, connect, find, fold, model_folder


@dataclass(frozen=True)
class Verdict:
    """What the gates say of a version; `champion` is the one in service while they were checked."""

    version: Version
    gates: list[gates.Gate]
    champion: int | None

    @property
    def failed(self) -> list[str]:
        return [gate.name for gate in self.gates if not gate.passed]

    @property
    def may_be_promoted(self) -> bool:
        """Whether it passed, and was never in service: one that somebody took out of service does not come back by itself."""
        return not self.failed and "promoted" not in self.version.tags


@dataclass(frozen=True)
class Decision:
    """What was done with a version, and why."""

    version: Version
    gates: list[gates.Gate]
    champion: int | None
    lines: list[str]

    @property
    def is_champion(self) -> bool:
        return self.champion == self.version.number


def check(version: Version, root: Path, params: Params, pairs: Sequence[Pair] | None = None) -> Verdict:
    """Check the gates and write what they say into the version's tags.

    Args:
        pairs: this version's answers beside the champion's; None where there is no champion, or this is the one.

    Raises:
        UserError: a number is missing in metrics/evaluate.json.
    """
    client = connect(root, params)
    champion = aliases(root, params).get("champion")
    checked = gates.check(gates.read_metrics(root), params, pairs)
    verdict = Verdict(version, checked, champion)
    # one that was in service keeps what it was promoted for
    if "promoted" not in version.tags:
        for name, value in fold({f"gate.{gate.name}": gate.line for gate in checked}).items():
            client.set_model_version_tag(version.model, str(version.number), name, value)
        if pairs is not None:
            client.set_model_version_tag(version.model, str(version.number), "compared_with", str(champion))
        said = f"failed: {', '.join(verdict.failed)}" if verdict.failed else "passed"
        told = "\n".join([f"Gates {said}", "", *(f"- {gate.line}" for gate in checked)])
        before = client.get_model_version(version.model, str(version.number)).description
        client.update_model_version(version.model, str(version.number), description=described(told, before))
        client.set_model_version_tag(version.model, str(version.number), "gates", said)
    return verdict


def carry_out(verdict: Verdict, root: Path, params: Params, *, by: str, why: str, declined: str | None = None) -> Decision:
    """Move the aliases as a verdict says. Done again with nothing new, it leaves everything as it is.

    Args:
        verdict: what the gates said.
        by: who decides.
        why: for the history.
        declined: why a version that passed is not promoted all the same, for example that nobody approved of it.

    Raises:
        UserError: another version became champion since the verdict, or this one's files were changed.
    """
    version, champion = verdict.version, verdict.champion
    service = f"version {champion}" if champion else "none"
    if champion == version.number:
        with lock(root, "registry"):
            history.settle(connect(root, params), version.model)  # the run that promoted it may have been cut off there
        outcome = f"version {version.number} is champion already"
    elif "promoted" in version.tags:
        outcome = f"version {version.number} was champion before: alias champion stays with {service}"
    elif verdict.failed or declined:
        because = f"failed: {', '.join(verdict.failed)}" if verdict.failed else declined
        with lock(root, "registry"):
            connect(root, params).set_registered_model_alias(version.model, "candidate", str(version.number))
        outcome = f"version {version.number} is candidate, champion is {service}; {because}"
    else:
        _move(root, params, version, champion, "promoted", by, why)
        outcome = f"version {version.number} is champion, the one before is {service}"
    after = find(root, params, version.number)
    now = aliases(root, params).get("champion")
    return Decision(after, verdict.gates, now, [*(gate.line for gate in verdict.gates), outcome])


def promote(version: Version, seen: int | None, root: Path, params: Params, *, by: str, why: str) -> Move:
    """Put a version into service by hand, whatever its gates said; the history tells which ones failed.

    Args:
        version: to promote.
        seen: the champion that is to be replaced.
        by: who does it.
        why: for the history.

    Raises:
        UserError: it is champion already, another version became champion meanwhile, or a file of the version was changed.
    """
    said = version.tags.get("gates", "not checked")
    return _move(root, params, version, seen, "promoted", by, why if said == "passed" else f"{why} [gates {said}]")


def rollback(seen: int | None, root: Path, params: Params, *, by: str, why: str) -> Move:
    """Put the version before into service again; the one in service now becomes `previous`.

    Args:
        seen: the champion that is to be replaced.
        by: who does it.
        why: for the history.

    Raises:
        UserError: there is none before, another version became champion meanwhile, or a file of the version was changed.
    """
    with lock(root, "registry"):
        state = history.settle(connect(root, params), params.promote.model)
    _check_seen(state, params.promote.model, seen)
    before = state.aliases.get("previous")
    if before is None or before == seen:
        what = f"{params.promote.model}: no version was in service before this one"
        raise UserError(what, remedy="`rlhf models` lists the versions, `rlhf promote VERSION` puts one into service")
    return _move(root, params, find(root, params, before), seen, "rolled back", by, why)


def _move(
    root: Path, params: Params, version: Version, seen: int | None, action: Literal["promoted", "rolled back"], by: str, why: str
) -> Move:
    history.check_reason(why)
    model, number = version.model, version.number
    # nobody is kept waiting by this: it reads every byte of the version
    model_folder(version.uri, root, params)
    with lock(root, "registry"):
        client = connect(root, params)
        state = history.settle(client, model)
        _check_seen(state, model, seen)
        if action == "rolled back" and state.aliases.get("previous") != number:  # the champion went, and came back from another one
            what = (
                f"{model}: version {state.aliases.get('previous')} was in service before by now, not version {number}; nothing was changed"
            )
            raise UserError(what, remedy="see `rlhf models`, and decide again")
        if seen == number:
            raise UserError(f"version {number} of {model} is champion already", remedy="`rlhf models` lists the others")
        move = Move(len(state.moves) + 1, history.now(), by, action, number, seen, state.aliases.get("previous"), why)
        history.write(client, model, move)
        if seen:
            client.set_registered_model_alias(model, "previous", str(seen))
        client.set_registered_model_alias(model, "champion", str(number))
        return history.finish(client, model, move, state.aliases.get("candidate"))


def _check_seen(state: history.State, model: str, seen: int | None) -> None:
    champion = state.aliases.get("champion")
    if champion != seen:
        who = next((f", {move.action} at {move.at} by {move.by}" for move in reversed(state.moves) if move.version == champion), "")
        what = f"{model}: version {champion} is champion by now{who}; nothing was changed"
        raise UserError(what, remedy="see `rlhf models`, and decide again")
