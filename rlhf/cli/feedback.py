"""`rlhf feedback`: what people said and think."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf import config
from rlhf.cli import rated
from rlhf.workspace.find import workspace

app = typer.Typer(no_args_is_help=True, help="What people asked the assistant, and what they think of its answers.")


@app.callback()
def _options() -> None:
    pass


for _command in rated.COMMANDS:
    app.command()(_command)


@app.command()
def forget(
    user: Annotated[str, typer.Argument(metavar="USER", help="As the application named the user (`user` of its requests).")],
) -> None:
    """Delete all that a user asked, the answers, and what was said of them."""
    from rlhf.feedback import database
    from rlhf.feedback.hashes import Hashes
    from rlhf.locks import lock

    root = workspace()
    # else what is deleted here would become data a moment later
    with lock(root, "ingest", refuse=f"{root}: ratings are being ingested, and may hold what this user asked"):
        record = database.connect(root, config.load(root / "params.yaml"))
        gone = record.forget(Hashes(root).of("user", user))
        record.close()
    if gone["answers"]:
        print(f"deleted: {', '.join(f'{count} {table}' for table, count in gone.items())}; what was exported before stays as data")
    else:
        print("nothing that this user asked is recorded")
