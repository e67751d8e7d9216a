"""The policy as an application-level autoscaling policy of Ray Serve.

Name it in the application's config, with `policy_kwargs` as `ServeSettings` says:

    autoscaling_policy:
      policy_function: autoscaler.serve_policy:PrefillDecodePolicy
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

from autoscaler.decision import Action, Decision, PolicyState
from autoscaler.decision_log import DecisionLog
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.serve_pools import Context, ServePools, ServeSettings
from autoscaler.signals import Signals
from autoscaler.windows import Missing
from cluster.autoscaler_config import AutoscalerSection
from cluster.errors import ConfigError

# Ray shows a new application's deployments one after the other: faults must stand this long.
_FAULT_STANDS_S = 2.0
_STATE = "tandem"

# Serve's own, so that what happens to its applications is told in one log.
_log = logging.getLogger("ray.serve")


class PrefillDecodePolicy:
    """Both pools' replicas from one signal; every other deployment follows Ray's own policy.

    Ray makes one per application and calls it about ten times a second in Serve's controller.
    Wrong settings are logged once and leave both pools as they are. They are never raised: that
    would keep the controller from updating this and every later application, at each call.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings: ServeSettings | None = None
        self._invalid = ""
        try:
            self._settings = ServeSettings.parse(settings)
        except ConfigError as error:
            self._invalid = str(error)
        self._section: AutoscalerSection | None = None
        self._bounds: tuple[Sizes, Sizes] | None = None
        self._signals: Signals | None = None
        self._known_until = float("-inf")
        self._next_at = float("-inf")
        self._log: DecisionLog | None = None
        self._faults = Complaint(logging.ERROR, "neither pool is scaled")
        self._silence = Complaint(logging.WARNING, "the pools cannot follow the load")

    def __call__(
        self, contexts: Mapping[Any, Context]
    ) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
        """Return replicas by deployment, and what to hand back at the next call.

        A deployment that is left out stays as it is. The pools' common state lies with decode.
        """
        states = {
            key: {_STATE: context.policy_state[_STATE]}
            for key, context in contexts.items()
            if _STATE in context.policy_state
        }
        targets: dict[Any, float] = {}
        try:
            pools = self._pools(contexts)
            # Not before both are known: a pool with a misspelt name must not follow another policy.
            targets = _targets_of_others(contexts, pools)
            pools.check()
            config = self._config(pools)
            state = self._step(config, pools)
        except ConfigError as error:
            now = max((context.current_time for context in contexts.values()), default=0.0)
            self._faults.stands(str(error), now, _FAULT_STANDS_S)
            return targets, states
        self._faults.is_gone()
        prefill, decode = (_key(contexts, each) for each in pools.both)
        if config.mode == "act":
            targets |= {prefill: state.target.prefill, decode: state.target.decode}
        return targets, {decode: {_STATE: state.as_document()}}

    def _pools(self, contexts: Mapping[Any, Context]) -> ServePools:
        if self._settings is None:
            raise ConfigError(self._invalid)
        return ServePools.choose(self._settings, contexts)

    def _config(self, pools: ServePools) -> AutoscalerSection:
        if self._section is None or self._bounds != pools.bounds:
            assert self._settings is not None
            self._section, self._bounds = self._settings.section(pools.bounds), pools.bounds
        return self._section

    def _step(self, config: AutoscalerSection, pools: ServePools) -> PolicyState:
        """Take in what has been reported since, decide if it is time to; return the state."""
        now, saved = pools.now, pools.decode.policy_state.get(_STATE)
        state = PolicyState(pools.targets) if saved is None else PolicyState.from_document(saved)
        self._signals = self._signals or Signals(config)
        known_until = pools.known_until()
        if known_until > self._known_until or self._known_until > now:
            self._known_until = known_until
            self._signals.add(pools.load(known_until))
        period_s = config.scaled(config.decision_period_s)
        # More than a period to go: the clock has been set back since.
        if config.mode == "off" or 0 < self._next_at - now <= period_s:
            return state
        self._next_at = now + period_s
        snapshot = self._signals.read(now)
        decision, after = decide(config, state, snapshot, now)
        self._decisions(config).append(config, snapshot, state, decision)
        self._tell(config, decision)
        return after

    def _decisions(self, config: AutoscalerSection) -> DecisionLog:
        if self._log is None:
            file = config.decision_file
            self._log = DecisionLog(config.decision_records, Path(file) if file else None)
        return self._log

    def _tell(self, config: AutoscalerSection, decision: Decision) -> None:
        if decision.action is not Action.HOLD:
            _log.info("%s: %s", decision.action, decision.reason)
        signal = decision.inputs[0].value
        if isinstance(signal, Missing):
            self._silence.stands(signal.reason, decision.now, config.window(config.stale_s))
        else:
            self._silence.is_gone()


def _targets_of_others(contexts: Mapping[Any, Context], pools: ServePools) -> dict[Any, float]:
    """Return what Ray's own policy wants of the deployments that are no pool."""
    return {
        key: replica_queue_length_autoscaling_policy(context)[0]
        for key, context in contexts.items()
        if context not in pools.both
    }


def _key(contexts: Mapping[Any, Context], wanted: Context) -> Any:
    return next(key for key, context in contexts.items() if context is wanted)


class Complaint:
    """Something that may be wrong: said once, after it has stood unchanged for a while."""

    def __init__(self, level: int, consequence: str) -> None:
        self._level = level
        self._consequence = consequence
        self._reason: str | None = None
        self._since = 0.0
        self._is_said = False

    def stands(self, reason: str, now: float, after_s: float) -> None:
        if reason != self._reason:
            self._reason, self._since, self._is_said = reason, now, False
        if not self._is_said and now - self._since >= after_s:
            self._is_said = True
            _log.log(self._level, "%s: %s", self._consequence, reason)

    def is_gone(self) -> None:
        self._reason = None
