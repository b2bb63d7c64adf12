"""Ratings become data: refused where raters do not agree, each taken once, by hand or by their number; no held-out prompt is trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import delete, func, select

from rlhf import config
from rlhf.cli import ratings as taking
from rlhf.cli.feedback import forget
from rlhf.cli.ratings import _note, ingest
from rlhf.errors import UserError
from rlhf.feedback import database, pairs
from rlhf.feedback.database import Database, Kept
from rlhf.feedback.export import export
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.pairs import Written
from rlhf.feedback.rating import Rater, StaleError
from rlhf.feedback.tables import TAKING, Answer, Opinion, Pair, Rating, now
from rlhf.feedback.verdicts import waiting
from rlhf.job import Job, read_lines, write_lines
from rlhf.locks import lock
from rlhf.serving.ingesting import Ratings
from rlhf.stages.prepare import main as prepare
from rlhf.workspace import presets
from tests.feedback.conftest import params_with
from tests.feedback.test_tables import answer

PROJECT = Path(__file__).parents[2]
FEW = [f"data.sources.{number}.rows=60" for number in range(4)]


class Workspace:
    """A DVC workspace of the sandbox with few rows, and its record."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("presets", "graphs"):
            shutil.copytree(PROJECT / folder, root / folder)
        for words in (["git", "init", "--quiet"], [str(Path(sys.executable).with_name("dvc")), "init", "--quiet"]):
            subprocess.run(words, cwd=root, check=True)
        presets.use(root, "sandbox", FEW)
        self.record: Database = database.connect(root, self.params)

    @property
    def params(self) -> config.Params:
        return config.load(self.root / "params.yaml")

    def rate(self, prompts: list[Any], *choices: str, edit: str | None = None) -> None:
        """Add pairs that so many raters choose a side of."""
        with self.record.writing() as session:
            for prompt in prompts:
                answers = (Written("Yes, gladly.", "assistant/1"), Written("No.", "assistant/2"))
                assert pairs.add(session, "sample", prompt, answers)
                pair = list(session.scalars(select(Pair).order_by(Pair.id)))[-1]
                for rater, choice in enumerate(choices):
                    given = {"token": f"{pair.id}/{rater}", "rater": str(rater), "swapped": False, "edit": edit if rater == 0 else None}
                    session.add(Rating(pair=pair, choice=choice, **given))

    def rows(self, source: str) -> list[list[dict[str, Any]]]:
        """Those of each part."""
        return [read_lines(part) for part in sorted((self.root / "data/raw" / source).glob("*.jsonl"))]

    def prepared(self) -> tuple[dict[str, Any], list[Any]]:
        """What stage prepare counted, and the prompts that it held out."""
        folder = self.root / "job"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        prepare(Job("prepare", self.params, self.root, folder, "cpu", 0, 1, 0))
        counted = json.loads((folder / "out/metrics/prepare.json").read_text())
        return counted, [row["prompt"] for row in read_lines(folder / "out/data/prepared/heldout_prompts.jsonl")]


def asking(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    found = Workspace(tmp_path_factory.mktemp("work"))
    yield found
    found.record.close()


def test_raters_that_do_not_agree_are_refused(workspace: Workspace) -> None:
    before = (workspace.root / "params.yaml").read_bytes()
    workspace.rate([asking(f"alike {number}") for number in range(3)], "a", "a")
    with pytest.raises(UserError, match="cannot be told"):
        ingest(workspace.root, workspace.params)
    workspace.rate([asking(f"apart {number}") for number in range(4)], "a", "b")
    with pytest.raises(UserError, match=r"alpha of 7 pairs is -0\.\d+ .*, and feedback.min_agreement is 0.3; nothing was added") as refused:
        ingest(workspace.root, workspace.params)
    assert "rlhf feedback figures" in refused.value.remedy
    assert (workspace.root / "params.yaml").read_bytes() == before
    assert not (workspace.root / "data/raw/ratings").exists()


def kept(root: Path, params: config.Params) -> Kept:
    return Kept(lambda: database.connect(root, params))


def test_so_many_ratings_become_data_by_themselves_and_once(workspace: Workspace) -> None:
    presets.use(workspace.root, str(workspace.root / "params.yaml"), ["feedback.min_agreement=null", "feedback.ingest_ratings=16"])
    ratings = Ratings(workspace.root, workspace.params, kept(workspace.root, workspace.params))
    assert not ratings.due()  # 14
    workspace.rate([asking("one rater short")], "a")
    workspace.rate([asking("neither")], "tie", "both-bad")
    workspace.rate([asking("mended")], "b", "b", edit="No, sorry.")
    assert ratings.due()
    ratings.start()
    deadline = time.monotonic() + 120
    while ratings.due():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ratings.stop()

    sources = {source.name: source for source in workspace.params.data.sources}
    assert list(sources)[-2:] == ["ratings", "corrections"]
    assert (sources["ratings"].split.reward, sources["corrections"].split.sft) == (1, 1)
    (part,) = workspace.rows("ratings")
    assert sorted(row["prompt"][0]["content"] for row in part) == ["alike 0", "alike 1", "alike 2", "mended", "mended"]
    assert ("No, sorry.", "No.") in {(row["chosen"], row["rejected"]) for row in part}
    assert workspace.rows("corrections") == [[{"messages": [*asking("mended"), {"role": "assistant", "content": "No, sorry."}]}]]
    (undecided,) = (workspace.root / "feedback/undecided").iterdir()
    assert len(read_lines(undecided)) == 5
    versioned = yaml.safe_load((workspace.root / "data/raw/ratings.dvc").read_text())["outs"]
    assert versioned[0]["nfiles"] == 1

    assert ingest(workspace.root, workspace.params) == []
    # a kill before they were noted: the rows are known, and come in no second time
    with workspace.record.writing() as session:
        for rating in session.scalars(select(Rating)):
            rating.ingested = None
    assert [done.rows for done in ingest(workspace.root, workspace.params)] == [0, 0, 0]
    assert workspace.rows("ratings") == [part]


def test_what_waited_long_enough_is_due(workspace: Workspace) -> None:
    feedback = workspace.params.feedback.model_copy(update={"ingest_ratings": None, "ingest_hours": 2.0})
    params = workspace.params.model_copy(update={"feedback": feedback})
    ratings = Ratings(workspace.root, params, kept(workspace.root, params))
    workspace.rate([asking("waits")], "a", "a")
    assert not ratings.due()
    with workspace.record.writing() as session:
        for rating in session.scalars(select(Rating).where(Rating.ingested.is_not(None))):
            rating.ingested = now() - timedelta(hours=3)
    assert ratings.due()
    ratings.stop()


def test_edits_of_an_application_alone_are_due_as_well(tmp_path: Path) -> None:
    params = params_with(ingest_ratings=None, ingest_hours=2.0)
    ratings = Ratings(tmp_path, params, kept(tmp_path, params))
    for hours, due in ((1, False), (3, True)):
        with ratings.record.writing() as session:
            own = answer(f"r{hours}")
            session.add_all([own, Opinion(token=f"t{hours}", answer=own, edit="Wir.", at=now() - timedelta(hours=hours))])
        assert ratings.due() is due
    ratings.stop()


def test_a_record_whose_file_was_deleted_is_opened_anew(tmp_path: Path) -> None:
    ratings = Ratings(tmp_path, params_with(ingest_ratings=1), kept(tmp_path, params_with(ingest_ratings=1)))
    assert not ratings.due()
    for file in (tmp_path / "feedback").glob("feedback.db*"):
        file.unlink()
    with ratings.record.writing() as session:
        session.add(answer("r"))
    with ratings.record.reading() as session:
        assert session.scalar(select(func.count()).select_from(Answer)) == 1
    ratings.stop()


def test_a_refusal_is_no_problem_any_more_once_nothing_is_due(tmp_path: Path) -> None:
    ratings = Ratings(tmp_path, params_with(ingest_ratings=1), kept(tmp_path, params_with(ingest_ratings=1)))
    ratings.problem = "raters agree too little"
    ratings.start()
    deadline = time.monotonic() + 120
    while ratings.problem:  # somebody may have ingested them by hand
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ratings.stop()


def test_held_out_prompts_do_not_enter_by_this_door(workspace: Workspace) -> None:
    counted, heldout = workspace.prepared()
    assert counted["sources"]["ratings"]["leaked"] == 0
    workspace.rate(heldout[:3], "a", "a")
    # with the one that waited above, they are one more part
    (done,) = ingest(workspace.root, workspace.params)
    assert (done.source, done.rows) == ("ratings", 4)
    assert [len(rows) for rows in workspace.rows("ratings")] == [5, 4]
    after, still = workspace.prepared()
    assert still == heldout
    assert after["sources"]["ratings"]["leaked"] == 3
    assert after["sources"]["ratings"]["used"]["reward"] == 5 + 1


def test_what_is_forgotten_while_it_is_ingested_fails_nothing(workspace: Workspace) -> None:
    workspace.rate([asking("stays"), asking("goes")], "a", "a")
    with workspace.record.reading() as session:
        found = export(session, 2, new=True)
    with workspace.record.writing() as session:
        session.execute(delete(Pair).where(Pair.id == max(judged.pair.id for judged in found.pairs)))
    _note(workspace.record, found, now())
    assert ingest(workspace.root, workspace.params) == []


def test_what_is_being_ingested_is_not_undone_and_what_was_refused_can_be(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.rate([asking("while it goes in")], "a", "a")
    undone = []

    def undo() -> None:
        with workspace.record.writing() as session:
            last = session.scalars(select(Rating).where(Rating.rater == "1").order_by(Rating.id.desc())).first()
            assert last
            Rater(session, workspace.params, "1").undo(last.token)
        undone.append(last.id)

    def fails(*_: Any) -> Any:
        with pytest.raises(StaleError, match="until it has been ingested"):
            undo()
        raise UserError("the disk is full", remedy="make room")

    with monkeypatch.context() as patch:
        patch.setattr(taking, "_added", fails)
        with pytest.raises(UserError, match="the disk is full"):
            ingest(workspace.root, workspace.params)
    with workspace.record.reading() as session:
        assert waiting(session, 2) == 2
    undo()  # nothing of it is data
    assert len(undone) == 1
    assert ingest(workspace.root, workspace.params) == []
    workspace.rate([asking("then killed")], "b", "b")
    with workspace.record.writing() as session:  # as a kill leaves them
        for rating in session.scalars(select(Rating).where(Rating.ingested.is_(None), Rating.revoked.is_(None))):
            rating.ingested = TAKING
    with pytest.raises(StaleError):
        undo()
    with workspace.record.reading() as session:
        assert waiting(session, 2) == 2
    assert [one.rows for one in ingest(workspace.root, workspace.params)] == [1]


def test_nobody_is_forgotten_while_ratings_are_being_ingested(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.root)
    with lock(workspace.root, "ingest"), pytest.raises(UserError, match="may hold what this user asked"):
        forget("anna")
    forget("anna")


def test_of_who_is_forgotten_no_row_stays_aside_and_what_is_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").touch()
    record = database.connect(tmp_path, config.load(tmp_path / "params.yaml"))
    undecided, left = tmp_path / "feedback/undecided/day.jsonl", tmp_path / "feedback/ingest-killed"
    with record.writing() as session:
        for name in ("anna", "bert"):  # both ask the same, and are answered differently
            user = Hashes(tmp_path).of("user", name)
            for number, choice in enumerate(("a", "tie", "b")):
                both = [answer(f"{name}{number}{side}", user=user, text=f"{name} {number} {side}") for side in "xy"]
                session.add_all(both)
                session.flush()
                written = tuple(Written(one.text, one.version, answer=one.id) for one in both)
                assert pairs.add(session, "sample", both[0].messages or [], (written[0], written[1]))
                pair = list(session.scalars(select(Pair).order_by(Pair.id)))[-1]
                edit = f"{name}, mended" if choice == "b" else None
                session.add(Rating(token=f"{name}{number}", pair=pair, rater="me", swapped=False, choice=choice, edit=edit))
        rows = export(session).rows
    earlier = [{"prompt": row["prompt"], "answer": row["rejected"]} for row in reversed(rows["pairs"])]
    write_lines(undecided, rows["undecided"])
    kinds = {"ratings/day": rows["pairs"], "corrections/1": rows["demonstrations"], "earlier/ratings": earlier}
    for name, own in kinds.items():
        write_lines(tmp_path / f"data/raw/{name}.jsonl", own)
    (tmp_path / "data/raw/ratings/other.jsonl").write_text('7\n{"messages": []}\n{"prompt": "?", "chosen": {}}\nnothing\n')
    left.mkdir()
    monkeypatch.chdir(tmp_path)
    forget("anna")
    said = capsys.readouterr().out
    assert "deleted: 6 answers, 0 opinions, 3 pairs, 3 ratings, 1 rows that were set aside as no pairs" in said
    assert [row["answers"][0][:4] for row in read_lines(undecided)] == ["bert"]
    assert not left.exists()
    for name in kinds:
        lines = (tmp_path / f"data/raw/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        mine = [str(number) for number, line in enumerate(lines, start=1) if "anna" in line]
        assert mine
        assert f"still data: data/raw/{name}.jsonl, line {', '.join(mine)}\n" in said
    assert "other.jsonl" not in said
    forget("bert")
    assert not undecided.exists()
    capsys.readouterr()
    forget("bert")
    assert "nothing that this user asked is recorded" in capsys.readouterr().out
    with record.writing() as session:
        session.add(answer("carl", user=Hashes(tmp_path).of("user", "carl")))
    (tmp_path / "feedback/key").unlink()
    with pytest.raises(UserError, match="the key of users' hashes is missing"):  # it would not find, and say that there is nothing
        forget("carl")
    record.close()


def test_what_no_stage_takes_holds_up_no_others(workspace: Workspace) -> None:
    workspace.rate([asking("good"), asking(""), [*asking("two"), *asking("turns")]], "a", "a", edit="Yes.")
    workspace.rate([asking("said nothing")], "a", "a")
    with workspace.record.writing() as session:
        list(session.scalars(select(Pair).order_by(Pair.id)))[-1].second_text = ""
    done = {one.source: one for one in ingest(workspace.root, workspace.params)}
    assert (done["ratings"].rows, done["corrections"].rows) == (2, 1)
    assert "1 not usable (empty: rejected)" in done["undecided"].lines[0]
    assert "3 not usable (malformed: turn 2 is of role 'user'" in done["undecided"].lines[0]
