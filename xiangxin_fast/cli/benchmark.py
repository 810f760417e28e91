"""`--benchmark`: a table, or JSON Lines, of what benchmark.py measures."""

import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xiangxin_fast.benchmark import Contender, Measured, copy_bytes_per_s, measure, ours, random_model, transformers
from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.hf_config import read_config, read_quantization
from xiangxin_fast.memory import free_bytes, gigabytes, lacks_memory
from xiangxin_fast.model import DEFAULT_DTYPE, Phi
from xiangxin_fast.quantization import quantize_model
from xiangxin_fast.strict_files import file_of

from .complete import write_json_line
from .engine import default_device, device_of, dtype_of, require_memory, use_threads

if TYPE_CHECKING:
    from .arguments import Arguments

NEW_TOKENS = {"cuda": 64, "cpu": 8}
ROWS = {"cuda": (1, 4, 8, 32), "cpu": (1,)}
PROMPTS = {"cuda": (128, 1024, 1920), "cpu": (128,)}
OURS, HF = "ours", "transformers"
LEGEND = """size: sequences x tokens of each prompt; first: to the first token; prefill, decode: tokens/s (medians)
copy: the weights and cache that a decode step must read, over its time, beside what copies move (read plus written)
ours is: so many times faster at prefill, at decode"""


def benchmark(arguments: "Arguments") -> None:
    """Measures the grid of sizes, smallest first, and prints it; what is done when Ctrl-C comes, too."""
    use_threads(arguments.machine)
    peer = _peer(_model(arguments, None)) if arguments.bench.against == "hf" else {}
    model = _model(arguments, arguments.machine.quantize)
    device = model.embed.device
    rows = max(arguments.bench.benchmark_rows or ROWS[device.type])
    contenders = {OURS: ours(model, rows)} | peer
    bandwidth = copy_bytes_per_s(device)
    about = _about(arguments, model) | {"copy_bytes_per_s": bandwidth}
    if arguments.json:
        write_json_line(sys.stdout, {"kind": "environment"} | about)
    records = []
    try:
        for record in _records(contenders, device, bandwidth, arguments):
            records.append(record)
            if arguments.json:
                write_json_line(sys.stdout, {"kind": "generate"} | record)
    finally:
        if not arguments.json:
            _print(about, records)


def _model(arguments: "Arguments", quantize: str | None) -> Phi:
    device, dtype = device_of(arguments.machine), dtype_of(arguments.machine)
    if arguments.bench.preset is None:
        path = file_of(arguments.model, "config.json")
        require_memory(read_config(path), device, dtype, quantize, read_quantization(path))
        return load_pretrained(arguments.model, device, dtype, quantize=quantize)
    config = PhiConfig.from_preset(arguments.bench.preset)
    require_memory(config, device, dtype, None)
    model = random_model(config, device or default_device(), dtype or DEFAULT_DTYPE)
    return quantize_model(model, quantize) if quantize else model


def _peer(model: Phi) -> dict[str, Contender]:
    """transformers with the weights of `model`. InputError where it is not there or does not work."""
    from xiangxin_fast.hf_peer import causal_lm

    try:
        return {HF: transformers(causal_lm(model, share=True), model.config)}
    except Exception as error:  # it may be built for another torch: then importing it fails in its own way
        got = " ".join(f"{type(error).__name__}: {error}".split())
        if lacks_memory(error):
            raise InputError(f"{_too_little_for_peer(model)} ({got:.200})") from None
        expected = "a transformers that works (pip install transformers)"
        raise InputError(f"--against hf: expected {expected}, got {got:.200}") from None


def _too_little_for_peer(model: Phi) -> str:
    """What transformers needs beside the weights that both lay out alike: q, k, v, dense and fc2 of its own."""
    C, F, device = model.config.channels, model.config.mlp_hidden, model.embed.device
    own = model.config.layers * C * (4 * C + F) * model.embed.dtype.itemsize
    got = f"{gigabytes(free_bytes(device))} free on {device}"
    return f"--against hf: expected {gigabytes(own)} of memory for transformers' own weights, got {got}"


def _about(arguments: "Arguments", model: Phi) -> dict[str, object]:
    device, preset = model.embed.device, arguments.bench.preset
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "torch": torch.__version__,
        "model": f"{preset}, random weights" if preset else str(arguments.model),
        "parameters": model.config.parameters,
        "dtype": str(model.embed.dtype).removeprefix("torch."),
        "quantize": arguments.machine.quantize,
    }


def _records(
    contenders: dict[str, Contender], device: torch.device, bandwidth: float, arguments: "Arguments"
) -> Iterator[dict[str, object]]:
    """A record of each contender at each size; with a `reason` instead of figures where it could not run."""
    options, context = arguments.bench, contenders[OURS].config.context
    new_tokens = arguments.limits.max_new_tokens or NEW_TOKENS[device.type]
    prompts = sorted(options.benchmark_prompts or PROMPTS[device.type])
    sizes = [(rows, tokens) for tokens in prompts for rows in sorted(options.benchmark_rows or ROWS[device.type])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        turns = (options.benchmark_rounds + 1) * len(contenders)
        task = progress.add_task("Measuring", total=len(sizes) * turns)
        for done, (rows, tokens) in enumerate(sizes):
            progress.update(task, completed=done * turns, description=f"Measuring {rows} x {tokens} tokens")
            size = {"rows": rows, "prompt_tokens": tokens, "new_tokens": new_tokens}
            if tokens + new_tokens > context:
                found, failed = {}, dict.fromkeys(contenders, f"the model's context is {context} tokens")
            else:
                rounds = options.benchmark_rounds
                found, failed = measure(contenders, **size, rounds=rounds, after_turn=lambda: progress.advance(task))
            for name, contender in contenders.items():
                about = size | {"provider": name}
                if name in found:
                    yield about | _figures(found[name], contender, bandwidth)
                else:
                    yield about | {"reason": failed[name]}


def _figures(found: Measured, contender: Contender, bandwidth: float) -> dict[str, object]:
    figures = {"rounds": len(found.turns), "first_token_s": found.first.median}
    figures["prefill_tokens_per_s"] = found.prefill_tokens_per_s
    if found.step:
        figures |= {"step_s": found.step.median, "step_s_least": found.step.least, "step_s_most": found.step.most}
        figures["decode_tokens_per_s"] = found.decode_tokens_per_s
        figures["of_copy_bandwidth"] = found.bytes_per_s(contender) / bandwidth
    return figures


def _print(about: dict[str, object], records: list[dict[str, object]]) -> None:
    console = Console(file=sys.stdout, highlight=False, markup=False)
    quantized = f", {about['quantize']}" if about["quantize"] else ""
    console.print(f"{about['model']}: {about['parameters']:,} parameters, {about['dtype']}{quantized}")
    console.print(f"{about['device']}; torch {about['torch']}; copies {about['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("size", "", "first", "prefill", "decode", "copy", "ours is"):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    for record in records:
        size = f"{record['rows']} x {record['prompt_tokens']}"
        if "reason" in record:
            console.print(f"{size}, {record['provider']}: {record['reason']}")
        else:
            of_ours = next(r for r in records if r["provider"] == OURS and _size(r) == _size(record))
            table.add_row(size, str(record["provider"]), *_cells(record, of_ours))
    if table.row_count:
        console.print(table)
        console.print(LEGEND)


def _size(record: dict[str, object]) -> tuple[object, object]:
    return record["rows"], record["prompt_tokens"]


def _cells(record: dict[str, object], of_ours: dict[str, object]) -> list[str]:
    cells = [f"{record['first_token_s']:.3f} s", f"{record['prefill_tokens_per_s']:,.1f}"]
    if "step_s" not in record:
        return cells
    cells += [f"{record['decode_tokens_per_s']:,.2f}", f"{record['of_copy_bandwidth']:.0%}"]
    if record is not of_ours and "step_s" in of_ours:
        ratios = (of_ours[key] / record[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s"))
        cells.append(" ".join(f"{ratio:.2f}x" for ratio in ratios))
    return cells
