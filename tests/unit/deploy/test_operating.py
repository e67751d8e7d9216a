"""What `tandem status`, `scale`, `decisions` and `replay` say, and what they refuse."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from autoscaler.decision import Action
from autoscaler.decision_log import DecisionLog
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from cluster.autoscaler_config import AutoscalerSection
from cluster.errors import ConfigError, TandemError, Unavailable
from deploy import decisions, scale
from deploy.cli import main
from deploy.controller_link import (
    ControllerLink,
    _unanswered,
    limits_of,
    missing_for,
    wait_for_sizes,
)
from deploy.decisions import DecisionsView, line
from deploy.processes import ProcessId
from deploy.replay import first_difference, read_recording, rerun_lines, run
from deploy.scale import ScaleOrder
from deploy.state import DeploymentState
from deploy.status import show
from tests.unit.autoscaler.samples import STALE, START, section, snapshot, state


def worker(worker_id: str, role: str, state: str = "ready") -> dict[str, Any]:
    figures = {"cpus": [0, 1], "start_s": 1.25, "num_running": None, "num_free_blocks": 7}
    return {"worker_id": worker_id, "role": role, "state": state, "endpoint": "tcp://x", **figures}


def status(prefill: int = 1, decode: int = 1, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": "t",
        "model": "tiny",
        "engine": "simulated",
        "healthy": True,
        "reason": "serving",
        "epoch": 3,
        "autoscaler": "act",
        "desired": {"prefill": prefill, "decode": decode},
        "pinned": None,
        "unwritten_decisions": 0,
        "bounds": {"prefill": [1, 4], "decode": [1, 8]},
        "gpu_budget": None,
        "gpus_per_worker": {"prefill": 0, "decode": 0},
        "unplaced": [],
        "refused_pairs": {},
        "failed_starts": {},
        "workers": [worker("prefill-1", "prefill"), worker("decode-1", "decode")],
    }
    return {**plain, **changes}


def test_status_tells_what_is_wanted_and_why_it_is_not_there() -> None:
    misfit = {"prefill-1->decode-1": "dtype is float32 on prefill-1, float16 on decode-1"}
    unplaced = ["decode: no node has a free GPU"]
    text = show(status(1, 2, unplaced=unplaced, refused_pairs=misfit), "http://h")
    assert text.splitlines() == [
        "t: tiny (simulated) at http://h/v1, healthy",
        "desired 1P2D, autoscaler act, controller epoch 3",
        "no place: decode: no node has a free GPU",
        "not paired: prefill-1->decode-1: dtype is float32 on prefill-1, float16 on decode-1",
        "",
        "worker_id  role     state  cpus  start_s  num_running  num_free_blocks  endpoint",
        "prefill-1  prefill  ready  0,1   1.2      -            7                tcp://x",
        "decode-1   decode   ready  0,1   1.2      -            7                tcp://x",
    ]


def test_status_tells_of_an_order_by_hand_and_of_decisions_that_are_not_in_the_file() -> None:
    text = show(status(pinned=[1, 1], unwritten_decisions=3), "http://h").splitlines()
    assert text[1] == "desired 1P1D, autoscaler act, controller epoch 3, sizes held by hand"
    assert text[2] == "3 decisions could not be written to the decision file"


class RayTaskError(Exception):
    """As Ray has it: the text is a page of traceback, the cause is the exception itself."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::ControllerActor.scale() (pid=1)\n  File ...")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RayTaskError(Unavailable("it has only just started")), ": it has only just started"),
        (RayTaskError(KeyError("decode")), " does not answer: KeyError: 'decode'"),
        (OSError("gone\nadvice"), " does not answer: OSError: gone"),
    ],
)
def test_what_the_controller_raised_is_told_by_its_cause(error: Exception, words: str) -> None:
    assert str(_unanswered("t", error)) == f"the controller of 't'{words}"


class FakeController:
    """A controller whose pools take a few questions to follow an order."""

    def __init__(self, lag: int = 2, **changes: Any) -> None:
        self.orders: list[Sizes | None] = []
        self._status = status(**changes)
        self._lag = lag

    def status(self) -> Mapping[str, Any]:
        if self.orders and (sizes := self.orders[-1]) is not None:
            self._lag -= 1
            self._status["desired"] = {"prefill": sizes.prefill, "decode": sizes.decode}
            if self._lag <= 0:
                roles = ["prefill"] * sizes.prefill + ["decode"] * sizes.decode
                self._status["workers"] = [worker(f"w{i}", r) for i, r in enumerate(roles)]
        return self._status

    def scale(self, sizes: Sizes) -> None:
        self.orders.append(sizes)

    def unscale(self) -> None:
        self.orders.append(None)


def order(controller: FakeController, wanted: ScaleOrder) -> list[str]:
    said: list[str] = []
    link = cast(ControllerLink, controller)
    if wanted.is_auto:
        scale._leave_to_the_load(link, said.append)
    else:
        scale._hold(link, wanted, said.append)
    return said


def test_sizes_are_ordered_and_waited_for() -> None:
    controller = FakeController()
    said = order(controller, ScaleOrder(2, 3, wait_s=5.0))
    assert controller.orders == [Sizes(2, 3)]
    assert said[0].startswith("pools are held at 2P3D, were 1P1D")
    assert said[1:] == ["1P1D serve and 0 change their role", "2P3D serve"]


def test_a_pool_without_a_number_keeps_its_size() -> None:
    controller = FakeController(prefill=2, decode=3)
    order(controller, ScaleOrder(decode=5))
    assert controller.orders == [Sizes(2, 5)]


def test_sizes_outside_the_bounds_are_refused_in_one_line() -> None:
    controller = FakeController(gpu_budget=4.0, gpus_per_worker={"prefill": 1, "decode": 1})
    refused = (
        "5P9D is refused: 5 prefill workers are above max_prefill 4;"
        " 9 decode workers are above max_decode 8; 14 GPUs exceed gpu_budget 4"
    )
    with pytest.raises(ConfigError, match=refused):
        order(controller, ScaleOrder(5, 9))
    assert controller.orders == []


@pytest.mark.parametrize(
    ("mode", "then"), [("act", "the load decides"), ("off", "they stay (autoscaler.mode is off)")]
)
def test_an_order_is_taken_back(mode: str, then: str) -> None:
    controller = FakeController(autoscaler=mode)
    said = order(controller, ScaleOrder(is_auto=True))
    assert controller.orders == [None]
    assert said == [f"pools are no longer held at 1P1D: {then}"]


@pytest.mark.parametrize(
    "order", [{}, {"prefill": 1, "is_auto": True}, {"is_auto": True, "wait_s": 1.0}]
)
def test_orders_that_say_nothing_or_two_things_are_refused(order: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ScaleOrder(**order)


def test_what_is_missing_is_named() -> None:
    sizes = Sizes(1, 1)
    assert missing_for(status(), sizes) is None
    assert missing_for(status(1, 2), sizes) == "the controller still keeps 1P2D"
    workers = [worker("p", "prefill"), worker("d", "decode"), worker("f", "decode", "flipping")]
    waiting = status(workers=workers, failed_starts={"decode": "no memory"})
    assert missing_for(waiting, sizes) == "1P1D serve and 1 change their role; no memory"
    leaving = [worker("p", "prefill"), worker("d", "decode"), worker("o", "decode", "soft_out")]
    assert missing_for(status(workers=leaving), sizes) is None
    with pytest.raises(Unavailable, match="2P1D not there within 0 s: the controller still"):
        wait_for_sizes(cast(ControllerLink, FakeController()), Sizes(2, 1), 0.0)


def test_limits_come_from_the_deployment() -> None:
    limits = limits_of(status(gpu_budget=6.0, gpus_per_worker={"prefill": 2, "decode": 1}))
    assert limits.fewest == Sizes(1, 1) and limits.most == Sizes(4, 8)
    assert limits.gpus(Sizes(1, 4)) == limits.gpu_budget == 6.0


# Decisions and their replay.


def recorded(path: Path, loads: list[float]) -> None:
    log, before = DecisionLog(100, path), state(4, 4)
    for index, tps in enumerate(loads):
        sample = snapshot(decode_tps=tps)
        decision, after = decide(section(), before, sample, START + 200.0 * index)
        log.append(section(), sample, before, decision)
        before = after


@pytest.fixture
def file(tmp_path: Path) -> Path:
    recorded(tmp_path / "decisions.jsonl", [400.0, 900.0, 900.0, 1500.0, 1500.0])
    return tmp_path / "decisions.jsonl"


def test_a_decision_is_one_line() -> None:
    decision, _ = decide(section(), state(4, 4), snapshot(decode_tps=900.0), START)
    assert line(7, decision) == (
        "2027-01-15T08:00:00Z  #7  decode_tps=900 latency_over_objective=0.2 arriving_tps=-"
        " ratio=1  9P9D -> 9P9D  out  signal  4P4D to 9P9D:"
        " decode_tps 900 at 100 per worker needs 9.00 decode workers"
    )
    silent, _ = decide(section(), state(4, 4), snapshot(decode_tps=STALE, tbt_s=STALE), START)
    assert "decode_tps=missing" in line(1, silent) and "  - -> 4P4D  hold  nothing" in line(
        1, silent
    )


def test_the_same_settings_replay_identically(file: Path) -> None:
    said: list[str] = []
    assert run(file, section(), is_rerun=False, say=said.append) == 0
    assert said == ["5 decisions (#1 to #5) are identical, byte for byte"]


def test_the_first_difference_is_shown(file: Path) -> None:
    said: list[str] = []
    assert run(file, section(max_decode=8), is_rerun=False, say=said.append) == 1
    assert said[0] == "#2 at 2027-01-15T08:03:20Z is the first decision that differs:"
    (final,) = (each for each in said if each.startswith("  final:"))
    assert final == "  final: recorded [9, 9], now [8, 8]"
    recording = read_recording(file)
    assert first_difference(recording.records, recording.under(section())) is None


def reran(file: Path, config: AutoscalerSection) -> list[str]:
    recording = read_recording(file)
    return list(rerun_lines(recording.records, recording.under(config)))


def test_a_rerun_lists_what_differs_side_by_side(file: Path) -> None:
    said = reran(file, section(max_decode=12))
    assert said[-3] == "2 of 5 decisions differ"
    assert said[-2].startswith("recorded: 2 moves") and said[-2].endswith("at most 30 workers")
    assert said[-1].startswith("changed: 2 moves") and said[-1].endswith("at most 24 workers")
    heading, row, after = (" ".join(each.split()) for each in said[:-3])
    assert heading.split() == ["seq", "time", "recorded", "changed", "why"]
    assert "15P15D -> 15P15D out (signal) 15P15D -> 12P12D out (signal)" in row
    assert "15P15D -> 15P15D hold (signal) 15P15D -> 12P12D hold (signal)" in after
    same = reran(file, section())
    assert same[0] == "0 of 5 decisions differ" and len(same) == 3


def test_reruns_rest_on_their_own_decisions(file: Path) -> None:
    said = reran(file, section(cooldown_out_s=1e6))
    assert any(Action.HOLD in each and "scale-out cooldown" in each for each in said[1:-3])


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "holds no decision"), ("{}\n", "line 1 is no decision record"), (None, "No such file")],
)
def test_files_that_cannot_be_replayed(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decisions.jsonl"
    if text is not None:
        file.write_text(text)
    assert main(["replay", str(file)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"tandem: error: {file}: ") and words in error


def test_a_file_replays_by_itself_and_the_command_line_changes_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(file)]) == 0
    assert "identical" in capsys.readouterr().out
    changed = ["replay", str(file), "--autoscaler.target_per_worker", "200"]
    assert main(changed) == 1
    assert main([*changed, "--rerun"]) == 0
    assert "decisions differ" in capsys.readouterr().out


def test_a_file_without_settings_takes_those_of_the_command_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(file.read_text().partition("\n")[2])
    plain = {"mode": "act", "target_per_worker": "100", "max_prefill": "40", "max_decode": "40"}
    pairs = ((f"--autoscaler.{name}", value) for name, value in plain.items())
    flags = ["--no-autoscaler.arrival_term", "--autoscaler.slo_tbt_s", "0.1"]
    assert main(["replay", str(file), *itertools.chain(*pairs), *flags]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["replay", str(file)]) == 1


def test_a_line_that_was_torn_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([head, lines[0], lines[1][:50] + "\n", *lines[2:]]))
    assert main(["replay", str(file)]) == 0
    torn, same = capsys.readouterr().out.splitlines()
    assert torn == f"{file}: left out what was cut off while it was written: line 3"
    assert same == "4 decisions (#1 to #5) are identical, byte for byte"


def pages(monkeypatch: pytest.MonkeyPatch, answers: list[httpx.Response | Exception]) -> list[int]:
    """Let the endpoint give these answers; return the list of what was asked for."""
    asked: list[int] = []

    def get(url: str, params: dict[str, int], **_: object) -> httpx.Response:
        asked.append(params["after"])
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr(decisions, "_POLL_S", 0.0)
    return asked


def page(*seqs: int) -> httpx.Response:
    return httpx.Response(200, json={"decisions": [{"seq": seq} for seq in seqs], "next": 0})


DEPLOYMENT = DeploymentState("t", "t:1", ProcessId(1, 0), "http://h", None, None)


def test_decisions_are_paged_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pages(monkeypatch, [page(4, 5), page(6), page()])
    shown = decisions._all(DEPLOYMENT, DecisionsView(after=3))
    assert [document["seq"] for document in shown] == [4, 5, 6]
    assert asked == [3, 5, 6]


def test_following_waits_for_a_dead_controller_but_not_for_a_deployment_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down = httpx.Response(503, json={"error": {"message": "the controller does not answer"}})
    no_router = httpx.Response(503, text="<html>")
    gone = httpx.ConnectError("refused")
    asked = pages(monkeypatch, [page(1), page(), down, no_router, page(2), gone])
    states = [DEPLOYMENT, DEPLOYMENT, None]
    monkeypatch.setattr(DeploymentState, "read", lambda name: states.pop(0))
    seen = []
    with pytest.raises(TandemError, match="the deployment 't' is gone"):
        for document in decisions._follow(DEPLOYMENT, 0):
            seen.append(document["seq"])
    assert seen == [1, 2] and asked == [0, 1, 1, 1, 1, 2]
    said = "tandem: waiting: HTTP 503: the controller does not answer\n"
    assert capsys.readouterr().err == said, "once"


@pytest.mark.parametrize("temp_dir", ["/tmp/t", None])
def test_following_ends_with_a_launcher_that_was_killed(
    monkeypatch: pytest.MonkeyPatch, temp_dir: str | None
) -> None:
    """Its notes are still there; a deployment on a cluster of others' outlives its launcher."""
    gone = replace(DEPLOYMENT, temp_dir=temp_dir)
    pages(monkeypatch, [httpx.ConnectError("refused"), page(1), httpx.ConnectError("refused")])
    states = [gone, None]
    monkeypatch.setattr(DeploymentState, "read", lambda name: states.pop(0))
    seen = []
    with pytest.raises(TandemError, match="the deployment 't' is gone"):
        for document in decisions._follow(gone, 0):
            seen.append(document["seq"])
    assert seen == ([] if temp_dir else [1])


def test_an_endpoint_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pages(monkeypatch, [httpx.Response(200, text="<html>")])
    with pytest.raises(Unavailable, match="http://h/admin/decisions: JSONDecodeError"):
        list(decisions._all(DEPLOYMENT, DecisionsView()))
