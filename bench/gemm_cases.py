"""The products of a layer that carry an epilogue, each beside both ways of doing it and beside torch.compile.

These ops stand behind the front door: what `parallel_block` and `gelu_mlp` are made of. They run where Triton does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from xiangxin_kernels import gemm
from xiangxin_kernels.parallel_block import split_projection

from .case import Case, Draw, Inputs, Provider, Run, Shape, compiled, of_inputs, rotary_tables

Outputs = tuple[Tensor, ...]


def _gelu(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def _project_in_ref(y: Tensor, w_in: Tensor, b_in: Tensor, cos: Tensor, sin: Tensor, heads: int, T: int) -> Outputs:
    C = y.shape[1]
    p = F.linear(y, w_in, b_in)
    q, k, v, h = split_projection(p.view(-1, T, p.shape[1]), C, heads, cos, sin)
    columns = [t.flatten(2).flatten(0, 1) for t in (q, k, v)] + [h.flatten(0, 1)]
    return torch.cat(columns, dim=1), _gelu(h).flatten(0, 1)


def _project_in(y: Tensor, w_in: Tensor, b_in: Tensor, cos: Tensor, sin: Tensor, heads: int, T: int) -> Outputs:
    (N, C), columns = y.shape, w_in.shape[0]
    p, z = y.new_empty(N, columns), y.new_empty(N, columns - 2 * C)
    torch.ops.xiangxin.project_in(y, w_in, b_in, cos, sin, p, z, heads, T, 0)
    return p, z[:, C:]


def _project_out_ref(z: Tensor, w_out: Tensor, b_out: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(z, w_out) + b_out[0] + b_out[1]


def _project_out(z: Tensor, w_out: Tensor, b_out: Tensor, residual: Tensor) -> Tensor:
    out = torch.empty_like(residual)
    torch.ops.xiangxin.project_out(z, w_out, b_out, residual, out)
    return out


def _linear_gelu_ref(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    h = F.linear(x, w, b)
    return h, _gelu(h)


def _linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    h, g = (x.new_empty(x.shape[0], w.shape[0]) for _ in range(2))
    torch.ops.xiangxin.linear_gelu(x, w, b, h, g)
    return h, g


def _linear_gelu_bwd_ref(dy: Tensor, w: Tensor, h: Tensor) -> Outputs:
    return torch.ops.aten.gelu_backward(dy @ w, h, approximate="tanh"), _gelu(h)


def _linear_gelu_bwd(dy: Tensor, w: Tensor, h: Tensor) -> Outputs:
    dh, g = torch.empty_like(h), torch.empty_like(h)
    partial = torch.empty(gemm.dgelu_row_tiles(dy, h.shape[1]), h.shape[1], dtype=torch.float32, device=h.device)
    torch.ops.xiangxin.linear_gelu_bwd(dy, w, h, dh, g, partial)
    return dh, g


def _linear_ref(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b)


def _triton_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A plain product through our own GEMM, to be held against cuBLAS: what the other epilogues start from."""
    out = x.new_empty(x.shape[0], w.shape[0])
    gemm._triton_gemm(gemm.BIAS, x, w, out, True, None, b, None, None, None)
    return out


def _matrix(shape: Shape, draw: Draw, rows: int, columns: int) -> Tensor:
    return draw(rows, columns, std=shape.config.init_std)


def _project_in_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F_ = _c_and_f(shape)
    cos, sin = rotary_tables(shape, draw)
    weights = {"w_in": _matrix(shape, draw, 3 * C + F_, C), "b_in": _matrix(shape, draw, 1, 3 * C + F_)[0]}
    return {"y": draw(shape.N, C), **weights, "cos": cos, "sin": sin, "heads": shape.config.heads, "T": shape.T}


def _project_out_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F_ = _c_and_f(shape)
    z, residual = draw(shape.N, C + F_), draw(shape.N, C)
    return {"z": z, "w_out": _matrix(shape, draw, C, C + F_), "b_out": _matrix(shape, draw, 2, C), "residual": residual}


def _linear_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F_ = _c_and_f(shape)
    return {"x": draw(shape.N, C), "w": _matrix(shape, draw, F_, C), "b": _matrix(shape, draw, 1, F_)[0]}


def _linear_bwd_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F_ = _c_and_f(shape)
    return {"dy": draw(shape.N, C), "w": _matrix(shape, draw, C, F_), "h": draw(shape.N, F_)}


def _case(op: str, reference: Callable, ours: Callable, make: Callable, traffic: Callable[[Shape], tuple]) -> Case:
    """`traffic` gives (weights, elements of the inputs and outputs per row) of the product."""

    def moved(shape: Shape, e: int) -> dict[str, float]:
        weights, per_row = traffic(shape)
        return {"fwd": float(e * (weights + shape.N * per_row))}

    def flops(shape: Shape) -> dict[str, float]:
        return {"fwd": 2.0 * shape.N * traffic(shape)[0]}

    return Case(op, reference, ours, make, (), flops, moved, composite=False)


def _c_and_f(shape: Shape) -> tuple[int, int]:
    return shape.config.channels, shape.config.mlp_hidden


def _in_traffic(shape: Shape) -> tuple[int, int]:
    C, F_ = _c_and_f(shape)
    return (3 * C + F_) * C, 4 * C + 2 * F_


def _out_traffic(shape: Shape) -> tuple[int, int]:
    C, F_ = _c_and_f(shape)
    return C * (C + F_), 3 * C + F_


def _linear_traffic(outputs: int) -> Callable[[Shape], tuple[int, int]]:
    def traffic(shape: Shape) -> tuple[int, int]:
        C, F_ = _c_and_f(shape)
        return C * F_, C + outputs * F_

    return traffic


GEMM_CASES = {
    case.op: case
    for case in (
        _case("project_in", _project_in_ref, _project_in, _project_in_inputs, _in_traffic),
        _case("project_out", _project_out_ref, _project_out, _project_out_inputs, _out_traffic),
        _case("linear_gelu", _linear_gelu_ref, _linear_gelu, _linear_inputs, _linear_traffic(2)),
        _case("linear_gelu_bwd", _linear_gelu_bwd_ref, _linear_gelu_bwd, _linear_bwd_inputs, _linear_traffic(3)),
        _case("linear", _linear_ref, _triton_linear, _linear_inputs, _linear_traffic(1)),
    )
}


@contextmanager
def _forced(fused: bool) -> Iterator[None]:
    """Inside, every epilogue takes the way given, whatever was measured."""
    before = gemm.fuses_gemm
    gemm.fuses_gemm = lambda *about: fused
    try:
        yield
    finally:
        gemm.fuses_gemm = before


def _way(fused: bool) -> Provider:
    def provide(case: Case, inputs: Inputs, shape: Shape) -> Run:
        def forward() -> Outputs | Tensor:
            with _forced(fused):
                return case.ours(**inputs)

        return Run(forward, ())

    return provide


def _compiled_reference(case: Case, inputs: Inputs, shape: Shape) -> Run:
    return of_inputs(compiled(case.reference, shape))(case, inputs, shape)


def _compiled_and_both_ways() -> dict[str, Provider]:
    ways = {"Triton GEMM": _way(True), "cuBLAS + our elementwise kernel": _way(False)}
    return ways | {"cuBLAS + torch.compile": _compiled_reference}


GEMM_PEERS: dict[str, dict[str, Provider]] = {op: _compiled_and_both_ways() for op in GEMM_CASES}
GEMM_PEERS["linear"] = {"cuBLAS": lambda case, inputs, shape: of_inputs(case.reference)(case, inputs, shape)}
