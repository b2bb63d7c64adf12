"""The command line `rlhf`. Each command imports what it needs when it runs, so that `rlhf --help` answers at once."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from rlhf import config
from rlhf.cli import feedback, versions
from rlhf.cli.streams import say_anything
from rlhf.cli.sweep import sweep
from rlhf.errors import UserError, full_disk
from rlhf.redact import redact
from rlhf.workspace import served, snapshot
from rlhf.workspace.find import workspace

app = typer.Typer(
    help="Scheduled, reproducible RLHF retraining: from raw data to a promoted model.\n\nCommands work on the nearest folder upwards that "
    "holds params.yaml and dvc.yaml. Start with `rlhf use sandbox`, then `rlhf run`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line: what a user can mend is told in one line, without a traceback, with exit code 1."""
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    say_anything()
    gc.set_threshold(100_000)  # else a sixth of the time in which Prefect, MLflow and DVC are loaded goes into a search for garbage
    try:
        app(prog_name="rlhf")
    except UserError as error:
        message = f"{error.what} — {error.remedy}"
    except OSError as error:
        if full := full_disk(error, Path.cwd()):
            message = f"{full.what} — {full.remedy}"
        elif error.filename is None:
            raise
        else:
            message = f"{error.filename}: {error.strerror} — set its permissions"
    else:
        return
    print("error:", redact(" ".join(message.split())), file=sys.stderr)
    sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        from rlhf.cli import environment

        print(f"rlhf {environment.version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:
    pass


def _presets() -> list[str]:
    """What completion offers; outside a workspace nothing."""
    from rlhf.workspace import presets

    try:
        return [*presets.names(workspace()), "params.yaml"]
    except UserError:
        return []


@app.command()
def use(
    preset: Annotated[
        str,
        typer.Argument(help="Name of a file in presets/ (sandbox, hh, opt-1.3b, …), or the path of a YAML file.", autocompletion=_presets),
    ],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values to change, for example ppo.steps=100 or data.sources.0.path=pairs.jsonl; docs/params.md explains every key.",
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Take what the file lacks from this preset, and known no more out: after an upgrade."),
    ] = None,
) -> None:
    """Write params.yaml from a preset, with changed values, and dvc.yaml for its algorithm.

    Data files that it names are copied to data/raw and versioned with DVC.
    """
    from rlhf.cli.ingest import bring_earlier
    from rlhf.workspace import presets

    root = workspace()
    for line in presets.use(root, preset, values or [], lambda params: bring_earlier(root, params), fill):
        print(line)


@app.command()
def check() -> None:
    """Check the whole plan without training: model, tokenizer, template, data, lengths, memory, disk, places. All that is wrong is told."""
    from rlhf.cli import plan

    found = plan.check(workspace())
    plan.show(found)
    if found.problems:
        sys.exit(1)
    print("nothing is wrong: `rlhf run` trains")


@app.command()
def run(
    values: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values of params.yaml for this run alone, such as ppo.steps=100.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why it is run, kept with the version.")] = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run; nothing is registered then.")] = None,
) -> None:
    """Run the retraining flow: all stages that are not up to date, then registration, gates and promotion."""
    from rlhf.cli import progress, standing
    from rlhf.launcher import processes
    from tasks import server

    root = workspace()
    os.chdir(root)
    params = config.load(root / "params.yaml")
    print(f"{root}: starting (Ctrl-C stops it; a later run goes on from there)", file=sys.stderr, flush=True)
    served.enter(root)
    try:
        with processes.stoppable():
            own = server.start(root)  # first: both it and what the flow imports take seconds to load
            with progress.shown(Console(stderr=True), root):
                from flows import retrain

                retrain.check(root, reason, until)
                threading.Thread(target=_open_mlflow, args=(root, params), daemon=True).start()
                server.ensure(own)
                outcome = retrain.retrain(root, values, reason, cast(Any, until))
    except processes.Stopped as stop:
        print(f"stopped by {stop}; a rerun goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + stop.number)
    if not until:
        standing.print_numbers(root)
        print()
    for line in outcome["lines"]:
        print(line)
    if not until:
        for line in standing.after_run(outcome):
            print(line)
    if paths := snapshot.uncommitted(root):
        print(f"\nto commit: `git add {' '.join(paths)}`")
    uri = redact(_tracking_uri(root, params))
    pages = uri if uri.startswith("http") else f"`mlflow ui --backend-store-uri {uri}`"
    print(f"\nnext: `rlhf chat`, `rlhf models`, `dvc plots show` (needs the internet; report.html in MLflow does not), {pages}")


def _open_mlflow(root: Path, params: config.Params) -> None:
    """Load what reads MLflow's database while Prefect's server starts: the flow would wait for it later."""
    from rlhf import tracking

    if _tracking_uri(root, params).startswith("sqlite:"):
        with suppress(Exception):  # the flow meets it as well, and tells of it
            tracking.initialise(root, params)


@app.command()
def ingest(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="Files of new rows, in the format of the source.")] = None,
    source: Annotated[str | None, typer.Option(help="Name of the source in params.yaml.  [default: the only one that reads files]")] = None,
    ratings: Annotated[bool, typer.Option("--feedback", help="Ratings that are no data yet, in the place of files.")] = False,
) -> None:
    """Add new rows to a source: checked, versioned as a dated part, and told to Prefect's server as event dataset.updated."""
    from rlhf.cli import ingest as adding
    from rlhf.cli.ratings import ingest as add_ratings

    root = workspace()
    params = config.load(root / "params.yaml")
    if ratings == bool(files) or (ratings and source):
        raise UserError("`rlhf ingest` takes either files or --feedback", remedy="give files of rows (and --source), or --feedback alone")
    done = add_ratings(root, params) if ratings else [adding.ingest(root, params, files or [], source)]
    for line in (line for one in done for line in one.lines):
        print(line)
    parts, rows = [part for one in done for part in one.parts], sum(one.rows for one in done)
    if not parts:
        print("nothing new")
        return
    for line in adding.renew_earlier(root):
        print(line)
    served.enter(root)
    from tasks import events

    if events.announce(root, done[0].source, parts, rows):
        print(f"sent event {events.DATASET_UPDATED}: {rows} new rows in {', '.join(parts)}")
    else:
        print(
            f"{rows} new rows in {', '.join(parts)}; no server was told (no `rlhf serve` here, PREFECT_API_URL not set): "
            "`rlhf run` trains on them"
        )


class Only(StrEnum):
    """Parts of `rlhf serve` that start alone."""

    assistant = "assistant"


@app.command()
def serve(
    prefect_port: Annotated[int | None, typer.Option(help="Port of Prefect's server.  [default: 4200, or a free one]")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of MLflow's server.  [default: 5000, or a free one]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the assistant's own server.  [default: serving.port, or a free one]")] = None,
    only: Annotated[Only | None, typer.Option(help="Start the assistant's own server alone.")] = None,
) -> None:
    """Start Prefect's server, a worker for the schedule of prefect.yaml, MLflow's pages and the assistant on this machine, until Ctrl-C."""
    root = workspace()
    params = config.load(root / "params.yaml")
    if only:
        from rlhf.serving.process import EngineProcess

        engines = EngineProcess()  # before what the server imports: both take seconds
        try:
            from rlhf.serving import server

            server.serve(root, params, port, lambda line: print(line, flush=True), engines)
        finally:
            engines.kill()
        return
    from rlhf.cli import serve as serving

    serving.serve(root, params, prefect_port, mlflow_port, port, lambda line: print(line, flush=True))


@app.command()
def status(
    every: Annotated[bool, typer.Option("--all", help="Every number of the last evaluation.")] = False,
) -> None:
    """Show the champion, what the gates said of the last version, which stages are up to date, and the numbers that decide."""
    from rlhf import registry
    from rlhf.cli import standing
    from tasks import graph

    root = workspace()
    params = config.load(root / "params.yaml")
    for line in standing.of_registry(params.promote.model, registry.versions(root, params), registry.moves(root, params)):
        print(line)
    print()
    table = Table("stage", "state", "what it does", box=None)
    try:
        for stage in graph.read(root):
            table.add_row(stage.name, "up to date" if stage.current else "to do", stage.description)
        Console().print(table)
    except graph.BusyError as busy:
        print(f"stages: {busy.what}")
    print()
    standing.print_numbers(root, every=every)


@app.command()
def launch(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(config.STAGES)}.", autocompletion=lambda: list(config.STAGES))],
    rollouts: Annotated[
        Path | None,
        typer.Option("--from", help="Stored answers (runs/STAGE/FINGERPRINT/rollout.pt) to train from; publishes nothing."),
    ] = None,
) -> None:
    """Run one stage by itself, as dvc.yaml does: through the DeepSpeed launcher, going on from its last checkpoint if it has one.

    `dvc repro STAGE` is what you want by hand: it brings the stages before it up to date first.
    """
    if config.kind(stage) not in config.STAGES:
        raise UserError(f"unknown stage '{stage}'", remedy=f"one of {', '.join(config.STAGES)}")
    if rollouts is not None:
        from rlhf.launcher.replay import replay

        sys.exit(replay(stage, workspace(), rollouts))
    from rlhf.launcher.launch import launch as launch_stage

    sys.exit(launch_stage(stage, workspace()))


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            help="Number or alias of a version, a folder such as models/ppo, or models:/NAME/VERSION.  "
            "[default: the champion, or else the candidate]"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; at 0 the likeliest answer is given.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="An answer that has not ended by itself is cut off at so many tokens.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="An answer ends before this text; may be given several times.")] = None,
) -> None:
    """Talk to a model. It remembers the dialogue; /reset forgets it, /quit or Ctrl-D ends. Questions may be piped in, one a line."""
    from rlhf.cli import chat as dialogue

    partner = dialogue.choose(model)
    commands = "; /help lists the commands" if sys.stdin.isatty() else ""
    print(f"{partner.name}{commands}", file=sys.stderr, flush=True)  # the answers alone are standard output
    dialogue.converse(partner, dialogue.questions(), lambda text: print(text, end="", flush=True), temperature, max_tokens, stop or ())


app.command()(sweep)
for _command in versions.COMMANDS:
    app.command()(_command)
app.add_typer(feedback.app, name="feedback")


@app.command()
def env() -> None:
    """Print what a bug report should say: versions, machine, workspace, servers. Passwords are left out."""
    from rlhf.cli import environment

    for name, value in environment.report():
        print(f"{name + ':':<12}{value}", flush=True)


@app.command()
def reference() -> None:
    """Print the reference of every key of params.yaml (docs/params.md)."""
    from rlhf.cli.reference import markdown

    print(markdown(), end="")


def _tracking_uri(root: Path, params: config.Params) -> str:
    from rlhf import tracking

    return tracking.tracking_uri(root, params)
