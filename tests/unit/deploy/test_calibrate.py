"""From what clients saw to a measurement, to a table, a plot and two lines of YAML."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from autoscaler.calibration import Measurement, Objectives, SplitResult, choose
from autoscaler.ratio import Sizes
from cluster.config import load_config, parse_config
from cluster.errors import ConfigError
from deploy.calibrate import CalibrationPlan, Sweep, _conclude, _require_matching_signal, _sweep
from deploy.calibration_plot import draw
from deploy.config_edit import with_settings, write_settings
from deploy.loadtest.words import Outcome, RequestRecord, Send
from deploy.pressure import measured

OBJECTIVES = Objectives(ttft_s=1.0, tbt_s=0.1)
WINDOW = (10.0, 20.0)
SETTINGS = {"ratio": "1:2", "target_per_worker": 83.2}


def request(
    sent_at: float, *answers: tuple[float, int], is_over: bool = True, error: str | None = None
) -> RequestRecord:
    record = RequestRecord(0, Send(sent_at, (1,) * 8, 4), sent_at, error=error)
    record.token_s, record.token_counts = [at for at, _ in answers], [n for _, n in answers]
    record.end_s = 0.0 if is_over else None
    if is_over:
        record.outcome = Outcome.COMPLETED if error is None else Outcome.LOST
    return record


def measure(*requests: RequestRecord, quantile: float = 0.99) -> Measurement:
    return measured(Sizes(1, 1), len(requests), requests, WINDOW, OBJECTIVES, quantile)


def test_only_what_happens_in_the_window_counts() -> None:
    before = request(5.0, (6.0, 1), (9.9, 3), (10.5, 4))
    inside = request(11.0, (11.5, 2), (11.7, 4))
    after = request(19.0, (20.5, 4))
    figures = measure(before, inside, after)
    assert figures.decode_tps == pytest.approx((1 + 4) / 10)
    assert figures.ttft_s == pytest.approx(0.5), "a first token before or after it is not seen"
    assert figures.tbt_s == pytest.approx(0.6), "a gap counts where it ends"
    assert figures.num_failed == 0


def test_waits_cut_off_by_the_end_count_once_they_are_too_long() -> None:
    waiting = request(15.0, is_over=False)
    assert measure(waiting).ttft_s == pytest.approx(5.0)
    assert measure(request(19.5, is_over=False)).ttft_s == math.inf, "nothing is known yet"
    stalled = request(12.0, (12.5, 1), (12.6, 2), is_over=False)
    assert measure(stalled).tbt_s == pytest.approx(7.4)
    assert measure(request(12.0, (12.5, 1), (12.6, 2))).tbt_s == pytest.approx(0.1)


def test_failures_are_counted_and_are_no_latencies() -> None:
    figures = measure(request(11.0, error="HTTP 503"), request(11.0, (11.5, 2), (11.6, 4)))
    assert figures.num_failed == 1 and figures.ttft_s == pytest.approx(0.5)


COMMENTED = """\
# ours
model:
  path: /m  # the model
autoscaler:  # the loop
    # what one worker carries
    target_per_worker: 10  # measured in May
    mode: act

    slo_tbt_s: 0.1
router: {port: 8001}
"""


def test_comments_and_order_stay() -> None:
    assert with_settings(COMMENTED, "autoscaler", SETTINGS) == COMMENTED.replace(
        "target_per_worker: 10 ", "target_per_worker: 83.2 "
    ).replace("  # the loop\n", "  # the loop\n    ratio: '1:2'\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        COMMENTED,
        "autoscaler:\n",
        "autoscaler:\nmodel:\n  dtype: auto",
        "autoscaler: {ratio: '3:1', mode: 'off'}\nmodel: {dtype: auto}\n",
        'autoscaler:\n  ratio: "1:1"\n  target_per_worker: null\n',
        "autoscaler:\n  calendar:\n  - {start: '10:00', end: '12:00', prefill: 1, decode: 1}\n",
        "autoscaler:\n  calendar:\n    - start: '10:00'\n      end: '12:00'\n      prefill: 2\n"
        "      decode: 2\n  # end\n",
        "{}\n",
    ],
)
def test_any_file_gets_the_settings_and_keeps_the_rest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    before = yaml.safe_load(text) or {}
    write_settings(path, "autoscaler", SETTINGS)
    after = load_config(path)
    assert (after.autoscaler.ratio, after.autoscaler.target_per_worker) == ("1:2", 83.2)
    kept = {**before, "autoscaler": {**(before.get("autoscaler") or {}), **SETTINGS}}
    assert yaml.safe_load(path.read_text()) == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_made(tmp_path: Path) -> None:
    write_settings(tmp_path / "new.yaml", "autoscaler", SETTINGS)
    assert (tmp_path / "new.yaml").read_text() == (
        "autoscaler:\n  ratio: '1:2'\n  target_per_worker: 83.2\n"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("autoscaler: {min_prefill: 8}\n", "no sizes within the bounds have ratio 1:2"),
        ("autoscaler: [\n", "not YAML"),
        ("- 1\n", "not a mapping"),
    ],
)
def test_what_would_be_no_configuration_is_not_written(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        write_settings(path, "autoscaler", {**SETTINGS, "max_decode": 8})
    assert path.read_text() == text


def test_a_file_for_another_signal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tandem.yaml"
    _require_matching_signal(path)
    path.write_text("autoscaler: {signal: ttft, slo_ttft_s: 1}\n")
    with pytest.raises(ConfigError, match="calibration is for signal decode_tps, not ttft"):
        _require_matching_signal(path)


def figures(prefill: int, decode: int, clients: int, tps: float, ttft_s: float) -> Measurement:
    return Measurement(Sizes(prefill, decode), clients, tps, ttft_s, 0.02)


def sweep() -> Sweep:
    held, broken = figures(1, 2, 8, 400.0, 0.2), figures(1, 2, 16, 500.0, 2.0)
    worst = figures(2, 1, 3, 90.0, 3.0)
    results = [
        SplitResult(Sizes(1, 2), held, "16 clients: TTFT 2 s is above 1 s"),
        SplitResult(Sizes(2, 1), None, "3 clients: TTFT 3 s is above 1 s"),
    ]
    return Sweep([held, broken, worst], results)


def plan(folder: Path) -> CalibrationPlan:
    return CalibrationPlan(
        3, OBJECTIVES, 100, 20, 5.0, folder / "tandem.yaml", folder / "tandem.svg"
    )


def test_the_result_is_shown_written_and_drawn(tmp_path: Path) -> None:
    said: list[str] = []
    assert _conclude(plan(tmp_path), sweep(), said.append) == 0
    assert said[:3] == [
        "   split  clients  tokens/s  per D  TTFT s  TBT s  ended by",
        "*  1P2D   8        400       200    0.2     0.02   16 clients: TTFT 2 s is above 1 s",
        "   2P1D   -        -         -      -       -      3 clients: TTFT 3 s is above 1 s",
    ]
    assert "holds at 5 prompt tokens per output token" in said[4]
    written = load_config(tmp_path / "tandem.yaml").autoscaler
    assert (written.ratio, written.target_per_worker) == ("1:2", 160.0)
    ElementTree.fromstring((tmp_path / "tandem.svg").read_text())


def test_no_split_within_the_objectives_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = sweep()
    del failed.results[0], failed.measured[:2]
    assert _conclude(plan(tmp_path), failed, lambda line: None) == 1
    assert "no split holds the objectives" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tandem.svg"]


def test_the_plot_shows_every_load_and_the_choice() -> None:
    done = sweep()
    svg = draw(done.measured, done.results, choose(done.results), OBJECTIVES)
    root = ElementTree.fromstring(svg)
    dots = root.findall("{http://www.w3.org/2000/svg}circle")
    assert [dot.get("fill") for dot in dots] == ["#1f5fa8", "white", "white", "none"]
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    assert {"1P2D", "2P1D", "0", "500", "1P2D: 400"} <= set(texts)
    for dot in dots:
        assert 0 < float(dot.get("cx") or -1) < 720 and 0 < float(dot.get("cy") or -1) < 440


@pytest.mark.parametrize(
    "wrong", [{"total": 1}, {"duration_s": 0.0}, {"output_tokens": 1}, {"input_tokens": 0}]
)
def test_plans_that_cannot_be_measured_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    good = {"total": 3, "input_tokens": 8, "output_tokens": 8, "duration_s": 1.0}
    files = {"config_out": tmp_path / "c", "plot": tmp_path / "p"}
    with pytest.raises(ConfigError):
        CalibrationPlan(objectives=OBJECTIVES, **files, **{**good, **wrong})  # type: ignore[arg-type]


@dataclass
class Fleet:
    """A controller whose pools reach every size but `unreachable`."""

    unreachable: Sizes | None = None
    pinned: Sizes | None = None
    sizes: Sizes = field(default_factory=lambda: Sizes(1, 1))
    orders: list[Sizes | None] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        serving = Sizes(1, 1) if self.sizes == self.unreachable else self.sizes
        roles = ["prefill"] * serving.prefill + ["decode"] * serving.decode
        return {
            "desired": {"prefill": self.sizes.prefill, "decode": self.sizes.decode},
            "pinned": self.pinned and self.pinned.as_document(),
            "bounds": {"prefill": [1, 4], "decode": [1, 4]},
            "gpus_per_worker": {"prefill": 0, "decode": 0},
            "gpu_budget": None,
            "workers": [{"role": role, "state": "ready"} for role in roles],
            "unplaced": ["decode: no node has a free GPU"],
            "failed_starts": {},
        }

    def scale(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.orders.append(sizes)

    def unscale(self) -> None:
        self.orders.append(None)


def swept(fleet: Fleet, folder: Path) -> tuple[Sweep, list[str]]:
    """Measure every split of three workers, each of which carries 8 clients."""
    done = Sweep()
    said: list[str] = []
    config = parse_config({"cluster": {"start_timeout_s": 1e-9}})

    def measure(sizes: Sizes, clients: int) -> Measurement:
        return figures(sizes.prefill, sizes.decode, clients, 100.0 * sizes.decode, clients / 8.5)

    link: Any = fleet
    _sweep(link, config, plan(folder), measure, done, said.append)
    return done, said


def test_a_split_that_does_not_come_about_is_marked_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    fleet = Fleet(unreachable=Sizes(1, 2))
    done, said = swept(fleet, tmp_path)
    assert fleet.orders == [Sizes(1, 2), Sizes(2, 1), Sizes(1, 1), None]
    lost, found = done.results
    assert lost.best is None and lost.reason.startswith("1P2D not there within 0 s: 1P1D serve")
    assert "no node has a free GPU" in lost.reason and any(lost.reason in line for line in said)
    assert found.best is not None and found.sizes == Sizes(2, 1)
    assert _conclude(plan(tmp_path), done, said.append) == 0


def test_no_split_that_comes_about_is_drawn_too() -> None:
    results = [SplitResult(Sizes(1, 2), None, "not there")]
    ElementTree.fromstring(draw([], results, choose(results), OBJECTIVES))


def test_sizes_held_by_hand_are_held_again(tmp_path: Path) -> None:
    fleet = Fleet(pinned=Sizes(2, 2))
    swept(fleet, tmp_path)
    assert fleet.orders == [Sizes(1, 2), Sizes(2, 1), Sizes(2, 2)]
