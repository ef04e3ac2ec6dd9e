"""The report page as a person meets it: opened from disk in a real browser, used, and attacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ragdistill.records import Hint, Step, StopReason, Trajectory, Usage
from ragdistill.report.page import Page, write_page
from tests.browser import Tab, find_browser, open_tab
from tests.test_report import KINDS, measure, study

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install one or set RAGDISTILL_CHROMIUM")

ATTACKS = (
    "<script>window.hit=1</script>", "<img src=x onerror='window.hit=1'>", "</script><script>window.hit=1</script>",
    "<!--<script>", "\"><svg onload=window.hit=1>", "javascript:window.hit=1", "&lt;b&gt;", "{{ 7 * 7 }}",
)  # fmt: skip
EVIL = " ".join(ATTACKS)


def trajectory(policy: str, task: int, won: bool, hints: tuple[str, ...] = (), attempt: int = 0) -> Trajectory:
    """t0 is the attacked game; in the others policies part at the second step."""
    bad = task == 0
    walk = (
        Step(reply="", thought="I look.", action="go to fridge 1", observation=f"You see apple {task}."),
        Step(reply="", thought="", action=EVIL if bad else f"open {policy}", observation=EVIL if bad else "Opened."),
        Step(
            reply="", thought="Strange.", action="take apple", observation="Nothing happens.", valid=False,
            reward=1.0 if won else 2 / 3 if task == 11 else 0.0,
        ),
    )  # fmt: skip
    return Trajectory(
        id=f"{policy}-{task}-{attempt}-{len(hints)}", task_id=f"{EVIL if bad else ''}t{task}", policy=policy,
        agent="react", attempt=attempt, seed=0, goal=EVIL if bad else f"goal {task}", bucket="clean",
        group=f"room{task % 5}", kind=KINDS[task % 4], hints=hints, hint_ids=("h0",) if hints else (), steps=walk,
        first_observation=EVIL, usage=Usage(prompt_tokens=900 + task, completion_tokens=90, computed_tokens=400),
        stop=StopReason.SUCCESS if won else StopReason.LOOP,
    )  # fmt: skip


def make(where: Path) -> Path:
    """Twelve held-out games: base wins 0-3, distilled 2-9; eight training games with evidence."""
    wins = {"base": range(4), "rag": range(2, 6), "distilled": range(2, 10)}
    rollouts = [trajectory("roll", t, t < 2, attempt=a) for t in range(8) for a in range(2)]
    page = Page(
        measure(study(), label="smoke"),
        hints=[Hint(id="h0", bucket="clean", text=EVIL, kind="contrast", evidence=(rollouts[4].id, "not stored"))],
        trajectories={p: [trajectory(p, t, t in won) for t in range(12)] for p, won in wins.items()},
        rollouts=rollouts,
        taught=[trajectory("teach", t, t < 6, ("a hint",)) for t in range(8)],
        episodes=study(),
        trainings={"distilled-0": {"tokens": 100, "lora": {"epochs": 2}}},
        bootstrap=200,
    )
    write_page(where, page)
    return where


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tab, str]]:
    where = tmp_path_factory.mktemp("page")
    url = make(where / "report.html").as_uri()
    assert BROWSER
    with open_tab(BROWSER, where / "profile") as tab:
        yield tab, url


@pytest.fixture
def tab(shared: tuple[Tab, str]) -> Iterator[Tab]:
    """The page, freshly opened on a desktop; afterwards it must have complained of nothing and asked for nothing."""
    tab, url = shared
    tab.complaints.clear()
    tab.requests.clear()
    tab.size(1280)
    tab.open("about:blank")
    tab.open(url)
    yield tab
    assert tab.complaints == []
    assert {r.partition("#")[0] for r in tab.requests} <= {url, "about:blank"}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_light_or_dark_as_the_reader_s_system_and_never_blank(tab: Tab, tmp_path: Path, width: int) -> None:
    brightness = {}
    for dark in (False, True):
        tab.size(width, dark=dark)
        tab.picture(tmp_path / f"{dark}.png", height=900)
        pixels = np.asarray(Image.open(tmp_path / f"{dark}.png").convert("L"), dtype=float)
        assert pixels.shape[0] == 900 and width - 20 < pixels.shape[1] <= width, "nothing is wider than the window"
        assert pixels.std() > 15, "text and figures stand out"
        brightness[dark] = float(np.median(pixels))
    assert brightness[False] > 230 and brightness[True] < 50


def listed(tab: Tab) -> list[str]:
    within = "[...n.childNodes].filter((c) => c.nodeName !== 'SMALL').map((c) => c.textContent).join('')"
    return tab.run(f"[...document.querySelectorAll('#g-list .goal')].map((n) => {within})")


def choose(tab: Tab, box: str, label: str) -> None:
    """Pick the option of select `box` that reads `label`, as a person's click does."""
    done = tab.run(
        f"(() => {{ const b = document.getElementById('{box}');"
        f" const o = [...b.options].find((o) => o.textContent === {json.dumps(label)}); if (!o) return false;"
        " b.value = o.value; b.dispatchEvent(new Event('change', {bubbles: true})); return true; })()"
    )
    assert done, f"{box} does not offer {label}"


def search(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('f-text').select()")
    tab.run("document.getElementById('f-text').focus()")
    tab.run("document.getElementById('f-text').value = ''")
    tab.call("Input.insertText", text=text)
    tab.run("new Promise((r) => setTimeout(r, 300))")


FOCUSED = "document.activeElement.getAttribute('aria-current')"


def panes(tab: Tab) -> list[str]:
    return tab.run("[...document.querySelectorAll('#g-panes article')].map((n) => n.innerText)")


def test_page_shows_answer_and_label_without_any_request(tab: Tab) -> None:
    text = tab.run("document.body.innerText")
    assert "Smoke, not evidence" in text
    assert "Pays for itself after" in text
    assert tab.run("performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).length") == 0


def test_hostile_text_is_shown_and_does_nothing(tab: Tab) -> None:
    search(tab, "window.hit")
    choose(tab, "f-left", "base")
    assert any(goal.startswith(ATTACKS[0]) for goal in listed(tab))
    tab.run("document.querySelector('#g-list button').click()")
    tab.run("[...document.querySelectorAll('details')].forEach((d) => { d.open = true; })")
    assert tab.run("window.hit") is None
    assert tab.run("document.querySelectorAll('img, iframe, object, embed, script, link[rel=stylesheet]').length") == 2
    assert tab.run("document.querySelectorAll('[onload], [onerror], [onclick]').length") == 0
    shown = tab.run("document.body.textContent")
    for attack in ATTACKS:
        assert attack in shown


def test_script_that_is_not_the_page_s_own_is_refused_by_its_policy(tab: Tab) -> None:
    tab.run("(() => { const s = document.createElement('script'); s.textContent = 'window.hit = 2';"
            " document.body.append(s); })()")  # fmt: skip
    assert tab.run("window.hit") is None
    assert any("Content Security Policy" in c for c in tab.complaints)
    tab.complaints.clear()


def test_filters_narrow_the_list(tab: Tab) -> None:
    assert len(listed(tab)) == 12
    choose(tab, "f-outcome", "left lost, right won")
    assert sorted(listed(tab)) == [f"goal {t}" for t in range(4, 10)]
    choose(tab, "f-kind", KINDS[1])
    assert sorted(listed(tab)) == ["goal 5", "goal 9"]
    choose(tab, "f-room", "room4")
    assert listed(tab) == ["goal 9"]
    assert "1 of 12 games; left won 0, right won 1" in tab.run("document.getElementById('g-count').innerText")
    tab.run("document.getElementById('f-reset').click()")
    assert len(listed(tab)) == 12
    choose(tab, "f-outcome", "left ended by: success")
    assert len(listed(tab)) == 4
    choose(tab, "f-left", "distilled")
    assert len(listed(tab)) == 8


def test_search_finds_and_marks_text_of_either_side(tab: Tab) -> None:
    search(tab, "APPLE 7")
    assert listed(tab) == ["goal 7"]
    assert tab.run("[...document.querySelectorAll('#g-panes mark')].map((m) => m.textContent)") == ["apple 7"] * 2
    search(tab, "open rag")
    assert listed(tab) == []
    assert "No game fits" in tab.run("document.getElementById('g-panes').innerText")
    choose(tab, "f-right", "rag")
    assert len(listed(tab)) == 11


def test_two_policies_stand_side_by_side_with_the_step_where_they_part(tab: Tab) -> None:
    search(tab, "goal 5")
    left, right = panes(tab)
    assert left.startswith("Left: base") and "✗ lost" in left and "open base" in left
    assert right.startswith("Right: distilled") and "✓ won" in right and "open distilled" in right
    assert left.count("refused\n") == 1
    boxes = tab.run(
        "[...document.querySelectorAll('#g-panes article')].map((n) => { const r = n.getBoundingClientRect();"
        " return [r.left, r.top, r.right]; })"
    )
    assert boxes[0][1] == boxes[1][1] and boxes[0][2] <= boxes[1][0], "beside each other"
    forks = tab.run("[...document.querySelectorAll('#g-panes .fork')].map((n) => [...n.closest('ol').children]"
                    ".indexOf(n.closest('li')))")  # fmt: skip
    assert forks == [1, 1]
    tab.run("document.getElementById('f-swap').click()")
    assert panes(tab)[0].startswith("Left: distilled")


def test_what_a_lost_game_was_worth_stands_beside_its_verdict(tab: Tab) -> None:
    search(tab, "goal 11")
    assert all("✗ lost (reward 0.667) in 3 steps" in pane for pane in panes(tab))
    search(tab, "goal 5")
    assert not any("reward" in pane for pane in panes(tab)), "nothing and everything go without saying"


def test_the_page_opens_with_a_game_that_was_lost_before_and_won_after(tab: Tab) -> None:
    left, right = panes(tab)
    assert "✗ lost" in left and "✓ won" in right
    assert tab.run("scrollY") == 0


def test_keys_move_through_the_list(tab: Tab) -> None:
    tab.run("document.querySelector('#g-list button').click()")
    tab.run("document.querySelector('#g-list button').focus()")
    place = "[...document.querySelectorAll('#g-list button')].findIndex((b) => b.getAttribute('aria-current'))"
    for key, at in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 11), ("ArrowDown", 11), ("Home", 0)):
        tab.key(key)
        assert tab.run(place) == at
    assert tab.run(FOCUSED) == "true"
    assert tab.run("document.querySelectorAll('#g-list button[tabindex=\"0\"]').length") == 1


def test_evidence_of_a_hint_opens_its_training_episode_beside_the_hinted_one(tab: Tab) -> None:
    tab.run("document.querySelector('.hints button.link').click()")
    assert tab.run(f"{FOCUSED} === 'true' && scrollY > 0"), "the next key goes on from there"
    left, right = panes(tab)
    assert left.startswith("Left: no hints, attempt 1") and "roll-2-0-0" in left
    assert right.startswith("Right: with hints, attempt 1") and "Hint: a hint" in right
    choose(tab, "f-set", "held-out games")
    assert panes(tab)[0].startswith("Left: base")


def test_an_address_with_an_episode_opens_it(shared: tuple[Tab, str]) -> None:
    tab, url = shared
    tab.open("about:blank")
    tab.open(f"{url}#episode=distilled-11-0-0")
    assert "distilled-11-0-0" in panes(tab)[0]
    tab.open("about:blank")
    tab.open(f"{url}#episode=%3Cscript%3E")
    assert panes(tab)[0].startswith("Left: base"), "an unknown episode changes nothing"


def test_a_game_far_down_a_long_list_is_drawn_and_reached_by_keys(shared: tuple[Tab, str], tmp_path: Path) -> None:
    tab, _ = shared
    games = {p: [trajectory(p, t, False) for t in range(1, 1002)] for p in ("base", "distilled")}
    write_page(tmp_path / "report.html", Page(measure(study(), label="smoke"), trajectories=games, bootstrap=20))
    url = (tmp_path / "report.html").as_uri()
    place = "[...document.querySelectorAll('#g-list button')].findIndex((b) => b.tabIndex === 0)"
    shown = "document.getElementById('g-count').innerText"
    tab.open(url)
    order = tab.run("(() => { const s = JSON.parse(document.getElementById('episodes').textContent).sets[0]; return s"
                    ".tasks.map((t) => [t.kind, t.goal]); })()")  # fmt: skip
    goals = [goal for _, goal in sorted(order)]
    assert len(goals) > 900 and tab.run(place) == 0 and "The first 400 are listed" in tab.run(shown)
    for at, first in ((300, 0), (600, 400), (len(goals) - 1, len(goals) - 400)):
        tab.open("about:blank")
        tab.open(f"{url}#episode=distilled-{goals[at].split()[1]}-0-0")
        assert tab.run(place) == at - first and listed(tab) == goals[first : first + 400]
        assert tab.run(FOCUSED) == "true"
        assert not first or f"Games {first + 1} to {first + 400} are listed" in tab.run(shown)
        tab.key("ArrowUp")
        assert tab.run(place) == at - first - 1


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, True)])
def test_nothing_sticks_out_on_any_screen(tab: Tab, width: int, dark: bool) -> None:
    tab.size(width, 844, dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    ground = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark


def test_print_shows_what_is_folded_and_hides_the_controls(tab: Tab) -> None:
    closed = tab.run("document.querySelectorAll('details:not([open])').length")
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run("document.querySelectorAll('details:not([open])').length") == 0 < closed
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.querySelector('.filters')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('.play ol')).maxHeight") == "none"
    for width in (718, 1045):  # A4, upright and across
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        cut = "[...document.querySelectorAll('.scroll')].filter((n) => n.scrollWidth > n.clientWidth)"
        assert tab.run(f"{cut}.map((n) => n.getAttribute('aria-label'))") == [], "paper does not scroll"
    tab.call("Emulation.setEmulatedMedia", media="")
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run("document.querySelectorAll('details:not([open])').length") == closed
