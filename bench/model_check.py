"""The whole model on the device against its specification in fp64: logits, every gradient, greedy tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from xiangxin_fast.generator import Generator
from xiangxin_fast.layout import native_tensors
from xiangxin_fast.model import Phi
from xiangxin_fast.reference import PhiReference

from .case import Unavailable
from .hugging_face import causal_lm
from .numerics import Comparison, compare, ulp
from .train_step import random_model

LAYERS = 3


def _reference(model: Phi, dtype: torch.dtype) -> PhiReference:
    with torch.device("meta"):
        reference = PhiReference(model.config)
    tensors = native_tensors(model.config, dict(model.named_parameters()))
    weights = {name: tensor.detach().to(dtype, copy=True) for name, tensor in tensors.items()}
    reference.load_state_dict(weights, assign=True)
    return reference.requires_grad_()


def _gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _evaluate(model, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradient of the loss by each tensor of the native layout."""
    with torch.no_grad():
        logits = model(tokens)
    loss = model.loss(tokens, targets)
    gradients = _gradients(loss, dict(model.named_parameters()))
    if isinstance(model, Phi):
        gradients = native_tensors(model.config, gradients)
    return {"logits": logits} | gradients


def _emit(work, provider: str, what: str, verdict: dict[str, Comparison]) -> None:
    tensor, worst = max(verdict.items(), key=lambda item: item[1].ratio)
    about = {"kind": "check", "op": "model", "provider": provider, "shape": what, "dtype": "bfloat16"}
    found = {"passed": worst.passed, "tensor": tensor, "ratio": worst.ratio, "criterion": worst.criterion}
    work.emit(about | found | {"worst": worst.worst})


def check_model(work) -> None:
    """Ours against fp64 by the numerics rule, logits and all gradients, at full width; transformers' beside."""
    config = replace(work.shape.config, layers=min(LAYERS, work.shape.config.layers))
    T = min(509, work.shape.T)
    model = random_model(config, work.device, work.dtype)
    tokens = torch.randint(config.vocab, (2, T + 1), device=work.device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    exact = _evaluate(_reference(model, torch.float64), *batch)
    plain = _evaluate(_reference(model, work.dtype), *batch)
    ours = _evaluate(model, *batch)
    what = f"B=2 T={T} L={config.layers}"
    _emit(work, "ours", what, {name: compare(ours[name], plain[name], exact[name]) for name in exact})
    try:
        hf = causal_lm(model)
    except Unavailable as error:
        work.emit({"kind": "skip", "provider": "transformers", "reason": str(error)})
        return
    with torch.no_grad():
        logits = hf(batch[0]).logits
    _emit(work, "transformers", what, {"logits": compare(logits, plain["logits"], exact["logits"])})


def check_greedy(work) -> None:
    """Every greedy token of the generator is one that rounding could choose: its fp64 logit is the largest, or below
    it by no more than twice the largest error the numerics rule allows.
    """
    config = replace(work.shape.config, layers=min(LAYERS, work.shape.config.layers))
    prompt_tokens, new_tokens = (7, 5) if work.dry_run else (331, 64)
    model = random_model(config, work.device, work.dtype).requires_grad_(False)
    prompt = torch.randint(config.vocab, (prompt_tokens,)).tolist()
    new = Generator(model).generate([prompt], max_new_tokens=new_tokens, temperature=0, stop_ids=())[0]
    tokens = torch.tensor([prompt + new], device=work.device)
    with torch.no_grad():
        exact, plain = (_reference(model, d)(tokens)[0, prompt_tokens - 1 : -1] for d in (torch.float64, work.dtype))
    chosen = exact.gather(1, tokens[0, prompt_tokens:, None])[:, 0]
    short = float((exact.amax(1) - chosen).max())
    allowed = 2 * (2 * float((plain.double() - exact).abs().max()) + ulp(work.dtype, float(exact.abs().max())))
    about = {"kind": "check", "op": "greedy tokens", "provider": "ours", "dtype": "bfloat16"}
    about |= {"shape": f"{prompt_tokens} + {new_tokens} tokens, L={config.layers}", "tensor": "logit of the choice"}
    found = {"passed": short <= allowed and len(new) == new_tokens, "ratio": short / allowed, "criterion": "max"}
    work.emit(about | found | {"worst": f"{short:.4g} below the largest, {allowed:.4g} allowed"})
