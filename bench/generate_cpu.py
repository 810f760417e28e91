"""Generation on a CPU beside transformers' `generate`: the same random weights, all of them taking turns.

A phase has transformers in one dtype, our model in that dtype, and our model with rounded weights. In fp32 the peer
shares storage with ours wherever the layouts allow (its q, k, v and fc1 weights are rows of our w_in, in another order,
which changes values and not speed), so that 2.78 B parameters fit twice into 16 GB; its dense and fc2 weights, columns
of our w_out, get memory of their own: the peer is never slowed. In bf16 our generator lays its weights out anew.

What is fast depends on whether the CPU multiplies bf16. One that does becomes one that does not by
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from bench.measure import environment
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.generator import Generator
from xiangxin_fast.model import Phi
from xiangxin_fast.quantization import place, quantization_of, rounded

# What takes turns with transformers in each dtype.
PHASES = {"bfloat16": ("bfloat16", "int8", "int4"), "float32": ("float32", "int8")}


def build_pair(config: PhiConfig, dtype: torch.dtype) -> tuple[Phi, nn.Module]:
    """Our model with random weights and transformers' PhiForCausalLM of the same shape, sharing what they can."""
    from transformers import PhiConfig as PeerConfig
    from transformers import PhiForCausalLM
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    C, F, R = config.channels, config.mlp_hidden, config.rotary_dim
    ours = Phi(config, dtype=dtype).eval().requires_grad_(False)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(config.init_std).to(dtype)
    for parameter in ours.parameters():
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            flat[start : start + noise.numel()] = noise[: flat.numel() - start]
    peer_config = PeerConfig(
        vocab_size=config.vocab,
        hidden_size=C,
        intermediate_size=F,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": R / config.head_dim,
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
    )
    with torch.device("meta"):
        peer = PhiForCausalLM(peer_config).to(dtype)
    state = {
        "model.embed_tokens": (ours.embed, None),
        "model.final_layernorm": (ours.ln_w, ours.ln_b),
        "lm_head": (ours.head_w, ours.head_b),
    }
    for i, block in enumerate(ours.blocks):
        q, k, v, fc1 = zip(block.w_in.split([C, C, C, F]), block.b_in.split([C, C, C, F]), strict=True)
        dense, fc2 = (part.contiguous() for part in block.w_out.split([C, F], dim=1))
        state |= {
            f"model.layers.{i}.input_layernorm": (block.ln_w, block.ln_b),
            f"model.layers.{i}.self_attn.q_proj": q,
            f"model.layers.{i}.self_attn.k_proj": k,
            f"model.layers.{i}.self_attn.v_proj": v,
            f"model.layers.{i}.self_attn.dense": (dense, block.b_out[0]),
            f"model.layers.{i}.mlp.fc1": fc1,
            f"model.layers.{i}.mlp.fc2": (fc2, block.b_out[1]),
        }
    tensors = {f"{name}.weight": weight for name, (weight, _) in state.items()}
    tensors |= {f"{name}.bias": bias for name, (_, bias) in state.items() if bias is not None}
    # Detached: our parameters change their layout, their memory does not.
    peer.load_state_dict({name: values.detach() for name, values in tensors.items()}, assign=True)
    peer.model.rotary_emb = PhiRotaryEmbedding(peer_config)
    return ours, peer.eval()


def rounded_copy(model: Phi, kind: str) -> Phi:
    """`model` with its matrices rounded to `kind`, the rest shared where it is in bf16 already."""
    copy = Phi(model.config, "meta", torch.bfloat16)
    parameters = ((name, values.detach().bfloat16()) for name, values in model.named_parameters())
    for name, value in rounded(parameters, quantization_of(kind, model.config)):
        place(copy, name, value)
    return copy.eval().requires_grad_(False)


class _Timestamps:
    """A streamer of transformers' that notes when each token came; the first `put` is the prompt."""

    def __init__(self):
        self.at: list[float] = []

    def put(self, value) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def _run_ours(generator: Generator, prompt: list[int], new_tokens: int) -> list[float]:
    at = [time.perf_counter()]
    for _ in generator.stream([prompt], max_new_tokens=new_tokens, temperature=0, stop_ids=()):
        at.append(time.perf_counter())
    return at


def _run_peer(peer: nn.Module, prompt: list[int], new_tokens: int) -> list[float]:
    streamer = _Timestamps()
    begin = time.perf_counter()
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    return [begin, *streamer.at[1:]]


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "samples": len(seconds)}


def measure(
    ours: dict[str, Phi], peer: nn.Module, *, prompt_tokens: int, new_tokens: int, rounds: int, seed: int = 0
) -> list[dict[str, object]]:
    """Times `rounds` turns of each, in alternating order: seconds to the first token, and for each token after it.

    One result for each of `ours`, which are named by what their weights are; the peer's figures are in all of them.
    """
    generators = {name: Generator(model) for name, model in ours.items()}
    config = next(iter(ours.values())).config
    ids = torch.randint(config.vocab, (prompt_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    turns = {name: functools.partial(_run_ours, generator, ids, new_tokens) for name, generator in generators.items()}
    turns["transformers"] = functools.partial(_run_peer, peer, ids, new_tokens)
    first: dict[str, list[float]] = {name: [] for name in turns}
    decode: dict[str, list[float]] = {name: [] for name in turns}
    load = []
    for turn in range(rounds + 1):
        load.append(os.getloadavg()[0])
        for name in sorted(turns, reverse=turn % 2 == 0):
            at = turns[name]()
            if turn:  # the first round warms up
                gaps = [b - a for a, b in itertools.pairwise(at)]
                first[name].append(gaps[0])
                decode[name] += gaps[1:]
    common = {
        "parameters": config.parameters,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "load_average": load,
    }
    results = []
    for name in ours:
        result = {"dtype": name, "peer_dtype": str(peer.dtype).removeprefix("torch.")} | common
        for what, samples in (("first_token", first), ("decode", decode)):
            if samples[name]:
                mine, theirs = _summary(samples[name]), _summary(samples["transformers"])
                ratios = {f"speedup_{key}": theirs[f"{key}_s"] / mine[f"{key}_s"] for key in ("median", "min")}
                result[what] = {"xiangxin_fast": mine, "transformers": theirs} | ratios
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xiangxin-3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's, for a quick look")
    parser.add_argument("--dtypes", nargs="+", default=[*PHASES], choices=PHASES)
    parser.add_argument("--decode", type=int, nargs=3, default=[32, 9, 8], metavar=("PROMPT", "NEW", "ROUNDS"))
    parser.add_argument("--prefill", type=int, nargs=2, default=[512, 3], metavar=("PROMPT", "ROUNDS"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = PhiConfig.from_preset(arguments.preset)
    if arguments.layers:
        config = PhiConfig(**{**vars(config), "layers": arguments.layers})
    everything = []
    for dtype in arguments.dtypes:
        results = []
        model, peer = build_pair(config, getattr(torch, dtype))
        ours = {name: model if name == dtype else rounded_copy(model, name) for name in PHASES[dtype]}
        prompt, new, rounds = arguments.decode
        if rounds:
            results += measure(ours, peer, prompt_tokens=prompt, new_tokens=new, rounds=rounds)
        prompt, rounds = arguments.prefill
        if rounds:
            results += measure(ours, peer, prompt_tokens=prompt, new_tokens=1, rounds=rounds)
        for result in results:
            print(json.dumps(result), flush=True)
        everything += results
        del model, ours, peer
    if arguments.out:
        record = {"environment": environment(torch.device("cpu")), "results": everything}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
