"""The tokenizer: held to transformers and the tokenizers library on the files both read, and to hostile files."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from xiangxin_fast import tokenizer as module
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import BYTE_OF_SYMBOL, END_OF_TEXT, Tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SYMBOL = {byte: symbol for symbol, byte in BYTE_OF_SYMBOL.items()}
TEXTS = [
    "年轻人不应该再努力了，年轻人就应该享受生活，看看山，看看水，看看身边的人。",
    "山里的春天来得很晚。三月的时候，河面上还有一层薄薄的冰，太阳照上去，亮得让人睁不开眼睛。",
    "河边的村子里住着一位老人，他每天早上都要到河边去看一看冰，看看春天到了没有。",
    "The model reads tokens and the model writes tokens.\n    def read(model):\n\t\treturn model  # 读\n",
]
CODEGEN_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
MIXED = "山里的 model  don't 12345\n    def\t\t\t\tx  😀é　，<|endoftext|> ok\u2028end"


def symbols(content: bytes) -> str:
    return "".join(SYMBOL[byte] for byte in content)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 400)


@pytest.fixture(scope="module")
def codegen(tmp_path_factory) -> Path:
    """CodeGen's layout with a small vocabulary: bytes, merges, end-of-text, then runs of spaces and of tabs."""
    merges = [(b" ", b"m"), (b"o", b"d"), (b"e", b"l"), (b" m", b"od"), (b" mod", b"el")]
    merges += [
        ("山".encode()[:1], "山".encode()[1:2]),
        ("山".encode()[:2], "山".encode()[2:]),
        ("里".encode()[:1], b"\x87"),
    ]
    vocab = [bytes([byte]) for byte in BYTE_OF_SYMBOL.values()] + [left + right for left, right in merges]
    added = [" " * n for n in range(7, 1, -1)] + ["\t" * n for n in range(4, 1, -1)]
    directory = tmp_path_factory.mktemp("codegen")
    ids = {symbols(content): i for i, content in enumerate(vocab)} | {END_OF_TEXT: len(vocab)}
    added_ids = {text: len(ids) + i for i, text in enumerate(added)}
    settings_json = {"tokenizer_class": "CodeGenTokenizer", "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    lines = ["#version: 0.2", *(f"{symbols(left)} {symbols(right)}" for left, right in merges), ""]
    (directory / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (directory / "added_tokens.json").write_text(json.dumps(added_ids), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings_json), encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=["trained", "codegen"])
def tokenizer(request) -> Tokenizer:
    value = request.getfixturevalue(request.param)
    return value if isinstance(value, Tokenizer) else Tokenizer.load(value)


def examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True)


class TestText:
    @examples(80)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_characters_never_trained_on_come_back(self, trained):
        text = "龘𠮷🧬ßŁ\x00\x7f\ufeff\U0010ffff"
        assert trained.decode(trained.encode(text)) == text

    def test_spelled_special_tokens_are_text(self, tokenizer):
        assert tokenizer.eos_id not in tokenizer.encode(MIXED)
        assert tokenizer.eos_id not in tokenizer.encode_batch([MIXED, END_OF_TEXT])[1]
        assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED

    def test_batch_is_each_alone(self, tokenizer):
        texts = [*TEXTS, "", MIXED]
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]

    @pytest.mark.parametrize(("text", "valid"), [("a\ud800b", "a\ufffdb"), ("\ud83d\ude00\udc80", "😀\ufffd")])
    def test_lone_surrogates_are_replaced(self, tokenizer, text, valid):
        assert tokenizer.encode(text) == tokenizer.encode(valid) == tokenizer.encode_batch([text])[0]

    @examples(80)
    @given(data=st.data())
    def test_decodes_any_tokens_as_the_library_does(self, tokenizer, data):
        tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
        assert tokenizer.decode(tokens) == tokenizer._backend.decode(tokens, skip_special_tokens=True)

    @pytest.mark.parametrize("token", [-1, 10**6])
    def test_tokens_that_do_not_exist_are_errors(self, tokenizer, token):
        with pytest.raises(InputError, match=f"expected a token in 0..{len(tokenizer) - 1}, got {token}"):
            tokenizer.decode([0, token])

    def test_first_token_past_the_end_is_an_error(self, tokenizer):
        tokenizer.decode([len(tokenizer) - 1])
        with pytest.raises(InputError, match="expected a token"):
            tokenizer.stream().push(len(tokenizer))


class TestStream:
    @examples(100)
    @given(data=st.data())
    def test_any_tokens_streamed_are_decoded(self, tokenizer, data):
        tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, tokens), stream.finish()]) == tokenizer.decode(tokens)

    @examples(80)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_text_appears_as_soon_as_its_characters_are_whole(self, tokenizer, text):
        stream, shown, content = tokenizer.stream(), "", b""
        for token in tokenizer.encode(text):
            shown += stream.push(token)
            content += tokenizer.token_bytes(token)
            assert shown == content.decode(errors="ignore")
        assert stream.finish() == ""

    def test_bytes_that_cannot_become_a_character_are_shown_at_once(self, trained):
        first_byte, letter = trained.encode("山")[0], trained.encode("x")[0]
        byte = next(t for t in range(len(trained)) if trained.token_bytes(t) == "山".encode()[:1])
        stream = trained.stream()
        assert [stream.push(byte), stream.push(letter), stream.push(byte), stream.finish()] == [
            "",
            "\ufffdx",
            "",
            "\ufffd",
        ]
        assert stream.push(letter) == "x", "finish starts afresh"
        assert first_byte < len(trained)

    def test_state_does_not_grow(self, tokenizer):
        stream = tokenizer.stream()
        for token in tokenizer.encode("山里的春天😀" * 200):
            stream.push(token)
            assert len(stream._utf8.getstate()[0]) <= 3


class TestTraining:
    def test_same_texts_same_tokenizer_whatever_the_threads(self, trained):
        code = "import sys, json; from xiangxin_fast.tokenizer import Tokenizer; "
        code += "print(Tokenizer.train(json.load(sys.stdin), 400).sha256)"
        paths = ":".join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(TEXTS * 3),
            env={"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == trained.sha256

    def test_layout_of_the_vocabulary(self, trained):
        assert len(trained) == 400
        assert trained.eos_id == 0
        assert sorted(trained.token_bytes(token) for token in range(1, 257)) == [bytes([byte]) for byte in range(256)]

    def test_says_when_the_texts_give_fewer_tokens(self):
        with pytest.warns(UserWarning, match="of the 5,000 asked for"):
            few = Tokenizer.train(TEXTS, 5000)
        assert 257 < len(few) < 5000

    def test_does_not_say_so_otherwise(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Tokenizer.train(TEXTS * 3, 300)

    @pytest.mark.parametrize("vocab", [0, 256, 10**9])
    def test_impossible_sizes_are_refused(self, vocab):
        with pytest.raises(InputError, match=r"expected vocab in 257\.\.300000"):
            Tokenizer.train(TEXTS, vocab)

    def test_lone_surrogates_do_not_stop_it(self):
        Tokenizer.train([*TEXTS, "a\ud800"], 300)


class TestFiles:
    def test_transformers_agrees_on_what_we_write(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save(tmp_path, context=77)
        (tmp_path / "config.json").write_text('{"model_type": "phi"}')
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos_id
        assert (len(theirs), theirs.model_max_length) == (len(tokenizer), 77)
        for text in (*TEXTS, MIXED.replace(END_OF_TEXT, "")):
            encoded = theirs(text)
            assert set(encoded) == {"input_ids", "attention_mask"}, "Phi.generate refuses token_type_ids"
            assert encoded["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(encoded["input_ids"]) == text

    def test_transformers_agrees_on_codegens_files(self, codegen):
        from transformers import AutoTokenizer

        ours, theirs = Tokenizer.load(codegen), AutoTokenizer.from_pretrained(codegen)
        assert type(theirs).__name__.startswith("CodeGen")
        assert len(ours) == len(theirs)
        text = MIXED.replace(END_OF_TEXT, "")
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert theirs(END_OF_TEXT)["input_ids"] == [ours.eos_id]
        assert "  " in theirs.convert_ids_to_tokens(ours.encode(text)), "runs of spaces are tokens of their own"

    def test_loads_what_transformers_saves_again(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save(tmp_path / "ours")
        AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        assert Tokenizer.load(tmp_path / "theirs").sha256 == tokenizer.sha256

    def test_hash_is_that_of_the_file_in_every_layout(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "a")
        again = Tokenizer.load(tmp_path / "a")
        again.save(tmp_path / "b")
        files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
        assert files[0] == files[1]
        assert hashlib.sha256(files[0]).hexdigest() == tokenizer.sha256 == again.sha256
        assert Tokenizer.load(tmp_path / "a" / "tokenizer.json").sha256 == tokenizer.sha256

    def test_class_for_transformers_survives(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "a")
        Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
        contents = [json.loads((tmp_path / name / "tokenizer_config.json").read_bytes()) for name in "ab"]
        assert contents[0] == contents[1]
        assert contents[0]["tokenizer_class"] in ("CodeGenTokenizer", "PreTrainedTokenizerFast")
        assert contents[0]["clean_up_tokenization_spaces"] is False

    def test_merges_are_strings_for_old_readers(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        merges = json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["merges"]
        assert merges
        assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)

    @pytest.mark.parametrize("named", ["</s>", {"content": "</s>", "special": True}])
    def test_end_of_text_has_the_name_that_the_config_gives(self, trained, tmp_path, named):
        trained.save(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text(encoding="utf-8").replace(END_OF_TEXT, "</s>"), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        renamed = Tokenizer.load(tmp_path)
        assert renamed.eos_id == 0
        assert 0 not in renamed.encode("</s>")
        renamed.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").eos_id == 0

    def test_truncation_and_padding_in_the_file_change_nothing(self, trained, tmp_path):
        trained.save(tmp_path)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        theirs.enable_truncation(3)
        theirs.enable_padding(length=50)
        theirs.save(str(tmp_path / "tokenizer.json"))
        loaded = Tokenizer.load(tmp_path)
        assert loaded.encode_batch([TEXTS[0], "x"]) == trained.encode_batch([TEXTS[0], "x"])

    @pytest.mark.parametrize(
        "steps",
        [
            [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
            [
                {"type": "Split", "pattern": {"Regex": module.GPT2_PATTERN}, "behavior": "Isolated", "invert": False},
                BYTES | {"use_regex": False},
            ],
        ],
        ids=["digits", "split"],
    )
    def test_known_pre_tokenizers_are_kept(self, trained, tmp_path, steps):
        document = copy.deepcopy(trained._document)
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        text = "年轻人 2026 don't 12345"
        assert Tokenizer.load(tmp_path).encode(text) == theirs.encode(text).ids


def put(path: str, value: object):
    """A change to a tokenizer.json: `value` at `path`; `...` deletes."""

    def change(document: dict) -> None:
        *parents, last = path.split("/")
        for name in parents:
            document = document[int(name) if name.isdigit() else name]
        if value is ...:
            del document[last]
        elif isinstance(document, list) and last == "+":
            document.append(value)
        else:
            document[int(last) if last.isdigit() else last] = value

    return change


ADDED = {"content": "<x>", "id": 400}
HOSTILE = {
    "no model": put("model", ...),
    "another model": put("model/type", "Unigram"),
    "model is a list": put("model", []),
    "vocabulary is a list": put("model/vocab", []),
    "merges missing": put("model/merges", ...),
    "merge result unknown": put("model/merges/+", "z z"),
    "merge part unknown": put("model/merges/+", ["zz", "z"]),
    "merge of three": put("model/merges/+", ["a", "b", "c"]),
    "merge of numbers": put("model/merges/+", [1, 2]),
    "prefix that overruns": put("model/continuing_subword_prefix", "#" * 40),
    "dropout": put("model/dropout", 0.5),
    "byte fallback": put("model/byte_fallback", True),
    "id twice": put("model/vocab/a", 5),
    "id with a hole": put("model/vocab/Ġzz", 10**6),
    "id negative": put("model/vocab/a", -1),
    "id is text": put("model/vocab/a", "7"),
    "id is true": put("model/vocab/!", True),
    "byte missing": put("model/vocab/a", ...),
    "token of no bytes": put("model/vocab/中", 400),
    "surrogate token": put("model/vocab/\ud800", 400),
    "added token far away": put("added_tokens/+", {"content": "<x>", "id": 10**9}),
    "added token without id": put("added_tokens/+", {"content": "<x>"}),
    "added token without content": put("added_tokens/+", {"id": 400}),
    "added token empty": put("added_tokens/+", {"id": 400, "content": ""}),
    "added token half a character": put("added_tokens/+", {"id": 400, "content": "\ud800"}),
    "added token twice": put("added_tokens", [ADDED, ADDED]),
    "added token of another id": put("added_tokens/0/id", 5),
    "added tokens are a dict": put("added_tokens", {"a": 1}),
    "end-of-text missing": put("added_tokens", []),
    "too many added tokens": put("added_tokens", [{"content": f"<{i}>", "id": 400 + i} for i in range(10_001)]),
    "own regular expression": put(
        "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    ),
    "own regular expression in a sequence": put(
        "pre_tokenizer",
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(a|a)*$"}}, {"type": "ByteLevel"}],
        },
    ),
    "no pre-tokenizer": put("pre_tokenizer", None),
    "digits only": put("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
    "bytes twice": put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}),
    "empty sequence": put("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
    "replacing normalizer": put("normalizer", {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}),
    "template": put("post_processor", {"type": "TemplateProcessing", "single": []}),
    "another decoder": put("decoder", {"type": "Metaspace"}),
    "decoder is text": put("decoder", "Metaspace"),
}


class TestHostileFiles:
    @pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
    def test_one_line_names_the_file(self, trained, tmp_path, change):
        document = copy.deepcopy(trained._document)
        change(document)
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(InputError) as error:
            Tokenizer.load(tmp_path)
        assert str(tmp_path / "tokenizer.json") in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 600

    @examples(60)
    @given(data=st.data())
    def test_any_one_change_is_refused_or_harmless(self, trained, tmp_path_factory, data):
        """Whatever JSON stands anywhere in the file: an InputError, or a tokenizer that still gives text back."""
        document = copy.deepcopy(trained._document)
        small = st.none() | st.booleans() | st.integers(-1, 500) | st.text(max_size=3) | st.just(0.5)
        value = data.draw(small | st.lists(small, max_size=2) | st.dictionaries(st.text(max_size=3), small, max_size=2))
        node = document
        while True:
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = value
        file = tmp_path_factory.getbasetemp() / "mutated.json"
        file.write_text(json.dumps(document))
        try:
            changed = Tokenizer.load(file)
        except InputError:
            return
        assert changed.decode(changed.encode(TEXTS[3])).removeprefix(" ") == TEXTS[3]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"\xff\xfe",
            b'{"model": {}, "model": {}}',
            b'{"model": NaN}',
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b'{"a": ' + b"9" * 5000 + b"}",
        ],
        ids=["empty", "cut", "list", "bytes", "key twice", "NaN", "deep", "long number"],
    )
    def test_broken_json(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)

    def test_oversized_file_is_not_read(self, tmp_path):
        with (tmp_path / "tokenizer.json").open("wb") as stream:
            stream.truncate(module.MAX_FILE_BYTES + 1)
        with pytest.raises(InputError, match="expected at most"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize("how", ["a link out", "a pipe", "too long"])
    @pytest.mark.parametrize("name", [*CODEGEN_FILES, "tokenizer.json"])
    def test_no_file_is_read_but_a_regular_one_of_the_directory_of_a_bounded_size(self, codegen, tmp_path, name, how):
        directory = tmp_path / "model"
        if name == "tokenizer.json":
            Tokenizer.load(codegen).save(directory)
        else:
            shutil.copytree(codegen, directory)
        file = (directory / name).rename(tmp_path / "elsewhere")
        if how == "a link out":
            (directory / name).symlink_to(file)
            complaint = f"{directory / name}: expected a file of this directory, got a link to {file}"
        elif how == "a pipe":
            os.mkfifo(directory / name)
            complaint = f"{directory}: expected a file {name}, got none"
        else:
            shutil.copy(file, directory / name)
            os.truncate(directory / name, module.MAX_FILE_BYTES + 1)
            complaint = f"{directory / name}: expected at most {module.MAX_FILE_BYTES} bytes, got more"
        with pytest.raises(InputError) as refused:
            Tokenizer.load(directory)
        assert str(refused.value) == complaint

    def test_a_panic_of_the_library_is_an_input_error(self, trained):
        document = copy.deepcopy(trained._document)
        document["model"]["continuing_subword_prefix"] = "#" * 40
        with pytest.raises(BaseException) as panic:
            tokenizers.Tokenizer.from_str(json.dumps(document))
        assert not isinstance(panic.value, Exception), "the library no longer panics: take a file that makes it"
        with pytest.raises(InputError, match="where: the tokenizers library refuses it: range end index"):
            module._build(json.dumps(document), "where")

    def test_interrupts_are_not_swallowed(self, monkeypatch):
        def interrupted(text):
            raise KeyboardInterrupt

        monkeypatch.setattr(module.tokenizers.Tokenizer, "from_str", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module._build("{}", "where")

    @pytest.mark.parametrize("missing", ["", "vocab.json", "merges.txt"])
    def test_missing_files_are_named(self, tmp_path, missing):
        for name in {"vocab.json", "merges.txt"} - {missing}:
            if missing:
                (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("vocab.json", b'{"a": 0, "a": 1}'),
            ("merges.txt", b"\xff"),
            ("merges.txt", b"a b c"),
            ("merges.txt", b"zz zz"),
            ("added_tokens.json", b'{"  ": 3}'),
            ("tokenizer_config.json", b"{"),
            ("tokenizer_config.json", b'{"eos_token": 3}'),
            ("tokenizer_config.json", b'{"eos_token": "</s>"}'),
        ],
    )
    def test_broken_codegen_files(self, codegen, tmp_path, name, content):
        for file in codegen.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=str(tmp_path)):
            Tokenizer.load(tmp_path)
