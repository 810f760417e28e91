"""PhiConfig: the only home of architecture numbers."""

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class PhiConfig:
    """Shape of one Phi model. Letters in comments are those of kernels/README.md; `head_dim` is derived."""

    vocab: int  # V: rows of the embedding and of the head; a tokenizer may have fewer ids
    channels: int  # C
    layers: int  # L
    heads: int  # H
    rotary_dim: int  # R: leading dims of each head that are rotated; even
    mlp_hidden: int  # F
    context: int = 2048  # T: positions a sequence may have
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied_head: bool = False  # the head's weight is the embedding
    init_std: float = 0.02
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self):
        for name in ("vocab", "channels", "layers", "heads", "mlp_hidden", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"config: expected {name} >= 1, got {getattr(self, name)}")
        if self.channels % self.heads:
            raise InputError(f"config: expected channels divisible by {self.heads} heads, got {self.channels}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise InputError(f"config: expected an even rotary_dim in 2..{self.head_dim}, got {self.rotary_dim}")

    @property
    def head_dim(self) -> int:  # D
        return self.channels // self.heads

    @property
    def parameters(self) -> int:
        """How many numbers a model of this shape has."""
        C, F, V = self.channels, self.mlp_hidden, self.vocab
        layer = 2 * C + (3 * C + F) * (C + 1) + C * (C + F) + 2 * C
        return (1 if self.tied_head else 2) * V * C + V + 2 * C + self.layers * layer

    def flops_per_token(self, T: int) -> tuple[float, float]:
        """Training FLOPs of one token of a sequence of T: (causal half of the attention, full attention).

        Matrix products alone, forward once and backward twice: 6 per weight of the layers and the head (the embedding
        is a look-up), and for the scores and their use of the values 12 L C T, or half of it.
        """
        C, F = self.channels, self.mlp_hidden
        weights = self.layers * ((3 * C + F) * C + C * (C + F)) + self.vocab * C
        scores = 12.0 * self.layers * C * T
        return 6.0 * weights + scores / 2, 6.0 * weights + scores

    @staticmethod
    def from_preset(name: str) -> "PhiConfig":
        """The preset called `name`; InputError names the known ones."""
        if name not in PRESETS:
            raise InputError(f"config: expected a preset of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]


_PHI_2 = PhiConfig(
    vocab=51200, channels=2560, layers=32, heads=32, rotary_dim=32, mlp_hidden=10240, bos_id=50256, eos_id=50256
)

PRESETS = {
    "xiangxin-3b": _PHI_2,
    "phi-2": _PHI_2,
    "phi-1_5": PhiConfig(
        vocab=51200, channels=2048, layers=24, heads=32, rotary_dim=32, mlp_hidden=8192, bos_id=50256, eos_id=50256
    ),
    "demo": PhiConfig(
        vocab=4096, channels=480, layers=2, heads=6, rotary_dim=32, mlp_hidden=1920, context=256, bos_id=0, eos_id=0
    ),
}
