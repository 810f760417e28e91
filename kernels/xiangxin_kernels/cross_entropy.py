"""Cross-entropy, plain and fused with the projection to the vocabulary, whose logits are never held.

    z[n]    = x[n] weight^T + bias                            (the plain op is given z)
    lse[n]  = peak[n] + log total[n]            peak = max_j z[n, j], total = sum_j exp(z[n, j] - peak[n])
    loss[n] = (1 - s) (lse[n] - z[n, t]) + s (lse[n] - mean_j z[n, j]) + z_loss lse[n]^2
    dz[n,j] = p[n, j] (1 + 2 z_loss lse[n]) - (1 - s) [j = t] - s / V
    with t = targets[n], s = label_smoothing, p = exp(z - lse)

Rows whose target is ignore_index count for nothing; "mean" divides by the number of the others, at least 1.

Shapes    logits [N, V]   x [N, C]   weight [V, C]   bias [V] or None   targets [N] int64
          loss, lse, peak, total [N] fp32
Method    Rows go in chunks whose logits fit a workspace. Per chunk: one GEMM, one kernel that turns the logits in place
          into loss, lse and dz, then the gradient GEMMs at once, so that the backward only scales. With per-token
          losses the upstream gradient must enter before the sum over rows: there the backward makes the logits again.
Saves     peak, total and the logits (plain) or x, weight, bias (fused, "none"); fused "mean", "sum": the gradients, of
          which an fp32 dW is handed out itself (x is kept then, so that a second backward can make it again)
Numerics  softmax and dz in fp32, rounded once; dW and db accumulated in fp32 over chunks in ascending order. peak and
          total stay apart: at |z| = 1e4 the rounding of lse would cost p three digits, and a confident loss all
Limits    Triton: fp32, fp16, bf16; last axes that are not contiguous, and targets, are copied
          a target outside [0, V) that is not ignore_index: ValueError on a CPU; on a device the row's loss and gradient
          are NaN (asking would wait for the device) and nothing out of bounds is touched
Source    Milakov, Gimelshein 2018, arXiv:1805.02867 (online softmax); Szegedy et al. 2015, arXiv:1512.00567, section 7
          (label smoothing); Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._host import check, check_dtypes, in_autocast_dtype, kernel_op, use_triton
from ._tuning import arch_of, choose_cross_entropy

WORKSPACE_BYTES = 256 * 2**20
CPU_WORKSPACE_BYTES = 8 * 2**20  # a chunk that stays in a last-level cache

LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropy_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The specification: softmax in fp32 (fp64 for fp64 logits). Shapes as in the module's docstring."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    valid = targets != ignore_index
    if z_loss:
        loss = loss + z_loss * torch.where(valid, z.logsumexp(dim=-1) ** 2, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: float | str
) -> Tensor:
    """The specification: the logits, then `cross_entropy_ref`."""
    return cross_entropy_ref(F.linear(x, weight, bias), targets, **options)


@triton.jit
def _cross_entropy_kernel(
    z_ptr,
    dz_ptr,
    targets_ptr,
    peak_ptr,
    total_ptr,
    loss_ptr,
    dloss_ptr,
    z_stride_n,
    dz_stride_n,
    dloss_stride_n,
    V,
    ignore_index,
    z_loss,
    label_smoothing,
    FORWARD: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: FORWARD makes its statistics and loss; WRITE_DZ makes dz, in the backward times dloss. dz may be z."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride_n
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    # An out-of-range target must poison its row visibly: it never matches a column, so NaN has to be put in by hand.
    poison = tl.where(ignored | ((target >= 0) & (target < V)), 0.0, float("nan"))
    offs_v = tl.arange(0, BLOCK_V)

    if FORWARD:
        m_i = tl.full((), float("-inf"), tl.float32)
        l_i = tl.full((), 0.0, tl.float32)
        z_target = tl.full((), 0.0, tl.float32)
        z_sum = tl.full((), 0.0, tl.float32)
        for start in range(0, V, BLOCK_V):
            mask_v = start + offs_v < V
            z = tl.load(z_row + start + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m_i, tl.max(z, 0))
            # While every logit so far is -inf, any finite maximum avoids -inf - -inf.
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            l_i = l_i * tl.exp2((m_i - m_safe) * LOG2E) + tl.sum(tl.exp2((z - m_safe) * LOG2E), 0)
            m_i = m_new
            z_target += tl.sum(tl.where(start + offs_v == target, z, 0.0), 0)
            if SMOOTH:
                z_sum += tl.sum(tl.where(mask_v, z, 0.0), 0)
        peak = tl.where(m_i == float("-inf"), 0.0, m_i)
        log_total = tl.log(l_i)
        lse = peak + log_total
        loss = (1.0 - label_smoothing) * (peak - z_target + log_total) + z_loss * lse * lse
        if SMOOTH:
            loss += label_smoothing * (peak - z_sum / V + log_total)
        tl.store(peak_ptr + row, peak)
        tl.store(total_ptr + row, l_i)
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss) + poison)
    else:
        peak = tl.load(peak_ptr + row)
        l_i = tl.load(total_ptr + row)
        lse = peak + tl.log(l_i)

    if WRITE_DZ:
        dloss = 1.0 + poison
        if not FORWARD:
            dloss = tl.load(dloss_ptr + row * dloss_stride_n).to(tl.float32) + poison
        p_scale = (1.0 + 2.0 * z_loss * lse) / l_i
        for start in range(0, V, BLOCK_V):
            mask_v = start + offs_v < V
            z = tl.load(z_row + start + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
            dz = tl.exp2((z - peak) * LOG2E) * p_scale
            if SMOOTH:
                dz -= label_smoothing / V
            dz = tl.where(start + offs_v == target, dz - (1.0 - label_smoothing), dz) * dloss
            dz = tl.where(ignored, 0.0, dz)
            tl.store(dz_ptr + row * dz_stride_n + start + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=mask_v)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"cross_entropy: expected targets in 0..{V - 1} or {ignore_index}, got {int(targets[row])} in row {row}"
        )


def _rows_cpu(z, dz, targets, peak, total, loss, dloss, ignore_index, z_loss, label_smoothing) -> None:
    _check_targets(targets, z.shape[1], ignore_index)
    ignored = targets == ignore_index
    column = targets.masked_fill(ignored, 0)[:, None]
    z = z.to(peak.dtype)
    z_target, z_mean = z.gather(1, column)[:, 0], z.mean(dim=1) if label_smoothing else None
    if loss is not None:
        torch.amax(z, dim=1, out=peak)
        peak.masked_fill_(peak == float("-inf"), 0)
    p = torch.sub(z, peak[:, None], out=dz if dz is not None and dz.dtype == peak.dtype else None).exp_()
    if loss is not None:
        torch.sum(p, dim=1, out=total)
        log_total = total.log()
        loss.copy_((1 - label_smoothing) * (peak - z_target + log_total))
        if label_smoothing:
            loss += label_smoothing * (peak - z_mean + log_total)
        loss += z_loss * (peak + log_total) ** 2
        loss.masked_fill_(ignored, 0)
    if dz is not None:
        p *= ((1 + 2 * z_loss * (peak + total.log())) / total)[:, None]
        if label_smoothing:
            p -= label_smoothing / z.shape[1]
        p.scatter_add_(1, column, p.new_full(column.shape, label_smoothing - 1))
        if dloss is not None:
            p *= dloss[:, None]
        dz.copy_(p.masked_fill_(ignored[:, None], 0))


def _rows(z, dz, targets, peak, total, loss, dloss, ignore_index, z_loss, label_smoothing) -> None:
    """z [n, V] -> peak, total, loss [n] (loss None: the others are given), and dz [n, V] unless None; dz may be z."""
    if not use_triton(z):
        _rows_cpu(z, dz, targets, peak, total, loss, dloss, ignore_index, z_loss, label_smoothing)
    elif z.shape[0] > 0:
        config = choose_cross_entropy(z.shape[1], z.dtype, arch_of(z.device))
        _cross_entropy_kernel[(z.shape[0],)](
            z, dz, targets, peak, total, loss, dloss, z.stride(0), 0 if dz is None else dz.stride(0),
            0 if dloss is None else dloss.stride(0), z.shape[1], ignore_index, z_loss, label_smoothing,
            FORWARD=loss is not None, WRITE_DZ=dz is not None, SMOOTH=label_smoothing != 0,
            BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip


@kernel_op(mutates=("peak", "total", "loss"))
def _cross_entropy_fwd(
    z: Tensor, targets: Tensor, peak: Tensor, total: Tensor, loss: Tensor, ignore_index: int, z_loss: float,
    label_smoothing: float,
) -> None:  # fmt: skip
    _rows(z, None, targets, peak, total, loss, None, ignore_index, z_loss, label_smoothing)


@kernel_op(mutates=("dz",))
def _cross_entropy_bwd(
    z: Tensor, dz: Tensor, targets: Tensor, peak: Tensor, total: Tensor, dloss: Tensor, ignore_index: int,
    z_loss: float, label_smoothing: float,
) -> None:  # fmt: skip
    _rows(z, dz, targets, peak, total, None, dloss, ignore_index, z_loss, label_smoothing)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [M, N] = a b, or += when not first, in total's precision."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.device.type != "cpu":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # mm with an out_dtype has no CPU kernel
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _chunks(x, weight, bias, targets, z, peak, total, loss, dloss, dx, dw, db, *options) -> None:
    """The rows in chunks of len(z), the workspace: logits, `_rows` on them in place, their share of the gradients."""
    rows = z.shape[0]
    with_gradients = any(gradient is not None for gradient in (dx, dw, db))
    for start in range(0, x.shape[0], rows):
        chunk = slice(start, start + rows)
        x_chunk = x[chunk]
        logits = z[: len(x_chunk)]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=logits)
        _rows(
            logits, logits if with_gradients else None, targets[chunk], peak[chunk], total[chunk],
            None if loss is None else loss[chunk], None if dloss is None else dloss[chunk], *options,
        )  # fmt: skip
        if dx is not None:
            torch.mm(logits, weight, out=dx[chunk])
        if dw is not None:
            _accumulate(dw, logits.t(), x_chunk, first=start == 0)
        if db is not None:
            share = logits.sum(dim=0, dtype=db.dtype)
            db.copy_(share) if start == 0 else db.add_(share)
    if x.shape[0] == 0:
        for empty in (dw, db):
            if empty is not None:
                empty.zero_()


@kernel_op(mutates=("z", "peak", "total", "loss", "dx", "dw", "db"))
def _linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z: Tensor, peak: Tensor, total: Tensor,
    loss: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, ignore_index: int, z_loss: float,
    label_smoothing: float,
) -> None:  # fmt: skip
    """peak, total and loss [N], and for those of dx, dw, db that are given the gradients of the sum of the losses."""
    options = (ignore_index, z_loss, label_smoothing)
    _chunks(x, weight, bias, targets, z, peak, total, loss, None, dx, dw, db, *options)


@kernel_op(mutates=("z", "dx", "dw", "db"))
def _linear_cross_entropy_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z: Tensor, peak: Tensor, total: Tensor,
    dloss: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, ignore_index: int, z_loss: float,
    label_smoothing: float,
) -> None:  # fmt: skip
    """The gradients of sum_n dloss[n] loss[n], from the forward's peak and total."""
    options = (ignore_index, z_loss, label_smoothing)
    _chunks(x, weight, bias, targets, z, peak, total, None, dloss, dx, dw, db, *options)


def _workspace(x: Tensor, V: int, chunk_rows: int | None) -> Tensor:
    """Uninitialised logits [rows, V] of one chunk: even chunks, whole tiles of 128 rows, within the workspace."""
    N = max(x.shape[0], 1)
    if chunk_rows is None:
        fit = (WORKSPACE_BYTES if use_triton(x) else CPU_WORKSPACE_BYTES) // (V * x.element_size())
        fit = max(fit // 128, 1) * 128
        chunk_rows = triton.cdiv(triton.cdiv(N, triton.cdiv(N, fit)), 128) * 128
    return x.new_empty(min(chunk_rows, N), V)


def _row_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised peak, total, loss [N] in fp32 (fp64) for the rows of x."""
    return torch.empty(3, x.shape[0], device=x.device, dtype=_wide(x.dtype)).unbind()


def _lse(peak: Tensor, total: Tensor) -> Tensor:
    """lse [N]; below a logit of +inf total is NaN, and lse is not."""
    return torch.where(peak == float("inf"), peak, peak + total.log())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, *options):
        peak, total, loss = _row_statistics(logits)
        _cross_entropy_fwd(logits, targets, peak, total, loss, *options)
        ctx.save_for_backward(logits, targets, peak, total)
        ctx.options = options
        lse = _lse(peak, total)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        logits, targets, peak, total = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _cross_entropy_bwd(logits, dlogits, targets, peak, total, dloss, *ctx.options)
        return dlogits, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-token losses: the backward makes the logits again."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, chunk_rows, *options):
        nothing = (None, None, None)
        peak, total, loss = _loss_and_gradients(x, weight, bias, targets, chunk_rows, nothing, options)
        ctx.save_for_backward(x, weight, bias, targets, peak, total)
        ctx.chunk_rows, ctx.options = chunk_rows, options
        lse = _lse(peak, total)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        x, weight, bias, targets, peak, total = ctx.saved_tensors
        z = _workspace(x, len(weight), ctx.chunk_rows)
        dx, dw, db = _gradients(x, weight, bias, ctx.needs_input_grad)
        _linear_cross_entropy_bwd(x, weight, bias, targets, z, peak, total, dloss, dx, dw, db, *ctx.options)
        return dx, _rounded(dw, weight), _rounded(db, bias), None, None, None, None, None


class _LinearCrossEntropySum(torch.autograd.Function):
    """The sum of the losses: the upstream gradient is one number, so the forward makes the gradients.

    An fp32 weight's dW is its accumulator, scaled in place and given away; a second backward makes the gradients again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, chunk_rows, needs_grad, *options):
        gradients = _gradients(x, weight, bias, ctx.needs_input_grad) if needs_grad else (None, None, None)
        peak, total, loss = _loss_and_gradients(x, weight, bias, targets, chunk_rows, gradients, options)
        # The compiler reuses buffers by itself, and a mutation of what was saved would hold for every run of its graph.
        ctx.gives_dw = weight.dtype == _wide(weight.dtype) and not torch.compiler.is_compiling()
        ctx.save_for_backward(weight, bias, *gradients, *((x, targets) if ctx.gives_dw else (None, None)))
        ctx.given, ctx.chunk_rows, ctx.options = False, chunk_rows, options
        lse = _lse(peak, total)
        ctx.mark_non_differentiable(lse)
        return loss.sum(), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        weight, bias, dx, dw, db, x, targets = ctx.saved_tensors
        if ctx.given:
            dx, dw, db = _gradients(x, weight, bias, ctx.needs_input_grad)
            _loss_and_gradients(x, weight, bias, targets, ctx.chunk_rows, (dx, dw, db), ctx.options)
        if dw is not None and ctx.gives_dw:
            ctx.given = True
            dw = dw.data.mul_(dloss)  # .data: what its receiver writes into it is no change of a saved tensor
        else:
            dw = _rounded(dw, weight, dloss)
        dx = None if dx is None else dx * dloss
        return dx, dw, _rounded(db, bias, dloss), None, None, None, None, None, None


def _loss_and_gradients(x, weight, bias, targets, chunk_rows, gradients, options) -> tuple[Tensor, Tensor, Tensor]:
    """peak, total, loss [N]; those of the gradients dx, dw, db that are given become those of the losses' sum."""
    peak, total, loss = _row_statistics(x)
    z = _workspace(x, len(weight), chunk_rows)
    _linear_cross_entropy_fwd(x, weight, bias, targets, z, peak, total, loss, *gradients, *options)
    return peak, total, loss


def _gradients(x, weight, bias, needed) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Uninitialised dx in x's dtype, and dw, db in fp32 (fp64) to accumulate in, for those that are needed."""
    wide = _wide(weight.dtype)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None,
        weight.new_empty(weight.shape, dtype=wide) if needed[1] else None,
        bias.new_empty(bias.shape, dtype=wide) if bias is not None and needed[2] else None,
    )


def _rounded(gradient: Tensor | None, parameter: Tensor | None, scale: Tensor | None = None) -> Tensor | None:
    """gradient * scale in the parameter's dtype, in one pass and without a second fp32 tensor."""
    if gradient is None:
        return None
    if scale is None:
        return gradient.to(parameter.dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=parameter.dtype))


def _check_options(op: str, computed: Tensor, targets: Tensor, N: int, reduction: str) -> None:
    """`computed`: logits or x, whose dtype the op computes from."""
    if use_triton(computed):
        check_dtypes(op, **{"logits" if op == "cross_entropy" else "x": computed})
    check(targets.shape == (N,), f"{op}: expected targets [{N}], got {list(targets.shape)}")
    check(targets.dtype == torch.int64, f"{op}: expected targets of torch.int64, got {targets.dtype}")
    check(reduction in ("mean", "sum", "none"), f"{op}: expected reduction mean, sum or none, got {reduction!r}")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits [N, V] against targets [N] int64: fp32, a scalar, or [N] with reduction="none".

    With return_lse also lse [N] fp32, through which no gradient flows. The module's docstring has the maths and what
    happens to targets out of range. Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    check(logits.dim() == 2, f"cross_entropy: expected logits [N, V], got {list(logits.shape)}")
    check(logits.is_floating_point(), f"cross_entropy: expected floating-point logits, got {logits.dtype}")
    _check_options("cross_entropy", logits, targets, logits.shape[0], reduction)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    targets = targets.contiguous()  # the kernel knows no stride of theirs
    loss, lse = _CrossEntropy.apply(logits, targets, ignore_index, z_loss, label_smoothing)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum().clamp(min=1)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy` of x [N, C] projected by weight [V, C] and bias [V] or None; the logits are never all held.

    chunk_rows: rows whose logits are held at a time; None takes what fits 256 MiB. Under autocast x, weight and bias
    are cast to its dtype, as nn.Linear's would be. Raises ValueError naming the argument that does not fit.
    """
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    check(x.dim() == 2, f"linear_cross_entropy: expected x [N, C], got {list(x.shape)}")
    (N, C), V = x.shape, weight.shape[0]
    check(weight.shape == (V, C), f"linear_cross_entropy: expected weight [V, {C}], got {list(weight.shape)}")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            check(given.dtype == x.dtype, f"linear_cross_entropy: expected {name} of {x.dtype}, got {given.dtype}")
    if bias is not None:
        check(bias.shape == (V,), f"linear_cross_entropy: expected bias [{V}], got {list(bias.shape)}")
    if chunk_rows is not None:
        check(chunk_rows > 0, f"linear_cross_entropy: expected chunk_rows > 0, got {chunk_rows}")
    _check_options("linear_cross_entropy", x, targets, N, reduction)
    targets = targets.contiguous()
    options = (ignore_index, z_loss, label_smoothing)
    if reduction == "none":
        loss, lse = _LinearCrossEntropy.apply(x, weight, bias, targets, chunk_rows, *options)
    else:
        needs_grad = torch.is_grad_enabled()
        loss, lse = _LinearCrossEntropySum.apply(x, weight, bias, targets, chunk_rows, needs_grad, *options)
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum().clamp(min=1)
    return (loss, lse) if return_lse else loss
