"""Makes the pictures of the dashboard in docs/images from a simulated deployment under load.

    python -m tests.screenshot [--seconds 200]

Everything on them is real: the load rises and falls, the autoscaler acts on it, and the pictures
are taken once it has scaled out and in. Needs Debian's package `chromium`.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tests.background_load import BackgroundLoad
from tests.served import Served, tandem, wait_until

CHROMIUM = "/usr/bin/chromium"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 400_000
PROMPT_TOKENS, OUTPUT_TOKENS = 600, 40
DEPLOYMENT: dict[str, Any] = {
    "model__engine": "simulated",
    "model__max_model_len": 2048,
    "model__block_size": 16,
    "simulated__num_blocks": 1024,
    "simulated__block_bytes": 65536,
    "simulated__decode_step_s": 0.02,
    "simulated__prefill_tokens_per_s": 8000,
    "prefill__workers": 1,
    "decode__workers": 2,
    "cluster__standby": 1,
    "autoscaler__mode": "act",
    "autoscaler__target_per_worker": 80,
    "autoscaler__ratio": "1:2",
    "autoscaler__max_prefill": 2,
    "autoscaler__max_decode": 4,
    "autoscaler__slo_ttft_s": 0.5,
    "autoscaler__slo_tbt_s": 0.1,
    "autoscaler__speedup": 10,
    "autoscaler__scale_in_step": 0.5,
}
# Width, height, theme, name.
PICTURES = (
    (1440, 1500, "light", "dashboard"),
    (1440, 1500, "dark", "dashboard-dark"),
    (390, 844, "light", "dashboard-phone"),
)


def rate(elapsed_s: float) -> float:
    """Return requests per second: waves of two minutes between quiet and more than 1P2D carry."""
    return 3.4 - 2.0 * math.cos(2 * math.pi * elapsed_s / 120)


def actions(served: Served) -> set[str]:
    """Return the kinds of what the autoscaler has done so far."""
    page = served.client.get("/admin/decisions?limit=1000").json()["decisions"]
    return {record["decision"]["action"] for record in page}


def take(browser: Browser, url: str, picture: tuple[int, int, Any, str], folder: Path) -> Path:
    width, height, theme, name = picture
    viewport: Any = {"width": width, "height": height}
    page = browser.new_page(viewport=viewport, color_scheme=theme)
    page.goto(f"{url}/dashboard")
    page.locator(".worker[data-state=ready]").first.wait_for()
    page.locator(".request").first.wait_for()
    # Rates per worker take a few looks.
    page.wait_for_timeout(6000)
    path = folder / f"{name}.png"
    page.screenshot(path=path)
    page.close()
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0, help="load before the pictures")
    parser.add_argument("--folder", type=Path, default=IMAGES)
    parsed = parser.parse_args(arguments)
    parsed.folder.mkdir(parents=True, exist_ok=True)
    with (
        tandem("screenshot", **DEPLOYMENT) as served,
        BackgroundLoad(served, rate, PROMPT_TOKENS, OUTPUT_TOKENS) as load,
    ):
        time.sleep(parsed.seconds)
        wait_until(lambda: "out" in actions(served), 120, "a scale-out")
        print("actions:", sorted(actions(served)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for picture in PICTURES:
                path = take(browser, served.url, picture, parsed.folder)
                size = path.stat().st_size
                print(f"{path}: {size} bytes")
                if size > MAX_BYTES:
                    print(f"error: {path} is over {MAX_BYTES} bytes", file=sys.stderr)
                    return 1
            browser.close()
    if load.result().failures:
        print("error: requests failed:", load.result().failures[:3], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
