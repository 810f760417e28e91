"""transformers' Phi beside ours: on the same weights, with SDPA, eager or compiled."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from xiangxin_fast.config import PhiConfig
from xiangxin_fast.hf_config import write_configs
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


def config_for(config: PhiConfig, dtype: torch.dtype):
    """transformers' configuration of our shape, read from the config.json that we write."""
    from transformers import PhiConfig as HFConfig

    with tempfile.TemporaryDirectory() as directory:
        write_configs(Path(directory), config, dtype)
        hf_config = HFConfig.from_pretrained(directory)
    hf_config._attn_implementation = "sdpa"
    return hf_config


def _empty(build, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that `build` makes, on `device` in `dtype`, without the initialisation that copied weights replace."""
    with torch.device("meta"):
        module = build()
    return module.to(dtype).to_empty(device=device)


def causal_lm(model: Phi) -> nn.Module:
    """PhiForCausalLM with the weights of `model`, on its device and in its dtype."""
    phi, device, dtype = modeling(), model.embed.device, model.embed.dtype
    hf_config = config_for(model.config, dtype)
    hf = _empty(lambda: phi.PhiForCausalLM(hf_config), device, dtype)
    parameters, hf_parameters = dict(model.named_parameters()), dict(hf.named_parameters())
    with torch.no_grad():
        for name, slot in slots_of(model.config).items():
            hf_parameters[name].copy_(parameters[slot.parameter][slot.part])
    hf.model.rotary_emb = phi.PhiRotaryEmbedding(hf_config).to(device)
    return hf


def _layer(case: Case, inputs: Inputs, shape: Shape, function) -> Run:
    phi, x = modeling(), inputs["x"]
    hf_config = config_for(shape.config, x.dtype)
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
