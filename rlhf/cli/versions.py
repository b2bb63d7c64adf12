"""The commands of `rlhf` around registered versions. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlhf import config
from rlhf.workspace.find import workspace

if TYPE_CHECKING:
    from rlhf.registry import Move, Version

Named = Annotated[str, typer.Argument(metavar="VERSION", help="Number of a version, or an alias such as candidate.")]
Why = Annotated[str, typer.Option(help="The reason, for the history.")]


def models() -> None:
    """List the registered versions, newest first: aliases, date, scores, gates; and who put which into service, when and why."""
    from rlhf import registry

    root = workspace()
    params = config.load(root / "params.yaml")
    versions = registry.versions(root, params)
    if not versions:
        print(f"no version of {params.promote.model} is registered yet: `rlhf run` registers one")
        return
    table = Table("version", "aliases", "created (UTC)", "gold", "win rate", "gates", box=None)
    for version in versions:
        table.add_row(*_row(version))
    Console().print(table)
    for move in reversed(registry.moves(root, params)):
        print(move.line)


def _row(version: Version) -> list[str]:
    def number(tag: str) -> str:
        return f"{float(version.tags[tag]):.3f}" if tag in version.tags else "—"

    scores = [number(f"evaluate.gold.{version.tags.get('algorithm')}"), number("evaluate.win_rate.value")]
    return [
        str(version.number),
        ", ".join(version.aliases),
        f"{version.created:%Y-%m-%d %H:%M}",
        *scores,
        version.tags.get("gates", "not checked"),
    ]


def promote(version: Named, why: Why = "no reason given") -> None:
    """Put a version into service by hand, whatever its gates said. The one in service now becomes `previous`."""
    from rlhf import registry
    from rlhf.registry.history import person

    root = workspace()
    params = config.load(root / "params.yaml")
    seen = registry.aliases(root, params).get("champion")
    chosen = registry.resolve(root, params, version)
    _show(registry.promote(chosen, seen, root, params, by=person(), why=why))
    if chosen.tags.get("gates") != "passed":
        print(f"its gates: {chosen.tags.get('gates', 'not checked')}")


def rollback(why: Why = "no reason given") -> None:
    """Put the version before into service again, at once and without training. Done a second time, it undoes itself."""
    from rlhf import registry
    from rlhf.registry.history import person

    root = workspace()
    params = config.load(root / "params.yaml")
    seen = registry.aliases(root, params).get("champion")
    _show(registry.rollback(seen, root, params, by=person(), why=why))


def _show(move: Move) -> None:
    before = f", previous is version {move.replaces}" if move.replaces else ""
    print(f"version {move.version} is champion{before}; {move.action} by {move.by} at {move.at}: {move.why}")


def compare(version: Named = "champion") -> None:
    """Hold the last registered model of this folder against a version: the champion's answers to the same prompts, the same judge."""
    from rlhf import registry
    from rlhf.launcher import processes
    from rlhf.registry import comparison, gates

    root = workspace()
    params = config.load(root / "params.yaml")
    own, other = registry.register(root, params), registry.resolve(root, params, version)
    processes.stop_with_its_starters()
    try:
        with processes.stoppable():
            comparison.compare(own, other, root, params)
    except processes.Stopped as stop:
        sys.exit(128 + stop.number)
    for gate in gates.against_champion(comparison.pairs(own, other, root), params, gates.read_metrics(root).get("prompts")):
        print(gate.line)


def lineage(version: Named) -> None:
    """Show what a version was made of: git revision, data, params, each stage's MLflow run, and the champion that it replaced."""
    from rlhf import registry

    root = workspace()
    params = config.load(root / "params.yaml")
    chosen = registry.resolve(root, params, version)
    tags = chosen.tags
    revision = tags["git.revision"]
    aliased = f" ({', '.join(chosen.aliases)})" if chosen.aliases else ""
    print(f"{chosen.model} version {chosen.number}{aliased}, {chosen.created:%Y-%m-%d %H:%M} UTC")
    print(f"weights   sha256 {tags['sha256']}")
    print(f"revision  {revision} (tag {chosen.model}-v{chosen.number}; checked out was {tags['git.head']})")
    print(f"params    sha256 {tags['params']}, see `git show {chosen.model}-v{chosen.number}:params.yaml`")
    parts = {key.removeprefix("data."): md5 for key, md5 in tags.items() if key.startswith("data.")}
    for path, md5 in parts.items() or {"none: all rows are made from the seed": ""}.items():
        print(f"raw data  {path} {md5}".rstrip())
    table = Table("stage", "MLflow run", "fingerprint", box=None)
    made = [key.removeprefix("fingerprint.") for key in tags if key.startswith("fingerprint.")]
    for stage in sorted(made, key=lambda name: (config.STAGES.index(config.kind(name)), name)):
        table.add_row(stage, tags.get(f"run.{stage}", "—"), tags[f"fingerprint.{stage}"])
    Console(width=120).print(table)
    outputs = {key.removeprefix("md5."): md5 for key, md5 in tags.items() if key.startswith("md5.")}
    for path, md5 in outputs.items():
        print(f"output    {path} md5 {md5}")
    compared = f"with version {tags['compared_with']}" if "compared_with" in tags else "with no other version"
    print(f"compared  {compared}; gates {tags.get('gates', 'not checked')}")
    print(f"report    {tags.get('report', 'none: no flow decided about it')}")
    for move in registry.moves(root, params):
        if chosen.number in (move.version, move.replaces):
            print(move.line)


def verify(
    version: Named,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train everything again, too, and compare all bytes.")] = False,
) -> None:
    """Show that a version can be had again: a fresh checkout of its revision with its data has nothing to do, and holds the same model."""
    from rlhf import registry
    from rlhf.registry import verify

    root = workspace()
    params = config.load(root / "params.yaml")
    chosen = registry.resolve(root, params, version)
    verify.verify(chosen, root, params, retrain=retrain, say=lambda line: print(line, flush=True))
    print(f"version {chosen.number} is verified")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
) -> None:
    """Remove what no run goes on from and no registered version, branch or tag needs: scratch, old data in the DVC cache, MLflow's files.

    Begin with --dry-run. DVC remotes are not touched.
    """
    from rlhf.registry import gc as cleaning

    root = workspace()
    params = config.load(root / "params.yaml")
    with cleaning.alone(root, params):
        found = cleaning.find(root, params)
        table = Table("what", "MiB", "why", box=None)
        for leftover in found.leftovers:
            table.add_row(leftover.what, f"{cleaning.size(leftover.paths) / 2**20:.1f}", leftover.why)
        if found.leftovers:
            Console().print(table)
        for note in found.notes:
            print(f"note: {note}")
        freed = cleaning.freed([path for leftover in found.leftovers for path in leftover.paths])
        if not dry_run:
            cleaning.remove(root, params, found.leftovers)
    print(f"{freed / 2**20:.1f} MiB {'would be' if dry_run else 'are'} free again; what is linked elsewhere, too, takes no room of its own")


COMMANDS = (models, promote, rollback, compare, lineage, verify, gc)
