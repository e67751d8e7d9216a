"""Which requests failed under a load, by the router's own records, and whether they had to."""

from collections.abc import Collection
from typing import Any

from tests.paced_load import LoadReport
from tests.served import Served

_ENDED_WELL = ("stop", "length")


def failed_records(served: Served) -> list[dict[str, Any]]:
    """Return the records of all requests that did not end as their clients wanted."""
    records = served.client.get("/admin/requests?limit=10000").json()["requests"]
    return [record for record in records if record["outcome"] not in _ENDED_WELL]


def only_cut_streams_failed(
    served: Served, report: LoadReport, lost: Collection[str]
) -> list[dict[str, Any]]:
    """Check that exactly those failed that a lost decode worker had begun to stream.

    A request that had no token yet is tried again elsewhere, so no other has a reason. The
    router must still have every record. Returns those that were cut.
    """
    totals = served.client.get("/debug/pinned").json()["totals"]
    assert totals["open"] == {} and sum(totals["outcomes"].values()) >= report.num_sent
    failed = failed_records(served)
    wrong = [
        record
        for record in failed
        if record["outcome"] != "error"
        or record["decode_worker"] not in lost
        or record["ttft_s"] is None
    ]
    assert wrong == []
    assert len(failed) == len(report.failures), (failed, report.failures)
    return failed
