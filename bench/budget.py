"""What every compiled kernel must keep to, and `bench/results/static.json`, against which it must not get worse."""

import dataclasses
import json
from pathlib import Path

from bench.roofline import SMS
from bench.static_model import Row

RECORDED = Path(__file__).parent / "results" / "static.json"
COMMAND = f"python -m bench.static --json bench/results/{RECORDED.name}"

# Issued per useful matrix FLOP: causal tiles cost 3 to 6% at T = 2048; padding a head of 80 to 96 would cost 20%.
FLOPS_RATIO = 1.15
SLOWER = 1.05  # of the estimate: a compiler's mood moves it by a percent or two


def key(row: Row) -> str:
    """What a row is about; its config may change."""
    return f"{row.case}|{row.kernel}|sm_{row.arch}|{row.dtype}"


def broken_limits(row: Row) -> list[str]:
    """The limits `row` breaks, whatever was recorded; each as "measure: expected ..., got ..."."""
    found = []

    def limit(kept: bool, what: str, expected: object, got: object) -> None:
        if not kept:
            found.append(f"{what}: expected {expected}, got {got}")

    most = SMS[row.arch].shared_per_block
    limit(row.spills_in_loop == 0, "spills (STL, LDL) in the hot loops", 0, row.spills_in_loop)
    limit(row.shared <= most, "shared memory", f"at most {most} bytes", row.shared)
    limit(row.shared > most or row.blocks_per_sm > 0, "blocks per SM", "at least 1", row.blocks_per_sm)
    limit(not row.offset_products, "32-bit products of position and stride", "none", row.offset_products)
    if row.flops_ratio:
        slow = [name for name in row.tensor if row.arch == 90 and not name.startswith("HGMMA")]
        limit(bool(row.tensor), "tensor-core instructions in the hot loop", "some", "none")
        limit(not slow, "tensor-core instructions on sm_90", "HGMMA only", slow)
        limit(
            row.flops_ratio <= FLOPS_RATIO, "FLOPs per useful FLOP", f"at most {FLOPS_RATIO}", f"{row.flops_ratio:.3f}"
        )
    wanted = row.config.get("warp_specialize", False)
    limit(row.warp_specialized or not wanted, "warp specialization", "present, as the config asks", "none")
    return found


def regressions(row: Row, recorded: Row) -> list[str]:
    """In what `row` is worse than what was recorded; a config other than the recorded one makes the file stale."""
    found = []

    def no_worse(kept: bool, what: str, before: object, now: object) -> None:
        if not kept:
            found.append(f"{what}: recorded {before}, now {now}")

    if row.config != recorded.config:
        return [f"config: recorded {recorded.config}, now {row.config}; run {COMMAND}"]
    estimates = f"{recorded.estimate_us:.1f}", f"{row.estimate_us:.1f}"
    wide = f"{recorded.wide_fraction:.3f}", f"{row.wide_fraction:.3f}"
    ratios = f"{recorded.flops_ratio:.3f}", f"{row.flops_ratio:.3f}"
    no_worse(row.spills_elsewhere <= recorded.spills_elsewhere, "spills outside the hot loops",
             recorded.spills_elsewhere, row.spills_elsewhere)  # fmt: skip
    no_worse(row.blocks_per_sm >= recorded.blocks_per_sm, "blocks per SM", recorded.blocks_per_sm, row.blocks_per_sm)
    no_worse(row.wide_fraction >= recorded.wide_fraction - 1e-3, "share of 16-byte accesses", *wide)
    no_worse(row.flops_ratio <= recorded.flops_ratio + 1e-3, "FLOPs per useful FLOP", *ratios)
    no_worse(row.estimate_us <= recorded.estimate_us * SLOWER, "expected microseconds", *estimates)
    no_worse(row.warp_specialized >= recorded.warp_specialized, "warp specialization", True, False)
    no_worse(bool(row.bulk) >= bool(recorded.bulk), "bulk copies", recorded.bulk, row.bulk)
    return found


def violations(rows: list[Row], recorded: dict[str, Row]) -> list[str]:
    """Every broken limit and every regression of `rows`, each named with its kernel."""
    found = []
    for row in rows:
        before = recorded.get(key(row))
        missing = [] if before else [f"not in {RECORDED.name}: run {COMMAND}"]
        found += [
            f"{key(row)}: {text}" for text in broken_limits(row) + (regressions(row, before) if before else missing)
        ]
    return found


def load(path: Path = RECORDED) -> dict[str, Row]:
    """The recorded rows by `key`; none where the file is not there."""
    if not path.exists():
        return {}
    rows = [Row(**fields) for fields in json.loads(path.read_text())["rows"]]
    return {key(row): row for row in rows}


def save(rows: list[Row], path: Path, cases: set[str]) -> None:
    """Writes `rows` in place of those of the same key; rows of cases not in `cases` go."""
    held = load(path) | {key(row): row for row in rows}
    kept = [row for row in held.values() if row.case in cases]
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in sorted(kept, key=key))
    path.write_text('{"rows": [\n' + lines + "\n]}\n")
