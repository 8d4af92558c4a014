"""What is printed: one line a row as soon as it is measured, so column widths are fixed beforehand."""

from collections.abc import Mapping, Sequence

from bench.peers import OURS, Candidate
from bench.race import Row

TITLE = 59
FLOOR_MARKS = {"flops": "f", "memory": "m"}


def short(seconds: float) -> str:
    """Milliseconds with three figures: 0.0123, 1.23, 12.3, 123, 12300."""
    ms = 1000 * seconds
    for limit, digits in ((0.0995, 4), (0.995, 3), (9.95, 2), (99.5, 1)):
        if ms < limit:
            return f"{ms:.{digits}f}"
    return f"{ms:.0f}" if ms < 9999.5 else f"{round(ms, -len(str(int(ms))) + 3)}".removesuffix(".0")


def share_of_peak(row: Row, peaks: Mapping[str, float]) -> tuple[float, str] | None:
    """The larger of our shares of the machine's arithmetic and of its memory bandwidth, and which it is."""
    ours = row.seconds(OURS.name)
    if ours is None or not row.workload.traffic:
        return None
    flops = row.workload.operations / peaks["flops"] / ours
    memory = row.workload.traffic / max(peaks["read"], peaks["update"]) / ours
    return (flops, FLOOR_MARKS["flops"]) if flops >= memory else (memory, FLOOR_MARKS["memory"])


class Table:
    """The rows of one section, with a column for each candidate."""

    def __init__(self, candidates: Sequence[Candidate], peaks: Mapping[str, float]) -> None:
        self.names, self.peaks = [candidate.name for candidate in candidates], peaks
        self.widths = [max(8, len(name)) for name in self.names]

    def head(self, title: str) -> str:
        cells = [name.rjust(width) for name, width in zip(self.names, self.widths, strict=True)]
        line = "  ".join([f"{title:{TITLE}}", *cells, f"{'ratio':>20}", "GFLOP/s", "  GB/s", "  peak"])
        return f"{line}\n{'-' * len(line)}"

    def line(self, row: Row) -> str:
        cells = [self._cell(row, name).rjust(width) for name, width in zip(self.names, self.widths, strict=True)]
        ours, ratio, share = row.seconds(OURS.name), row.ratio, share_of_peak(row, self.peaks)
        compared = f"{ratio[0]:.2f} [{ratio[1]:.2f}-{ratio[2]:.2f}]" if ratio else "-"
        flops = f"{row.workload.operations / ours / 1e9:.1f}" if ours and row.workload.operations else "-"
        traffic = f"{row.workload.traffic / ours / 1e9:.1f}" if ours and row.workload.traffic else "-"
        peak = f"{100 * share[0]:.0f} %{share[1]}" if share else "-"
        line = "  ".join([f"{row.workload.title:{TITLE}}", *cells, f"{compared:>20}", f"{flops:>7}", f"{traffic:>6}"])
        return "\n".join([f"{line}  {peak:>6}", *self._troubles(row)])

    def _cell(self, row: Row, name: str) -> str:
        seconds = row.seconds(name)
        if seconds is not None:
            return short(seconds)
        return "wrong" if name in row.wrong else "failed" if name in row.troubles else "-"

    def _troubles(self, row: Row) -> list[str]:
        return [f"    {name}: {why}" for name, why in row.troubles.items()]


def memory_line(title: str, megabytes: Mapping[str, float | None], troubles: Mapping[str, str]) -> str:
    """Peak memory of a fresh process of each candidate, and ours as a share of the least of the others."""
    cells = [f"{name} {'-' if value is None else f'{value:.0f}'}" for name, value in megabytes.items()]
    ours, peers = megabytes.get(OURS.name), [v for n, v in megabytes.items() if n != OURS.name and v is not None]
    share = f"   ours/least of the others {ours / min(peers):.2f}" if ours and peers else ""
    return "\n".join([f"{title:{TITLE}}  {'   '.join(cells)}{share}", *(f"    {n}: {w}" for n, w in troubles.items())])


def start_line(title: str, cold: float, warm: float) -> str:
    """Seconds to the end of a first training step, kernels to be compiled, and kept."""
    return f"{title:{TITLE}}  kernels compiled {cold:.1f}   kernels kept {warm:.1f}"


def growth_line(series: str, points: Mapping[str, float | None]) -> str:
    """One series: the times at its points."""
    cells = [f"{point}: {'-' if seconds is None else short(seconds)}" for point, seconds in points.items()]
    return f"{series:80}  {'   '.join(cells)}"
