"""The report of a sweep: the front by hand-worked points, and a page that needs nothing else."""

from __future__ import annotations

import re

from rlhf.sweep import pictures, report
from rlhf.sweep.space import Direction, Space
from rlhf.sweep.state import DONE, FAILED, Result

SPACE = Space.model_validate(
    {
        "name": "one",
        "method": "grid",
        "points": 9,
        "values": {"ppo.kl.coefficient": [0.1, 0.2], "algorithm": ["ppo", "dpo"], "seed": [1, 2]},
    }
)
WANTED: dict[str, Direction] = {"gold": "maximize", "kl": "minimize"}


def result(number: int, gold: float, kl: float, seed: int = 1) -> Result:
    values = {"ppo.kl.coefficient": 0.1 * number, "algorithm": "ppo", "seed": seed}
    return Result(number, f"one-{number}", values, DONE, {"gold": gold, "kl": kl}, seconds=10.0 * number)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(0.5, 1.0), (0.6, 2.0), (0.6, 2.5), (0.4, 0.5), (0.3, 0.6), (0.6, 2.0)]
    assert pictures.front(points, ("maximize", "minimize")) == [0, 1, 3, 5]
    assert pictures.front(points, ("minimize", "minimize")) == [3, 4]
    assert pictures.front([], ("maximize",)) == []


def test_the_page_needs_nothing_else_and_has_all_points() -> None:
    failed = Result(5, "one-5", {"ppo.kl.coefficient": 0.2, "algorithm": "<b>", "seed": 2}, FAILED, error="stage ppo: <no> room")
    done = [result(1, 0.5, 1.0), result(2, 0.6, 2.0), result(3, 0.55, 3.0), result(4, 0.6, 2.5, seed=2)]
    page = report.html(SPACE, [*done, failed, Result(6, "one-6", {})], WANTED, "Begun at noon.")
    assert "6 points by grid: 4 done, 1 failed, 1 to do. Begun at noon." in page
    assert "Best by gold (maximize): one-2" in page
    assert re.findall(r"one-(\d) ★", page) == ["2", "1"]
    assert "stage ppo: &lt;no&gt; room" in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|<b>\)""", page)
    # points that differ in the seed alone are shown together, too
    assert "Over the seeds" in page


def test_a_sweep_in_which_nothing_is_done_has_a_page() -> None:
    assert "1 points by grid: 1 to do" in report.html(SPACE, [Result(1, "one-1", {"seed": 1})], WANTED, "")
