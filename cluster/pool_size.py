"""How pools reach their size: pure, the cheapest action first.

Out: restore a worker taken out a moment ago, flip one the other pool can spare, activate a
standby, start a worker; a worker that finds no node waits in Ray's queue, which is what asks
Ray's autoscaler for one. In: what does not serve yet, then the workers whose loss costs least.
"""

from cluster.names import Role
from cluster.worker_state import (
    PROVISIONED,
    Action,
    Desired,
    Enter,
    Observed,
    ObservedWorker,
    StartWorker,
    StopWorker,
    TakeRole,
    WorkerState,
)

# Routers go on for a moment with the list from before a worker left it.
SETTLE_S = 1.0


def resize(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """Return the actions that bring both pools and the standbys to their sizes."""
    plan = _Plan(desired, observed, now)
    for role in Role:
        plan.restore(role)
    for role in Role:
        plan.flip(role)
    for role in Role:
        plan.activate_standbys(role)
        plan.start(role)
        plan.shrink(role)
    plan.let_go()
    plan.keep_standbys()
    return plan.actions


class _Plan:
    """Actions so far, how many workers each pool still lacks, and who is spoken for."""

    def __init__(self, desired: Desired, observed: Observed, now: float) -> None:
        self.actions: list[Action] = []
        self._desired = desired
        self._observed = observed
        self._now = now
        self._taken: set[str] = set()
        standbys = observed.in_state(WorkerState.STANDBY)
        coming = [w for w in observed.in_state(*PROVISIONED) if w.is_spare]
        self.num_standbys_missing = desired.standby - len(standbys) - len(coming)
        self.num_missing = {
            role: desired.workers[role] - len(observed.pool(role, *PROVISIONED)) for role in Role
        }

    def free(self, workers: list[ObservedWorker]) -> list[ObservedWorker]:
        return [worker for worker in workers if worker.worker_id not in self._taken]

    def take(self, worker: ObservedWorker, action: Action) -> None:
        self._taken.add(worker.worker_id)
        self.actions.append(action)

    def _why(self, role: Role) -> str:
        wanted = self._desired.workers[role]
        return f"{wanted - self.num_missing[role]} of {wanted} {role} workers"

    def restore(self, role: Role) -> None:
        """Take back what was taken out last: it is loaded, warm and connected."""
        out = self._observed.pool(role, WorkerState.SOFT_OUT)
        for worker in sorted(out, key=lambda w: -w.since)[: max(0, self.num_missing[role])]:
            reason = f"restored: {self._why(role)}"
            self.take(worker, Enter(worker.worker_id, WorkerState.READY, reason))
            self.num_missing[role] -= 1

    def flip(self, role: Role) -> None:
        """Change the role of workers that the other pool gave up or has too many of."""
        if not self._desired.can_flip:
            return
        for worker in self._spare_in(role.other)[: max(0, self.num_missing[role])]:
            reason = f"changes role: {self._why(role)}, {role.other} can spare it"
            if worker.state is not WorkerState.SOFT_OUT:
                self.num_missing[worker.role] += 1
            self.take(worker, TakeRole(worker.worker_id, role, reason))
            self.num_missing[role] -= 1

    def _spare_in(self, role: Role) -> list[ObservedWorker]:
        out = self.free(self._observed.pool(role, WorkerState.SOFT_OUT))
        surplus = max(0, -self.num_missing[role])
        return out + self._cheapest(role, WorkerState.HELD, WorkerState.READY)[:surplus]

    def _cheapest(self, role: Role, *states: WorkerState) -> list[ObservedWorker]:
        """Return workers by what their loss costs: not serving before serving, the most
        valuable network domain first, the fewest held blocks, the coldest cache, the youngest."""

        def cost(worker: ObservedWorker) -> tuple[int, ...]:
            stage = PROVISIONED.index(worker.state)
            return (stage, -worker.value, worker.num_held_blocks, worker.work)

        youngest_first = reversed(self.free(self._observed.pool(role, *states)))
        return sorted(youngest_first, key=cost)

    def activate_standbys(self, role: Role) -> None:
        standbys = [
            worker
            for worker in self.free(self._observed.in_state(WorkerState.STANDBY))
            if self._desired.can_flip or worker.role is role
        ]
        for worker in standbys[: max(0, self.num_missing[role])]:
            reason = f"standby activated: {self._why(role)}"
            self.take(worker, TakeRole(worker.worker_id, role, reason))
            self.num_missing[role] -= 1
            self.num_standbys_missing += 1

    def start(self, role: Role) -> None:
        trouble = self._observed.failed_starts.get(role)
        if trouble is not None and self._now < trouble.retry_at:
            return
        again = f"; try {trouble.failures + 1} after: {trouble.reason}" if trouble else ""
        for _ in range(max(0, self.num_missing[role])):
            self.actions.append(StartWorker(role, self._why(role) + again))

    def shrink(self, role: Role) -> None:
        surplus = max(0, -self.num_missing[role])
        for worker in self._cheapest(role, *PROVISIONED)[:surplus]:
            reason = self._why(role)
            if worker.state not in (WorkerState.FLIPPING, WorkerState.READY):
                self.take(worker, StopWorker(worker.worker_id, reason))
            elif self._desired.soft_out_s > 0:
                self.take(worker, Enter(worker.worker_id, WorkerState.SOFT_OUT, reason))
            else:
                self.take(worker, Enter(worker.worker_id, WorkerState.DRAINING, reason))

    def let_go(self) -> None:
        """End observation periods and drains; a drained worker may stay on as a standby."""
        for worker in self.free(self._observed.in_state(WorkerState.SOFT_OUT)):
            if self._now - worker.since >= self._desired.soft_out_s:
                reason = f"not missed for {self._desired.soft_out_s:g} s"
                self.take(worker, Enter(worker.worker_id, WorkerState.DRAINING, reason))
        limit_s = self._desired.drain_timeout_s
        for worker in self._observed.in_state(WorkerState.DRAINING):
            if self._now - worker.since < SETTLE_S:
                continue
            if worker.is_idle and self.num_standbys_missing > 0:
                self.num_standbys_missing -= 1
                reason = "drained; kept as a standby"
                self.take(worker, Enter(worker.worker_id, WorkerState.STANDBY, reason))
            elif worker.is_idle:
                self.take(worker, StopWorker(worker.worker_id, "drained"))
            elif self._now - worker.since >= limit_s:
                reason = f"still {worker.num_requests} requests after {limit_s:g} s"
                self.take(worker, StopWorker(worker.worker_id, reason))

    def keep_standbys(self) -> None:
        """Start spares only while nothing else is starting: pools come first."""
        num_wanted = self._desired.standby
        reason = f"{num_wanted - self.num_standbys_missing} of {num_wanted} standbys"
        for worker in self.free(self._observed.in_state(WorkerState.STANDBY)):
            if self.num_standbys_missing < 0:
                self.num_standbys_missing += 1
                self.take(worker, StopWorker(worker.worker_id, reason))
        is_busy = any(isinstance(action, StartWorker) for action in self.actions)
        trouble = self._observed.failed_starts.get(Role.DECODE)
        if not is_busy and (trouble is None or self._now >= trouble.retry_at):
            spare = StartWorker(Role.DECODE, reason, is_spare=True)
            self.actions += [spare] * max(0, self.num_standbys_missing)
