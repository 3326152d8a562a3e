"""Tables of the budget benchmark: rows in, lines of text out."""

from __future__ import annotations

import statistics
from typing import Any

from bench_digits import PEERS

Row = dict[str, Any]
EQUAL = 2.0  # per cent that two latencies may be apart


def shown(row: Row) -> str:
    """One line of progress."""
    hidden = ["trials", "setting", "shares", "part", "untrained"]
    cells = [f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
             if k not in hidden]  # fmt: skip
    return f"({row['part']}) " + " ".join(cells)


def table_equal(rows: list[Row]) -> list[str]:
    """Part a: points lost by the peer and by ours at its latency, mean over seeds."""
    lines = []
    for epochs in rows[0]["lost"]:
        lines += [
            "",
            f"points lost, peer / ours at the same latency, {epochs} epochs of fine-tuning",
        ]
        for method in PEERS:
            cells = []
            for point in dict.fromkeys(row["point"] for row in rows):
                pairs = paired(rows, method, point, epochs)
                means = [f"{statistics.fmean(side):5.2f}" for side in zip(*pairs, strict=True)]
                cells.append(f"{point:g}: {' /'.join(means) or 'none delivered'}")
            every = paired(rows, method, None, epochs)
            won = sum(theirs > mine for theirs, mine in every)
            gain = statistics.fmean(theirs - mine for theirs, mine in every)
            lines.append(
                f"{method:22}"
                + "   ".join(cells)
                + f"   less by {gain:5.2f}, {won} of {len(every)}"
            )
    return [*lines, "", *spread_of(rows)]


def paired(
    rows: list[Row], method: str, point: float | None, epochs: str
) -> list[tuple[float, float]]:
    """Points lost by one method of the peer and by ours, per seed (and point, where ``None``).

    Pairs of which the latencies are more than ``EQUAL`` apart are left out.
    """
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [
        (theirs["lost"][epochs], mine["lost"][epochs])
        for theirs, mine in pairs
        if theirs["method"] == method and point in (None, theirs["point"]) and "lost" in mine
        if abs(off(theirs, mine, epochs)) <= EQUAL
    ]


def off(theirs: Row, mine: Row, epochs: str) -> float:
    """By how many per cent ours takes longer than the peer."""
    ours = mine["untrained"] if epochs == "0" else mine
    return float(100 * (ours["latency"][0] / theirs["latency"][0] - 1))


def spread_of(rows: list[Row]) -> list[str]:
    """How equal the latencies are, and which pairs are missing."""
    pairs = [p for p in zip(rows[::2], rows[1::2], strict=True) if "lost" in p[1]]
    none = len(rows) // 2 - len(pairs)
    told = []
    for epochs, when in (("0", "no training"), ("1", "training follows")):
        apart = [off(theirs, mine, epochs) for theirs, mine in pairs]
        told.append(
            f"ours over the peer's latency, {when}: {min(apart):+.1f} to {max(apart):+.1f} %, "
            f"within {EQUAL:g} % in {sum(abs(a) <= EQUAL for a in apart)} of {len(apart)} pairs, "
            f"the others left out; {none} without a build of ours"
        )
    return [
        *told,
        f"builds: {sum(r['builds'] for r in rows[::2])} of the peer, ours at most "
        f"{max(r['builds'] for r in rows[1::2])} for one latency",
    ]


def table_planted(rows: list[Row]) -> list[str]:
    """Part b: points lost by method, mean over seeds; ``*`` marks means with builds off."""
    kinds = list(dict.fromkeys(row["point"] for row in rows))
    lines = [f"{'points lost':24}" + "".join(f"{kind:>10}" for kind in kinds)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for kind in kinds:
            found = [row for row in rows if (row["method"], row["point"]) == (method, kind)]
            lost = [row["lost"]["0"] for row in found if "lost" in row]
            mark = "*" if any(row.get("off", True) for row in found) else " "
            cells.append(f"{statistics.fmean(lost):9.2f}{mark}" if lost else f"{'none':>9}{mark}")
        lines.append(f"{method:24}{''.join(cells)}")
    return lines


def table_plain(rows: list[Row]) -> list[str]:
    """Parts c and d: a line per row; of d the median error too."""
    lines = [shown(row) for row in rows]
    keys = dict.fromkeys((row["point"], row["method"]) for row in rows if "error" in row)
    for point, method in keys:
        mine = [r for r in rows if (r["point"], r["method"]) == (point, method)]
        error = statistics.median(abs(r["error"]) for r in mine)
        macs = statistics.median(abs(100 * (r["macs"] / r["measured"] - 1)) for r in mine)
        lines.append(f"{point} {method}: median error {error:.1f} %, by MACs {macs:.1f} %")
    return lines
