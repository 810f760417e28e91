"""The specification: Phi in plain PyTorch, in whatever dtype its parameters have (fp64 is the truth of the tests).

    a = layer_norm(x)
    x = x + dense(attention(q_proj(a), k_proj(a), v_proj(a))) + fc2(gelu(fc1(a)))        for every layer
    logits = lm_head(final_layernorm(x))

Attention and MLP read one LayerNorm and are added together. Attention is causal, with a rotary embedding on the first R
dims of each head, where dim i turns with dim i + R/2. GELU is the tanh approximation. Every projection has a bias.

Parameters carry the names of transformers' PhiForCausalLM, whose state dict loads here as it is. There is no dropout.

Source    Gunasekar et al. 2023, arXiv:2306.11644, and the model card of microsoft/phi-2; Su et al. 2021,
          arXiv:2104.09864 (rotary embedding); Wang and Komatsuzaki 2021, GPT-J (parallel block)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PhiConfig


def rotary_tables(config: PhiConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin [T, R/2] in fp64 of the angles position * theta ** (-2i / R)."""
    R = config.rotary_dim
    frequencies = config.rope_theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first R dims of each head of x [B, T, H, D] by the angles of cos, sin [T, R/2]; rounds once."""
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, R/2]
    x1, x2, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        C = config.channels
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.dense = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return self.dense(torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.channels, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.channels, config.eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        a = self.input_layernorm(x)
        return x + self.self_attn(a, cos, sin, visible) + self.mlp(a)


class Trunk(nn.Module):
    def __init__(self, config: PhiConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.channels)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_layernorm = nn.LayerNorm(config.channels, config.eps)


class PhiReference(nn.Module):
    """Phi as the module's docstring specifies it; slow, and the judge of everything fast."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.channels, config.vocab)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]. With segment_ids [B, T] a position sees only its own segment."""
        T = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        tables = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (table.to(x.device, tables) for table in rotary_tables(self.config, T))
        visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        if segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None]  # [B, 1, T, S]
            visible = visible & same
        for layer in self.model.layers:
            x = layer(x, cos, sin, visible)
        return self.lm_head(self.model.final_layernorm(x))

    def loss(self, tokens: Tensor, targets: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of tokens [B, T] against targets [B, T] (already shifted, -100 ignored), mean over valid."""
        logits = self(tokens, segment_ids)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten())
