"""Three cures for vLLM 0.32's CPU engine, applied in its processes; none on a GPU worker.

Two are about work that only CUDA was built for, one about cores that engines share.
"""

import time
from typing import Any

import numpy as np
import torch

# Within this time of the last message the next one is nearly always on its way.
_SPIN_S = 0.001
# An idle reader looks for itself this often at first, and ever more rarely.
_FIRST_POLL_MS = 1
_POLL_SHARE_OF_IDLE = 0.2


class RewindableGenerator(torch.Generator):  # type: ignore[misc]  # torch is untyped here
    """A CPU generator that can take back one draw.

    vLLM draws for every row of a step and takes the draw of an unfinished prompt back by
    rewinding the generator's offset (`gpu_model_runner.py:3499`); a CPU generator has none and
    raises, which ends the engine. This one goes back to the state it was copied in.
    """

    def rewind_to(self, original: torch.Generator) -> "RewindableGenerator":
        self._state = original.get_state()
        self.set_state(self._state)
        return self

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        self.set_state(self._state)


def claim_amx_tiles() -> None:
    """Ask the kernel for AMX tile permission; CPU attention uses tiles without asking.

    A decode-only worker would die with SIGILL: no local prefill ever asks for it. A no-op on
    CPUs without AMX.
    """
    torch.cpu._init_amx()


def make_seeded_prompts_chunkable() -> None:
    """Let a seeded request's prompt span several steps without ending the CPU engine."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample = CPUModelRunner._sample

    def sample_rewindably(runner: Any, *args: Any, **kwargs: Any) -> Any:
        _prepare_rewind(runner)
        return sample(runner, *args, **kwargs)

    CPUModelRunner._sample = sample_rewindably  # type: ignore[method-assign, assignment]


def sleep_when_idle() -> None:
    """Let this process sleep as soon as the other side of its message queue has nothing to say.

    vLLM's readers spin for a second after each message (`shm_broadcast.py`, `SpinCondition`):
    right where a GPU computes, but here the idle engine of one role takes the core from
    everything else on it. A sleeping reader can miss the writer's notice, so it also looks for
    itself, and waits at most a fifth longer than it has been idle.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    def wait(condition: Any, timeout_ms: int | None = None) -> None:
        condition.busy_loop_s = _SPIN_S
        idle_ms = 1e3 * (time.monotonic() - condition.last_read)
        limit_ms = int(max(_FIRST_POLL_MS, idle_ms * _POLL_SHARE_OF_IDLE))
        spin_or_sleep(condition, limit_ms if timeout_ms is None else min(limit_ms, timeout_ms))

    spin_or_sleep = SpinCondition.wait
    SpinCondition.wait = wait  # type: ignore[method-assign, assignment]


def _prepare_rewind(runner: Any) -> None:
    """Before the draw, copy the generators whose draw this step takes back."""
    batch = runner.input_batch
    if not batch.generators:
        return
    for row in np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]:
        original = batch.generators.get(int(row))
        if original is not None:
            generator = RewindableGenerator(device="cpu").rewind_to(original)
            batch.generators[int(row)] = generator
            runner.requests[batch.req_ids[row]].generator = generator
