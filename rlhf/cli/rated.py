"""Commands of `rlhf feedback` around ratings: pairs to rate, figures, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from rlhf import config
from rlhf.workspace.find import workspace

if TYPE_CHECKING:
    from rlhf.feedback.database import Database

PromptFile = Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines (or another data file) with a column `prompt`.")]


@contextmanager
def record() -> Iterator[tuple[Path, config.Params, Database]]:
    """The workspace, its params, and the record while it is open."""
    from rlhf.feedback import database

    root = workspace()
    params = config.load(root / "params.yaml")
    found = database.connect(root, params)
    try:
        yield root, params, found
    finally:
        found.close()


def sample(
    file: PromptFile,
    version: Annotated[
        list[str] | None, typer.Option(help="Number or alias of a version; may be given several times.  [default: champion]")
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers of each version to each prompt.")] = 2,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts alone.")] = None,
) -> None:
    """Have versions answer prompts several times, and add the answers as pairs to be rated."""
    from rlhf import registry
    from rlhf.errors import UserError
    from rlhf.feedback import pairs
    from rlhf.feedback.sample import answers as written
    from rlhf.feedback.sample import sampling_of

    versions = version or ["champion"]
    if len(versions) * answers < 2:
        raise UserError("one answer makes no pair", remedy="give --answers 2, or a second --version")
    prompts = [row.prompt for row in _rows(file, "prompts")][:limit]
    with record() as (root, params, found):
        said: list[list[Any]] = [[] for _ in prompts]
        for name in versions:
            one = registry.resolve(root, params, name)
            folder = registry.model_folder(one.uri, root, params)
            texts = written(folder, f"{one.model}/{one.number}", [list(prompt) for prompt in prompts], params, temperature, answers)
            for each, more in zip(said, texts, strict=True):
                each.extend(more)
        with found.writing() as session:
            given = sampling_of(params, temperature)
            new = sum(pairs.add_all(session, "sample", list(prompt), each, given) for prompt, each in zip(prompts, said, strict=True))
    every, whole = len(prompts) * answers * len(versions), sum(map(len, said))
    cut_off = f"; {every - whole} of {every} answers were cut off at serving.max_tokens, {params.serving.max_tokens}, and are left out"
    print(f"{len(prompts)} prompts, {new} new pairs to rate{cut_off if whole < every else ''}")


def evaluated(
    one: Annotated[str, typer.Argument(metavar="VERSION", help="Number or alias of a version.")] = "candidate",
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Number or alias of another one.")] = "champion",
) -> None:
    """Add what two versions answered to the same held-out prompts in their evaluation as pairs to be rated.

    Such ratings say which version is better; none of them is trained on, as their prompts are held out.
    """
    from rlhf.feedback import pairs

    with record() as (root, params, found), found.writing() as session:
        new, prompts = pairs.from_evaluations(session, root, params, one, other)
    print(f"{prompts} prompts that both answered, {new} new pairs to rate")


def gold(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A data file with the columns `prompt`, `chosen` and `rejected`.")],
) -> None:
    """Add pairs whose right verdict is known: they are shown among the others, tell how well a rater does, and are never exported."""
    from rlhf.feedback import pairs

    rows = _rows(file, "pairs")
    with record() as (_, _, found), found.writing() as session:
        new = 0
        for row in rows:
            both = (pairs.Written(row.chosen or "", pairs.GIVEN), pairs.Written(row.rejected or "", pairs.GIVEN))
            new += pairs.add(session, "given", list(row.prompt), both, gold="first")
    print(f"{len(rows)} rows, {new} new gold pairs")


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go; those of an earlier export are replaced.")],
    least: Annotated[int, typer.Option(min=1, help="Pairs with so many ratings at least.")] = 1,
) -> None:
    """Write ratings as rows: pairs.jsonl, demonstrations.jsonl, undecided.jsonl (ties, both bad), thumbs.jsonl and arena.jsonl."""
    from rlhf.feedback import export as exporting

    with record() as (_, _, found), found.reading() as session:
        done = exporting.export(session, least)
        exporting.write(done, folder)
    for line in done.lines:
        print(f"{folder}/{line}")


def figures() -> None:
    """Show ratings a day, win rates of versions, how far raters agree, and each rater's own figures."""
    from rlhf.feedback import figures as counting

    with record() as (_, params, found), found.reading() as session:
        numbers = counting.figures(session, params)
    for table in _tables(numbers):
        Console().print(table)
    decided = ", ".join(f"{name} {count}" for name, count in numbers.decisions.items())
    print(f"{numbers.pairs} pairs rated ({decided or 'none'}), {numbers.complete} complete; {numbers.waiting} ratings wait to become data")
    if agreed := numbers.agreement:
        print(f"Krippendorff's alpha {agreed.alpha:.3f} ({agreed.low:.3f} to {agreed.high:.3f}) of {agreed.pairs} pairs that several rated")
    else:
        print("how far raters agree cannot be told: no two rated the same pairs with different results")


def _tables(numbers: Any) -> Iterator[Table]:
    days = Table("day (UTC)", "ratings", box=None)
    for day, count in numbers.days:
        days.add_row(day, str(count))
    yield days
    versions = Table("version", "win rate", "95 %", "won", "lost", "neither", box=None)
    for one in numbers.versions:
        versions.add_row(one.version, f"{one.rate:.3f}", f"{one.low:.3f}–{one.high:.3f}", str(one.wins), str(one.losses), str(one.ties))
    yield versions
    raters = Table("rater", "ratings", "skipped", "gold right", "same again", "left side", box=None)
    for rater in numbers.raters:
        shares = (f"{share.part} of {share.of}" for share in (rater.gold, rater.repeats, rater.left))
        raters.add_row(rater.name, str(rater.ratings), str(rater.skipped), *shares)
    yield raters


def _rows(file: Path, form: Literal["prompts", "pairs"]) -> list[Any]:
    """The rows of a data file.

    Raises:
        UserError: it holds none, or a damaged one.
    """
    from rlhf.config.data import SLICES, Columns, ColumnSource, Split
    from rlhf.data.formats import Quarantined, read
    from rlhf.errors import UserError

    columns = Columns(**{name: name for name in Columns.model_fields})
    split = Split(**dict.fromkeys(SLICES, 1.0))
    place = {"path": str(file.resolve()), "hub": None, "revision": None, "hub_split": None}
    source = ColumnSource(name="feedback", format=form, columns=columns, split=split, weight=1.0, **place)
    rows = list(read(source, str(file), Path("/"), seed=0))
    for row in rows:
        if isinstance(row, Quarantined):
            raise UserError(f"{file}: line {row.line}: {row.reason}", remedy="mend the row, or leave it out")
    return rows


COMMANDS = (sample, evaluated, gold, figures, export)
