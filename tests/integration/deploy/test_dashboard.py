"""The dashboard in a real Chromium on a real deployment: nothing on the page is made up."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.chaos.test_controller_loss import controller_of
from tests.integration.deploy.browser import Dashboard, contrast
from tests.prompts import prompt_of
from tests.served import Served, tandem, wait_until

pytestmark = pytest.mark.timeout(300)

NAME = "test-dashboard"
WAIT_S = 20.0
FLAGS: dict[str, Any] = {
    "model__engine": "simulated",
    "model__max_model_len": 512,
    "model__block_size": 16,
    "router__replicas": 2,
    "autoscaler__mode": "advise",
    "autoscaler__target_per_worker": 100,
    "autoscaler__max_prefill": 2,
    "autoscaler__max_decode": 2,
    "autoscaler__slo_ttft_s": 1.0,
    "autoscaler__slo_tbt_s": 0.1,
    "autoscaler__speedup": 10.0,
}
HOSTILE = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tandem(NAME, **FLAGS) as served:
        yield served


@pytest.fixture
def dashboard(served: Served, browser: Browser) -> Iterator[Dashboard]:
    """A fresh page; the test may take the faults that it provokes out again."""
    with browser.new_context(color_scheme="light") as context:
        dashboard = Dashboard(context.new_page(), served.url)
        dashboard.open()
        yield dashboard
    assert dashboard.faults == []


def state(served: Served) -> dict[str, Any]:
    document: dict[str, Any] = served.client.get("/admin/state").json()
    return document


def admin_pools(served: Served) -> dict[str, tuple[str, str]]:
    return {w["worker_id"]: (w["role"], w["state"]) for w in state(served)["workers"]}


def admin_decisions(served: Served) -> list[int]:
    page = served.client.get("/admin/decisions?limit=1000").json()["decisions"]
    return [record["seq"] for record in reversed(page)]


def decision(served: Served, action: str) -> dict[str, Any]:
    page = served.client.get("/admin/decisions?limit=1000").json()["decisions"]
    found: dict[str, Any] = next(r for r in page if r["decision"]["action"] == action)
    return found


def test_pools_and_decisions_are_those_of_admin_while_it_scales_out(
    served: Served, dashboard: Dashboard
) -> None:
    def agree() -> dict[str, tuple[str, str]] | None:
        before, shown, after = admin_pools(served), dashboard.pools(), admin_pools(served)
        return shown if before == shown == after else None

    assert wait_until(agree, WAIT_S, "the pools of /admin/state").keys() == {
        "prefill-1",
        "decode-1",
    }
    order = [sys.executable, "-m", "deploy.cli", "scale", "--name", NAME, "--prefill", "2"]
    scaling = subprocess.Popen([*order, "--decode", "2"], stdout=subprocess.DEVNULL)
    seen: set[str] = set()

    def is_done() -> bool:
        # Not only when all three agree: on a busy machine they do so too seldom.
        seen.update(state for _, state in dashboard.pools().values())
        shown = agree()
        return shown is not None and list(shown.values()).count(("decode", "ready")) == 2

    wait_until(is_done, 90, "two decode workers, on the page and in /admin/state")
    assert scaling.wait(30) == 0
    assert seen - {"ready"}, "the page never showed one on its way"
    wait_until(lambda: agree() and len(dashboard.pools()) == 4, WAIT_S, "2P2D on the page")
    assert wait_until(
        lambda: dashboard.sizes() == ["2 ready of 2 wanted"] * 2, WAIT_S, "the sizes on the page"
    )
    wait_until(lambda: dashboard.decisions() == admin_decisions(served), WAIT_S, "the decisions")
    workers = dashboard.page.locator("#chart-workers .legend dd")
    expect(workers).to_have_text(["2", "2", "2", "2"])
    expect(dashboard.page.locator("#chart-workers .mark-line.tone-decode")).not_to_have_count(0)
    assert dashboard.page.locator("#scaling").inner_text().endswith("held at 2P2D: by hand")


def test_a_decision_opens_by_mouse_and_keyboard(served: Served, dashboard: Dashboard) -> None:
    record = decision(served, "out")["decision"]
    page, drawer = dashboard.page, dashboard.page.get_by_role("dialog")
    page.locator(".decision[data-action=out]").first.click()
    expect(drawer.get_by_role("heading", level=2)).to_contain_text("Scale out")
    expect(drawer).to_contain_text(record["reason"])
    assert drawer.locator(".steps .size").all_inner_texts() == [
        "1P1D",
        "2P2D",
        *(f"{b[0]}P{b[1]}D → {a[0]}P{a[1]}D" for _, b, a, _ in record["clamps"]),
        "2P2D",
        "scale out",
    ]
    headings = drawer.get_by_role("heading", level=3).all_inner_texts()
    assert {"Inputs", "Outcome"} <= set(headings)
    inputs = drawer.locator("section", has=page.get_by_role("heading", name="Inputs"))
    assert inputs.locator("tr").count() == len(record["inputs"])
    expect(drawer.locator(".outcome")).to_contain_text("2P2D were ready after")
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()

    # One stop of the Tab key, where the focus was last; from there arrow keys.
    page.locator("#kinds input").first.focus()
    page.keyboard.press("Tab")
    stop = page.locator(".decision[tabindex='0']")
    expect(stop).to_have_count(1)
    expect(stop).to_be_focused()
    assert stop.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    came_from = stop.get_attribute("data-seq")
    page.keyboard.press("ArrowUp")
    expect(stop).to_be_focused()
    opened = stop.get_attribute("data-seq")
    assert opened != came_from
    page.keyboard.press("Enter")
    heading = drawer.get_by_role("heading", level=2)
    expect(heading).to_contain_text(f"#{opened} ")
    expect(page.locator("#drawer-close")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(heading).to_contain_text(f"#{came_from} ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    expect(page.locator(f".decision[data-seq='{opened}']")).to_be_focused()


def test_the_explorer_gathers_the_requests_of_every_replica(
    served: Served, dashboard: Dashboard
) -> None:
    for seed in range(12):
        served.complete(prompt_of(40, seed=seed), max_tokens=8)
    known: dict[str, dict[str, Any]] = {}

    def gathered() -> bool:
        page = served.client.get("/admin/requests?limit=1000").json()["requests"]
        known.update({f"{r['router_id']} {r['request_id']}": r for r in page})
        return len(known) >= 12 and len({r["router_id"] for r in known.values()}) == 2

    wait_until(gathered, WAIT_S, "both replicas")
    # What nobody looks at is not asked for.
    dashboard.page.locator(".requests").scroll_into_view_if_needed()
    rows = dashboard.page.locator("#request-list > li")
    keys = "all => all.map((row) => row.dataset.key)"
    wait_until(lambda: set(rows.evaluate_all(keys)) == known.keys(), WAIT_S, "all of them shown")
    expect(dashboard.page.locator("#gathered")).to_contain_text("2 of 2 router replicas")

    newest = max(known.values(), key=lambda request: request["arrived_at"])
    widths = "all => all.map((piece) => piece.getBoundingClientRect().width)"
    shown = rows.first.locator(".stage").evaluate_all(widths)
    # The first token begins no stage.
    stamps = [each["at_s"] for each in newest["events"] if each["event"] != "first_token"]
    took = [b - a for a, b in itertools.pairwise(stamps)]
    assert len(shown) == len(took)
    assert shown[-1] / sum(shown) == pytest.approx(took[-1] / sum(took), abs=0.1)

    rows.first.click()
    drawer = dashboard.page.get_by_role("dialog")
    expect(drawer).to_contain_text(newest["exchange_id"])
    expect(drawer).to_contain_text(newest["decode_worker"])
    dashboard.page.keyboard.press("Escape")
    dashboard.page.locator("#find").fill("no such request")
    expect(dashboard.page.locator("#no-requests")).to_have_text("None like this.")


def test_a_lost_connection_is_shown_and_recovers(dashboard: Dashboard) -> None:
    page, banner = dashboard.page, dashboard.page.locator("#banner")
    expect(banner).to_be_hidden()
    page.context.set_offline(True)
    expect(banner).to_contain_text(re.compile(r"Connection lost since \d\d:\d\d:\d\d"))
    expect(page.get_by_role("alert")).to_be_visible()
    assert dashboard.pools(), "what was known stays"
    page.context.set_offline(False)
    expect(banner).to_be_hidden()
    expect(page.locator("#news")).to_contain_text("Live again after")
    dashboard.faults = [each for each in dashboard.faults if "ERR_INTERNET" not in each]


def test_a_controller_that_is_away_is_told_apart(served: Served, dashboard: Dashboard) -> None:
    controller_of(served).kill()
    banner = dashboard.page.locator("#banner")
    expect(banner).to_contain_text("The controller is away since", timeout=15_000)
    served.complete(prompt_of(20, seed=99), max_tokens=2)
    expect(banner).to_be_hidden(timeout=60_000)
    wait_until(lambda: dashboard.pools() == admin_pools(served), WAIT_S, "the same pools")
    wait_until(lambda: dashboard.decisions() == admin_decisions(served), WAIT_S, "and decisions")
    dashboard.faults = [each for each in dashboard.faults if "503" not in each]


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_overflows_at_phone_width(dashboard: Dashboard, width: int) -> None:
    dashboard.page.set_viewport_size({"width": width, "height": 740})
    dashboard.page.locator(".decision").first.wait_for()
    assert dashboard.overflow() == 0
    dashboard.page.locator(".decision").first.click()
    assert dashboard.overflow() == 0
    box = dashboard.page.get_by_role("dialog").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_is_legible(dashboard: Dashboard, theme: Any) -> None:
    page = dashboard.page
    page.emulate_media(color_scheme=theme)
    page.locator(".request").first.wait_for()
    assert dashboard.faint_texts() == []
    marks = ("prefill", "decode", "signal", "transfer", "waiting", "good", "bad", "edge", "focus")
    tones = dashboard.tones("panel", *marks)
    faint = {name: contrast(tones[name], tones["panel"]) for name in marks}
    assert all(ratio >= 3 for ratio in faint.values()), faint
    page.locator(".decision").first.click()
    assert dashboard.faint_texts() == []


def test_colour_never_carries_meaning_alone(dashboard: Dashboard) -> None:
    page = dashboard.page
    for chart in page.locator(".chart").all():
        lines = chart.locator(".legend svg").evaluate_all(
            "all => all.map((mark) => [mark.querySelector('.mark-line').getAttribute('class'),"
            " mark.querySelector('.mark-point')?.getAttribute('d') ?? '',"
            " mark.parentElement.textContent])"
        )
        assert len({tuple(line) for line in lines}) >= len({label for *_, label in lines})
    fills = page.locator("#stage-key .stage").evaluate_all(
        "all => all.map((stage) => getComputedStyle(stage).backgroundImage.split('(')[0]"
        " + getComputedStyle(stage).backgroundImage.match(/\\d+deg/))"
    )
    assert len(set(fills)) == len(fills) == 4, "each stage has a pattern of its own"
    for tile in page.locator(".worker").all():
        assert tile.locator(".state").inner_text() == tile.get_attribute("data-state")


def test_the_theme_can_be_chosen_and_stays(dashboard: Dashboard) -> None:
    page, button = dashboard.page, dashboard.page.locator("#theme")
    light = dashboard.tones("panel")["panel"]
    button.click()
    expect(button).to_have_text("Theme: light")
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert dashboard.tones("panel")["panel"] != light
    page.reload()
    expect(button).to_have_text("Theme: dark")
    assert dashboard.tones("panel")["panel"] != light


def test_text_from_the_server_stays_text(dashboard: Dashboard) -> None:
    def answer(route: Route) -> None:
        response = route.fetch()
        said = {**response.json(), "healthy": False, "reason": HOSTILE, "name": HOSTILE}
        route.fulfill(response=response, json=said)

    dashboard.page.route("**/admin/state", answer)
    expect(dashboard.page.locator("#health")).to_have_text(HOSTILE)
    expect(dashboard.page.locator("#name")).to_have_text(HOSTILE)
    assert dashboard.page.locator("main img, #health img, #name img").count() == 0
    assert dashboard.page.title() == f"▲ {HOSTILE} · Tandem"


def test_axes_and_words(dashboard: Dashboard) -> None:
    ask = dashboard.page.evaluate
    module = "const m = await import(`${location.origin}/dashboard/%s.js`);"
    ticks = ask(f"async () => {{ {module % 'scale'} return m.linearAxis(83).ticks }}")
    assert ticks == [0, 50, 100]
    ticks = ask(f"async () => {{ {module % 'scale'} return m.linearAxis(3, true).ticks }}")
    assert ticks == [0, 1, 2, 3]
    axis = ask(f"async () => {{ {module % 'scale'} return m.logAxis(0.02, 0.3) }}")
    assert axis["low"] <= 0.02 and axis["high"] >= 0.3 and len(axis["ticks"]) <= 5
    thinned = "m.thin([0, 1, 2, 3, 20, 21], [1, 9, 2, null, 3, 4], 0, 2, 5)"
    points = ask(f"async () => {{ {module % 'scale'} return {thinned} }}")
    assert points == [[0, 9], [2, 2], None, [20, 4]]
    said = "[m.seconds(0.0042), m.seconds(0.25), m.seconds(83), m.bytes(1.5e6)]"
    words = ask(f"async () => {{ {module % 'format'} return {said} }}")
    assert words == ["4.2 ms", "250 ms", "83 s", "1.5 MB"]
