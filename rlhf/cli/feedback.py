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
    """Delete all that a user asked, the answers, and what was said of them; what is data already is named."""
    from rlhf.feedback import database, forgetting
    from rlhf.feedback.hashes import Hashes
    from rlhf.locks import lock

    root = workspace()
    # else what is deleted here would become data a moment later
    with lock(root, "ingest", refuse=f"{root}: ratings are being ingested, and may hold what this user asked"):
        record = database.connect(root, config.load(root / "params.yaml"))
        with record.reading() as session:
            name = Hashes(root, new=not forgetting.knows_users(session)).of("user", user)
            texts = forgetting.texts_of(session, name)
        set_aside = forgetting.delete(root, texts)  # first: the record alone knows what to look for
        held = forgetting.data(root, texts)
        gone = record.forget(name)
        record.close()
    if not gone["answers"]:
        print("nothing that this user asked is recorded; what was data before, no later call can find")
        return
    print(f"deleted: {', '.join(f'{count} {table}' for table, count in gone.items())}, {set_aside} rows that were set aside as no pairs")
    for path, lines in held:
        print(f"still data: {path}, line {', '.join(map(str, lines))}")
    if held:
        print("note these lines: docs/serving.md says how they leave the data, its earlier revisions, and what was trained on them")
    print("what `rlhf feedback export` wrote elsewhere, and copies of the record, are yours to look through")
