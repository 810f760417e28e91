"""transformers' Phi beside ours: on the same weights, with SDPA, eager or compiled."""

import torch
from torch import Tensor, nn

from xiangxin_fast import hf_peer
from xiangxin_fast.layout import slots_of
from xiangxin_fast.model import Phi

from .case import Case, Inputs, Provider, Run, Shape, Unavailable, compiled


def modeling():
    """transformers' modelling module of Phi, or Unavailable."""
    try:
        from transformers.models.phi import modeling_phi
    except Exception as error:  # built for another torch, or absent
        raise Unavailable(f"transformers: {type(error).__name__}: {error}") from error
    return modeling_phi


def _empty(build, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that `build` makes, on `device` in `dtype`, without the initialisation that copied weights replace."""
    with torch.device("meta"):
        module = build()
    return module.to(dtype).to_empty(device=device)


def causal_lm(model: Phi) -> nn.Module:
    """PhiForCausalLM with the weights of `model`, on its device and in its dtype, in memory of its own."""
    modeling()
    return hf_peer.causal_lm(model)


def _layer(case: Case, inputs: Inputs, shape: Shape, function) -> Run:
    phi, x = modeling(), inputs["x"]
    hf_config = hf_peer.hf_config(shape.config, x.dtype)
    layer = _empty(lambda: phi.PhiDecoderLayer(hf_config, layer_idx=0), x.device, x.dtype)
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for name, slot in slots_of(shape.config).items():
            if slot.parameter.startswith("blocks.0."):
                ours = inputs[slot.parameter.removeprefix("blocks.0.")]
                parameters[name.removeprefix("model.layers.0.")].copy_(ours[slot.part])
    positions = torch.arange(x.shape[1], device=x.device)[None]
    embeddings = phi.PhiRotaryEmbedding(hf_config).to(x.device)(x, positions)
    call = function(layer)

    def forward() -> Tensor:
        return call(x, attention_mask=None, position_ids=positions, position_embeddings=embeddings)

    return Run(forward, (x, *layer.parameters()), comparable=False)


def layer_peer(compile: bool) -> Provider:
    """transformers' decoder layer on the case's weights, with SDPA."""

    def provide(case: Case, inputs: Inputs, shape: Shape) -> Run:
        return _layer(case, inputs, shape, lambda layer: compiled(layer, shape) if compile else layer)

    return provide
