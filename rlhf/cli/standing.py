"""Where a workspace stands, in few lines: what `rlhf run` ends with, and what `rlhf status` begins with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rlhf.registry import Move, Version

# what the gates look at, of metrics/evaluate.json
DECIDING = re.compile(
    r"gold\.(difference|ci95)|accuracy\.(difference|ci95|(?!sft)\w+\.value)|win_rate\.(length_controlled\.)?(value|ci95)|"
    r"reward_model\.accuracy|kl|perplexity\.ratio|(eos_rate|answer_tokens)\.(?!sft)\w+"
)


def after_run(outcome: Mapping[str, Any]) -> Iterator[str]:
    """What a flow run that promoted nothing means, and what one can do about it; nothing where its version is champion.

    Args:
        outcome: what flows.retrain.retrain gives.
    """
    version, champion = outcome["version"], outcome["champion"]
    if version == champion:
        return
    service = f"version {champion} stays in service" if champion else "no version is in service"
    yield f"\nnothing was promoted: {service}"
    yield from (f"  {line}" for line in outcome["failed"])
    yield "what you can do:"
    for command, effect in (
        (f"rlhf chat --model {version}", "talk to it"),
        (f'rlhf promote {version} --why "…"', "put it into service, whatever its gates said"),
        ("rlhf use params.yaml key=value", "change a value, or a gate's bound, then `rlhf run` (docs/promote.md)"),
    ):
        yield f"  {command:32}{effect}"


def of_registry(model: str, versions: list[Version], moves: list[Move]) -> Iterator[str]:
    """The champion, the other aliases, and what the gates said of the last version.

    Args:
        model: its registered name.
        versions: all of them, newest first.
        moves: of the champion, oldest first.
    """
    by_alias = {alias: version.number for version in versions for alias in version.aliases}
    champion = by_alias.pop("champion", None)
    since = next((f", {move.action} at {move.at} by {move.by}" for move in reversed(moves) if move.version == champion), "")
    yield f"champion of {model}: " + (f"version {champion}{since}" if champion else "none")
    yield from (f"{alias}: version {number}" for alias, number in sorted(by_alias.items()))
    if not versions:
        yield "no version is registered yet: `rlhf run` registers one"
        return
    last = versions[0]
    yield f"last version: {last.number}, gates {last.tags.get('gates', 'not checked')}"
    yield from (f"  {said}" for tag, said in sorted(last.tags.items()) if tag.startswith("gate.") and said.startswith("FAIL"))


def numbers(root: Path, *, every: bool) -> list[tuple[str, str]]:
    """The numbers of metrics/evaluate.json under their paths in the file: those that decide, or every one. Empty before any evaluation."""
    path = root / "metrics" / "evaluate.json"
    if not path.is_file():
        return []
    found = list(_flat("", json.loads(path.read_text(encoding="utf-8"))))
    return [(name, value) for name, value in found if every or DECIDING.fullmatch(name)]


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}".removeprefix("."), inner)
    else:
        members = value if isinstance(value, list) else [value]
        yield path, " … ".join(f"{member:.4g}" if isinstance(member, float) else str(member) for member in members)


def print_numbers(root: Path, *, every: bool = False) -> None:
    """The numbers that decide, as a table."""
    found = numbers(root, every=every)
    if not found:
        print("no evaluation yet")
        return
    more = "" if every else " (`rlhf status --all` has every number)"
    print(f"metrics/evaluate.json{more}")
    table = Table("metric", "value", box=None)
    for row in found:
        table.add_row(*row)
    Console().print(table)
