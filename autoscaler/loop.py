"""The loop around the policy: samples load, decides every period, logs, and resizes the pools."""

import asyncio
import logging
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoscaler.decision import Action, Decision, Pin, PolicyState
from autoscaler.decision_log import DecisionLog, Record
from autoscaler.gauge import read_gauge
from autoscaler.policy import decide
from autoscaler.ratio import Ratio, Sizes
from autoscaler.signals import Signals, Snapshot, known_signals
from cluster.autoscaler_config import AutoscalerSection
from cluster.config import TandemConfig
from cluster.names import Role
from cluster.pools import Pools

SAMPLE_S = 0.5
# More history than this is in the decision file only: the document is saved after each decision.
SAVED_RECORDS = 100
_VERSION = 1

_log = logging.getLogger(__name__)


class Autoscaler:
    """Both pools' sizes; everything it must remember is in `document()`.

    With mode `off` it only follows orders given by hand, with `advise` it decides as if it were
    obeyed and changes nothing.
    """

    def __init__(
        self, config: TandemConfig, pools: Pools, saved: Mapping[str, Any] | None = None
    ) -> None:
        self._config = config.autoscaler
        self._pools = pools
        self._signals = _signals(config)
        self.log = _log_of(config.autoscaler)
        self.state = PolicyState(Sizes(config.prefill.workers, config.decode.workers))
        if saved is not None and saved.get("version") == _VERSION:
            self.state = PolicyState.from_document(saved["state"])
            self.log.restore(Record.from_document(each) for each in saved["records"])
            self.log.next_seq = max(self.log.next_seq, int(saved["next_seq"]))
        self._applied: Sizes | None = None
        self._next_at = 0.0
        self._is_ordered = self.state.pin is not None

    async def run(self) -> None:
        """Sample and decide until cancelled."""
        while True:
            self.tick()
            period_s = self._config.scaled(self._config.decision_period_s)
            await asyncio.sleep(min(SAMPLE_S, period_s))

    def tick(self) -> Decision | None:
        """Take one sample; decide if it is time to and return the decision."""
        self._signals.add(self._pools.load())
        now = self._pools.now()
        # More than a period to go: the clock has been set back since.
        is_early = 0 < self._next_at - now <= self._config.scaled(self._config.decision_period_s)
        is_time = self._config.mode != "off" and not is_early
        return self._decide(now) if is_time or self._is_ordered else None

    def pin(self, sizes: Mapping[Role, int], reason: str) -> None:
        """Order sizes by hand; they hold until `unpin`."""
        wanted = Sizes(sizes[Role.PREFILL], sizes[Role.DECODE])
        self.state = replace(self.state, pin=Pin(wanted, reason))
        self._is_ordered = True

    def unpin(self) -> None:
        """Take the order back: the load decides again, from the sizes there are."""
        self.state = replace(self.state, pin=None)

    def reconfigure(self, config: TandemConfig, sizes: Mapping[Role, int], reason: str) -> None:
        """Go by `config` from now on, and give the pools these sizes unless an order by hand
        holds. Signals are collected afresh; cooldowns, decisions and the order stay."""
        earlier = self.log
        self._config, self._signals = config.autoscaler, _signals(config)
        self.log = _log_of(config.autoscaler)
        self.log.restore(earlier.last(config.autoscaler.decision_records))
        self.log.next_seq = earlier.next_seq
        self._next_at = 0.0
        if self.state.pin is None:
            target = Sizes(sizes[Role.PREFILL], sizes[Role.DECODE])
            self.state, self._applied = replace(self.state, target=target), None
            self._pools.resize(sizes, reason)

    def snapshot(self) -> Snapshot:
        """Return what the next decision would rest on."""
        return self._signals.read(self._pools.now())

    def signals(self) -> Mapping[str, float]:
        """Return what is measured now, by name; what is not known is left out."""
        return known_signals(self.snapshot())

    @property
    def pinned(self) -> list[int] | None:
        """The sizes ordered by hand, (P, D), None while the load decides."""
        pin = self.state.pin
        return None if pin is None else pin.sizes.as_document()

    @property
    def num_unwritten(self) -> int:
        return self.log.num_unwritten

    def decisions(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Return up to `limit` records that follow number `after`, oldest first, JSON-able."""
        return [record.as_document() for record in self.log.page(after, limit)]

    def view(self) -> dict[str, Any]:
        """Return the signal beside what it is held against, and the rules in force, JSON-able."""
        config, state = self._config, self.state
        return {
            "signal": read_gauge(config, self.snapshot(), state.target).as_document(),
            "objectives": {
                "ttft_s": config.slo_ttft_s,
                "tbt_s": config.slo_tbt_s,
                "quantile": config.latency_quantile,
            },
            "ratio": state.estimated_ratio or Ratio.configured(config).value,
            "pin": None if state.pin is None else f"{state.pin.sizes}: {state.pin.reason}",
            "last_seq": self.log.next_seq - 1,
        }

    @property
    def revision(self) -> Hashable:
        """Changes whenever `document()` does, and costs nothing."""
        return self.log.next_seq, self.state

    def document(self) -> dict[str, Any]:
        """Return what a successor needs to go on from here."""
        return {
            "version": _VERSION,
            "state": self.state.as_document(),
            "next_seq": self.log.next_seq,
            "records": [record.as_document() for record in self.log.last(SAVED_RECORDS)],
        }

    def _decide(self, now: float) -> Decision:
        self._next_at = now + self._config.scaled(self._config.decision_period_s)
        self._is_ordered = False
        snapshot, before = self._signals.read(now), self.state
        decision, self.state = decide(self._config, before, snapshot, now)
        self.log.append(self._config, snapshot, before, decision)
        if decision.action is not Action.HOLD:
            _log.info("%s: %s", decision.action, decision.reason)
        if self._config.mode == "act" or before.pin is not None:
            self._apply(decision)
        return decision

    def _apply(self, decision: Decision) -> None:
        # The first decision of a life is applied even if it holds: its target may be a saved one.
        if decision.final != self._applied:
            self._applied = decision.final
            sizes = {Role.PREFILL: decision.final.prefill, Role.DECODE: decision.final.decode}
            self._pools.resize(sizes, decision.reason)


def _signals(config: TandemConfig) -> Signals:
    gpus = (config.prefill.gpus_per_worker, config.decode.gpus_per_worker)
    return Signals(config.autoscaler, gpus)


def _log_of(section: AutoscalerSection) -> DecisionLog:
    file = section.decision_file
    return DecisionLog(section.decision_records, Path(file) if file else None)
