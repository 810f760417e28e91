"""Drafts for speculative decoding, looked up in the text so far.

Text repeats itself: names, quotations, tables, code. Where the last tokens stood before, what followed them there is
the draft (prompt lookup, Saxena 2023; Leviathan et al. 2023, arXiv:2211.17192, for the verification).
"""

import torch
from torch import Tensor

NGRAM = 3  # tokens compared at most: the longest match wins, and of equals the latest


def draft(history: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` likely next tokens [n, count] for each row of history [n, S], and whether its last token was found [n].

    Row r has history[r, :lengths[r]], at least one token; what stands beyond is never read into a draft. A match whose
    continuation ends before `count` tokens goes on periodically. Where nothing matches the draft is the last token.
    """
    ids = torch.arange(history.shape[1], device=history.device)
    last = lengths[:, None] - 1
    matching, score = ids < last, 0
    for back in range(NGRAM):
        wanted = history.gather(1, (last - back).clamp(min=0))
        # Place e of the rolled row holds the token `back` places before e; the first ones have none there.
        matching = matching & (history.roll(back, 1) == wanted) & (ids >= back) & (last >= back)
        score = score + matching.long()
    best, at = (score * history.shape[1] + ids).masked_fill(score == 0, -1).max(1, keepdim=True)
    found = best >= 0
    at = torch.where(found, at, last - 1)
    step = torch.arange(count, device=history.device)
    return history.gather(1, at + 1 + step % (last - at)), found[:, 0]
