"""Open requests by key and by name."""

from cluster.names import RequestId
from cluster.submissions import Submissions

A, B = RequestId("a"), RequestId("b")


def test_a_name_that_comes_again_has_another_key() -> None:
    submissions = Submissions()
    aborted = submissions.open(A, is_continued=False)
    assert submissions.abort(A) == aborted
    ended = submissions.open(A, is_continued=False)
    submissions.close(ended)
    last = submissions.open(A, is_continued=True)
    assert len({aborted, ended, last}) == 3
    found = [submissions.find(key) for key in (aborted, ended, last)]
    assert [each and (each.request_id, each.is_continued) for each in found] == [
        None,
        None,
        (A, True),
    ]
    assert submissions.abort(A) == last


def test_what_is_not_open_has_no_key() -> None:
    submissions = Submissions()
    submissions.close(submissions.open(A, is_continued=False))
    assert submissions.abort(A) is None and submissions.abort(B) is None


def test_a_request_waits_until_it_runs() -> None:
    submissions = Submissions()
    first, _ = (submissions.open(name, is_continued=False) for name in (A, B))
    assert (submissions.num_waiting, submissions.num_running) == (2, 0)
    found = submissions.find(first)
    assert found is not None
    found.is_running = True
    assert repr(submissions) == "<Submissions waiting=1 running=1>"
    submissions.close(first)
    assert (submissions.num_waiting, submissions.num_running) == (1, 0)
