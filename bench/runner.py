"""One case from its inputs to its figures: judged first, then timed beside its peers. No green, no number."""

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Case, Inputs, Provider, Run, Shape, Unavailable, implementation, make_inputs, of_inputs
from .measure import Ceilings, Turn, as_graph, assert_alive, interleaved, peak_extra_bytes
from .numerics import Comparison, compare

OURS = "ours"
Record = dict[str, object]
Emit = Callable[[Record], None]


def with_gradients(
    forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs, and the gradients by `leaves`; an op with several outputs has none."""
    out = forward()
    if not leaves:
        return tuple(t.detach() for t in (out if isinstance(out, tuple) else (out,)))
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


class Judge:
    """Holds the truth about one case on one set of inputs: the output and every gradient in fp64, and plain torch's."""

    def __init__(self, case: Case, inputs: Inputs):
        with torch.no_grad():
            outputs = with_gradients(lambda: case.reference(**inputs), (), None)
        outs = ("out",) if len(outputs) == 1 else tuple(f"out{i}" for i in range(len(outputs)))
        self.names = outs + tuple(f"d{name}" for name in case.leaves)
        leaves = tuple(inputs[name] for name in case.leaves)
        # Gradients of a loss are scaled by its dout: one that is not 1 shows who forgets it.
        self.dout = torch.randn_like(outputs[0]) if outputs[0].dim() else torch.full_like(outputs[0], 1.5)
        self.plain = with_gradients(lambda: case.reference(**inputs), leaves, self.dout)
        self.exact = self._exact(case, inputs)

    def _exact(self, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
        wide = {
            name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        count = wide[case.rows[0]].shape[0] if case.rows else 1
        parts = []
        for i in range(count):
            part = {name: x[i : i + 1] if name in case.rows else x for name, x in wide.items()}
            leaves = tuple(part[name].requires_grad_() for name in case.leaves)
            dout = self.dout.double()
            dout = dout[i : i + 1] if case.rows else dout
            parts.append(with_gradients(lambda part=part: case.reference(**part), leaves, dout))
        if not case.rows:
            return parts[0]
        by_row = [True, *(name in case.rows for name in case.leaves)]
        return tuple(
            torch.cat(values) if stack else sum(values[1:], values[0])
            for stack, values in zip(by_row, zip(*parts, strict=True), strict=True)
        )

    def verdict(self, run: Run) -> dict[str, Comparison]:
        """Every output of `run` against the truth; the gradients too where its leaves are the case's own."""
        leaves = run.leaves if run.comparable else ()
        found = with_gradients(run.forward, leaves, self.dout)
        pairs = zip(self.names, found, self.plain, self.exact, strict=False)
        # Some peers round a loss to their inputs' dtype: that is an error to be judged, not a reason not to.
        return {name: compare(actual.to(plain.dtype), plain, exact) for name, actual, plain, exact in pairs}


def _turn(run: Run, mode: str, dout: Tensor) -> Turn:
    def fwd(start):
        start()
        return run.forward()

    def bwd(start):
        out = run.forward()
        start()
        return torch.autograd.grad(out, run.leaves, dout)

    def fwdbwd(start):
        start()
        return torch.autograd.grad(run.forward(), run.leaves, dout)

    return {"fwd": fwd, "bwd": bwd, "fwdbwd": fwdbwd}[mode]


def _about(case: Case, shape: Shape, dtype: torch.dtype) -> Record:
    return {"op": case.op, "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}


def _judged(judge: Judge, run: Run) -> Record:
    verdict = judge.verdict(run)
    tensor, worst = max(verdict.items(), key=lambda item: item[1].ratio)
    found = {"tensor": tensor, "ratio": worst.ratio, "criterion": worst.criterion, "worst": worst.worst}
    return {"kind": "check", "passed": worst.passed} | found


def check(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, emit: Emit, seed: int = 1) -> bool:
    """Judges our op alone, on fresh inputs; emits the verdict and returns whether it passed. May raise Unavailable."""
    inputs = make_inputs(case, shape, device, dtype, seed)
    run = of_inputs(case.ours)(case, inputs, shape)
    record = _about(case, shape, dtype) | {"provider": OURS, "implementation": implementation(case, run)}
    record |= _judged(Judge(case, inputs), run)
    emit(record)
    return record["passed"]


def run_case(
    case: Case,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    modes: tuple[str, ...],
    peers: dict[str, Provider],
    seconds: float,
    ceilings: Ceilings | None,
    emit: Emit,
    seed: int = 0,
) -> list[Record]:
    """Judges our op and its peers on one set of inputs, then times them in turns, about `seconds` in all.

    Emits a record per verdict, skip and timing as soon as it is known, and returns the timings. Our own op has no
    timing unless it passed; a peer that does not pass keeps its timing, beside its ratio. May raise Unavailable.
    """
    about = _about(case, shape, dtype)
    inputs = make_inputs(case, shape, device, dtype, seed)
    judge = Judge(case, inputs)
    runs: dict[str, Run] = {}
    notes: dict[str, Record] = {}
    for name, provide in {OURS: of_inputs(case.ours), **peers}.items():
        try:
            run = provide(case, inputs, shape)
            verdict = _judged(judge, run)
        except Unavailable as error:
            emit(about | {"kind": "skip", "provider": name, "reason": str(error)})
            continue
        except Exception as error:
            emit(about | {"kind": "error", "provider": name, "reason": reason_of(error)})
            assert_alive(device)
            continue
        notes[name] = {"ratio": verdict["ratio"]}
        if name == OURS:
            notes[name]["implementation"] = implementation(case, run)
        emit(about | {"provider": name} | notes[name] | verdict)
        if name != OURS or verdict["passed"]:
            runs[name] = run
    dout = judge.dout if judge.dout.dim() else torch.ones_like(judge.dout)  # training starts its backward from 1
    del judge

    for name, run in runs.items() if case.graph else ():
        if notes[name].get("implementation") == "composite":
            continue  # it may ask the host for lengths, which no graph can hold
        try:
            runs[name] = Run(as_graph(run.forward, device), run.leaves)
        except Exception as error:  # timed with its launches then, and that is said
            notes[name]["not_captured"] = reason_of(error)
            assert_alive(device)
    flops, moved = case.flops(shape), case.moved(shape, torch.finfo(dtype).bits // 8)
    timings = []
    for mode in (m for m in modes if m in case.modes):
        turns = {name: _turn(run, mode, dout) for name, run in runs.items()}
        found, failed = interleaved(turns, device, seconds / len(modes))
        for name, reason in failed.items():
            emit(about | {"kind": "error", "provider": name, "mode": mode, "reason": reason[:500]})
        for name, timing in found.items():
            record = about | {"kind": "time", "provider": name, "mode": mode} | notes[name]
            record |= {"ms": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}
            record |= {"tflops": flops[mode] / timing.median / 1e9, "gbs": moved[mode] / timing.median / 1e6}
            if ceilings:
                record["percent"] = 100 * ceilings.floor_ms(flops[mode], moved[mode]) / timing.median
            if mode == "fwdbwd":
                step = turns[name]
                record["extra_bytes"] = peak_extra_bytes(lambda step=step: step(lambda: None), device)
            emit(record)
            timings.append(record)
    return timings


def reason_of(error: BaseException) -> str:
    """An exception as one line that fits a record."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
