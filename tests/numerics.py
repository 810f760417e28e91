"""The driver that holds an op, and every gradient of it, to the numerics rule; `bench.numerics` has the rule itself."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.numerics import compare


@dataclass(frozen=True)
class Finding:
    """How close one tensor came to the limit: `ratio` = measured / allowed for the criterion nearest to it."""

    what: str
    dtype: str
    ratio: float
    criterion: str
    where: str


# The worst finding of each (op, dtype) of this process; conftest.py prints them below the tests.
worst: dict[tuple[str, str], Finding] = {}


def record(finding: Finding) -> None:
    """Keeps `finding` if it is the worst of its op and dtype."""
    key = (finding.what.split(".")[0], finding.dtype)
    if key not in worst or not finding.ratio <= worst[key].ratio:
        worst[key] = finding


def assert_no_worse_than_torch(actual: Tensor, same_dtype: Tensor, exact: Tensor, *, what: str) -> None:
    """Holds `actual` to the rule, given the reference in the same dtype and in fp64; `what` names it: "op.tensor"."""
    dtype = str(actual.dtype).removeprefix("torch.")
    assert actual.shape == exact.shape, f"{what}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{what}: expected {same_dtype.dtype}, got {actual.dtype}"
    found = compare(actual, same_dtype, exact)
    record(Finding(what, dtype, found.ratio, found.criterion, found.worst))
    limit = f"{found.criterion} error {found.ratio:.3g} times what the rule allows"
    assert found.passed, f"{what} ({dtype}): {limit}, largest {found.worst}"


def lay_out(values: Tensor, layout: str) -> Tensor:
    """`values` with strides that autograd may hand to a backward; the "expanded" ones repeat some of the values."""
    if values.dim() == 0:
        return values
    if layout == "transposed":
        if values.dim() == 1:
            return torch.stack([values, values], dim=-1)[:, 0]
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "narrow":
        return torch.cat([values, values], dim=-1).narrow(-1, values.shape[-1], values.shape[-1])
    if layout == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if layout == "expanded":
        return values.new_full((), 0.375).expand(values.shape)
    if layout == "expanded_rows":
        return values[:1].expand(values.shape)
    assert layout == "contiguous", layout
    return values


DOUT_LAYOUTS = ("contiguous", "transposed", "narrow", "offset", "expanded", "expanded_rows")


def run_with_grads(
    op: Callable, inputs: dict[str, Any], wrt: Iterable[str], douts: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """op(**inputs) and the gradients of the inputs named in `wrt`, given one dout for each differentiable output."""
    leaves = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in wrt:
        leaves[name].requires_grad_()
    outputs = op(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if douts is None:
        return [y.detach() for y in outputs], {}
    differentiable = [y for y in outputs if y.requires_grad]
    grads = torch.autograd.grad(differentiable, [leaves[name] for name in wrt], douts)
    return [y.detach() for y in outputs], dict(zip(wrt, grads, strict=True))


def _in_fp64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_op(
    op: Callable,
    ref: Callable,
    inputs: dict[str, Any],
    *,
    wrt: Iterable[str] | None = None,
    layouts: Iterable[str] = ("contiguous",),
    name: str | None = None,
    seed: int = 0,
) -> None:
    """Holds op(**inputs) and every gradient to the rule, with ref(**inputs) in the same dtype and in fp64 beside it.

    `wrt` names the inputs to differentiate by: default all floating tensors, () for forward only. dout is normal noise,
    laid out in each of `layouts` (DOUT_LAYOUTS has them all). Neither pass may change an input.
    """
    name = name or op.__name__
    if wrt is None:
        wrt = [key for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    wrt = list(wrt)
    before = {key: x.clone() for key, x in inputs.items() if isinstance(x, Tensor)}
    wide = {key: _in_fp64(x) for key, x in inputs.items()}

    reference, _ = run_with_grads(ref, inputs, [], None)
    exact, _ = run_with_grads(ref, wide, [], None)
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(y.shape, generator=generator).to(y) for y in reference if y.is_floating_point()]
    for layout in layouts:
        douts = [lay_out(values, layout) for values in noise] if wrt else None
        outputs, grads = run_with_grads(op, inputs, wrt, douts)
        assert len(outputs) == len(exact), f"{name}: expected {len(exact)} outputs, got {len(outputs)}"
        for i, tensors in enumerate(zip(outputs, reference, exact, strict=True)):
            assert_no_worse_than_torch(*tensors, what=f"{name}.out{i if len(outputs) > 1 else ''}")
        if not wrt:
            break
        _, reference_grads = run_with_grads(ref, inputs, wrt, douts)
        _, exact_grads = run_with_grads(ref, wide, wrt, [dout.double() for dout in douts])
        suffix = "" if layout == "contiguous" else f" (dout {layout})"
        for key in wrt:
            what = f"{name}.d{key}{suffix}"
            assert_no_worse_than_torch(grads[key], reference_grads[key], exact_grads[key], what=what)
    for key, x in before.items():
        assert torch.equal(x.nan_to_num(), inputs[key].nan_to_num()), f"{name}: changed its input {key}"
