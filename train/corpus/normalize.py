"""Normalisation: one way to write what looks the same. `normalize(normalize(text)) == normalize(text)`.

Unicode's NFC; "\\n" for every line end (also U+2028, U+2029, U+0085, form feeds); no control characters but "\\n" and
tabs; no zero-width or direction marks (joiners between letters or emoji stay: they are part of them); a plain space for
U+00A0; no space at line ends, no indent of ideographic spaces, at most one blank line in a row.
"""

import re
import unicodedata

_LINE_ENDS = re.compile("\r\n|[\r\u0085\u2028\u2029\x0b\x0c]")
# C0 and C1 controls, soft hyphen, zero-width space, word joiner, byte order mark, marks of direction
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
)
_EDGES = re.compile("[ \t\u3000]+(?=\n)|(?<=\n)\u3000+(?=[^\n])")
_EDGES_NEAR = re.compile("\n\u3000|[ \t\u3000]\n")
_BLANK_LINES = re.compile("\n{3,}")


def normalize(text: str) -> str:
    """`text` normalised; '' where nothing visible is left."""
    # what str.isprintable lets pass has nothing for the next two patterns, and asking it is ten times faster
    if not text.replace("\n", "").replace("\u3000", "").isprintable():
        text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text)).replace("\u00a0", " ")
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "\n" in text:
        text = _BLANK_LINES.sub("\n\n", _EDGES.sub("", text) if _EDGES_NEAR.search(text) else text)
    return text.rstrip(" \t\n\u3000").lstrip("\n\u3000")
