"""What the command line takes, what it says about itself, and what can be refused before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xiangxin_fast.errors import InputError, one_line_complaints

PROGRAM = "python -m xiangxin_fast.generate"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, in transformers' order: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: Annotated[float, tyro.conf.arg(metavar="X")] = 1.0
    """Divides the logits; 0 is --greedy."""
    top_k: Annotated[int, tyro.conf.arg(metavar="K")] = 50
    """Sample from the K likeliest tokens only; 0 from all. 50 is what transformers does unasked."""
    top_p: Annotated[float, tyro.conf.arg(metavar="P")] = 1.0
    """Sample from the fewest tokens whose probabilities reach P."""
    min_p: Annotated[float, tyro.conf.arg(metavar="P")] = 0.0
    """Drop tokens less than P times as likely as the likeliest."""
    repetition_penalty: Annotated[float, tyro.conf.arg(metavar="X")] = 1.0
    """Above 1: makes tokens that are already there less likely."""
    greedy: bool = False
    """Always take the likeliest token."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The same seed gives the same completions."""
    num_samples: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Completions of each prompt."""


@dataclass(frozen=True)
class LimitOptions:
    """A completion ends at the model's end of text, at a limit given here, or when the model's context is full."""

    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 256)")] = None
    """Most tokens of a completion. No such limit when only --max-length is given."""
    max_length: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Most tokens of prompt and completion together."""
    stop: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT", help_behavior_hint="(repeatable)")
    ] = ()
    """End a completion before this text."""


@dataclass(frozen=True)
class MachineOptions:
    """Where and how the model runs."""

    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """"cuda", "cuda:1", "cpu"; auto: a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What to compute in; auto: the fastest on the device."""
    quantize: Annotated[Literal["int8", "int4"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Round the weights when they are loaded: a half or a quarter of the bytes that each token has to read."""
    lookup: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Guess up to N tokens ahead where the text repeats itself, and check them in one step. Changes the speed alone."""
    rows: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Most prompts decoded together."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: torch's)")] = None
    """CPU threads."""
    check_finite: bool = False
    """Refuse weights that are NaN or infinite when they are loaded."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What --benchmark measures, on the weights of --model or on random ones of a --preset."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Shape of a model of random weights, instead of --model: xiangxin-3b, phi-2, phi-1_5 or demo."""
    against: Annotated[Literal["hf"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Let transformers take turns on the same weights (never quantized)."""
    benchmark_rows: Annotated[
        tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="(default: 1 4 8 32; on a CPU 1)")
    ] = ()
    """Sequences decoded together."""
    benchmark_prompts: Annotated[
        tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="(default: 128 1024 1920; on a CPU 128)")
    ] = ()
    """Tokens of a prompt."""
    benchmark_rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Turns that count, after one that does not; the table has their median."""


@dataclass(frozen=True)
class Arguments:
    """Completes each PROMPT with a model and streams the text to standard output.

    examples, "generate" standing for "python -m xiangxin_fast.generate":
      generate --model DIR "从前有座山，"
      generate --model DIR --greedy --max-new-tokens 50 --stats "def fibonacci(n):"
      cat opening.txt | generate --model DIR
      generate --model DIR                          (interactive, on a terminal)
      generate --model DIR --input prompts.jsonl --json > completions.jsonl
      generate --model DIR --score "年轻人就应该享受生活。"
      generate --model DIR --compare PHI2_DIR --max-length 100 "年轻人不应该再努力了，"
      generate --benchmark --preset phi-2 --quantize int8 --against hf

    --input takes one JSON object a line:
      {"prompt": TEXT} or {"tokens": [ID, ...]}, if wanted with "id" and "max_new_tokens";
      with --score {"text": TEXT} or {"tokens": [ID, ...]}, if wanted with "id" and a "prompt" to come before it.
      Lines that do not fit are named on standard error; the rest goes on.

    exit codes:
      0 done; 1 lines of --input were refused, the others are done; 130 Ctrl-C, what was written is whole;
      2 nothing was done, and one line says why.
    """

    prompts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT ...]", help_behavior_hint="")
    ] = ()
    """Text to go on from; several make a batch. "-", or none into a pipe, is standard input less its last newline."""
    model: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Model directory: config.json, *.safetensors and the tokenizer's files."""
    input: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Take the prompts from JSON Lines; "-" is standard input."""
    json: bool = False
    """Print a JSON object a line, as completions finish: id, prompt, text, tokens, logprobs, finish_reason."""
    stats: bool = False
    """Print time to first token, prefill and decode speed, and why each completion ended, to standard error."""
    interactive: bool = False
    """Read prompts one by one, with line editing. What happens on a terminal when there is no prompt."""
    score: bool = False
    """Print log-probability, perplexity per token and bits per character of given texts; their first token has none."""
    stride: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: half the context)")] = None
    """With --score: texts longer than the model's context are read in windows N tokens apart."""
    compare: Annotated[Path | None, tyro.conf.arg(metavar="DIR2", help_behavior_hint="")] = None
    """A second model: show what both make of each prompt, side by side."""
    benchmark: bool = False
    """Measure prefill and decode speed, time to first token, and decoding's share of the machine's copy bandwidth."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    bench: BenchmarkOptions = field(default_factory=BenchmarkOptions)


def parse(argv: Sequence[str] | None) -> Arguments:
    """The command line, checked as far as that goes without loading anything. InputError: it does not fit."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    with one_line_complaints():
        arguments = tyro.cli(Arguments, args=argv, prog=PROGRAM, config=config)
    _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    modes = [f"--{name}" for name in ("interactive", "score", "compare", "benchmark") if getattr(arguments, name)]
    if len(modes) > 1:
        allowed = "--interactive, --score, --compare and --benchmark"
        raise InputError(f"expected one of {allowed}, got {' and '.join(modes)}")
    refuse_what_has_no_effect(arguments, modes[0] if modes else "")
    if arguments.input is not None and arguments.prompts:
        raise InputError(f"expected prompts or --input, got both: {arguments.prompts[0]!r:.100} and {arguments.input}")
    if arguments.bench.preset is None:
        _expect_directory("--model", arguments.model)
    elif arguments.model:
        raise InputError(f"expected --model or --preset, got both: {arguments.model} and {arguments.bench.preset}")
    if arguments.compare:
        _expect_directory("--compare", arguments.compare)
    numbers = {
        "--max-new-tokens": (arguments.limits.max_new_tokens, 1),
        "--max-length": (arguments.limits.max_length, 1),
        "--num-samples": (arguments.sampling.num_samples, 1),
        "--lookup": (arguments.machine.lookup, 0),
        "--rows": (arguments.machine.rows, 1),
        "--threads": (arguments.machine.threads, 1),
        "--benchmark-rounds": (arguments.bench.benchmark_rounds, 1),
        "--benchmark-rows": (min(arguments.bench.benchmark_rows, default=None), 1),
        "--benchmark-prompts": (min(arguments.bench.benchmark_prompts, default=None), 1),
    }
    for name, (number, least) in numbers.items():
        if number is not None and number < least:
            raise InputError(f"{name}: expected at least {least}, got {number}")
    if "" in arguments.limits.stop:
        raise InputError("--stop: expected text, got an empty string")


def refuse_what_has_no_effect(arguments: Arguments, mode: str, reason: str = "") -> None:
    """InputError for an option that `mode`, which there is for `reason`, would silently ignore."""
    given = _given(arguments)
    for needed, flags in {"--score": {"stride"}, "--benchmark": _names(BenchmarkOptions)}.items():
        if mode != needed and given & flags:
            raise InputError(f"{_flags(given & flags)}: expected together with {needed}, got it without")
    sampling, limits = _names(SamplingOptions), _names(LimitOptions)
    refused = {
        "--interactive": {"prompts", "input", "json", "num_samples"},
        "--score": {"stats", "lookup", "rows"} | sampling | limits,
        "--benchmark": {"prompts", "input", "stats", "lookup", "rows", "check_finite", "max_length", "stop"} | sampling,
    }
    if given & refused.get(mode, set()):
        raise InputError(f"{mode}{reason}: expected no {_flags(given & refused[mode])}, got it")
    draws = given & {"temperature", "top_k", "top_p", "min_p"}
    if arguments.sampling.greedy and draws and arguments.sampling.temperature:
        raise InputError(f"--greedy: expected no {_flags(draws)}, got it")


def _names(options: type) -> set[str]:
    return {field.name for field in fields(options)}


def _given(options: object) -> set[str]:
    """The names of the options, those of groups included, that are not at their defaults."""
    given = set()
    for option in fields(options):
        value = getattr(options, option.name)
        if is_dataclass(value):
            given |= _given(value)
        elif value != option.default:
            given.add(option.name)
    return given


def _flags(names: set[str]) -> str:
    return " and ".join(name if name == "prompts" else f"--{name.replace('_', '-')}" for name in sorted(names))


def _expect_directory(name: str, path: Path | None) -> None:
    if path is None or not path.is_dir():
        raise InputError(f"{name}: expected a model directory, got {path or 'none'}")
