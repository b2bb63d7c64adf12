"""What an engine tells of its answers: at once what is first or last, and what comes in between together."""

from __future__ import annotations

import pytest

from rlhf.serving import outbox
from rlhf.serving.outbox import Outbox, Told, events_of
from rlhf.serving.requests import End, Event, Piece, Token


class Sent:
    """An outbox, and what has left it."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.box = Outbox(self.told.extend)

    def put(self, *events: tuple[int, Event]) -> list[tuple[int, Event]]:
        """What goes out once these have come, by request."""
        for request, event in events:
            self.box.put(request, event)
        self.told.clear()
        self.box.flush()
        return [(each[0], event) for each in self.told for event in events_of(each)]


def test_the_first_piece_and_the_end_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SECONDS_BETWEEN", 60.0)
    sent = Sent()
    assert sent.put((1, Piece(0, "a", ()))) == [(1, Piece(0, "a", ()))]
    assert sent.put((1, Piece(0, "b", ())), (2, Piece(0, "x", ())), (1, Piece(1, "y", ()))) == [
        (2, Piece(0, "x", ())),
        (1, Piece(1, "y", ())),
    ]
    assert sent.put((1, Piece(0, "c", ())), (1, Piece(1, "z", ()))) == []
    assert sent.put((1, End(0, "stop", 3))) == [(1, Piece(0, "bc", ())), (1, End(0, "stop", 3))]
    assert sent.put((1, End(1, "cancelled", 2)), (2, End(0, "length", 1))) == [
        (1, Piece(1, "z", ())),
        (1, End(1, "cancelled", 2)),
        (2, End(0, "length", 1)),
    ]
    assert not sent.box._held
    assert not sent.box._next


def test_pieces_that_come_close_together_are_one_with_all_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])
    sent = Sent()
    found: list[tuple[int, Event]] = []
    for number in range(20):
        found += sent.put((7, Piece(0, f"{number} ", (Token(number, 0.0, ()),))))
        now[0] += 0.01
    found += sent.put((7, End(0, "length", 20)))
    pieces = [event for _, event in found if isinstance(event, Piece)]
    assert "".join(piece.text for piece in pieces) == "".join(f"{number} " for number in range(20))
    assert [token.number for piece in pieces for token in piece.tokens] == [*range(20)]
    assert [len(piece.tokens) for piece in pieces] == [1, 5, 5, 5, 4]


def test_tokens_without_text_are_told_and_nothing_is_no_piece() -> None:
    sent, token = Sent(), Token(3, -1.0, ())
    assert sent.put((1, Piece(0, "", (token,))), (1, End(0, "stop", 2))) == [(1, Piece(0, "", (token,))), (1, End(0, "stop", 2))]
    assert sent.put((2, End(0, "error", 0))) == [(2, End(0, "error", 0))]
