"""What the engine's thread says reaches the event loop: at once what is first or last, and what comes in between together."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time

from rlhf.serving.mailbox import SECONDS_BETWEEN, Mailbox
from rlhf.serving.requests import End, Event, Piece, Token
from rlhf.serving.server import listen


def heard(events: list[Event], pause: float) -> list[tuple[float, Event]]:
    """What a loop gets, and when, of events that a thread sends with pauses between them."""

    async def main() -> list[tuple[float, Event]]:
        box = Mailbox()
        found: list[tuple[float, Event]] = []

        def send() -> None:
            for event in events:
                box.put(event)
                time.sleep(pause)

        threading.Thread(target=send).start()
        began = time.monotonic()
        while not found or not isinstance(found[-1][1], End):
            event = await box.get()
            found.append((time.monotonic() - began, event))
        return found

    return asyncio.run(main())


def test_pieces_that_come_close_together_are_one() -> None:
    pieces: list[Event] = [Piece(number % 2, f"{number} ", (Token(number, 0.0, ()),)) for number in (0, 2, 4, 6, 1, 3, 8)]
    found = [event for _, event in heard([*pieces, End(0, "stop", 9)], 0.0)]
    told = [event for event in found if isinstance(event, Piece)]
    assert "".join(piece.text for piece in told) == "0 2 4 6 1 3 8 "
    assert [token.number for piece in told for token in piece.tokens] == [0, 2, 4, 6, 1, 3, 8]
    assert all({token.number % 2 for token in piece.tokens} == {piece.choice} for piece in told)
    assert len(told) < len(pieces)


def test_the_first_piece_and_the_end_wait_for_nothing() -> None:
    pause = SECONDS_BETWEEN / 10
    found = heard([*(Piece(0, "a", ()) for _ in range(25)), End(0, "stop", 25)], pause)
    assert found[0][0] < SECONDS_BETWEEN / 2
    assert found[0][1] == Piece(0, "a", ())
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(found[:-1])]
    assert gaps
    assert max(gaps) > SECONDS_BETWEEN / 2
    assert len(found) < 15


def test_what_is_sent_goes_out_at_once() -> None:
    with listen("127.0.0.1", 0, asks=False) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio decides that TCP_NODELAY is to be set
