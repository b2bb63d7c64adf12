"""The pages in a real browser, by the keyboard alone: what was pressed is what the record holds, and no text becomes markup."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.rating import browser
from bench.rating.browser import RatingPage
from bench.rating.site import Site
from rlhf.config.serving import Key, Role
from rlhf.feedback.tables import Pair
from tests.feedback.conftest import params_with
from tests.feedback.test_tables import answer

NASTY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\n</p> & 🧪 مرحبا"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("site"), params_with(gold_share=0.0, repeat_share=0.0))
    yield found
    found.end()


@pytest.mark.skipif(browser.program() is None, reason="no Chromium is installed: the pages were not tried in a browser")
def test_two_raters_at_the_keyboard(site: Site) -> None:
    site.fill([f"{NASTY} {number}" for number in range(6)], f"{NASTY} good", f"{NASTY} bad")
    pressed: list[tuple[str, str, str | None]] = []
    with browser.browser() as chromium, chromium.page(f"{site.address}/rate") as page:
        ada = RatingPage(page)
        ada.enter("Ada")
        assert ada.pair
        assert ada.pair[1].startswith(NASTY)
        for keys, choice in ((("1",), "a"), (("2",), "b"), (("3",), "tie"), (("4",), "both-bad"), (("s", "2"), "skip")):
            assert ada.pair
            pressed.append((ada.pair[1][-4:], choice, None))
            ada.press(*keys)
        ada.press("u")  # the skip
        assert page.text("status") == "Taken back: rate it again."
        page.open(f"{site.address}/rate")  # she comes back later, where she stopped
        page.until("!document.getElementById('standing').hidden")
        assert ada.done == 4
        pressed.append((ada.pair[1][-4:], "a", None))
        ada.press("1")
        pressed.append((ada.pair[1][-4:], "b", "Better <b>words</b>."))
        ada.edit("2", "Better <b>words</b>.")
        assert ada.pair is None
        assert "nothing left" in page.text("finished")
        found = site.ratings("Ada")
        assert [rating.revoked is not None for rating in found] == [False] * 4 + [True] + [False] * 2
        assert [(rating.choice, rating.edit) for rating in found] == [(choice, edit) for _, choice, edit in pressed]
        assert found[4].reason == "the prompt is unclear"
        with site.record.reading() as session:
            for rating, (left, _, _) in zip(found, pressed, strict=True):
                pair = session.get_one(Pair, rating.pair_id)
                assert (pair.second_text if rating.swapped else pair.first_text)[-4:] == left
        page.evaluate("document.getElementById('leave').click()")
        bob = RatingPage(page)
        bob.enter("Bob")
        while bob.pair:
            bob.press("1" if bob.pair[1].endswith("good") else "2")
        assert {rating.verdict for rating in site.ratings("Bob")} == {"first"}
        page.open(f"{site.address}/figures")
        page.until("document.querySelectorAll('table').length === 3")
        shown = page.text("figures")
        assert "assistant/1" in shown
        assert "Ada" in shown
        assert page.evaluate("document.title") == "Figures of the ratings"
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.errors == []


def test_forms_and_opinions_that_are_wrong_stale_or_sent_again(site: Site) -> None:
    def post(path: str, **body: Any) -> tuple[int, Any]:
        found = site.client.post(path, json=body)
        return found.status_code, found.json()

    site.fill(["once", "twice"], "x", "y")
    shown = post("/rate/next", rater="Cy")[1]["pair"]
    form = {"rater": "Cy", "token": shown["token"], "pair": shown["id"]}
    assert "assistant" not in json.dumps(shown)
    for wrong, word in (
        ({"choice": "skip"}, "reason"),
        ({"choice": "c"}, "choice"),
        ({"choice": "tie", "edit": "x"}, "edit"),
        ({}, "choice"),
    ):
        status, content = post("/rate/vote", **form, **wrong)
        assert (status, content["error"]["param"]) == (400, word)
    assert post("/rate/next", rater=" \n")[0] == 400
    assert post("/rate/vote", **form | {"pair": 2**70, "choice": "a"})[0] == 400
    assert post("/rate/vote", **form | {"token": "a\0", "choice": "a"})[0] == 400
    assert post("/rate/vote", **form | {"pair": 2**31 - 1, "choice": "a"})[0] == 409
    first, again = (post("/rate/vote", **form, choice="a")[1] for _ in range(2))
    assert first == again
    assert post("/rate/vote", **form, choice="b")[0] == 409
    assert post("/rate/vote", **form | {"rater": "Eve"}, choice="a")[0] == 409
    assert post("/rate/undo", rater="Eve", token=shown["token"])[0] == 409
    assert len(site.ratings("Cy")) == 1
    # another site's form cannot send JSON
    assert (
        site.client.post("/rate/vote", content=json.dumps(form | {"choice": "a"}), headers={"content-type": "text/plain"}).status_code
        == 400
    )
    for path in ("/rate", "/figures", "/page/rate.js"):
        found = site.client.get(path)
        assert found.status_code == 200
        assert "default-src 'none'" in found.headers["content-security-policy"]
    assert [site.client.get(path).status_code for path in ("/page/..%2f..%2fapi.py", "/page/__init__.py", "/page/")] == [404] * 3

    with site.record.writing() as session:
        session.add(answer("chatcmpl-9"))
    said = {"id": "chatcmpl-9", "thumb": "up", "edit": "Ich bin's.", "token": "t"}
    assert [post("/v1/feedback", **said)[0] for _ in range(2)] == [200, 200]
    assert post("/v1/feedback", **said | {"thumb": "down"})[0] == 409
    assert post("/v1/feedback", id="chatcmpl-9")[0] == 400
    assert post("/v1/feedback", id="other", thumb="up")[0] == 404
    with site.record.reading() as session:
        assert session.connection().exec_driver_sql("SELECT thumb, edit FROM opinions").all() == [(1, "Ich bin's.")]


def test_while_the_record_is_away_it_is_to_be_tried_again(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    def post(path: str, **body: Any) -> tuple[int, Any]:
        found = site.client.post(path, json=body)
        return found.status_code, found.json().get("error", {}).get("code")

    site.fill(["away"], "x", "y")
    folder = Path(site.record.engine.url.database or "").parent
    away = tmp_path_factory.mktemp("away") / "feedback"
    folder.rename(away)
    folder.touch()
    asked: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/rate/next", {"rater": "Di"}),
        ("/rate/undo", {"rater": "Di", "token": "t"}),
        ("/figures/numbers", {}),
        ("/v1/feedback", {"id": "chatcmpl-1", "thumb": "up"}),
    )
    assert [post(path, **body) for path, body in asked] == [(503, "record_away")] * 4
    assert site.client.post("/rate/next", json={"rater": "Di"}).headers["retry-after"] == "2"
    assert str(folder) not in site.client.post("/rate/next", json={"rater": "Di"}).text
    assert site.client.get("/rate").status_code == 200
    folder.unlink()
    away.rename(folder)
    assert [post(path, **body)[0] for path, body in asked] == [200, 409, 200, 404]


def test_with_keys_a_page_is_for_all_and_what_it_shows_for_those_with_the_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_with(ratings=1)
    given = {"file": None, "requests_per_minute": None, "max_body_kib": None}
    roles: dict[str, Role] = {"ada": "rate", "app": "ask", "bot": "ask"}
    keys = [Key(name=name, roles=[role], variable=f"KEY_{name}", **given) for name, role in roles.items()]
    for key in keys:
        monkeypatch.setenv(f"KEY_{key.name}", f"{key.name}-0123456789abcdef")
    site = Site(tmp_path, params.model_copy(update={"serving": params.serving.model_copy(update={"named_keys": keys})}))
    site.fill(["one"], "x", "y")
    rater = {"authorization": "Bearer ada-0123456789abcdef"}
    assert [site.client.get(path).status_code for path in ("/rate", "/figures", "/page/rate.js", "/page/other.js")] == [200, 200, 200, 401]
    assert site.client.post("/rate/next", json={"rater": "Eve"}).status_code == 401
    assert (
        site.client.post("/rate/next", json={"rater": "Eve"}, headers={"authorization": "Bearer app-0123456789abcdef"}).status_code == 403
    )
    assert site.client.post("/figures/numbers", headers=rater).status_code == 403
    shown = site.client.post("/rate/next", json={"rater": "Eve"}, headers=rater).json()
    assert shown["rater"] == "ada"
    form = {"rater": "Eve", "token": shown["pair"]["token"], "pair": shown["pair"]["id"], "choice": "a"}
    assert site.client.post("/rate/vote", json=form, headers=rater).json()["done"] == 1
    assert [rating.rater for rating in site.ratings("ada")] == ["ada"]
    with site.record.writing() as session:
        session.add_all([answer("of-app", key="app"), answer("of-bot", key="bot")])
    for name in ("app", "bot", "app"):  # both may count 1, 2, 3; neither speaks of the other's answers
        own = {"authorization": f"Bearer {name}-0123456789abcdef"}
        said = {"thumb": "up", "token": "1"}
        found = site.client.post("/v1/feedback", json=said | {"id": f"of-{name}"}, headers=own)
        assert (found.status_code, found.json()["token"]) == (200, "1")
        other = "bot" if name == "app" else "app"
        assert site.client.post("/v1/feedback", json=said | {"id": f"of-{other}"}, headers=own).status_code == 404
    site.end()
