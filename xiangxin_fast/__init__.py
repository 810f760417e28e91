"""Phi-2's architecture, done fast: model, checkpoints and generator. Names load on first use, for torch is slow."""

import importlib

_HOMES = {
    "Generator": "generate",
    "Phi": "model",
    "PhiConfig": "config",
    "load_pretrained": "checkpoint",
    "save_pretrained": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'xiangxin_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
