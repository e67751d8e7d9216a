"""The life of a request, on one screen: `Flow.serve`. Read this file first.

admit -> place -> prefill -> hand over -> decode -> account -> release, and back to `place` with
`recover` if a worker fails before decode has said anything. Everything between two awaits
is one synchronous step, nothing in a cleanup awaits, and whatever ends the request (the last
token, an error, a deadline, a client that went away) goes through the same `finally`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import NoReturn

from cluster.config import RouterSection
from cluster.errors import (
    ConnectionCut,
    DeadlineExceeded,
    Overloaded,
    RetryElsewhere,
    TandemError,
    Unavailable,
)
from cluster.messages import FIRST_IS_LAST, Decode, Offer, Offered, Prefill, Prefilled, Tokens
from cluster.metrics import OPEN_RESERVATIONS
from cluster.names import FinishReason, HandoffId, RequestId, Role, WorkerId
from cluster.request_plane import Leg
from router.admission import Admission, Ticket
from router.first_token import may_prefill_sample
from router.ledger import Reservation
from router.load_meter import LoadMeter
from router.measures import NO_OBJECTIVES, Measures, Objectives
from router.membership import Membership
from router.policy import RETRY_AFTER_S, Placed, RejectedPlacement, Rejection
from router.records import Outcome, PromptTokens, Records, RequestRecord
from router.recovery import Cause, Tries, should_retry
from router.setbacks import EngineFailed, Refused, cause_of, failure_in, outcome_of
from router.timeline import Event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sampled sequence to generate.

    `request_id` is unique among all routers; the sequences of one client request (`n` > 1, a
    batch of prompts) share its `exchange_id`. `local_only` requests cannot use transferred KV.
    `traceparent` is the client's trace context, unchecked.
    """

    request_id: RequestId
    exchange_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, object]
    local_only: bool = False
    cache_salt: str | None = None
    priority: int = 0
    traceparent: str | None = None


class Flow:
    """Serves requests on the workers that `membership` knows; `on_end` sees every record once,
    when it is complete."""

    def __init__(
        self,
        config: RouterSection,
        membership: Membership,
        records: Records,
        rng: Random | None = None,
        objectives: Objectives = NO_OBJECTIVES,
        on_end: Callable[[RequestRecord], None] = lambda _record: None,
    ) -> None:
        self._config = config
        self._membership = membership
        self.records = records
        self.meter = LoadMeter()
        self._measures = Measures(objectives)
        self._on_end = on_end
        self._admission = Admission(config, membership.ready_workers, rng)
        self._runs: set[_Run] = set()
        self._num_shown = 0
        self._is_closed = False
        membership.subscribe(self._admission.redecide)

    def __repr__(self) -> str:
        return f"<Flow runs={len(self._runs)} {self._admission!r}>"

    async def serve(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]:
        """Yield the tokens of `request`; raise an error of `cluster.errors` if it fails.

        To cancel the task that iterates says that the client is gone; to close the generator,
        that it has all it wants (the front-end finds stop strings). Both end it on the workers.
        """
        run = self._admit(request)
        while run.last is None:
            try:
                await self._place(run)
                if (first := await self._prefill(run)) is not None:
                    first = self._account(run, first)
                    if first.finish_reason is not None:
                        run.last = first
                        continue
                    yield first
                self._hand_over(run)
                while (tokens := await self._decode(run)).finish_reason is None:
                    yield self._account(run, tokens)
                run.last = self._account(run, tokens)
            except RetryElsewhere as error:
                self._recover(run, error)
            except BaseException as error:
                self._end(run, error)
                raise
            finally:
                self._release(run)
        # The client learns of the end when there is nothing left to clean up.
        yield run.last

    def close(self) -> None:
        """End every request, and any that comes later, with `Unavailable`."""
        self._is_closed = True
        for run in list(self._runs):
            self._interrupt(run, Unavailable("the router is stopping"))

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    def status(self) -> dict[str, object]:
        """Return what is open on every worker, who waits, and totals since the start."""
        ledger = self._admission.ledger
        workers = [
            {**worker, "reserved": asdict(ledger.load(WorkerId(str(worker["worker_id"]))))}
            for worker in self._membership.report()
        ]
        return {
            "waiting": self._admission.num_waiting,
            "open_reservations": ledger.num_open,
            "workers": workers,
            "totals": self.records.totals(),
        }

    def check_invariants(self) -> None:
        self._admission.check_invariants()

    # --- the steps, in order

    def _admit(self, request: GenerateRequest) -> "_Run":
        if self._is_closed:
            raise Unavailable("the router is stopping")
        now = _now()
        num_tokens = len(request.prompt_token_ids)
        self.meter.arrive(num_tokens)
        self._measures.arrive(num_tokens)
        record = self.records.open(request.exchange_id, request.request_id, num_tokens, now)
        record.traceparent = request.traceparent
        deadline_s = now + self._config.request_deadline_s
        return _Run(request, record, self._admission.next_order(), deadline_s)

    async def _place(self, run: "_Run") -> None:
        """Choose workers and reserve room on them, waiting in line if there is none."""
        run.placement = None
        self._runs.add(run)
        # A timer of our own: `asyncio.timeout` around a `yield` would cancel whichever task the
        # consumer happens to be in.
        late = DeadlineExceeded(f"not finished after {self._config.request_deadline_s:g} s")
        run.timer = asyncio.get_running_loop().call_at(run.deadline_s, self._interrupt, run, late)
        request = run.request
        wanted = run.tries.request(len(request.prompt_token_ids), request.local_only, self._config)
        woken = run.woken = asyncio.Event()
        ticket = run.ticket = self._admission.enter(wanted, run.order, woken.set)
        if ticket.answer is None:
            await woken.wait()
        run.check()
        if not isinstance(ticket.answer, Reservation):
            raise self._refusal(ticket.answer, run)
        self._show_reservations()
        run.placement = ticket.answer.placement
        run.record.record_placed(run.placement, _now())

    async def _prefill(self, run: "_Run") -> Tokens | None:
        """Have the prompt computed and held, unless decode is to compute it.

        Return the first token where prefill samples it. One that the client has is not sampled
        again, wherever its request goes on.
        """
        worker_id = run.placed.prefill_worker
        if worker_id is None:
            return None
        run.side = Role.PREFILL
        request, leg_id = run.request, run.leg_id
        is_sampled = run.first_token is None and may_prefill_sample(request.sampling)
        run.prefill = self._membership.link(worker_id).open(
            Prefill(
                leg_id,
                HandoffId(leg_id),
                request.prompt_token_ids,
                request.cache_salt,
                request.priority,
                request.sampling if is_sampled else None,
            )
        )
        answer = await run.prefill.receive()
        if isinstance(answer, Offered):
            # Its blocks go over while the next ones are computed.
            run.offer, run.side = answer.offer, Role.DECODE
            self._ask_decode(run, awaits_token=is_sampled)
            run.side = Role.PREFILL
            answer = await run.prefill.receive()
        first = None
        if isinstance(answer, Prefilled):
            run.offer = answer.offer
            if is_sampled and answer.first_token is not None:
                run.first_token = answer.first_token
                first = Tokens(leg_id, (answer.first_token,), stats=answer.stats)
        elif isinstance(answer, Tokens) and is_sampled and answer.finish_reason in FIRST_IS_LAST:
            first = answer
        else:
            raise failure_in(answer)
        self._admission.end_prefill(run.reservation)
        run.record.timeline.stamp(Event.PREFILLED, _now())
        return first

    def _refusal(self, answer: RejectedPlacement | None, run: "_Run") -> TandemError:
        assert answer is not None
        self._measures.reject(answer.rejection)
        if answer.rejection is Rejection.OVERLOADED:
            return Overloaded(answer.reason, answer.retry_after_s)
        if answer.rejection is Rejection.EXHAUSTED and run.setback is not None:
            return run.setback
        return Unavailable(answer.reason)

    def _hand_over(self, run: "_Run") -> None:
        """The tokens are decode's to send from here on; it pulls the KV cache itself."""
        run.check()
        run.side = Role.DECODE
        if run.decode is None:
            self._ask_decode(run)
        assert run.decode is not None
        if run.prefill is not None:
            run.prefill.tie(run.decode)

    def _ask_decode(self, run: "_Run", awaits_token: bool = False) -> None:
        """Ask decode to go on from the prompt, or from the first token where there is one."""
        request = run.request
        self._admission.ledger.ask_decode(run.reservation, _now())
        run.decode = self._membership.link(run.placed.decode_worker).open(
            Decode(
                run.leg_id,
                request.prompt_token_ids,
                request.sampling,
                run.offer,
                request.cache_salt,
                request.priority,
                run.first_token,
                awaits_token,
            )
        )
        run.num_received = 0

    async def _decode(self, run: "_Run") -> Tokens:
        """Return the next tokens; the first ones show that the hand-off is done."""
        run.check()
        assert run.decode is not None
        answer = await run.decode.receive()
        if not isinstance(answer, Tokens):
            raise failure_in(answer)
        if answer.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineFailed(f"the decode worker ended it: {answer.stop_reason or 'aborted'}")
        if answer.num_before != run.num_received:
            raise ConnectionCut(
                f"tokens lost on the way: {run.num_received} received, {answer.num_before} sent"
            )
        run.num_received += len(answer.token_ids)
        if run.prefill is not None:
            run.prefill.close()
            run.prefill = None
            self._admission.ledger.end_handoff(run.reservation)
        return answer

    def _account(self, run: "_Run", tokens: Tokens) -> Tokens:
        """Count what the tokens carry and when they came; return them for the client."""
        now, record = _now(), run.record
        run.is_answered = True
        if run.side is Role.DECODE and not run.is_decoding:
            run.is_decoding = True
            record.timeline.stamp(Event.DECODING, now)
        # Prefill's are for the client; the record has decode's.
        if tokens.stats is not None and run.is_decoding:
            record.prompt_tokens = PromptTokens.of(tokens.stats, run.placed.expects_handoff)
            self._measures.prefilled(record.prompt_tokens)
        if tokens.receipt is not None:
            record.receipt = tokens.receipt
            self._measures.handed_over(tokens.receipt.received_bytes, record.bytes_agree is False)
            self.meter.hand_over(tokens.receipt.received_bytes)
        self._account_latency(record, len(tokens.token_ids), now)
        if tokens.finish_reason is not None:
            self._finish(record, Outcome.of(tokens.finish_reason), None)
        return tokens

    def _account_latency(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        gap_s = record.timeline.record_tokens(num_tokens, now)
        if gap_s is not None:
            self._measures.next_tokens(num_tokens, gap_s)
            self.meter.next_tokens(gap_s)
        elif num_tokens:
            record.timeline.stamp(Event.FIRST_TOKEN, now)
            self._measures.first_tokens(num_tokens, now - record.timeline.arrived_s)
            self.meter.first_token(now - record.timeline.arrived_s)

    def _recover(self, run: "_Run", error: RetryElsewhere) -> None:
        """Note the setback and return to try again, or raise what the client is told."""
        if run.placement is None:
            self._give_up(run, error)
        cause = cause_of(error, run.side)
        run.record.record_setback(cause, str(error), _now())
        if cause is Cause.HANDOFF_FAILED:
            self.meter.fail_handoff()
        if run.is_decoding or not should_retry(run.tries, cause, self._config):
            self._give_up(run, error)
        self._measures.recover(cause)
        logger.warning("%s: %s: %s; trying again", run.leg_id, cause.value, error)
        run.tries = run.tries.after(cause, run.placed)
        run.setback = error

    def _release(self, run: "_Run") -> None:
        """Close both legs, which cancels what still runs there, and give the room back."""
        self._runs.discard(run)
        if run.timer is not None:
            run.timer.cancel()
        ticket, run.ticket = run.ticket, None
        if ticket is None:
            return
        for leg in run.legs():
            leg.close()
        run.prefill = run.decode = run.offer = None
        self._admission.leave(ticket)
        self._show_reservations()

    # --- what ends a request early

    def _interrupt(self, run: "_Run", error: TandemError) -> None:
        """End the run from outside: at once on the workers, for the client when it next asks.

        A client that has stopped reading may never ask, so nothing waits for it.
        """
        run.interruption = error
        self._end(run, error)
        for leg in run.legs():
            leg.fail(error)
        if run.woken is not None:
            run.woken.set()
        self._release(run)

    def _give_up(self, run: "_Run", error: RetryElsewhere) -> NoReturn:
        if isinstance(error, Refused):
            overloaded = Overloaded(str(error), RETRY_AFTER_S)
            self._end(run, overloaded)
            raise overloaded from error
        self._end(run, error)
        raise error

    def _end(self, run: "_Run", error: BaseException) -> None:
        if isinstance(error, GeneratorExit) and run.is_answered:
            self._finish(run.record, Outcome.STOP, None)
        else:
            self._finish(run.record, outcome_of(error), str(error) or type(error).__name__)

    def _finish(self, record: RequestRecord, outcome: Outcome, error: str | None) -> None:
        if record.outcome is None:
            self.records.finish(record, outcome, error, _now())
            self._measures.end(record)
            self.meter.end(record.timeline.num_tokens, outcome.is_success)
            self._on_end(record)

    def _show_reservations(self) -> None:
        # By difference: the gauge is shared by the flows of several models.
        num_open = self._admission.ledger.num_open
        OPEN_RESERVATIONS.inc(num_open - self._num_shown)
        self._num_shown = num_open


@dataclass(slots=True, eq=False)
class _Run:
    """A request in the flow: what lasts, and below it what each attempt starts afresh."""

    request: GenerateRequest
    record: RequestRecord
    order: int
    deadline_s: float
    tries: Tries = field(default_factory=Tries)
    setback: RetryElsewhere | None = None
    interruption: TandemError | None = None
    is_answered: bool = False
    is_decoding: bool = False
    first_token: int | None = None
    last: Tokens | None = None

    timer: asyncio.TimerHandle | None = None
    woken: asyncio.Event | None = None
    ticket: Ticket | None = None
    placement: Placed | None = None
    side: Role = Role.PREFILL
    prefill: Leg | None = None
    decode: Leg | None = None
    offer: Offer | None = None
    num_received: int = 0

    @property
    def leg_id(self) -> RequestId:
        """Fresh for every attempt: a late answer must not be taken for the next one's."""
        return RequestId(f"{self.request.request_id}.{self.tries.num_attempts}")

    @property
    def placed(self) -> Placed:
        assert self.placement is not None
        return self.placement

    @property
    def reservation(self) -> Reservation:
        assert self.ticket is not None and isinstance(self.ticket.answer, Reservation)
        return self.ticket.answer

    def legs(self) -> list[Leg]:
        return [leg for leg in (self.prefill, self.decode) if leg is not None]

    def check(self) -> None:
        if self.interruption is not None:
            raise self.interruption


def _now() -> float:
    return asyncio.get_running_loop().time()
