"""Shares of the traffic: what is drawn for whom, exactly none and exactly all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from rlhf import config
from rlhf.config.serving import Traffic as Shares
from rlhf.errors import UserError
from rlhf.feedback.hashes import Hashes
from rlhf.serving.bodies import ChatBody, CompletionBody
from rlhf.serving.traffic import Traffic
from rlhf.serving.versions import Version, Versions

PROJECT = Path(__file__).parents[2]


def versions(root: Path, *aliases: str) -> Versions:
    """That are held by these aliases; nobody asks their engines anything."""
    found = Versions(root, config.load(PROJECT / "params.yaml"))
    found.by_alias = {alias: Version(f"assistant/{number}", number, "", 0, cast(Any, None)) for number, alias in enumerate(aliases, 1)}
    return found


def chat(**more: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "assistant", "messages": [{"role": "user", "content": "Hello"}]} | more)


def arms(root: Path, share: float, served: Versions, count: int) -> list[str | None]:
    traffic = Traffic(served, Hashes(root), Shares(candidate=share, shadow=0.0))
    found = [traffic.arm(chat(user=str(user)), None) for user in range(count)]
    return [arm.alias for arm in found if arm]


def test_shares_are_met_and_none_and_all_are_exact(tmp_path: Path) -> None:
    both = versions(tmp_path, "champion", "candidate")
    assert set(arms(tmp_path, 0.0, both, 2000)) == {"champion"}
    assert set(arms(tmp_path, 1.0, both, 2000)) == {"candidate"}
    few, more = (arms(tmp_path, share, both, 4000) for share in (0.1, 0.3))
    assert abs(few.count("candidate") / 4000 - 0.1) < 0.02
    assert abs(more.count("candidate") / 4000 - 0.3) < 0.03
    assert all(later == "candidate" for first, later in zip(few, more, strict=True) if first == "candidate")


def test_without_a_candidate_all_go_to_the_champion_and_without_a_champion_to_the_candidate(tmp_path: Path) -> None:
    assert set(arms(tmp_path, 1.0, versions(tmp_path, "champion"), 10)) == {"champion"}
    assert set(arms(tmp_path, 0.0, versions(tmp_path, "candidate"), 10)) == {"candidate"}
    assert arms(tmp_path, 0.5, versions(tmp_path), 10) == []


def test_a_conversation_without_a_name_is_known_by_how_it_began(tmp_path: Path) -> None:
    traffic = Traffic(versions(tmp_path, "champion", "candidate"), Hashes(tmp_path), Shares(candidate=0.5, shadow=0.0))

    def alias(body: Any) -> str | None:
        arm = traffic.arm(body, None)
        return arm.alias if arm else None

    found = set()
    for number in range(20):
        first = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Hello {number}"}]
        then = [*first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": f"And {number}?"}]
        assert alias(chat(messages=first)) == alias(chat(messages=then))
        found.add(alias(chat(messages=first)))
    assert found == {"champion", "candidate"}
    assert alias(CompletionBody(model="assistant", prompt="Once")) in found


def test_shares_that_cannot_be_are_refused(tmp_path: Path) -> None:
    text = (PROJECT / "params.yaml").read_text()
    for traffic, more, word in (
        ("{candidate: 0.5, shadow: 0.0}", ("  - candidate\n  more", "  more"), "needs champion and candidate"),
        ("{candidate: 0.0, shadow: 0.5}", ("keep: consented", "keep: none"), "needs answers that are recorded"),
        ("{candidate: 1.5, shadow: 0.0}", ("", ""), "less than or equal to 1"),
    ):
        changed = text.replace("{candidate: 0.0, shadow: 0.0}", traffic).replace(*more)
        (tmp_path / "params.yaml").write_text(changed)
        with pytest.raises(UserError, match=word):
            config.load(tmp_path / "params.yaml")
