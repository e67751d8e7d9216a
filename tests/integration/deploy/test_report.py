"""The load test's report in a real Chromium, from a file: on a phone, in the dark, by keyboard."""

import re
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, expect

from deploy.loadtest.report import page
from tests.integration.deploy.browser import OurPage
from tests.run_documents import run_document

PHONE, DESK = (360, 740), (1280, 800)
PHASES = {"calm": (0.0, 4.0), "rush": (4.0, 8.0)}
ONE = (run_document(phases=PHASES, faults=("lost", "late")),)
THREE = (run_document("ours"), run_document("theirs", slots=2), run_document("third", seed=3))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("runs", [ONE, THREE], ids=["run", "comparison"])
def test_it_needs_nothing_else_and_is_read_anywhere(
    browser: Browser, tmp_path: Path, runs: tuple[dict[str, object], ...], scheme: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(runs))
    wanted: Literal["light", "dark"] = "light" if scheme == "light" else "dark"
    with browser.new_context(color_scheme=wanted, offline=True) as context:
        report = OurPage(context.new_page(), file.as_uri())
        report.page.goto(report.url)
        for width, height in (PHONE, DESK):
            report.page.set_viewport_size({"width": width, "height": height})
            assert report.overflow() <= 0, f"{width} pixels wide"
        assert report.faint_texts() == []
        plots = report.page.locator(".chart")
        assert plots.count() >= 4
        drawn = "all => all.every((path) => path.getBBox().width > 0)"
        assert plots.first.locator(".area path[data-style]").evaluate_all(drawn)

        # The arrow keys read values off, in all plots over time at once.
        over_time = report.page.locator(".chart[data-axis=time]")
        assert over_time.count() >= 2
        over_time.first.locator(".area").focus()
        report.page.keyboard.press("ArrowRight")
        for number in range(over_time.count()):
            expect(over_time.nth(number).locator(".at")).to_have_text(re.compile(r"^at \d"))
        report.page.keyboard.press("Escape")
        expect(over_time.first.locator(".at")).to_have_text("")
    assert report.faults == []
