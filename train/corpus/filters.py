"""Filters suited to Chinese web text: which documents are not worth training on, and why.

Each threshold is a share that clean prose stays far below (or above): the filters take out what is plainly not text.
They judge folded text, so width and case do not count.
"""

import re

import numpy as np

from .fold import HAN, OTHER, SPACE, Folded, grams

MIN_CHARACTERS = 20  # letters, digits and Han characters
MIN_HAN = 0.3  # of letters and digits: the rest of a page of Chinese is names, numbers, code
MAX_SYMBOLS = 0.5  # neither letters nor digits
REPEAT_LENGTH, MAX_REPEATED = 10, 0.3  # share of the runs of ten characters that occurred before in the document
MAX_BOILERPLATE = 0.3  # of the characters, in lines that belong to a page and not to its text
MAX_MISDECODED = 0.01

REASONS = (
    "too short",
    "too little Chinese",
    "mostly symbols",
    "mis-decoded",
    "repetition",
    "boilerplate",
)

_BOILERPLATE = re.compile(
    r"版权所有|ICP备|ICP证|公网安备|免责声明|责任编辑|上一篇|下一篇|点击查看|点击进入|扫一扫|扫码|关注我们|微信公众号"
    r"|友情链接|网站地图|设为首页|加入收藏|返回顶部|返回首页|联系我们|请先登录|登录\s*[|/]\s*注册|立即注册|忘记密码"
    r"|转载请注明|未经授权|All [Rr]ights [Rr]eserved|Copyright|JavaScript|Cookie"
)
# what UTF-8 and GBK look like when taken for each other or for Latin-1, and the replacement character
_MISDECODED = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯|ï¼|ã€|â€|Ã[\x80-\xbf]|[\ue000-\uf8ff]")


def judge(texts: list[str], folded: Folded) -> list[str | None]:
    """For each document the first of REASONS that applies, or None."""
    spaces, symbols = (folded.tally(folded.kinds == kind) for kind in (SPACE, OTHER))
    visible = np.maximum(np.bincount(folded.documents, minlength=folded.count) - spaces, 1)
    letters = folded.only(folded.kinds > SPACE)
    repeated = repeated_share(letters)
    han = folded.tally(folded.kinds == HAN)
    holds = np.stack(
        [
            visible - symbols < MIN_CHARACTERS,
            han < MIN_HAN * (visible - symbols),
            symbols > MAX_SYMBOLS * visible,
            np.array([_share(_MISDECODED, text) > MAX_MISDECODED for text in texts], bool),
            repeated > MAX_REPEATED,
            np.array([_boilerplate_share(text) > MAX_BOILERPLATE for text in texts], bool),
        ]
    )
    first = np.where(holds.any(0), holds.argmax(0), len(REASONS))
    return [(*REASONS, None)[reason] for reason in first]


def repeated_share(letters: Folded) -> np.ndarray:
    """Share of each document's runs of REPEAT_LENGTH characters that occurred in it before: float64 [documents]."""
    hashes, starts = grams(letters.codes, letters.documents, REPEAT_LENGTH)
    documents = letters.documents[starts].astype(np.uint64)
    ordered = np.sort(documents << np.uint64(40) | hashes >> np.uint64(24))
    again = (ordered[1:][ordered[1:] == ordered[:-1]] >> np.uint64(40)).astype(np.int64)
    runs = np.bincount(documents.astype(np.int64), minlength=letters.count)
    return np.bincount(again, minlength=letters.count) / np.maximum(runs, 1)


def _share(pattern: re.Pattern, text: str) -> float:
    return sum(len(found) for found in pattern.findall(text)) / len(text)


def _boilerplate_share(text: str) -> float:
    if not _BOILERPLATE.search(text):
        return 0.0
    return sum(len(line) for line in text.split("\n") if _BOILERPLATE.search(line)) / len(text)
