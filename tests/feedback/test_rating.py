"""What raters are shown, in which order, and what becomes of each press: repeats, gold pairs, undo, forms that come twice."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from rlhf.config import Params
from rlhf.feedback import pairs
from rlhf.feedback.database import Database
from rlhf.feedback.pairs import Written
from rlhf.feedback.rating import REPEAT_AFTER, Given, Rater, Shown, StaleError
from rlhf.feedback.tables import Answer, Choice, Pair, Rating
from tests.feedback.conftest import params_with
from tests.feedback.test_tables import answer


def fill(record: Database, count: int, *, gold: int = 0) -> None:
    with record.writing() as session:
        for number in range(count):
            answers = (Written(f"good {number}", "assistant/1"), Written(f"bad {number}", "assistant/2"))
            pairs.add(session, "sample", [{"role": "user", "content": f"Q{number}"}], answers)
        for number in range(gold):
            answers = (Written(f"right {number}", pairs.GIVEN), Written(f"wrong {number}", pairs.GIVEN))
            pairs.add(session, "given", [{"role": "user", "content": f"G{number}"}], answers, gold="first")


def see(record: Database, params: Params, name: str) -> Shown | None:
    with record.writing() as session:
        return Rater(session, params, name).next()


def press(record: Database, params: Params, name: str, shown: Shown, choice: Choice, edit: str | None = None) -> None:
    with record.writing() as session:
        Rater(session, params, name).rate(Given(shown.token, shown.pair.id, choice, "unclear" if choice == "skip" else None, edit))


def rate_all(record: Database, params: Params, name: str, prefers: str = "good") -> list[Shown]:
    """Rate until nothing is left: the answer that begins with a word, else A."""
    seen = []
    while shown := see(record, params, name):
        press(record, params, name, shown, "b" if shown.texts[1].startswith((prefers, "right")) else "a")
        seen.append(shown)
    return seen


def held(record: Database) -> list[Rating]:
    with record.reading() as session:
        return list(session.scalars(select(Rating).where(Rating.revoked.is_(None)).order_by(Rating.id)))


def test_each_pair_goes_to_so_many_raters_and_no_further(record: Database) -> None:
    params = params_with(gold_share=0.0, repeat_share=0.0)
    fill(record, 12)
    first = rate_all(record, params, "Ada")
    assert sorted(shown.pair.id for shown in first) == list(range(1, 13))
    second = rate_all(record, params, "Bob")
    assert {shown.pair.id for shown in second} == {shown.pair.id for shown in first}
    assert [shown.pair.id for shown in second] != [shown.pair.id for shown in first]
    assert see(record, params, "Cy") is None  # two have rated each
    # the sides are drawn for pair and rater, and stored
    assert {shown.swapped for shown in first} == {True, False}
    assert [shown.swapped for shown in sorted(first, key=lambda shown: shown.pair.id)] != [
        shown.swapped for shown in sorted(second, key=lambda shown: shown.pair.id)
    ]
    assert {rating.verdict for rating in held(record)} == {"first"}


def test_a_pair_that_is_shown_again_is_the_same_form_and_one_rating(record: Database) -> None:
    params = params_with(gold_share=0.0, repeat_share=0.0)
    fill(record, 3)
    shown, again = see(record, params, "Ada"), see(record, params, "Ada")
    assert shown
    assert again
    assert (shown.pair.id, shown.swapped, shown.token) == (again.pair.id, again.swapped, again.token)
    for _ in range(3):
        press(record, params, "Ada", shown, "a")
    assert len(held(record)) == 1
    with pytest.raises(StaleError, match="with another choice"):
        press(record, params, "Ada", shown, "b")
    with pytest.raises(StaleError):  # somebody else's form
        press(record, params, "Bob", shown, "a")
    other = see(record, params, "Ada")
    assert other
    with pytest.raises(StaleError, match="as they stand"):
        press(record, params, "Ada", Shown(other.pair, False, shown.token[::-1]), "a")


def test_undo_takes_back_the_last_one_and_shows_it_again(record: Database) -> None:
    params = params_with(gold_share=0.0, repeat_share=0.0)
    fill(record, 3)
    shown = []
    choices: list[Choice] = ["a", "both-bad"]
    for choice in choices:
        found = see(record, params, "Ada")
        assert found
        press(record, params, "Ada", found, choice)
        shown.append(found)
    with pytest.raises(StaleError, match="only the last"), record.writing() as session:
        Rater(session, params, "Ada").undo(shown[0].token)
    for _ in range(2):  # what comes twice undoes once
        with record.writing() as session:
            assert Rater(session, params, "Ada").undo(shown[1].token) is session.get(Pair, shown[1].pair.id)
    back = see(record, params, "Ada")
    assert back
    assert (back.pair.id, back.swapped) == (shown[1].pair.id, shown[1].swapped)
    assert back.token != shown[1].token
    press(record, params, "Ada", shown[1], "both-bad")  # the old form is the old rating, which stays undone
    assert [rating.choice for rating in held(record)] == ["a"]
    press(record, params, "Ada", back, "tie")
    assert [rating.choice for rating in held(record)] == ["a", "tie"]
    with record.writing() as session:
        for rating in session.scalars(select(Rating)):
            rating.ingested = rating.at
    with pytest.raises(StaleError, match="until it has been ingested"), record.writing() as session:
        Rater(session, params, "Ada").undo(back.token)


def test_gold_pairs_and_repeats_with_exchanged_sides_are_hidden_among_the_others(record: Database) -> None:
    params = params_with(ratings=1, gold_share=0.3, repeat_share=0.3)
    fill(record, 40, gold=5)
    seen = rate_all(record, params, "Ada")
    gold = [shown for shown in seen if shown.pair.gold]
    repeats = [shown for shown in seen if shown.pair.repeat_of]
    assert len(gold) == 5
    assert len(repeats) > 5
    assert len(seen) == 40 + len(gold) + len(repeats)
    places = {shown.pair.id: place for place, shown in enumerate(seen)}
    for shown in repeats:
        before = seen[places[shown.pair.repeat_of or 0]]
        assert shown.texts == before.texts[::-1]
        assert places[shown.pair.id] > places[before.pair.id] + REPEAT_AFTER
    # the next rater's repeats of a pair are of the same second pair, and its ratings count for none
    with record.reading() as session:
        assert session.scalar(select(func.count()).select_from(Pair).where(Pair.repeat_of.is_not(None))) == len(repeats)
    assert see(record, params, "Bob") is None


def test_a_skip_leaves_the_pair_to_others(record: Database) -> None:
    params = params_with(ratings=1)
    fill(record, 1)
    shown = see(record, params, "Ada")
    assert shown
    press(record, params, "Ada", shown, "skip")
    assert see(record, params, "Ada") is None
    assert see(record, params, "Bob")


def test_shadow_answers_become_pairs_once(record: Database) -> None:
    with record.writing() as session:
        session.add_all(
            [
                answer("one", correlation="c1", user="u"),
                answer("one-shadow", correlation="c1", shadow=True, version="assistant/2", text="Er."),
                answer("two", correlation="c2"),
                answer("two-shadow", correlation="c2", shadow=True, version="assistant/2"),  # word for word the same
                answer("three"),
                answer("four", correlation="c4", finish="length"),  # cut off: it could win
                answer("four-shadow", correlation="c4", shadow=True, version="assistant/2", text="Er."),
                answer("five", correlation="c5"),
                answer("five-shadow", correlation="c5", shadow=True, version="assistant/2", text="Er.", finish="length"),
            ]
        )
    for new in (1, 0):
        with record.writing() as session:
            assert pairs.from_shadows(session) == new
    with record.reading() as session:
        (pair,) = session.scalars(select(Pair))
        assert (pair.first_text, pair.second_text, pair.source) == ("Ich. 🧪", "Er.", "shadow")
        assert (pair.first_version, pair.second_version, pair.second_answer) == ("assistant/1", "assistant/2", 2)
        assert session.get_one(Answer, pair.first_answer).user == "u"


def test_a_form_of_a_pair_that_was_forgotten_fits_no_other_one(record: Database) -> None:
    params = params_with(gold_share=0.0, repeat_share=0.0)
    with record.writing() as session:
        session.add_all([answer("one", correlation="c", user="u"), answer("two", correlation="c", shadow=True, user="u", text="Er.")])
        session.flush()
        session.scalars(select(Answer).where(Answer.shadow)).one().version = "assistant/2"
        assert pairs.from_shadows(session) == 1
    before = see(record, params, "Ada")
    assert before
    record.forget("u")
    fill(record, 1)
    with pytest.raises(StaleError):
        press(record, params, "Ada", before, "a")
    assert held(record) == []


def test_shadows_that_differ_in_blanks_alone_hide_no_others(record: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MOST_AT_ONCE", 1)
    with record.writing() as session:
        for number, text in enumerate(("Ich. 🧪\n", "\u3000Ich. 🧪\t", "Er.")):
            more = {"version": "assistant/2", "text": text, "shadow": True}
            both = (answer(f"{number}", correlation=f"c{number}"), answer(f"s{number}", correlation=f"c{number}", **more))
            session.add_all(both)
            session.flush()
        assert pairs.from_shadows(session) == 1


def test_an_edit_that_the_record_holds_otherwise_is_known_when_it_comes_again(record: Database) -> None:
    params = params_with(gold_share=0.0, repeat_share=0.0)
    fill(record, 1)
    shown = see(record, params, "Ada")
    assert shown
    for _ in range(2):
        press(record, params, "Ada", shown, "a", "one\0two")
    assert [rating.edit for rating in held(record)] == ["one\ufffdtwo"]
