"""`tandem decisions`: what the autoscaler decided and why, one line each, as it decides."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from autoscaler.decision import Decision, Input
from autoscaler.decision_log import canonical_json
from autoscaler.windows import Missing
from cluster.errors import TandemError, Unavailable
from deploy.access import Access
from deploy.controller_link import running_deployment
from deploy.state import DeploymentState

_POLL_S = 1.0
_TIMEOUT_S = 10.0
_PAGE = 500


@dataclass(frozen=True, slots=True)
class DecisionsView:
    """Which decisions are shown, and how."""

    after: int = 0
    is_following: bool = False
    is_json: bool = False


def run(name: str, view: DecisionsView, say: Callable[[str], None] = print) -> int:
    """Show the decisions of the deployment `name`; return the exit status."""
    state = running_deployment(name)
    shape = canonical_json if view.is_json else _document_line
    try:
        for document in _follow(state, view.after) if view.is_following else _all(state, view):
            say(shape(document))
    except KeyboardInterrupt:
        pass
    return 0


def line(seq: int, decision: Decision) -> str:
    """Return one decision as one line: time, inputs, raw and final sizes, action, why."""
    inputs = " ".join(map(_input, decision.inputs))
    raw = decision.raw or "-"
    return (
        f"{stamp(decision.now)}  #{seq}  {inputs}  {raw} -> {decision.final}"
        f"  {decision.action}  {decision.driver}  {decision.reason}"
    )


def stamp(now: float) -> str:
    """Return Unix time as text."""
    return f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _input(each: Input) -> str:
    if isinstance(each.value, Missing):
        # Nothing to measure is no trouble; not having heard is.
        return f"{each.name}={'-' if each.value.is_idle else 'missing'}"
    return f"{each.name}={each.value:.4g}"


def _document_line(document: dict[str, Any]) -> str:
    return line(document["seq"], Decision.from_document(document["decision"]))


def _all(state: DeploymentState, view: DecisionsView) -> Iterator[dict[str, Any]]:
    """Yield the decisions the controller still has; older ones are in its decision file."""
    after = view.after
    while page := _page(state.access, after):
        yield from page
        after = page[-1]["seq"]


def _follow(state: DeploymentState, after: int) -> Iterator[dict[str, Any]]:
    """Yield decisions as they come, until the deployment is gone; a pause of it is waited out."""
    is_silent = False
    while True:
        try:
            page = _page(state.access, after)
        except Unavailable as error:
            if DeploymentState.read(state.name) != state or _has_ended(state):
                raise TandemError(f"the deployment {state.name!r} is gone") from None
            if not is_silent:
                print(f"tandem: waiting: {error}", file=sys.stderr, flush=True)
            page, is_silent = [], True
        else:
            is_silent = False
        yield from page
        after = page[-1]["seq"] if page else after
        if len(page) < _PAGE:
            time.sleep(_POLL_S)


def _has_ended(state: DeploymentState) -> bool:
    """Return whether its launcher was killed: the Ray that it had started ended with it.

    One on a cluster that was there before goes on without its launcher.
    """
    return state.temp_dir is not None and not state.launcher.is_alive


def _page(access: Access, after: int) -> list[dict[str, Any]]:
    try:
        query = {"after": after, "limit": _PAGE}
        answer = access.get("/admin/decisions", _TIMEOUT_S, query)
        if answer.status_code != 200:
            raise Unavailable(f"HTTP {answer.status_code}: {_reason(answer)}")
        decisions: list[dict[str, Any]] = answer.json()["decisions"]
        return decisions
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"{access.url}/admin/decisions: {error!r}") from None


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        # Not the router's answer but that of the proxy before it.
        return answer.reason_phrase
