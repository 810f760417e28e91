"""Measures ops and the chain around them on this machine.

    python -m bench attention --mode fwd,bwd --against all
    python -m bench layer_norm cross_entropy --against torch --tokens 512
    python -m bench prepare | demo | generate-cpu | train-overhead    the chain, on a CPU, into bench/results/

An op is first judged against fp64 by the numerics rule (bench/numerics.py), on the inputs that are then timed: no
green, no number. Providers take turns, caches are flushed, medians and their spread are printed beside the ceilings
measured in the same run. Records and a picture per op go to --out. For everything on a GPU: python -m bench.gpu.
"""

import argparse
import sys
from pathlib import Path

OPS = (
    "layer_norm",
    "attention",
    "gelu_mlp",
    "parallel_block",
    "cross_entropy",
    "linear_cross_entropy",
    "decode_attention",
    "decode_block",
    "decode_head",
    "project_in",
    "project_out",
    "linear_gelu",
    "linear_gelu_bwd",
    "linear",
)
CHAIN = ("prepare", "demo", "generate-cpu", "train-overhead")
HERE = Path(__file__).resolve().parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", metavar="WHAT", help=f"ops: {', '.join(OPS)}; or one of {', '.join(CHAIN)}")
    parser.add_argument("--mode", default="fwd,bwd", help="of fwd, bwd, fwdbwd (default fwd,bwd)")
    parser.add_argument("--against", default="all", help="words of peers' names, all or none (default all)")
    parser.add_argument("--batch", type=int, help="sequences (default 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--tokens", type=int, help="tokens of each (default 2048 on a GPU, 256 on a CPU)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each op (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default runs/bench")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.what if name not in OPS]:
        parser.error(f"expected {', '.join(OPS)}, or one of {', '.join(CHAIN)} alone, got {', '.join(unknown)}")
    modes = arguments.mode.split(",")
    if unknown := [mode for mode in modes if mode not in ("fwd", "bwd", "fwdbwd")]:
        parser.error(f"--mode: expected fwd, bwd, fwdbwd, got {', '.join(unknown)}")
    if arguments.dtype not in (None, "bfloat16", "float16", "float32"):
        parser.error(f"--dtype: expected bfloat16, float16 or float32, got {arguments.dtype}")
    return arguments


def _bench_ops(arguments: argparse.Namespace) -> bool:
    """Judges and times the ops asked for; whether all of ours passed."""
    from dataclasses import replace

    import torch

    from .case import Unavailable
    from .cases import CASES, SHAPES
    from .gpu import append
    from .measure import environment, measure_ceilings
    from .peers import peers_of
    from .plots import plot_op
    from .runner import OURS, run_case
    from .tables import format_results

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if gpu else "float32"))
    shape = SHAPES["phi" if gpu else "cpu"]
    shape = replace(shape, B=arguments.batch or shape.B, T=arguments.tokens or shape.T)
    arguments.out.mkdir(parents=True, exist_ok=True)
    everything = []
    size = {"edge": 8192, "copy_bytes": 4 << 30} if gpu else {"edge": 1024, "copy_bytes": 256 << 20}
    ceilings = measure_ceilings(device, dtype, **size, seconds=min(2.0, arguments.seconds))
    common = [{"kind": "environment"} | environment(device), {"kind": "ceilings"} | vars(ceilings)]
    for op in arguments.what:
        path = arguments.out / f"{op}.jsonl"
        path.unlink(missing_ok=True)
        records = []

        def emit(record: dict, path: Path = path, records: list = records) -> None:
            append(path, record)
            records.append(record)

        for record in common:
            emit(record)
        try:
            run_case(
                CASES[op],
                shape,
                device,
                dtype,
                modes=tuple(arguments.mode.split(",")),
                peers=peers_of(op, arguments.against),
                seconds=arguments.seconds,
                ceilings=ceilings,
                emit=emit,
            )
        except Unavailable as error:
            emit({"kind": "skip", "op": op, "reason": str(error)})
        plot_op(op, records, path.with_suffix(".png"))
        everything += records[len(common) :]
    print(format_results(everything + common))
    print(f"records and pictures: {arguments.out}/")
    ours = [r for r in everything if r.get("provider") == OURS and r["kind"] in ("check", "error")]
    return all(r["kind"] == "check" and r["passed"] for r in ours)


def main() -> None:
    what, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]  # the chain's have options of their own
    if what == "generate-cpu":
        from torch.backends.cpu import get_cpu_capability

        from . import generate_cpu

        out = HERE / "results" / f"cpu-generate-{get_cpu_capability().lower()}.json"
        sys.argv = ["python -m bench generate-cpu", "--out", str(out), *rest]
        generate_cpu.main()
    elif what == "train-overhead":
        from . import train_overhead

        train_overhead.main(rest)
    elif what == "prepare":
        from . import prepare

        prepare.main(rest)
    elif what == "demo":
        from . import chain

        chain.main(rest)
    elif not _bench_ops(_arguments()):
        sys.exit("bench: an op of ours failed the numerics rule; it has no timing")


if __name__ == "__main__":
    main()
