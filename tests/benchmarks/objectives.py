"""Goodput for any objectives, computed offline from what each request met with. Pure.

A cell is one stack under one workload at one rate. Objectives are asked of its requests after
the run, so that every pair from loose to tight is judged by the same requests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deploy.loadtest.measures import attainment, gaps_s
from deploy.loadtest.words import Document, Outcome, RequestRecord, Send, Slo

SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Cell:
    """What a stack did with a workload at `rate` requests/s; rounds are put together."""

    stack: str
    workload: str
    rate: float
    records: tuple[RequestRecord, ...]

    def share(self, slo: Slo) -> float:
        """Return the share of its requests that met the objectives; lost ones did not."""
        found: float | None = attainment(self.records, slo, 1.0)["attainment"]
        return found or 0.0

    @property
    def completed(self) -> list[RequestRecord]:
        return [record for record in self.records if record.is_completed]


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate with enough good requests; `is_least` if no higher one was tried."""

    rate: float
    is_least: bool = False

    def __str__(self) -> str:
        return ("≥" if self.is_least else "") + (f"{self.rate:.2f}" if self.rate else "0")


def record_of(request: Document) -> RequestRecord:
    """Return a request of a run document as it was measured; its prompt is not kept."""
    return RequestRecord(
        index=request["index"],
        send=Send(request["scheduled_s"], (), request["output_tokens"]),
        scheduled_s=request["scheduled_s"],
        sent_s=request["sent_s"],
        end_s=request["end_s"],
        token_s=request["token_s"],
        token_counts=request["token_counts"],
        received_tokens=request["received_tokens"],
        outcome=Outcome(request["outcome"]),
        error=request["error"],
        id=request["id"],
    )


def cells_of(runs: Iterable[tuple[str, str, float, Document]]) -> list[Cell]:
    """Return the cells of (stack, workload, rate, run document), same ones put together."""
    grouped: dict[tuple[str, str, float], list[RequestRecord]] = {}
    for stack, workload, rate, document in runs:
        records = [record_of(request) for request in document["requests"]]
        grouped.setdefault((stack, workload, rate), []).extend(records)
    return [Cell(*key, tuple(records)) for key, records in sorted(grouped.items())]


def worst_gap_s(record: RequestRecord) -> float:
    """Return the longest wait between two answers with tokens, 0 if there was one answer."""
    return max(gaps_s(record), default=0.0)


def goodput(cells: Sequence[Cell], slo: Slo, share: float = SHARE) -> Goodput:
    """Return the highest rate at which `share` of requests met the objectives.

    `cells` are of one stack and workload. Between the highest rate that was met and the next one
    it lies where a straight line between both shares crosses.
    """
    points = sorted((cell.rate, cell.share(slo)) for cell in cells)
    met = [index for index, (_, reached) in enumerate(points) if reached >= share]
    if not met:
        return Goodput(0.0)
    last = met[-1]
    if last == len(points) - 1:
        return Goodput(points[last][0], is_least=True)
    (low, above), (high, below) = points[last], points[last + 1]
    return Goodput(low + (high - low) * (above - share) / (above - below))


@dataclass(frozen=True, slots=True)
class Score:
    """Over a grid of objectives: where the first stack is best, where equal, where behind."""

    ahead: int = 0
    level: int = 0
    behind: int = 0


def score(found: Iterable[Mapping[str, Goodput]], ours: str) -> Score:
    """Count the pairs of objectives that anybody meets, by how `ours` does against the best."""
    counts = {1: 0, 0: 0, -1: 0}
    for each in found:
        mine = each[ours].rate
        best = max((other.rate for name, other in each.items() if name != ours), default=0.0)
        if mine or best:
            counts[(mine > best) - (mine < best)] += 1
    return Score(counts[1], counts[0], counts[-1])


def course(cells: Sequence[Cell], ttft_s: float, tpots_s: Sequence[float]) -> list[float]:
    """Return the goodput at each TPOT objective, with one TTFT objective."""
    return [goodput(cells, Slo(ttft_s, tpot_s)).rate for tpot_s in tpots_s]
