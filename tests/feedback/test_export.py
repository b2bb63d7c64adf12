"""What ratings say together: figures against values worked by hand, and rows that readers of the project and of the Arena take."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import select

from rlhf.config.data import Columns, ColumnSource, Split
from rlhf.data.formats import Row, read
from rlhf.feedback import pairs
from rlhf.feedback.database import Database
from rlhf.feedback.export import export, write
from rlhf.feedback.figures import figures, win_rates
from rlhf.feedback.pairs import Written
from rlhf.feedback.tables import Opinion, Pair, Rating
from rlhf.feedback.verdicts import Judged, agreement, held, judged, waiting
from tests.feedback.conftest import params_with
from tests.feedback.test_tables import answer

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
EXCHANGED = {"a": "b", "b": "a"}


def put(record: Database, number: int, *choices: str, gold: str | None = None, edit: str | None = None) -> int:
    """A pair, rated by Ada, Bob and so on; every second one sees the sides exchanged. A choice is of the pair's own sides."""
    with record.writing() as session:
        answers = (Written(f"one {number}", "assistant/1", 5), Written(f"two {number}", "assistant/2", 6))
        pairs.add(session, "sample", [{"role": "user", "content": f"Q{number}"}], answers, gold=gold)
        pair = list(session.scalars(select(Pair).order_by(Pair.id)))[-1]
        for place, (choice, rater) in enumerate(zip(choices, ("Ada", "Bob", "Cy"), strict=False)):
            swapped = place % 2 == 1
            pressed = EXCHANGED.get(choice, choice) if swapped else choice
            given = {"reason": "unclear" if choice == "skip" else None, "edit": edit if place == 0 else None}
            session.add(Rating(token=f"{pair.id}-{rater}", pair=pair, rater=rater, swapped=swapped, choice=pressed, at=AT, **given))
        return pair.id


def test_ties_and_both_bad_become_no_pairs(record: Database, tmp_path: Path) -> None:
    for number, choices in enumerate((("a", "a"), ("b", "b", "a"), ("tie", "tie"), ("both-bad", "both-bad"), ("a", "b"), ("a", "tie"))):
        put(record, number, *choices)
    put(record, 6, "skip")
    put(record, 7, "a", gold="first")
    with record.reading() as session:
        done = export(session)
    write(done, tmp_path)
    assert [(row["chosen"], row["rejected"], row["confidence"]) for row in done.rows["pairs"]] == [
        ("one 0", "two 0", 1.0),
        ("two 1", "one 1", pytest.approx(2 / 3)),
    ]
    assert [row["decision"] for row in done.rows["undecided"]] == ["tie", "both-bad", "undecided", "undecided"]
    assert done.lines[2] == "undecided.jsonl: 4 rows (1 both-bad, 1 tie, 2 undecided)"
    # the Arena's columns: model_a is what stood on the left
    arena = done.rows["arena"]
    assert len(arena) == 13
    assert [(row["model_a"], row["winner"]) for row in arena[:5]] == [
        ("assistant/1", "model_a"),
        ("assistant/2", "model_b"),
        ("assistant/1", "model_b"),
        ("assistant/2", "model_a"),
        ("assistant/1", "model_a"),
    ]
    assert {row["winner"] for row in arena} == {"model_a", "model_b", "tie", "tie (bothbad)"}
    assert arena[1]["conversation_a"][-1] == {"role": "assistant", "content": "two 0"}
    columns = "question_id model_a model_b winner judge conversation_a conversation_b turn anony language tstamp"
    assert " ".join(arena[0]) == columns
    assert [row.chosen for row in rows_of(tmp_path / "pairs.jsonl", "pairs")] == ["one 0", "two 1"]


def rows_of(file: Path, form: Literal["pairs", "messages"]) -> list[Row]:
    """The rows as stage prepare reads them."""
    columns = Columns(**{name: name for name in Columns.model_fields})
    split = Split(text=0, sft=1, reward=0, ppo=0, judge=0, heldout=0)
    place = {"path": str(file), "hub": None, "revision": None, "hub_split": None}
    source = ColumnSource(name="ratings", format=form, columns=columns, split=split, weight=1.0, **place)
    found = list(read(source, "key", Path("/"), 0))
    rows = [row for row in found if isinstance(row, Row)]
    assert rows == found
    return rows


def test_edits_are_demonstrations_and_better_than_what_they_mend(record: Database, tmp_path: Path) -> None:
    put(record, 0, "b", edit="two, mended")
    put(record, 1, "a", gold="first", edit="gold, mended")  # hidden among the others, and never exported
    with record.writing() as session:
        said: list[dict[str, Any]] = [{"edit": "Wir."}, {"thumb": -1}, {"thumb": 1}, {"thumb": -1}, {"thumb": 1}]
        session.add_all([answer(str(number), finish="stop" if number < 3 else "length") for number in range(5)])
        session.flush()
        session.add_all([Opinion(token=str(number), answer_id=number, **one) for number, one in enumerate(said, start=1)])
    with record.reading() as session:
        done = export(session)
    write(done, tmp_path)
    assert [(row["chosen"], row["rejected"]) for row in done.rows["pairs"]] == [
        ("two 0", "one 0"),
        ("two, mended", "two 0"),
        ("Wir.", "Ich. 🧪"),
    ]
    assert [row.chosen for row in rows_of(tmp_path / "demonstrations.jsonl", "messages")] == ["two, mended", "Wir."]
    assert [row["label"] for row in done.rows["thumbs"]] == [False, True, False]  # what was cut off is a bad example at most


def test_the_same_answers_brought_twice_are_one_row(record: Database) -> None:
    put(record, 0, "a", "a")
    with record.writing() as session:
        other = Pair(name="again", source="shadow", prompt=[{"role": "user", "content": "Q0"}])
        other.first_text, other.second_text, other.first_version, other.second_version = "two 0", "one 0", "assistant/2", "assistant/1"
        session.add(other)
        session.add(Rating(token="x", pair=other, rater="Cy", swapped=False, choice="a"))
    with record.reading() as session:
        (row,) = export(session).rows["pairs"]
    assert (row["chosen"], row["confidence"], row["ratings"]) == ("one 0", pytest.approx(2 / 3), 3)


def test_the_last_word_of_a_user_or_rater_counts(record: Database) -> None:
    put(record, 0, "a")
    with record.writing() as session:
        other = Pair(name="again", source="shadow", prompt=[{"role": "user", "content": "Q0"}])
        other.first_text, other.second_text, other.first_version, other.second_version = "two 0", "one 0", "assistant/2", "assistant/1"
        session.add_all([other, Rating(token="x", pair=other, rater="Ada", swapped=False, choice="a")])
        session.add_all([answer(str(number), text=f"text {number // 2}", user=f"u{number % 2}") for number in range(6)])
        session.add(answer("again", text="text 2", user="u0"))
        session.flush()
        said: list[tuple[int, dict[str, Any]]] = [
            (1, {"thumb": 1}),
            (1, {"thumb": -1}),
            (2, {"thumb": 1}),
            (3, {"thumb": -1}),
            (3, {"edit": "Wir."}),
            (3, {"edit": "Sie."}),
            (3, {"thumb": 1}),
            (4, {"thumb": 1}),
            (4, {"comment": "so?"}),
            (5, {"thumb": 1}),  # word for word what the same user was told again
            (7, {"thumb": -1}),
        ]
        session.add_all([Opinion(token=str(token), answer_id=number, **more) for token, (number, more) in enumerate(said)])
    with record.reading() as session:
        done = export(session)
    assert [(row["chosen"], row["rejected"], row.get("ratings")) for row in done.rows["pairs"]] == [
        ("two 0", "one 0", 1),
        ("Sie.", "text 1", 1),
    ]
    assert [row["messages"][-1]["content"] for row in done.rows["demonstrations"]] == ["Sie."]
    assert [(row["completion"], row["label"]) for row in done.rows["thumbs"]] == [
        ("text 0", False),
        ("text 0", True),
        ("text 1", True),
        ("text 2", False),
    ]
    assert len(done.opinions) == len(said)


def test_a_pair_that_is_data_does_not_come_in_the_other_way_round(record: Database) -> None:
    put(record, 0, "a")
    with record.writing() as session:
        session.get_one(Rating, 1).ingested = AT
    for rater in ("Bob", "Cy"):
        with record.writing() as session:
            session.add(Rating(token=rater, pair_id=1, rater=rater, swapped=False, choice="b"))
    with record.reading() as session:
        done = export(session, new=True)
        assert [len(export(session).rows[name]) for name in ("pairs", "undecided")] == [1, 0]
    assert done.rows["pairs"] == []
    assert [row["decision"] for row in done.rows["undecided"]] == ["contrary to data"]
    assert len(done.ratings) == 2


def test_what_was_ingested_is_not_new(record: Database) -> None:
    put(record, 0, "a", "a", edit="mended")
    put(record, 1, "a")  # one rater short
    with record.reading() as session:
        assert waiting(session, 2) == 2
        assert len(export(session, 2, new=True).rows["pairs"]) == 2
    with record.writing() as session:
        for rating in export(session, 2, new=True).ratings:
            session.get_one(Rating, rating.id).ingested = AT
    with record.reading() as session:
        assert waiting(session, 2) == 0
        assert [*export(session, 2, new=True).rows.values()] == [[]] * 5
        assert len(export(session, 2).rows["pairs"]) == 2


def test_figures_are_those_worked_by_hand(record: Database) -> None:
    put(record, 0, "a", "a")
    put(record, 1, "a", "b")
    put(record, 2, "tie", "both-bad")
    put(record, 3, "b")
    put(record, 4, "a", "b", gold="first")
    with record.reading() as session:
        found = figures(session, params_with(ratings=2))
    assert (found.days, found.pairs, found.complete, found.waiting) == ([("2026-03-01", 9)], 4, 3, 6)
    assert found.decisions == {"one side": 2, "undecided": 2}
    # of seven ratings and one tie that each two versions count for: (3 + 2/2 + 1/2) / 8
    best = found.versions[0]
    assert (best.version, best.wins, best.losses, best.ties) == ("assistant/1", 3, 2, 2)
    assert best.rate == pytest.approx(4.5 / 8)
    assert best.low < best.rate < best.high
    # alpha by its definition: of three units with two values each, one disagrees; values a, a, a, b, neither, neither
    assert found.agreement
    expected = 1 - (2 / 6) / ((3 * 3 + 1 * 5 + 2 * 4) / (6 * 5))
    assert found.agreement.alpha == pytest.approx(expected)
    assert found.agreement.pairs == 3
    ada, bob = found.raters
    assert [(one.name, one.ratings, one.skipped, one.gold.part, one.gold.of) for one in (ada, bob)] == [
        ("Ada", 5, 0, 1, 1),
        ("Bob", 4, 0, 0, 1),
    ]
    assert (ada.left.part, ada.left.of) == (3, 4)
    assert (bob.left.part, bob.left.of) == (2, 3)


def test_a_version_that_never_lost_has_a_rate_below_one(record: Database) -> None:
    for number in range(9):
        put(record, number, "a")
    with record.reading() as session:
        best, worst = win_rates(judged(held(session)), 1)
        assert (best.version, best.rate) == ("assistant/1", pytest.approx(9.5 / 10))
        assert worst.rate == pytest.approx(0.5 / 10)
        assert agreement(judged(held(session)), 1) is None  # one rater each


def test_repeats_tell_who_judges_the_same_again(record: Database) -> None:
    first = put(record, 0, "a")
    with record.writing() as session:
        again = Pair(**{name: getattr(session.get_one(Pair, first), name) for name in ("source", "prompt", "first_text", "second_text")})
        again.name, again.repeat_of, again.first_version, again.second_version = "repeat/1", first, "assistant/1", "assistant/2"
        session.add(again)
        session.add(Rating(token="r", pair=again, rater="Ada", swapped=True, choice="a"))
    with record.reading() as session:
        found = figures(session, params_with())
        assert [(one.repeats.part, one.repeats.of) for one in found.raters] == [(0, 1)]
        assert found.pairs == 1
        assert isinstance(judged(held(session))[0], Judged)
