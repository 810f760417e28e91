"""transformers' Phi with the weights of ours, to be measured beside it. No other file here imports transformers."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from .config import PhiConfig
from .hf_config import write_configs
from .layout import slots_of
from .model import Phi


def hf_config(config: PhiConfig, dtype: torch.dtype):
    """transformers' configuration of our shape, with SDPA, read from the config.json that we write."""
    from transformers import PhiConfig as HFConfig

    with tempfile.TemporaryDirectory() as directory:
        write_configs(Path(directory), config, dtype)
        found = HFConfig.from_pretrained(directory)
    found._attn_implementation = "sdpa"
    return found


def causal_lm(model: Phi, *, share: bool = False) -> nn.Module:
    """PhiForCausalLM with the weights of `model`, on its device and in its dtype.

    `share`: what both lay out alike (embedding, head, fc1: half of it) is the same memory. Raises ImportError, or
    whatever else it does, where transformers is absent or does not get on with this torch.
    """
    from transformers.models.phi import modeling_phi

    config = hf_config(model.config, model.embed.dtype)
    with torch.device("meta"):
        hf = modeling_phi.PhiForCausalLM(config).to(model.embed.dtype)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {}
    for name, slot in slots_of(model.config).items():
        part = parameters[slot.parameter][slot.part].contiguous()  # columns of w_out, read with gaps, would slow it
        tensors[name] = part if share else part.clone()
    if model.config.tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    hf.load_state_dict(tensors, assign=True)
    hf.tie_weights()
    hf.model.rotary_emb = modeling_phi.PhiRotaryEmbedding(config).to(model.embed.device)
    return hf
