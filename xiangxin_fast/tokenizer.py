"""Tokenizer: text to tokens and back, over the `tokenizers` library.

Byte-level BPE only (GPT-2, CodeGen, phi-1/1.5/2 and what `Tokenizer.train` makes): every token is a fixed string of
bytes, so any text round-trips and a stream of tokens decodes in linear time. A tokenizer file is untrusted: it is
parsed here, checked field by field and rebuilt before the library sees it. The library panics on some malformed models,
and a regular expression of the file's own choosing can hang it (tokenizers issues 2094 and 2060).
"""

import codecs
import functools
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .errors import InputError
from .strict_files import file_of, read_bytes, read_json, write_json

END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 32 << 20
MAX_VOCAB = 300_000
MAX_ADDED = 10_000

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OWN_CLASS, CODEGEN_CLASS = "PreTrainedTokenizerFast", "CodeGenTokenizer"  # what transformers 4.x and 5.x both know


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_symbols()


class StreamDecoder:
    """Decodes token by token: all that `push` and then `finish` return is `Tokenizer.decode` of the same tokens.

    A character cut by a token border is held back until whole; bytes that can no longer become one are U+FFFD at once.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with `token`; often ''."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the decoder starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class Tokenizer:
    """A byte-level BPE tokenizer. Its tokens are exactly 0 .. len(tokenizer) - 1; a model may have more rows than that.

    `sha256` is that of the tokenizer.json which `save` writes, whatever layout the tokenizer was read from.
    """

    def __init__(self, document: dict, eos: str, hf_class: str, where: str):
        """`document` is a tokenizer.json as `_checked` returns it; `where` names its source in errors."""
        self._json = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        self._document, self._eos, self._hf_class = document, eos, hf_class
        self._backend = _build(self._json.decode(), where)
        self._backend.encode_special_tokens = True  # a text that spells "<|endoftext|>" has not ended
        self._size = self._backend.get_vocab_size(with_added_tokens=True)
        for token in document["added_tokens"]:
            if self._backend.token_to_id(token["content"]) != token["id"]:
                raise InputError(f"{where}: expected added token {token['content']!r} to get id {token['id']}")
        self.eos_id: int = next(token["id"] for token in document["added_tokens"] if token["content"] == eos)
        self.sha256: str = hashlib.sha256(self._json).hexdigest()

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or a directory with one or with CodeGen's vocab.json, merges.txt, added_tokens.json.

        Raises InputError for a file that is missing, too large, malformed or not a byte-level BPE.
        """
        path = Path(path)
        directory = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        settings = _read_object(directory, "tokenizer_config.json") or {}
        eos = settings.get("eos_token") or END_OF_TEXT
        eos = eos.get("content") if isinstance(eos, dict) else eos
        _expect(f"{directory / 'tokenizer_config.json'}", isinstance(eos, str), "the name of eos_token", eos)
        hf_class = OWN_CLASS
        document = _read_object(directory, file.name)
        if document is not None:
            if str(settings.get("tokenizer_class")).startswith(CODEGEN_CLASS):
                hf_class = CODEGEN_CLASS
        elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
            document, hf_class, file = _codegen_document(directory, eos), CODEGEN_CLASS, directory
        else:
            raise InputError(f"{path}: expected tokenizer.json, or vocab.json and merges.txt, found neither")
        return Tokenizer(_checked(document, eos, str(file)), eos, hf_class, str(file))

    @staticmethod
    def train(texts: Sequence[str], vocab: int) -> "Tokenizer":
        """Trains a byte-level BPE of `vocab` tokens: token 0 is <|endoftext|>, 1..256 the bytes, then merges in order.

        Each digit is a token, a Latin word takes the space before it along. The same texts give the same tokenizer.
        Texts that repeat too little for `vocab` tokens give fewer: a warning. Memory: up to 30 bytes per byte of
        Chinese from 16 MB on (measured; 100 without `_training_pieces`, at 1 to 2 % fewer tokens).
        """
        Tokenizer.check_vocab(vocab)
        backend = tokenizers.Tokenizer(models.BPE())
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(BYTE_OF_SYMBOL),
            show_progress=False,
        )
        backend.train_from_iterator(_training_pieces([_without_surrogates(text) for text in texts]), trainer)
        document = _checked(json.loads(backend.to_str()), END_OF_TEXT, "trained tokenizer")
        tokenizer = Tokenizer(document, END_OF_TEXT, OWN_CLASS, "trained tokenizer")
        if len(tokenizer) < vocab:
            warnings.warn(f"the text gave {len(tokenizer):,} tokens of the {vocab:,} asked for", stacklevel=2)
        return tokenizer

    @staticmethod
    def check_vocab(vocab: int) -> None:
        """Raises InputError where `train` could not make a tokenizer of `vocab` tokens."""
        if not 257 <= vocab <= MAX_VOCAB:
            raise InputError(f"tokenizer: expected vocab in 257..{MAX_VOCAB} (256 bytes and end-of-text), got {vocab}")

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, none added: text that spells a special token is plain text, a lone surrogate is U+FFFD."""
        return self._backend.encode(_without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [_without_surrogates(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`: '' for special ones, U+FFFD for bytes that are not UTF-8. InputError: no such token."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder that is given the tokens one at a time."""
        return StreamDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for: b'' for a special token."""
        if not 0 <= token < self._size:
            raise InputError(f"tokenizer: expected a token in 0..{self._size - 1}, got {token}")
        return self._pieces[token]

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        pieces = {}
        for symbols, token in self._document["model"]["vocab"].items():
            pieces[token] = bytes(BYTE_OF_SYMBOL.get(symbol, 0) for symbol in symbols)
        for added in self._document["added_tokens"]:
            pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
        return [pieces[token] for token in range(self._size)]

    def save(self, directory: str | Path, context: int = 2048) -> None:
        """Writes what transformers' AutoTokenizer (4.x, 5.x) and this class load. `context`: the model's, in tokens."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self._eos, "eos_token": self._eos, "unk_token": self._eos}
        settings = {
            "tokenizer_class": self._hf_class,
            **names,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in self._document["added_tokens"]
            },
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # Phi's generate refuses token_type_ids
            "model_max_length": context,
        }
        (directory / "tokenizer.json").write_bytes(self._json)
        write_json(directory / "tokenizer_config.json", settings)
        write_json(directory / "special_tokens_map.json", names)


_HAN_RUN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
_PIECE = 4  # Han characters: few words are longer


def _training_pieces(texts: list[str]) -> Iterator[str]:
    """The texts with their runs of Han characters cut: a trainer keeps every distinct stretch without punctuation, and
    in Chinese most clauses are distinct. Pieces of _PIECE characters that occur once are cut again, in halves.

    Occurrences are counted in a table of fixed size, by a checksum; now and then two pieces share a place.
    """
    seen = bytearray(1 << 24)
    for text in texts:
        for run in _HAN_RUN.findall(text):
            for start in range(0, len(run), _PIECE):
                place = zlib.crc32(run[start : start + _PIECE].encode()) >> 8
                seen[place] = min(seen[place] + 1, 2)
    for text in texts:
        end = 0
        for run in _HAN_RUN.finditer(text):
            yield text[end : run.start()]
            for start in range(run.start(), run.end(), _PIECE):
                piece = text[start : min(start + _PIECE, run.end())]
                if seen[zlib.crc32(piece.encode()) >> 8] > 1:
                    yield piece
                else:
                    yield piece[: _PIECE // 2]
                    yield piece[_PIECE // 2 :]
            end = run.end()
        yield text[end:]


def _without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone ones replaced by U+FFFD: the library raises TypeError on them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _build(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the library derives from BaseException and cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: the tokenizers library refuses it: {_one_line(error)}") from None


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _read_object(directory: Path, name: str) -> dict | None:
    """The JSON object in a file of `directory`, None where there is no such file."""
    return read_json(file_of(directory, name), MAX_FILE_BYTES) if (directory / name).exists() else None


def _codegen_document(directory: Path, eos: str) -> dict:
    """CodeGen's three files as one tokenizer.json; not yet checked."""
    merges = file_of(directory, "merges.txt")
    try:
        lines = read_bytes(merges, MAX_FILE_BYTES).decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{merges}: expected UTF-8: {_one_line(error)}") from None
    vocab = read_json(file_of(directory, "vocab.json"), MAX_FILE_BYTES)
    if lines[0].startswith("#version"):
        del lines[0]
    added = {eos: vocab.get(eos)} | (_read_object(directory, "added_tokens.json") or {})
    return {
        "added_tokens": [{"content": text, "id": token, "normalized": text != eos} for text, token in added.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": [*filter(None, lines)]},
    }


def _expect(where: str, holds: bool, expectation: str, got: object = None) -> None:
    if not holds:
        raise InputError(f"{where}: expected {expectation}" + ("" if got is None else f", got {_one_line(got)}"))


def _checked(document: dict, eos: str, where: str) -> dict:
    """The same tokenizer as a tokenizer.json with every field known, in one fixed order, and nothing else."""
    expect = functools.partial(_expect, where)
    model, added = document.get("model"), document.get("added_tokens") or []
    expect(isinstance(model, dict) and model.get("type", "BPE") == "BPE", "a model of type BPE", type(model).__name__)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        expect(not model.get(name), f"no {name} in a byte-level BPE", model.get(name))
    expect(document.get("normalizer") in (None, {"type": "NFC"}), "normalizer null or NFC", document.get("normalizer"))
    for name in ("post_processor", "decoder"):
        node = document.get(name)
        kind = node.get("type") if isinstance(node, dict) else node
        expect(kind in (None, "ByteLevel"), f"{name} ByteLevel or null", kind)

    vocab, merges = model.get("vocab"), model.get("merges")
    expect(isinstance(vocab, dict) and isinstance(merges, list), "a vocabulary and merges")
    expect(len(vocab) <= MAX_VOCAB and len(merges) <= MAX_VOCAB, f"at most {MAX_VOCAB:,} tokens and merges", len(vocab))
    expect(isinstance(added, list) and len(added) <= MAX_ADDED, f"a list of at most {MAX_ADDED:,} added tokens")
    added = [_checked_added(token, eos, expect) for token in added]
    contents = {token["content"] for token in added}
    expect(len(contents) == len(added), "each added token once")
    expect(eos in contents, f"the end-of-text token {eos!r} among the added tokens")
    ids = vocab | {token["content"]: token["id"] for token in added}
    for token in added:
        expect(vocab.get(token["content"], token["id"]) == token["id"], "one id for each token", token["content"])
    expect(all(type(token) is int for token in ids.values()), "whole numbers as ids")
    expect(sorted(ids.values()) == list(range(len(ids))), f"ids 0..{len(ids) - 1}, each once")
    expect(BYTE_OF_SYMBOL.keys() <= vocab.keys(), "all 256 byte symbols in the vocabulary")
    foreign = next((text for text in vocab if text not in contents and not BYTE_OF_SYMBOL.keys() >= set(text)), None)
    expect(foreign is None, "a vocabulary of byte symbols", repr(foreign))
    return {
        "version": "1.0",
        "truncation": None,  # either of these two would silently change what `encode` returns
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": document.get("normalizer"),
        "pre_tokenizer": _checked_pre_tokenizer(document.get("pre_tokenizer"), expect),
        "post_processor": _byte_level(trim_offsets=False),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": list(_checked_merges(merges, vocab, expect)),
        },
    }


def _checked_merges(merges: list, vocab: dict, expect) -> Iterator[str]:
    """Each merge as "left right": tokenizers before 0.20 cannot read pairs."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        known = (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part in vocab for part in pair)
        )
        expect(known and "".join(pair) in vocab, "merges of two known tokens into a third", merge)
        yield " ".join(pair)


def _checked_added(token: object, eos: str, expect) -> dict:
    content = token.get("content") if isinstance(token, dict) else None
    expect(isinstance(content, str), "added tokens with a content", token)
    expect(content != "" and content == _without_surrogates(content), "added tokens of valid text", repr(content))
    flags = {name: token.get(name, False) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
    special = token.get("special", False) is True or content == eos
    return {"id": token.get("id"), "content": content, **flags, "special": special}


def _byte_level(add_prefix_space: bool = False, trim_offsets: bool = True, use_regex: bool = True) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def _checked_pre_tokenizer(node: object, expect) -> dict:
    """Only splits that are known: no regular expression of the file's own, and bytes as symbols at the end."""
    steps = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    expect(isinstance(steps, list) and 1 <= len(steps) <= 8, "a pre_tokenizer", node)
    checked = []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Digits":
            checked.append({"type": "Digits", "individual_digits": step.get("individual_digits") is True})
        elif kind == "Split":
            known = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
            expect(step == known, "GPT-2's pattern in a Split pre_tokenizer", step)
            checked.append(known)
        else:
            expect(kind == "ByteLevel", "a pre_tokenizer of ByteLevel, Digits and GPT-2's Split", step)
            prefix, regex = step.get("add_prefix_space") is True, step.get("use_regex", True) is True
            checked.append(_byte_level(add_prefix_space=prefix, use_regex=regex))
    kinds = [step["type"] for step in checked]
    expect(kinds.count("ByteLevel") == 1 and kinds[-1] == "ByteLevel", "one ByteLevel, last, as pre_tokenizer", kinds)
    return checked[0] if len(checked) == 1 else {"type": "Sequence", "pretokenizers": checked}
