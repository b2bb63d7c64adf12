"""Users and conversations by keyed hashes, and what becomes of the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import config
from rlhf.errors import UserError
from rlhf.feedback.hashes import Hashes
from rlhf.feedback.tables import Answer
from rlhf.serving.record import Record
from tests.feedback.test_recorder import row

REPOSITORY = Path(__file__).resolve().parents[2]


def test_hashes_are_keyed_and_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_HASH_KEY", raising=False)
    for name in "abc":
        (tmp_path / name).mkdir()
    first, again = Hashes(tmp_path / "a"), Hashes(tmp_path / "a")
    other = Hashes(tmp_path / "b")
    assert first.of("user", "ü") == again.of("user", "ü")
    assert len({first.of("user", "ü"), first.of("conversation", "ü"), other.of("user", "ü")}) == 3
    shares = [first.share("user", str(number)) for number in range(4000)]
    assert abs(sum(share < 0.25 for share in shares) / 4000 - 0.25) < 0.03
    assert all(0 <= share < 1 for share in shares)
    assert [path.name for path in (tmp_path / "a/feedback").iterdir()] == ["key"]
    before, key = first.of("user", "ü"), tmp_path / "a/feedback/key"
    key.unlink()
    key.parent.rmdir()
    first.keep()  # what a server hashed with it is found later, too
    assert Hashes(tmp_path / "a", new=False).of("user", "ü") == first.of("user", "ü") == before
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="is missing"):
        Hashes(tmp_path / "c", new=False)
    key.write_text("restored")
    first.keep()
    assert first.of("user", "ü") == Hashes(tmp_path / "a").of("user", "ü") != before
    key.chmod(0o644)
    with pytest.raises(UserError, match="others may read"):
        Hashes(tmp_path / "a")
    monkeypatch.setenv("RLHF_HASH_KEY", "of the team")
    assert Hashes(tmp_path / "a").of("user", "ü") == Hashes(tmp_path / "c").of("user", "ü")
    assert not list((tmp_path / "c").iterdir())


def test_a_key_that_was_made_anew_is_told_of_where_users_were_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params, key = config.load(REPOSITORY / "params.yaml"), tmp_path / "feedback/key"

    def told(name: str) -> bool:
        caplog.clear()
        record = Record(tmp_path, params)
        with record.kept.get().writing() as session:
            session.add(Answer(**row(name, user=record.hashes.of("user", name))))
        record.recorder.stop()
        return "finds nobody who asked before" in caplog.text

    assert not told("anna")
    assert not told("bert")
    key.unlink()
    assert told("carl")
