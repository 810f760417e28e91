"""transformers' Phi as the oracle, and the way between its tensors and ours."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PhiConfig as HFConfig
from transformers import PhiForCausalLM

from xiangxin_fast.config import PhiConfig
from xiangxin_fast.hf_config import rotary_factor
from xiangxin_fast.layout import slots_of
from xiangxin_fast.model import Phi


def oracle(config: PhiConfig, seed: int = 0, **options) -> PhiForCausalLM:
    """transformers' model of `config` in fp32, with noise in every parameter: its own biases would be zero."""
    hf_config = HFConfig(
        vocab_size=config.vocab,
        hidden_size=config.channels,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        layer_norm_eps=config.eps,
        partial_rotary_factor=rotary_factor(config),
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    model = PhiForCausalLM(hf_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "layernorm.weight" in name else 0.0
            spread = 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(around, spread, generator=generator)
    return model


def fuse(config: PhiConfig, native: Mapping[str, Tensor]) -> Phi:
    """Phi with the numbers of a native state dict, in its dtype."""
    model = Phi(config, dtype=native["model.embed_tokens.weight"].dtype)
    with torch.no_grad():
        for name, slot in slots_of(config).items():
            model.get_parameter(slot.parameter)[slot.part] = native[name]
    return model


def random_model(config: PhiConfig, dtype: torch.dtype = torch.float32) -> Phi:
    """Phi in `dtype` with the oracle's numbers."""
    return fuse(config, {name: t.to(dtype) for name, t in oracle(config).state_dict().items()})


def grads_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}
