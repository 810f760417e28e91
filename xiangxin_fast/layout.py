"""Where the tensors of a checkpoint file live in Phi's fused parameters.

Three layouts hold the same numbers under different names, and q, k, v as
    native     model.layers.N.self_attn.{q,k,v}_proj        transformers >= 4.37
    fused      model.layers.N.self_attn.query_key_value     transformers 4.36: head by head, its q, its k, its v
    remote     transformer.h.N.mixer.Wqkv                   the code once shipped with phi-1, phi-1.5, phi-2: q, k, v
The order of rows in w_in is that of xiangxin_kernels.parallel_block.
"""

from collections.abc import Mapping
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from .config import PhiConfig


class Layout(NamedTuple):
    """The names one layout gives to Phi's tensors, less `.weight` and `.bias`."""

    embed: str
    layer: str
    ln: str
    qkv: tuple[str, ...]  # one tensor for each of q, k, v, or one for all
    dense: str
    final_ln: str
    head: str
    by_head: bool = False  # rows of the one tensor go head by head


SEPARATE_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NATIVE = Layout(
    embed="model.embed_tokens", layer="model.layers.{}.", ln="input_layernorm", qkv=SEPARATE_QKV,
    dense="self_attn.dense", final_ln="model.final_layernorm", head="lm_head",
)  # fmt: skip
FUSED = NATIVE._replace(qkv=("self_attn.query_key_value",), by_head=True)
REMOTE = Layout(
    embed="transformer.embd.wte", layer="transformer.h.{}.", ln="ln", qkv=("mixer.Wqkv",),
    dense="mixer.out_proj", final_ln="lm_head.ln", head="lm_head.linear",
)  # fmt: skip


class Slot(NamedTuple):
    """Where a tensor of a file lives in Phi: the parameter, what to index it with, and the shape of that part."""

    parameter: str
    part: Tensor | slice | tuple | int | EllipsisType
    shape: tuple[int, ...]


def qkv_rows(config: PhiConfig) -> Tensor:
    """Where each row of [q | k | v], head by head inside each, stands in w_in: int64 [3C]."""
    C, H, D, R = config.channels, config.heads, config.head_dim, config.rotary_dim
    dim = torch.arange(D, device="cpu")
    neighbours = torch.where(dim < R, dim % (R // 2) * 2 + dim // (R // 2), dim)
    head = torch.arange(H, device="cpu")[:, None] * D
    return torch.cat([head + neighbours, C + head + neighbours, 2 * C + head + dim]).flatten()


def slots_of(config: PhiConfig, layout: Layout = NATIVE) -> dict[str, Slot]:
    """Every tensor that a file in `layout` must hold, in file order, and where it lives in Phi."""
    V, C, F = config.vocab, config.channels, config.mlp_hidden
    qkv = qkv_rows(config)
    if layout.by_head:
        qkv = qkv.view(3, config.heads, config.head_dim).transpose(0, 1).flatten()
    slots = {f"{layout.embed}.weight": Slot("embed", ..., (V, C))}

    def add(name: str, weight: Slot, bias: Slot):
        slots[f"{name}.weight"], slots[f"{name}.bias"] = weight, bias

    for n in range(config.layers):
        layer, block = layout.layer.format(n), f"blocks.{n}."
        add(layer + layout.ln, Slot(block + "ln_w", ..., (C,)), Slot(block + "ln_b", ..., (C,)))
        for name, rows in zip(layout.qkv, qkv.chunk(len(layout.qkv)), strict=True):
            add(layer + name, Slot(block + "w_in", rows, (len(rows), C)), Slot(block + "b_in", rows, (len(rows),)))
        fc1, attention, mlp = slice(3 * C, None), (slice(None), slice(0, C)), (slice(None), slice(C, None))
        add(layer + layout.dense, Slot(block + "w_out", attention, (C, C)), Slot(block + "b_out", 0, (C,)))
        add(layer + "mlp.fc1", Slot(block + "w_in", fc1, (F, C)), Slot(block + "b_in", fc1, (F,)))
        add(layer + "mlp.fc2", Slot(block + "w_out", mlp, (C, F)), Slot(block + "b_out", 1, (C,)))
    add(layout.final_ln, Slot("ln_w", ..., (C,)), Slot("ln_b", ..., (C,)))
    add(layout.head, Slot("head_w", ..., (V, C)), Slot("head_b", ..., (V,)))
    if config.tied_head:
        del slots[f"{layout.head}.weight"]
    return slots


def native_tensors(config: PhiConfig, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Phi's parameters (or their gradients), by Phi's names, as the tensors of the native layout by native names."""
    return {name: fused[slot.parameter][slot.part] for name, slot in slots_of(config).items()}
