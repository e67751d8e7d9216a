"""A real Chromium on pages of ours, and what they show as data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"

# Text of every element with words of its own: [what, colour, ground, size in px, weight].
# Colours are painted to be read back, whatever notation they are in.
_TEXTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data);
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a] = rgba(getComputedStyle(at).backgroundColor);
      if (a === 255) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const texts = [];
  for (const node of document.querySelectorAll('body *')) {
    const has = Array.from(node.childNodes).some((c) => c.nodeType === 3 && c.data.trim());
    const box = node.getBoundingClientRect();
    if (!has || node.closest('.unseen, .skip, noscript') || box.width < 2) continue;
    const style = getComputedStyle(node);
    const colour = node.closest('svg') ? style.fill : style.color;
    texts.push([node.textContent.trim().slice(0, 30), rgba(colour).slice(0, 3), ground(node),
                parseFloat(style.fontSize), parseInt(style.fontWeight)]);
  }
  return texts;
}"""

# Contrast of the colours that lines, bars and outlines are drawn in, on panels: {name: [rgb]}.
_TONES = """(names) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const probe = document.body.appendChild(document.createElement('i'));
  const tones = Object.fromEntries(names.map((name) => {
    probe.style.color = `var(--${name})`;
    canvas.fillStyle = getComputedStyle(probe).color;
    canvas.fillRect(0, 0, 1, 1);
    return [name, Array.from(canvas.getImageData(0, 0, 1, 1).data).slice(0, 3)];
  }));
  probe.remove();
  return tones;
}"""

_POOLS = """() => Object.fromEntries(Array.from(
  document.querySelectorAll('.worker'),
  (tile) => [tile.querySelector('.id').textContent,
             [tile.closest('.pool').dataset.role, tile.dataset.state]]))"""

Rgb = tuple[int, int, int]


@dataclass
class OurPage:
    """One open page that asks only `url` and what lies below it; `faults` collects what its console
    and its requests should not have."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._asked(request.url))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _asked(self, url: str) -> None:
        if url != self.url and not url.startswith(f"{self.url}/"):
            self.faults.append(f"asked {url}")

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        width: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return width

    def faint_texts(self) -> list[str]:
        """Return what does not reach WCAG AA: 4.5, or 3 for large text."""
        faint = []
        for what, colour, ground, size, weight in self.page.evaluate(_TEXTS):
            is_large = size >= 24 or (size >= 18.66 and weight >= 700)
            if (ratio := contrast(colour, ground)) < (3.0 if is_large else 4.5):
                faint.append(f"{what!r}: {ratio:.2f} ({colour} on {ground})")
        return faint


class Dashboard(OurPage):
    """The page that an endpoint serves under /dashboard."""

    def open(self) -> None:
        self.page.goto(f"{self.url}/dashboard")
        self.page.locator("#health[data-is]").wait_for()

    def pools(self) -> dict[str, tuple[str, str]]:
        """Return role and state of each worker shown."""
        shown = self.page.evaluate(_POOLS)
        return {worker_id: (role, state) for worker_id, (role, state) in shown.items()}

    def sizes(self) -> list[str]:
        return self.page.locator(".pool .sizes").all_inner_texts()

    def decisions(self) -> list[int]:
        """Return the numbers of the decisions shown, newest first."""
        numbers = "all => all.map((row) => Number(row.dataset.seq))"
        shown: list[int] = self.page.locator(".decision").evaluate_all(numbers)
        return shown

    def focused(self) -> str:
        """Return the words of the element that has the focus."""
        text: str = self.page.evaluate("document.activeElement.innerText")
        return text

    def tones(self, *names: str) -> dict[str, Rgb]:
        """Return colours of the theme by name."""
        tones: dict[str, Rgb] = self.page.evaluate(_TONES, list(names))
        return tones


def contrast(one: Rgb, other: Rgb) -> float:
    """Return the contrast ratio as WCAG 2 defines it."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Rgb) -> float:
    shares = [part / 255 for part in colour]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
