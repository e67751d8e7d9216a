"""Which blocks of the prompts being computed are finished, step by step. Pure.

Told of each step before it computes, as a scheduler knows it: what was computed before a step is
finished when the step begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.names import HandoffId

Tables = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Growth:
    """Blocks of an open prompt that the last step has finished, by group, behind those before."""

    handoff_id: HandoffId
    block_ids: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Prompt:
    handoff_id: HandoffId
    tables: list[list[int]]
    num_finished: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_finished = [0] * len(self.tables)


class Progress:
    """The open prompts by engine request, with a block table per group of `block_sizes`.

    A group without a size has no block that is finished before the prompt is.
    """

    def __init__(self, block_sizes: Sequence[int | None]) -> None:
        self._block_sizes = block_sizes
        self._prompts: dict[str, _Prompt] = {}

    def __repr__(self) -> str:
        return f"<Progress of {len(self._prompts)} prompts>"

    def __contains__(self, key: str) -> bool:
        return key in self._prompts

    def begin(self, key: str, handoff_id: HandoffId) -> None:
        """Follow a prompt that is computed for the first time."""
        self._prompts[key] = _Prompt(handoff_id, [[] for _ in self._block_sizes])

    def step(self, key: str, new_blocks: Tables | None, num_computed: int) -> Growth | None:
        """Return the whole blocks finished since the last step, None if there are none.

        `new_blocks` go behind those the prompt has had since it began or was revoked.
        """
        prompt = self._prompts.get(key)
        if prompt is None:
            return None
        for table, block_ids in zip(prompt.tables, new_blocks or (), strict=False):
            table += block_ids
        finished = [
            0 if size is None else min(num_computed // size, len(table))
            for size, table in zip(self._block_sizes, prompt.tables, strict=True)
        ]
        grown = tuple(
            tuple(table[before:after])
            for table, before, after in zip(
                prompt.tables, prompt.num_finished, finished, strict=True
            )
        )
        prompt.num_finished = finished
        return Growth(prompt.handoff_id, grown) if any(grown) else None

    def revoke(self, key: str) -> HandoffId | None:
        """The prompt loses its blocks and begins anew; return its name, None if it is not open."""
        prompt = self._prompts.get(key)
        if prompt is None:
            return None
        self._prompts[key] = _Prompt(prompt.handoff_id, [[] for _ in self._block_sizes])
        return prompt.handoff_id

    def end(self, key: str) -> HandoffId | None:
        """Forget a prompt; return its name, None if it was not open."""
        prompt = self._prompts.pop(key, None)
        return None if prompt is None else prompt.handoff_id
