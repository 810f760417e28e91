"""What rounding its weights costs a model: perplexity of a text in bf16, int8 and int4.

`python -m bench.perplexity --model DIR --text FILE`, for instance the demo's model and its held-out chapters:
demo/run/model and demo/text/validation.txt.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from bench.measure import environment
from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.errors import exits_cleanly
from xiangxin_fast.quantization import quantization_of
from xiangxin_fast.score import token_logprobs
from xiangxin_fast.tokenizer import Tokenizer

KINDS = (None, "int8", "int4")


def measure(model: Path, text: Path) -> list[dict[str, object]]:
    """One result for each of KINDS. Windows of the model's context, half a context apart."""
    tokenizer = Tokenizer.load(model)
    tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    results = []
    for kind in KINDS:
        phi = load_pretrained(model, "cpu", torch.bfloat16, quantize=kind)
        loss = -token_logprobs(phi.prepack(), tokens, valid_ids=len(tokenizer)).double().mean().item()
        results.append(
            {
                "weights": kind or "bfloat16",
                "group": quantization_of(kind, phi.config).group if kind else None,
                "parameters": phi.config.parameters,
                "tokens": len(tokens) - 1,
                "nats_per_token": loss,
                "perplexity": math.exp(loss),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.model, arguments.text)
    if arguments.out:
        record = {"environment": environment(torch.device("cpu")), "results": results}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
