"""Records of a results file as tables: plain text for a terminal, Markdown for the README. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

OURS = "ours"


@dataclass(frozen=True)
class Table:
    """A titled table; every cell is text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def text(self) -> str:
        cells = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, *self.rows)]
        lines.insert(1, "|" + " --- |" * len(self.header))
        return f"**{self.title}**\n\n" + "\n".join(lines)


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record.get("kind") == kind]


def _number(record: dict, key: str, form: str = ".3g", unit: str = "") -> str:
    value = record.get(key)
    return "" if value is None else f"{value:{form}}{unit}"


def _milliseconds(record: dict) -> tuple[str, str]:
    return f"{record['ms']:.4g}", f"{record['p20']:.4g} to {record['p80']:.4g}"


def environment_line(records: list[dict]) -> str:
    """Device, versions, commit and date of a run, and its ceilings, in one line."""
    for facts in of_kind(records, "environment"):
        names = ("torch", "triton", "driver", "commit")
        parts = [facts["device"], *(f"{name} {facts[name]}" for name in names if facts.get(name)), facts["date"]]
        for found in of_kind(records, "ceilings"):
            copy, matmul = found["copy_bytes_per_s"] / 1e9, found["matmul_flops_per_s"] / 1e12
            parts.append(f"measured ceilings: copy {copy:.4g} GB/s, matrix product {matmul:.4g} TFLOP/s")
        return "; ".join(parts)
    return "no environment recorded"


def kernel_table(records: list[dict]) -> Table:
    """Every timing of an op; "ours is" compares medians of one run, above 1 where ours is the faster."""
    header = (
        "op",
        "shape",
        "mode",
        "provider",
        "ms",
        "20% to 80%",
        "TFLOP/s",
        "GB/s",
        "of floor",
        "ours is",
        "error",
        "extra",
    )
    times = of_kind(records, "time")
    rows = []
    for i, record in enumerate(times):
        # The latest timing of ours before this peer's is the one it took turns with.
        same = ("op", "shape", "dtype", "mode")
        ours = [t for t in times[: i + 1] if t["provider"] == OURS and all(t[key] == record[key] for key in same)]
        versus = f"{record['ms'] / ours[-1]['ms']:.2f}x" if ours and record["provider"] != OURS else ""
        name = record["provider"]
        if name == OURS and record["implementation"] != "kernels":
            name = f"{OURS} ({record['implementation']})"
        extra = record.get("extra_bytes")
        rows.append(
            (record["op"], record["shape"], record["mode"], name, *_milliseconds(record))
            + (_number(record, "tflops"), _number(record, "gbs", ".4g"), _number(record, "percent", ".0f", "%"), versus)
            + (_number(record, "ratio", ".2f"), "" if extra is None else f"{extra / 1e9:.2f} GB")
        )
    return Table("Kernels (error: the largest over what the numerics rule allows)", header, rows)


def check_table(records: list[dict]) -> Table:
    """The worst verdict of each op and shape of the correctness section, and every failed one of the others."""
    rows = [
        (r["op"], r["shape"], r["provider"], r.get("implementation", ""), f"{r['ratio']:.2f}", r["tensor"])
        + ("passed" if r["passed"] else "FAILED",)
        for r in of_kind(records, "check")
        if r.get("section") in (None, "correctness") or not r["passed"]
    ]
    return Table("Against fp64", ("op", "shape", "provider", "behind it", "error", "worst", "verdict"), rows)


def train_table(records: list[dict]) -> Table:
    """Every section's steps in the order they ran; a peer is compared with the section of ours just before it."""
    header = ("provider", "micro-batch", "tokens/s", "ms", "20% to 80%", "MFU causal", "MFU full", "of ceiling", "peak")
    rows, ours = [], None
    for r in of_kind(records, "train"):
        ours = r if r["provider"] == OURS else ours
        row = (r["provider"], f"{r['micro_batch']} x {r['T']}", f"{r['tokens_per_s']:,.0f}", *_milliseconds(r))
        row += (_number(r, "mfu_causal", ".1f", "%"), _number(r, "mfu_full", ".1f", "%"))
        row += (_number(r, "percent", ".0f", "%"), f"{r['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in r else "")
        rows.append((*row, f"{ours['tokens_per_s'] / r['tokens_per_s']:.2f}x" if ours and r is not ours else ""))
    return Table("Training step", (*header, "ours is"), rows)


def generate_table(records: list[dict]) -> Table:
    header = ("what", "rows", "provider", "tokens/s", "ms", "20% to 80%", "of ceiling")
    rows = [
        (r["what"], str(r["rows"]), r["provider"], _number(r, "tokens_per_s", ",.1f"), *_milliseconds(r))
        + (_number(r, "percent", ".0f", "%"),)
        for r in of_kind(records, "generate")
    ]
    return Table("Generation (decode: of the copy bandwidth; prefill: of the matrix rate)", header, rows)


def _safety_table(records: list[dict]) -> Table:
    rows = [("race", r["op"], f"{r['differing']} of {r['repeats']} runs differ") for r in of_kind(records, "race")] + [
        ("sanitizer", r["tool"], f"{r['errors']} errors, exit code {r['exit_code']}, ran {len(r['finished'])} ops")
        for r in of_kind(records, "sanitizer")
    ]
    return Table("Safety", ("check", "what", "found"), rows)


def _section_table(records: list[dict]) -> Table:
    rows = [
        (r["section"], r["status"], f"{r['seconds']:.0f} s", str(r["attempts"])) for r in of_kind(records, "section")
    ]
    return Table("Sections", ("section", "status", "time", "attempts"), rows)


def _gap_table(records: list[dict]) -> Table:
    gaps = [r for r in records if r.get("kind") in ("skip", "error")]
    rows = [
        (
            r["kind"],
            r.get("section", ""),
            str(r.get("op") or r.get("item") or ""),
            r.get("provider", ""),
            r["reason"][:100],
        )
        for r in gaps
    ]
    return Table("Skipped and failed", ("", "section", "item", "provider", "reason"), rows)


TABLES: tuple[Callable[[list[dict]], Table], ...] = (
    _gap_table, check_table, _safety_table, kernel_table, train_table, generate_table, _section_table
)  # fmt: skip


def format_results(records: list[dict]) -> str:
    """Everything a run found, as text; the figures last, where a terminal that scrolled shows them."""
    tables = [table.text() for table in (build(records) for build in TABLES) if table.rows]
    return "\n\n".join([*tables, environment_line(records)])
