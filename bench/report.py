"""Writes the README's measured tables and bench/results/*.png from the result files alone.

    python -m bench.report                    rewrite whatever is stale
    python -m bench.report --check            say what is stale, exit code 1 if anything is
    python -m bench.report --add DIR          take over a run of bench.gpu first

Tables stand between `<!-- bench:begin NAME -->` and `<!-- bench:end NAME -->`, NAME one of gpu, cpu, demo. What has
no result file is "not yet measured". The files in bench/results/ are written by programs only:
    gpu-<device>-<date>.jsonl    python -m bench.gpu, by --add
    cpu-generate-<instructions>.json                      python -m bench generate-cpu
    cpu-prepare.json, cpu-demo.json                       python -m bench prepare | demo
    cpu-perplexity.json                                   python -m bench.perplexity
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from xiangxin_fast.errors import InputError, exits_cleanly

from .gpu import RESULTS as GPU_RESULTS
from .gpu import ROOT, read_records
from .tables import OURS, Table, check_table, environment_line, generate_table, of_kind, train_table

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
NOT_MEASURED = "Not yet measured."


def best_table(records: list[dict]) -> Table:
    """For every op and mode our median beside that of the fastest peer that took turns with it."""
    groups: dict[tuple, list[dict]] = {}
    for record in of_kind(records, "time"):
        groups.setdefault(tuple(record[key] for key in ("op", "shape", "mode")), []).append(record)
    rows = []
    for (op, shape, mode), times in groups.items():
        ours = next((t for t in times if t["provider"] == OURS), None)
        peers = [t for t in times if t["provider"] != OURS]
        if ours is None:
            continue
        speed = f"{ours['tflops']:.0f} TFLOP/s" if ours["tflops"] >= 50 else f"{ours['gbs']:.0f} GB/s"
        row = (
            op + ("" if ours["implementation"] == "kernels" else " (composite)"),
            shape,
            mode,
            f"{ours['ms']:.3g} ms",
            speed,
        )
        row += (f"{ours['percent']:.0f}%" if "percent" in ours else "",)
        if peers:
            best = min(peers, key=lambda t: t["ms"])
            row += (f"{best['provider']}, {best['ms']:.3g} ms", f"{best['ms'] / ours['ms']:.2f}x")
        else:
            row += ("", "")
        rows.append(row)
    header = ("op", "shape", "mode", "ours", "rate", "of the measured floor", "best peer", "ours is")
    return Table("Kernels, bf16", header, rows)


def gpu_block(results: Path) -> str:
    """Every GPU run's tables, newest first."""
    runs = [(path, read_records(path)) for path in sorted(results.glob("gpu-*.jsonl"))]
    runs.sort(key=lambda run: max((r["date"] for r in of_kind(run[1], "environment")), default=""), reverse=True)
    parts = []
    for path, records in runs:
        tables = [build(records) for build in (best_table, train_table, generate_table)]
        checks = check_table(records).rows
        passed = sum(row[-1] == "passed" for row in checks if row[2] == OURS)
        parts.append(f"{environment_line(records)} ([all records](bench/results/{path.name}))")
        parts.append(f"Against fp64 {passed} of {sum(row[2] == OURS for row in checks)} checks passed.")
        parts += [table.markdown() for table in tables if table.rows]
        parts += [f"![{png.stem}](bench/results/{png.name})" for png in sorted(results.glob(f"{path.stem}-*.png"))]
    return "\n\n".join(parts) or NOT_MEASURED


def _load(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _where(measured: dict) -> str:
    facts = measured["environment"]
    return f"{facts['device']}; torch {facts['torch']}; commit {facts['commit']}; {facts['date']}"


def _generation_parts(measured: dict) -> list[str]:
    """One record of `python -m bench generate-cpu`: a table, and where it was measured."""
    rows = []
    for result in measured["results"]:
        for what, label in (("first_token", "first token of"), ("decode", "decode after")):
            if what in result:
                ours, theirs = (result[what][name]["median_s"] for name in ("xiangxin_fast", "transformers"))
                weights, peer = result["dtype"], result["peer_dtype"]
                rows.append(
                    (
                        f"{label} {result['prompt_tokens']} tokens",
                        weights if weights == peer else f"{weights}, theirs {peer}",
                        f"{ours:.3f} s",
                        f"{theirs:.3f} s",
                        f"{theirs / ours:.2f}x",
                    )
                )
    header = ("what", "dtype", "ours", "transformers", "ours is")
    title = f"Random weights, {measured['results'][0]['parameters']:,} parameters, seconds per token"
    return [Table(title, header, rows).markdown(), _where(measured)]


def cpu_block(results: Path) -> str:
    """Generation beside transformers and shard writing beside tokenizers, on a CPU."""
    parts = []
    for path in sorted(results.glob("cpu-generate-*.json")):
        parts += _generation_parts(_load(path))
    if not parts:
        parts.append(f"Generation beside transformers: {NOT_MEASURED.lower()}")
    if perplexity := _load(results / "cpu-perplexity.json"):
        rows = [
            (
                result["weights"] + (f", groups of {result['group']}" if result["group"] else ""),
                f"{result['nats_per_token']:.4f}",
                f"{result['perplexity']:.2f}",
            )
            for result in perplexity["results"]
        ]
        title = f"The demo's model on its held-out chapters, {perplexity['results'][0]['tokens']:,} tokens"
        parts += [Table(title, ("weights", "nats per token", "perplexity"), rows).markdown(), _where(perplexity)]
    else:
        parts.append(f"Perplexity of rounded weights: {NOT_MEASURED.lower()}")
    if prepare := _load(results / "cpu-prepare.json"):
        (result,) = prepare["results"]
        rows = [(name, f"{timing['median']:.0f} ms") for name, timing in result["ms"].items()]
        title = f"Token shards from {result['text_bytes'] / 1e6:.1f} MB of text, beside tokenizers' encoding alone"
        parts += [Table(title, ("program", "time"), rows).markdown(), _where(prepare)]
    else:
        parts.append(f"Token shards beside tokenizers: {NOT_MEASURED.lower()}")
    return "\n\n".join(parts)


def demo_block(results: Path) -> str:
    """What `make demo` reached."""
    measured = _load(results / "cpu-demo.json")
    if not measured:
        return NOT_MEASURED
    (result,) = measured["results"]
    gain = result["unigram_loss"] - result["validation_loss"]
    rows = [
        ("unigram frequencies", f"{result['unigram_loss']:.3f}"),
        (
            f"the demo's model, {result['steps']} steps in {result['minutes']:g} minutes",
            f"{result['validation_loss']:.3f}",
        ),
        ("lower by", f"{gain:.3f}"),
    ]
    title = f"Held-out chapters, {result['held_out_tokens']:,} tokens, nats per token"
    return Table(title, ("model", "loss"), rows).markdown() + f"\n\n{_where(measured)}"


BLOCKS: dict[str, Callable[[Path], str]] = {"gpu": gpu_block, "cpu": cpu_block, "demo": demo_block}


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of block `name`. InputError when it has not exactly one such pair."""
    begin, end = f"<!-- bench:begin {name} -->", f"<!-- bench:end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"README.md: expected one pair of {begin} and {end}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{content}\n{end}{tail}"


def _fingerprint(path: Path) -> str:
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _pictures(results: Path) -> dict[Path, tuple[Path, str]]:
    """Every picture there should be: the results file it comes from, and the op."""
    wanted = {}
    for path in sorted(results.glob("gpu-*.jsonl")):
        for op in dict.fromkeys(record["op"] for record in of_kind(read_records(path), "time")):
            wanted[path.with_name(f"{path.stem}-{op}.png")] = (path, op)
    return wanted


def stale(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """What does not agree with the result files: names of README blocks and of pictures."""
    text = readme.read_text(encoding="utf-8")
    found = [f"README.md, {name}" for name, build in BLOCKS.items() if fill(text, name, build(results)) != text]
    wanted = _pictures(results)
    for picture, (source, _) in wanted.items():
        if not picture.exists() or _fingerprint(source).encode() not in picture.read_bytes():
            found.append(picture.name)
    return found + [picture.name for picture in results.glob("*.png") if picture not in wanted]


def write(readme: Path = README, results: Path = RESULTS) -> None:
    """Brings the pictures and the README's blocks up to date."""
    wanted = _pictures(results)
    for picture in results.glob("*.png"):
        if picture not in wanted:
            picture.unlink()
    for picture, (source, op) in wanted.items():
        from .plots import plot_op

        plot_op(op, read_records(source), picture, _fingerprint(source))
    text = readme.read_text(encoding="utf-8")
    for name, build in BLOCKS.items():
        text = fill(text, name, build(results))
    readme.write_text(text, encoding="utf-8")


def add(run: Path, results: Path = RESULTS) -> Path:
    """Takes over the records of a run of bench.gpu under a name that tells device and date; returns the file."""
    source = run / GPU_RESULTS
    environments = of_kind(read_records(source), "environment")
    if not environments:
        raise InputError(f"{source}: expected the records of a run of bench.gpu, got none of its environment")
    facts = environments[0]
    if "capability" not in facts:
        raise InputError(f"{source}: expected a run on a GPU, got one on {facts['device']}")
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    target = results / f"gpu-{device}-{facts['date'][:16].replace(':', '')}.jsonl"
    results.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when something is stale")
    parser.add_argument("--add", type=Path, metavar="DIR", help="a directory that bench.gpu wrote")
    arguments = parser.parse_args()
    if arguments.add:
        print(f"added: {add(arguments.add)}")
    found = stale()
    if not arguments.check and found:
        write()
    for name in found:
        print(f"{'stale' if arguments.check else 'written'}: {name}")
    if arguments.check and found:
        sys.exit("run: python -m bench.report")


if __name__ == "__main__":
    main()
