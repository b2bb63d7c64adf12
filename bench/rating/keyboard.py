"""Two raters at the page's keyboard, fifty pairs each, with undo, both bad and edits: `python -m bench.rating.keyboard`.

It fails where the record holds anything else than what was pressed, or a script of the page complains. With `--pictures FOLDER`, pictures
show the pages light, dark and narrow.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from bench.rating.browser import Page, RatingPage, browser
from bench.rating.site import Site
from rlhf import config

PROJECT = Path(__file__).parents[2]
GOOD = "The capital of France is Paris. I am glad to help!\n\nIt lies on the Seine, and has been the capital for most of a thousand years."
BAD = "It is green. <b>Go away</b>, and look it up yourself: https://example.org/" + "a" * 90
CHOICES = {"1": "a", "2": "b", "3": "tie", "4": "both-bad", "s": "skip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), config.load(PROJECT / "params.yaml"))
        site.fill([f"What is the capital of France? ({number})" for number in range(arguments.pairs)], GOOD, BAD)
        try:
            with browser() as chromium:
                for name in ("Ada", "Bob"):
                    with chromium.page(f"{site.address}/rate") as page:
                        begun = time.monotonic()
                        pressed = _rate(page, name, arguments.pictures)
                        held = [(one.choice, one.edit) for one in site.ratings(name) if one.revoked is None]
                        assert held == pressed, (held, pressed)
                        assert page.errors == [], page.errors
                        seconds = time.monotonic() - begun
                        print(f"{name}: {len(pressed)} ratings as pressed, {1000 * seconds / len(pressed):.0f} ms each, no script error")
                with chromium.page(f"{site.address}/figures", height=900) as page:
                    page.until("document.querySelectorAll('table').length === 3")
                    _pictures(page, arguments.pictures, "figures")
                    assert page.errors == [], page.errors
        finally:
            site.end()


def _rate(page: Page, name: str, pictures: Path | None) -> list[tuple[str, str | None]]:
    """Rate until nothing is left; what must be held now."""
    rater, draw = RatingPage(page), random.Random(name)
    # another rater of the same browser
    if not page.evaluate("document.getElementById('standing').hidden"):
        page.evaluate("document.getElementById('leave').click()")
    _pictures(page, pictures, "enter")
    rater.enter(name)
    held: list[tuple[str, str | None]] = []
    while rater.pair:
        if len(held) == 3:
            _pictures(page, pictures, "pair")
        better = "1" if rater.pair[1] == GOOD else "2"
        key = draw.choices([better, "3", "4", "s", "e"], [10, 2, 2, 1, 1])[0]
        if key == "e":
            text = f"{GOOD} Ask again! {len(held)}"
            if pictures:
                page.press("e")
                page.press(better)
                _pictures(page, pictures, "edit")
                page.press("Escape")
            rater.edit(better, text)
            held.append((CHOICES[better], text))
        else:
            rater.press(*([key, "1"] if key == "s" else [key]))
            held.append((CHOICES[key], None))
        if draw.random() < 0.1:
            rater.press("u")
            held.pop()
    _pictures(page, pictures, "finished")
    return held


def _pictures(page: Page, folder: Path | None, name: str) -> None:
    if folder:
        for look, width, dark in (("light", 1280, False), ("dark", 1280, True), ("narrow", 360, False)):
            page.look(width, 800, dark=dark)
            page.picture(folder / f"{name}-{look}.png")
        page.look(1280, 800, dark=False)


if __name__ == "__main__":
    main()
