"""What every op keeps besides its numerics: bits, program order, memory, and torch.compile."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor], *, what: str) -> None:
    """Equal in every bit, so NaN equals the same NaN and 0 is not -0."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: tensor {i} is {a.dtype} {a.shape}, not {b.shape}"
        bytes_of_a, bytes_of_b = (t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (a, b))
        different = int(bytes_of_a.ne(bytes_of_b).sum())
        assert not different, f"{what}: tensor {i} {list(a.shape)} differs in {different} bytes"


def assert_repeatable(run: Callable[[], Iterable[Tensor]], times: int = 2) -> None:
    """run() gives the same bits every time: no reduction whose order may vary. Call it with forward and gradients."""
    first = list(run())
    for _ in range(times - 1):
        assert_same_bits(run(), first, what="a second run")


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Runs the programs of each grid last to first in Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_idx = InterpreterBuilder.set_grid_idx

    def reversed_grid_idx(self, x, y, z):
        nx, ny, nz = self.grid_dim
        set_grid_idx(self, nx - 1 - x, ny - 1 - y, nz - 1 - z)

    InterpreterBuilder.set_grid_idx = reversed_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_grid_idx


def assert_program_order_free(run: Callable[[], Iterable[Tensor]]) -> None:
    """run() gives the same bits with the programs in reverse: as much of a race check as an interpreter can do."""
    forward = list(run())
    with reversed_programs():
        assert_same_bits(run(), forward, what="programs in reverse order")


def saved_bytes(forward: Callable[[], object], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes forward() keeps for its backward, by unique storages; those of `besides` (parameters, say) do not count."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = forward()
    excluded = {tensor.untyped_storage().data_ptr() for tensor in besides}
    del keep
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in excluded)


def assert_compiles_without_clones(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """torch.compile(fullgraph=True) gives eager's bits, gradients included, and inductor copies nothing for fn's ops.

    Ops that write into their arguments are functionalised: this runs the pass of inductor that undoes it and counts the
    copies it could not avoid.
    """
    # Two seconds of imports that no other test needs.
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater

    graphs = []

    def keep(graph_module, _):
        graphs.append(graph_module)
        return make_boxed_func(graph_module.forward)

    def run(function):
        out = function(*inputs)
        differentiable = [x for x in inputs if x.requires_grad]
        return [out, *torch.autograd.grad(out, differentiable, out.detach())] if differentiable else [out]

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    assert_same_bits(run(compiled), run(fn), what="torch.compile")
    copies = torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten.copy.default
    for graph_module in graphs:
        graph = graph_module.graph
        before = sum(node.target in copies for node in graph.nodes)
        reinplace_inplaceable_ops(FakeTensorUpdater(graph_module), graph)
        decompose_auto_functionalized(graph)
        added = sum(node.target in copies for node in graph.nodes) - before
        assert added == 0, f"torch.compile copies {added} tensors for ops that write into their arguments:\n{graph}"
