"""`tandem loadtest` against the bare source: good runs, every way to fail, and what is kept."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config import BUNDLED_MODEL
from deploy.access import Access
from deploy.cli import main
from deploy.loadtest.client import Client
from deploy.loadtest.endpoint import Endpoint, discover
from deploy.loadtest.goodput import Judge
from deploy.loadtest.live import line_of
from deploy.loadtest.pace import Job, prepare
from deploy.loadtest.prompts import read_text
from deploy.loadtest.run import Glance, LoadPlan, load
from deploy.loadtest.search import SearchPlan
from deploy.loadtest.source import Fault, Source, SourcePlan
from deploy.loadtest.words import Outcome, Send, Slo
from deploy.ports import free_port
from tests.waiting import until, wait_for

FAST = SourcePlan(ttft_s=0.02, itl_s=0.002)
# The machine is shared: how late requests leave is the benchmark's to judge.
PATIENT = ("--late-limit", "5")


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut prompts out of a part of the text: tokenising all of it takes most of a test's time."""
    text = read_text()[:20_000]
    monkeypatch.setattr("deploy.loadtest.workload.read_text", lambda: text)


@contextmanager
def source(plan: SourcePlan = FAST) -> Iterator[str]:
    """Run a bare source in a thread of its own; yield its address."""
    with running(Source(plan)) as url:
        yield url


@contextmanager
def running(served: Source) -> Iterator[str]:
    """The same for a source of the test's own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(served.start("127.0.0.1", 0), loop).result(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(served.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def loadtest(url: str, output: Path, *flags: str, workload: str = "poisson:rate=100") -> int:
    """Run the command in this process; return its exit status."""
    where = ("--url", url, "--tokenizer", str(BUNDLED_MODEL), "--context", "2048")
    what = ("--workload", f"{workload},input=16,output=6", "--output", str(output))
    try:
        return main(["loadtest", *where, *what, "--requests", "20", *PATIENT, *flags])
    except SystemExit as error:
        return int(error.code or 0)


def read(output: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def jobs_of(endpoint: Endpoint, sends: list[Send]) -> list[Job]:
    return prepare(endpoint, sends, None)


def ignore(_glance: object) -> None:
    pass


def test_a_good_run_is_measured_from_the_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, html = tmp_path / "run.json", tmp_path / "run.html"
    objectives = ("--slo-ttft", "5", "--slo-tpot", "1")
    with source() as url:
        assert loadtest(url, output, *objectives, "--html", str(html), "--phase", "0.1") == 0
    document = read(output)
    assert document["state"] == "complete" and document["faults"] == []
    summary = document["summary"]
    assert (summary["completed"], summary["lost"]) == (20, 0)
    assert summary["slo"]["attainment"] == 1.0 and summary["fluidity"]["index"] == 1.0
    assert summary["ttft_s"]["p50"] >= 0.02 and summary["itl_s"]["mean"] >= 0.0015
    assert summary["worker_seconds"] is None, "the source has no workers to list"
    assert len(document["phases"]) >= 2
    for each in document["requests"]:
        assert each["sent_s"] >= each["scheduled_s"]
        assert each["ttft_s"] == pytest.approx(each["token_s"][0] - each["scheduled_s"], abs=2e-6)
        assert each["received_tokens"] == 6 and each["counted_prompt_tokens"] == 16
    shown = capsys.readouterr().out
    assert "20: 20 completed, 0 lost" in shown and "sent late p50 / p99 / max" in shown
    assert html.read_text()


def test_chat_and_closed_loop_and_conversations(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    with source() as url:
        assert loadtest(url, output, "--api", "chat", "--concurrency", "3") == 0
        assert read(output)["settings"]["mode"] == "closed"
        ends = sorted((r["sent_s"], r["end_s"]) for r in read(output)["requests"])
        under_way = [sum(b <= at < e for b, e in ends) for at, _ in ends]
        assert max(under_way) == 3
        sends = [
            Send(0.0, (1, 2), 4, session="a"),
            Send(0.0, (1, 2, 3), 4, session="a", turn=1, think_s=0.05),
        ]
        endpoint = discover(Access(url))
        jobs = jobs_of(endpoint, sends)
        asyncio.run(load(endpoint, jobs, LoadPlan(), ignore, asyncio.Event()))
    first, second = (job.record for job in jobs)
    assert first.end_s is not None and second.sent_s is not None
    assert second.scheduled_s == pytest.approx(first.end_s + 0.05, abs=0.005)
    assert second.sent_s >= first.end_s + 0.05


@pytest.mark.parametrize(
    ("fault", "after", "outcome", "says"),
    [
        (Fault.CLOSE, 3, "lost", "broke off after 3 tokens: the endpoint closed the connection"),
        (Fault.CLOSE, 0, "lost", "the endpoint closed the connection"),
        (Fault.TRUNCATE, 4, "truncated", "4 of 6 tokens"),
        (Fault.ERROR, 2, "lost", "the endpoint says: "),
        (Fault.GARBAGE, 2, "lost", "an answer is not one: "),
        (Fault.REFUSE, 0, "lost", "HTTP 503: "),
        (Fault.STALL, 2, "lost", "no end within 1 s"),
    ],
)
def test_every_failure_is_counted_and_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    after: int,
    outcome: str,
    says: str,
) -> None:
    output = tmp_path / "run.json"
    with source(SourcePlan(0.01, 0.001, fault, fault_every=5, fault_after=after)) as url:
        assert loadtest(url, output, "--timeout", "1") == 1
    document = read(output)
    assert (document["summary"][outcome], document["summary"]["completed"]) == (4, 16)
    faulty = [each for each in document["requests"] if each["outcome"] != "completed"]
    assert all(each["error"].startswith(says) for each in faulty), faulty
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(f": {outcome}: {says}" in line for line in lines)


def test_answers_are_compared_with_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, kept = tmp_path / "run.json", tmp_path / "reference.jsonl"
    with source() as url:
        assert loadtest(url, output, "--record", str(kept)) == 0
        assert loadtest(url, output, "--verify", str(kept)) == 0
        assert loadtest(url, output, "--verify", str(kept), "--seed", "1") == 1
        assert "no answer to request 0" in capsys.readouterr().err
    with source(SourcePlan(0.02, 0.002, Fault.OTHER, fault_every=10)) as url:
        assert loadtest(url, output, "--verify", str(kept)) == 1
    assert read(output)["summary"]["wrong"] == 2
    assert "wrong: differs from the reference at character " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (("--workload", "poison:rate=1"), 1, "no kind 'poison', did you mean 'poisson'?"),
        (("--workload", "poisson:rate=-1"), 1, "rate=-1 is not a number above 0"),
        (("--output", "/nowhere/run.json"), 1, "/nowhere/run.json: No such file or directory"),
        (("--model", "other"), 1, "serves bare, not other"),
        (("--verify", "/nowhere"), 1, "/nowhere: No such file or directory"),
        (("--time-scale", "0"), 2, "argument --time-scale: 0 is not above 0"),
        (("--header", "Key"), 2, "'Key' is not like 'Authorization: Bearer KEY'"),
        (("--find-goodput",), 1, "--find-goodput needs --slo-ttft or --slo-tpot"),
    ],
)
def test_bad_input_is_one_line_with_its_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bare: str,
    flags: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    assert loadtest(bare, tmp_path / "run.json", *flags) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tandem") and says in line
    assert not (tmp_path / "run.json").exists(), "nothing was measured"


@pytest.fixture(scope="module")
def bare() -> Iterator[str]:
    with source() as url:
        yield url


def test_nobody_at_the_address_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert loadtest(url, tmp_path / "run.json") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tandem: error: {url}/v1/models: ")


def test_a_wrong_line_of_a_trace_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bare: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97996,x,5\n")
    flags = ("--workload", f"azure:path={trace}")
    assert loadtest(bare, tmp_path / "run.json", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{trace}:2: " in line


async def test_an_endpoint_that_dies_ends_the_run_and_its_records_are_kept() -> None:
    served = Source(SourcePlan(0.01, 0.01))
    endpoint = Endpoint(f"http://127.0.0.1:{await served.start('127.0.0.1', 0)}", "bare")
    sends = [Send(0.02 * number, (1, 2, 3), 20) for number in range(200)]
    jobs = jobs_of(endpoint, sends)

    async def die() -> None:
        await until(lambda: any(job.record.is_completed for job in jobs))
        await served.stop()

    killer = asyncio.create_task(die())
    run = await load(endpoint, jobs, LoadPlan(give_up_s=0.2), ignore, asyncio.Event())
    await killer
    assert run.state == "broken"
    assert run.why is not None and run.why.startswith("the endpoint has answered nothing since")
    outcomes = [record.outcome for record in run.records if record.sent_s is not None]
    assert outcomes.count(Outcome.COMPLETED) > 0 and outcomes.count(Outcome.LOST) > 5
    assert any((r.error or "").startswith("broke off after") for r in run.records)
    assert any(r.error == "connection refused" for r in run.records)
    assert any(record.sent_s is None for record in run.records), "the rest was not sent"


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    output = tmp_path / "run.json"

    served = Source(SourcePlan(0.05, 0.2))

    def interrupt() -> None:
        wait_for(lambda: served.num_requests >= 3, 30.0)
        os.kill(os.getpid(), signal.SIGINT)

    with running(served) as url:
        killer = threading.Thread(target=interrupt)
        killer.start()
        assert loadtest(url, output, workload="poisson:rate=20") == 130
        killer.join()
    document = read(output)
    assert document["state"] == "interrupted" and document["summary"]["lost"] == 0
    assert {each["outcome"] for each in document["requests"]} <= {"unfinished", "completed"}


def test_a_client_that_cannot_keep_up_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Client.begin

    def slowly(*arguments: Any) -> None:
        time.sleep(0.02)
        begin(*arguments)

    monkeypatch.setattr(Client, "begin", slowly)
    output = tmp_path / "run.json"
    with source() as url:
        assert loadtest(url, output, "--late-limit", "0.05") == 1
    assert "the client could not keep up: requests left" in capsys.readouterr().err
    late = read(output)["scheduling"]
    assert not late["kept_up"] and late["p99_s"] > 0.05
    # The wait is the client's, and the figures do not hide it.
    assert read(output)["summary"]["ttft_s"]["max"] > late["p99_s"]


async def test_a_slow_reader_loses_nothing() -> None:
    served = Source(SourcePlan(0.0, 0.0))
    endpoint = Endpoint(f"http://127.0.0.1:{await served.start('127.0.0.1', 0)}", "bare")
    jobs = jobs_of(endpoint, [Send(0.0, (1, 2), 5000) for _ in range(4)])

    def stall(_glance: object) -> None:
        time.sleep(0.3)

    run = await load(endpoint, jobs, LoadPlan(), stall, asyncio.Event())
    await served.stop()
    assert [record.received_tokens for record in run.records] == [5000] * 4


async def test_a_connection_that_was_closed_idle_costs_no_request() -> None:
    served = Source(FAST)
    endpoint = Endpoint(f"http://127.0.0.1:{await served.start('127.0.0.1', 0)}", "bare")
    async with Client(endpoint) as client:
        for _ in range(2):
            (job,) = jobs_of(endpoint, [Send(0.0, (1, 2), 2)])
            record = await client.complete(job.record, job.request)
            assert record.is_completed, record.error
            for session in list(served.sessions):
                session.abort()
    await served.stop()


def test_finds_the_goodput_and_keeps_every_probe(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    search = ("--find-goodput", "--slo-ttft", "2", "--start-rate", "500", "--probe", "0.1")
    with source() as url:
        assert loadtest(url, output, *search, "--most-requests", "60") == 0
    document = read(output)
    assert [probe["verdict"] for probe in document["probes"]] == ["met", "met"]
    assert document["goodput"] == {
        "rate": 1000.0,
        "bound": None,
        "why": "met at 1000/s, the highest rate that is tried",
    }
    assert len(document["requests"]) == 60 and document["summary"]["slo"]["attainment"] == 1.0


async def test_a_rate_that_cannot_be_met_any_more_is_cut_short() -> None:
    served = Source(SourcePlan(0.02, 0.002))
    endpoint = Endpoint(f"http://127.0.0.1:{await served.start('127.0.0.1', 0)}", "bare")
    jobs = jobs_of(endpoint, [Send(0.01 * number, (1, 2), 2) for number in range(1000)])
    judge = Judge(Slo(ttft_s=0.001), 50, SearchPlan(start_rate=1.0))
    plan = LoadPlan(is_decided=judge.is_decided)
    run = await load(endpoint, jobs, plan, ignore, asyncio.Event())
    await served.stop()
    assert run.state == "cut" and run.why is None
    assert judge.num_met == 0 and 10 <= judge.num_judged < 1000


def test_a_terminal_shows_the_run_live() -> None:
    glance = Glance(2.0, 9.0, 40, 12, 10, 1, 2, 55.0, 5.0, 0.05, 0.07, 0.01, None, 1e-4, 1, 2)
    lines = json.dumps(glance.as_document()) + "\n"
    command = [sys.executable, "-m", "deploy.loadtest.live", "the title"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for shown in ("the title", "10 of 40", "50 ms", "1P2D", "the client's own delay"):
        assert shown in done.stdout
    assert line_of(glance.as_document()) == (
        "       2 s  10/40 done, 2 under way, 1 failed, 55 tokens/s, "
        "TTFT p50 50 ms p90 70 ms, TPOT p50 10 ms, 1P2D"
    )


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, report = (tmp_path / name for name in ("a.json", "b.json", "r.html"))
    with source() as url:
        assert loadtest(url, first, "--label", "before") == 0
        assert loadtest(url, second, "--label", "after") == 0
    assert main(["loadtest", "compare", str(first), str(second), "-o", str(report)]) == 0
    assert report.read_text()
    first.write_text("{}")
    capsys.readouterr()
    assert main(["loadtest", "compare", str(first), str(second), "-o", str(report)]) == 1
    assert f"{first}: not a run of format tandem-loadtest-1" in capsys.readouterr().err
