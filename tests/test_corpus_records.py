"""Reading: every published record format, container and encoding; a fault is one record's, named by file and offset."""

import gzip
import io
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from train.corpus import files, records
from train.corpus.files import Source, cut_into_units, list_files, merge_sources, parse_source
from train.corpus.records import TEXT_KEYS, Reader
from xiangxin_fast.errors import InputError

LONG = "山里的春天来得很晚，河面上还有一层薄薄的冰。" * 3


def as_json(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def write_lines(file: Path, lines: list[object]) -> Path:
    """A line for each: bytes as they are, anything else as JSON."""
    file.write_bytes(b"".join((line if isinstance(line, bytes) else as_json(line)) + b"\n" for line in lines))
    return file


def read(*inputs: Path, key: str | None = None, titles: bool = True) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Texts, and (file, offset, reason) of what has none, through all units in order."""
    texts, faults = [], []
    for unit in cut_into_units(list_files([Source("corpus", 1.0, tuple(map(str, inputs)))])):
        for record in Reader(unit, key, titles):
            if record.text is None:
                faults.append((Path(unit.file.path).name, record.offset, record.reason))
            else:
                texts.append(record.text)
    return texts, faults


class TestFormats:
    """The record formats of the corpora that people pretrain on."""

    @pytest.mark.parametrize(
        ("name", "record", "text"),
        [
            ("WanJuan", {"id": "1", "content": "正文"}, "正文"),
            ("CCI 3.0", {"id": "1", "content": "正文", "meta_info": {"a": 1}}, "正文"),
            ("CCI 3.0-HQ", {"id": 1, "text": "正文", "score": 3.2}, "正文"),
            ("WuDao", {"id": 1, "uniqueKey": "k", "title": "题", "content": "正文"}, "题\n正文"),
            ("SkyPile", {"text": "正文"}, "正文"),
            ("ChineseWebText", {"title": "题", "score": 0.9, "text": "题\n正文"}, "题\n正文"),
            ("ChineseWebText 2", {"text": "正文", "domain": {"single_label": "x"}, "toxicity": {"label": 0}}, "正文"),
            (
                "MNBVC",
                {
                    "文件名": "a.txt",
                    "段落": [
                        {"行号": 0, "是否重复": False, "内容": "一"},
                        {"行号": 1, "是否重复": True, "内容": "重"},
                        {"行号": 2, "是否重复": False, "内容": "二"},
                    ],
                    "时间": "2023",
                },
                "一\n二",
            ),
            ("MNBVC Q&A", {"id": 1, "问": "问题", "答": "回答", "来源": "x"}, "问题\n回答"),
            ("wiki2019zh", {"id": "1", "url": "u", "title": "题", "text": "正文"}, "题\n正文"),
            (
                "chinese-poetry",
                {"author": "李白", "paragraphs": ["床前明月光，", "疑是地上霜。"]},
                "床前明月光，\n疑是地上霜。",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
    )
    def test_published_records(self, tmp_path, name, record, text):
        assert read(write_lines(tmp_path / "a.jsonl", [record])) == ([text], [])
        (tmp_path / "b.json").write_bytes(as_json([record, record]))
        assert read(tmp_path / "b.json") == ([text, text], [])

    @pytest.mark.parametrize("key", TEXT_KEYS)
    def test_usual_keys_are_found(self, tmp_path, key):
        file = write_lines(tmp_path / "a.jsonl", [{"id": 1, key: "正文一"}, {"id": 2, key: "正文二"}])
        assert read(file) == (["正文一", "正文二"], [])

    def test_a_given_key_wins_and_titles_can_stay_out(self, tmp_path):
        file = write_lines(tmp_path / "a.jsonl", [{"text": "否", "answer": "是", "title": "题"}, {"text": "无"}])
        texts, faults = read(file, key="answer", titles=False)
        assert texts == ["是"]
        assert [reason for *_, reason in faults] == ["no key 'answer'"]

    def test_arrays_are_wrapped_nested_and_hold_texts(self, tmp_path):
        records = [{"content": '一"}]{[', "more": [{"a": [1]}]}, {"content": "二\\"}]
        (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf {"RECORDS" : ' + as_json(records) + b"}")
        (tmp_path / "b.json").write_bytes(as_json(["三", "四"]))
        assert read(tmp_path) == (['一"}]{[', "二\\", "三", "四"], [])

    def test_text_is_looked_for_behind_a_blank_one(self, tmp_path):
        assert read(write_lines(tmp_path / "a.jsonl", [{"text": " ", "content": "正文"}])) == (["正文"], [])

    def test_what_follows_an_array_is_read(self, tmp_path):
        lines = [[1, 2], {"text": "一"}, [{"text": "二"}, {"text": "三"}], {"text": "四"}, b"tail"]
        texts, faults = read(write_lines(tmp_path / "a.jsonl", lines))
        assert texts == ["一", "二", "三", "四"]
        content = (tmp_path / "a.jsonl").read_bytes()
        found = [(content[offset : offset + 4], reason) for _, offset, reason in faults]
        assert found == [(b"1, 2", "not a JSON object"), (b"\ntai", "not a JSON object")]

    def test_lines_named_json_are_lines(self, tmp_path):
        assert read(write_lines(tmp_path / "a.json", [{"text": "一"}, {"text": "二"}])) == (["一", "二"], [])

    def test_parquet_in_several_row_groups(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MIN_UNIT_BYTES", 1)
        table = pyarrow.table({"id": range(7), "title": ["题"] * 7, "text": [f"正文{n}" for n in range(6)] + [None]})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        texts, faults = read(tmp_path / "a.parquet")
        assert texts == [f"题\n正文{n}" for n in range(6)]
        assert [(offset, reason[:18]) for _, offset, reason in faults] == [(6, "no text under any ")]
        units = cut_into_units(list_files([Source("c", 1.0, (str(tmp_path),))]))
        assert len(units) == 4
        size = (tmp_path / "a.parquet").stat().st_size
        assert size - 4 <= sum(unit.bytes for unit in units) <= size
        for unit in units:
            reader = Reader(unit, None, True)
            positions = [reader.position for _ in reader]
            assert max(*positions, reader.position) == unit.bytes

    def test_a_bad_cell_of_parquet_is_one_fault(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 16)
        cells = ["一".encode(), b"\xff", "三".encode(), b"x" * (1 << 16) + b"x", "五".encode()]
        text = pyarrow.array(cells, pyarrow.binary()).view(pyarrow.string())
        parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
        texts, faults = read(tmp_path / "a.parquet")
        assert texts == ["一", "三", "五"]
        assert faults == [("a.parquet", 1, "not UTF-8"), ("a.parquet", 3, records.TOO_LONG)]

    def test_blank_lines_separate_documents_of_txt(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("\ufeff\n\n　甲\r\n乙 \n\n \u3000\n\n丙\u2028丁\n".encode())
        assert read(tmp_path / "a.txt") == (["　甲\n乙 ", "丙\u2028丁"], [])


TEXTS = [f"第{n}篇" for n in range(300)]


class TestContainers:
    @pytest.mark.parametrize("kind", ["gz", "zst"])
    @pytest.mark.parametrize("frames", [1, 3])
    def test_compressed_frames(self, tmp_path, kind, frames):
        content = b"".join(as_json(line) + b"\n" for line in ({"text": text} for text in TEXTS))
        compress = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
        cuts = [len(content) * i // frames for i in range(frames + 1)]
        parts = [compress(content[a:b]) for a, b in itertools.pairwise(cuts)]
        (tmp_path / f"a.jsonl.{kind}").write_bytes(b"".join(parts))
        assert read(tmp_path / f"a.jsonl.{kind}") == (TEXTS, [])

    @pytest.mark.parametrize("kind", ["gz", "zst"])
    def test_a_truncated_file_gives_what_is_whole_and_a_reason(self, tmp_path, kind):
        rng = random.Random(0)
        texts = ["".join(rng.choices(LONG, k=200)) for _ in range(400)]
        content = b"".join(as_json({"text": text}) + b"\n" for text in texts)
        compress = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
        whole = compress(content)
        (tmp_path / f"a.jsonl.{kind}").write_bytes(whole[: len(whole) * 2 // 3])
        found, faults = read(tmp_path / f"a.jsonl.{kind}")
        assert found == texts[: len(found)]
        assert kind == "zst" or len(found) > 100
        assert [reason for *_, reason in faults] == [f"truncated {'gzip' if kind == 'gz' else 'zstd'}"]

    @pytest.mark.parametrize("kind", ["gz", "zst"])
    def test_damage_is_a_reason(self, tmp_path, kind):
        content = b"".join(as_json({"text": LONG + str(n)}) + b"\n" for n in range(2000))
        damaged = bytearray(gzip.compress(content) if kind == "gz" else zstandard.ZstdCompressor().compress(content))
        damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = bytes(range(40))
        (tmp_path / f"a.jsonl.{kind}").write_bytes(damaged)
        assert {reason for *_, reason in read(tmp_path / f"a.jsonl.{kind}")[1]} >= {
            f"damaged {'gzip' if kind == 'gz' else 'zstd'}"
        }

    def test_a_suffix_that_lies_is_no_matter(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(gzip.compress(as_json({"text": "一"})))
        assert read(tmp_path / "a.jsonl") == (["一"], [])

    @pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"x" * 100, b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
    def test_files_of_nothing_but_magic_are_faults(self, tmp_path, content):
        (tmp_path / "a.jsonl").write_bytes(content)
        texts, faults = read(tmp_path / "a.jsonl")
        assert (texts, len(faults)) == ([], 1)

    def test_one_bad_file_stops_nothing(self, tmp_path):
        write_lines(tmp_path / "a.jsonl", [{"text": "一"}])
        (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
        (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe[\x00]\x00")
        (tmp_path / "d.txt").write_bytes(b"")
        write_lines(tmp_path / "e.jsonl", [{"text": "二"}])
        texts, faults = read(tmp_path)
        assert texts == ["一", "二"]
        assert [name for name, *_ in faults] == ["b.parquet", "c.jsonl"]
        assert faults[1][2] == "UTF-16, neither UTF-8 nor GB18030"


class TestFaults:
    def test_bad_records_are_named_and_the_others_kept(self, tmp_path):
        lines = [
            ({"text": LONG}, None),
            (b'{"text": "\xff"}', "not UTF-8"),
            (b'{"text": "cut', "not JSON"),
            (b'["a"]', "not a JSON object"),
            ({"text": None}, "no text under any"),
            ({"text": " \n\u3000"}, "empty text"),
            ({"other": "a"}, "no text under any"),
            (b'{"text": "\\ud83d"}', "lone surrogate"),
            (b'{"text": "b", "n": ' + b"9" * 5000 + b"}", "not JSON"),
            (b'{"a":' * 100_000, "not JSON"),
            (b"", None),
            (b'{"text": "\\ud83d\\ude00"}', None),
            ('{"text": "二\u2028三\u0085\x01"}\r'.encode(), None),
        ]
        texts, faults = read(write_lines(tmp_path / "a.jsonl", [line for line, _ in lines]))
        assert texts == [LONG, "😀", "二\u2028三\u0085\x01"]
        offset, expected = 0, []
        for line, reason in lines:
            expected += [(offset, reason)] if reason else []
            offset += len(line if isinstance(line, bytes) else as_json(line)) + 1
        assert [(at, reason[:17]) for _, at, reason in faults] == expected

    def test_bad_elements_of_an_array_are_named(self, tmp_path):
        parts = [as_json({"text": LONG}), b'{"text": "\xff"}', b"12", b'{"text": 1,}', as_json({"text": "二"})]
        (tmp_path / "a.json").write_bytes(b"[" + b", ".join(parts) + b"]")
        texts, faults = read(tmp_path / "a.json")
        assert texts == [LONG, "二"]
        assert [reason for *_, reason in faults] == ["not UTF-8", "not a JSON object", "not JSON"]
        content = (tmp_path / "a.json").read_bytes()
        assert [content[offset : offset + 4] for _, offset, _ in faults] == [b'{"te', b", 12", b'{"te']

    def test_an_array_that_ends_early_says_so(self, tmp_path):
        (tmp_path / "a.json").write_bytes(as_json([{"text": "一"}, {"text": "二"}])[:-5])
        texts, faults = read(tmp_path / "a.json")
        assert texts == ["一"]
        assert [reason for *_, reason in faults] == [records.CUT]

    @pytest.mark.parametrize("ending", [b"\n", b""])
    def test_a_gigantic_line_is_one_fault(self, tmp_path, monkeypatch, ending):
        monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 16)
        head = b'{"text": "a"}\n'
        tail = b'{"text": "b"}\n' if ending else b""
        (tmp_path / "a.jsonl").write_bytes(head + b'{"text": "' + b"x" * (1 << 18) + b'"}' + ending + tail)
        texts, faults = read(tmp_path / "a.jsonl")
        assert texts == (["a", "b"] if ending else ["a"])
        assert faults == [("a.jsonl", len(head), records.TOO_LONG)]

    @pytest.mark.parametrize(("name", "line"), [("a.jsonl", b"x" * (1 << 17)), ("a.txt", b"x\n" * (1 << 16))])
    def test_units_inside_one_record_do_not_read_on_to_its_end(self, tmp_path, monkeypatch, name, line):
        monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 13)
        monkeypatch.setattr(files, "MIN_UNIT_BYTES", 1 << 13)
        (tmp_path / name).write_bytes(line)
        seen = Counter()

        class Counted(io.FileIO):
            def readline(self, size=-1):
                content = super().readline(size)
                seen["bytes"] += len(content)
                return content

        monkeypatch.setattr(records, "open_stream", lambda path, compression: Counted(path))
        assert read(tmp_path / name) == ([], [(name, 0, records.TOO_LONG)])
        assert seen["bytes"] < 4 * len(line)

    def test_a_gigantic_element_is_one_fault(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 16)
        elements = [{"text": "a"}, {"text": "x" * (1 << 20)}, {"text": "b"}, {"text": "c"}]
        (tmp_path / "a.json").write_bytes(as_json(elements))
        texts, faults = read(tmp_path / "a.json")
        assert texts == ["a", "b", "c"]
        assert [reason for *_, reason in faults] == [records.TOO_LONG]

    def test_a_line_of_just_the_limit_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 16)
        text = "x" * (records.MAX_RECORD_BYTES - len('{"text": ""}\n'))
        texts, faults = read(write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "x"}]))
        assert texts == [text]
        assert [reason for *_, reason in faults] == [records.TOO_LONG]

    def test_a_document_of_txt_with_a_bad_line_is_left_out_whole(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(LONG.encode() + b"\n\na\nb\xff\nc\xff\nd\n\ne\n\n\xff")
        texts, faults = read(tmp_path / "a.txt")
        assert texts == [LONG, "e"]
        assert [reason for *_, reason in faults] == ["not UTF-8", "not UTF-8"]


class TestEncodings:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
    @pytest.mark.parametrize("bom", [False, True])
    def test_gb18030_is_told_for_each_file(self, tmp_path, name, bom):
        mark = "\ufeff" if bom else ""
        # 乗 has the second byte of a backslash in GB18030, 輀 that of a brace
        texts = [f"{LONG}乗輀{n}" for n in range(5)]
        if name.endswith("txt"):
            content = "\n\n".join(texts)
        else:
            lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
            content = "\n".join(lines) if name.endswith("l") else "[" + ",".join(lines) + "]"
        (tmp_path / name).write_bytes((mark + content).encode("gb18030"))
        (tmp_path / "b.jsonl").write_bytes(as_json({"text": "另一个文件"}))
        assert read(tmp_path) == ([*texts, "另一个文件"], [])

    def test_a_few_bad_lines_do_not_make_a_file_gb18030(self, tmp_path):
        gb = json.dumps({"text": LONG}, ensure_ascii=False).encode("gb18030")
        texts, faults = read(write_lines(tmp_path / "a.jsonl", [{"text": LONG}, gb, {"text": LONG}, {"text": LONG}]))
        assert texts == [LONG] * 3
        assert [reason for *_, reason in faults] == ["not UTF-8"]

    @pytest.mark.parametrize("before", [1, 2, 3])
    def test_a_character_across_two_probes_tells_nothing(self, tmp_path, monkeypatch, before):
        monkeypatch.setattr(files, "PROBE_BYTES", 1 << 8)
        text = "x" * ((1 << 8) - len('{"text": "') - before) + "𠮷"
        assert read(write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": "x" * 300}])) == ([text, "x" * 300], [])

    def test_an_encoding_is_looked_for_behind_ascii(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "PROBE_BYTES", 1 << 12)
        lines = [b'{"text": "ascii only"}'] * 500 + [
            json.dumps({"text": LONG}, ensure_ascii=False).encode("gb18030")
        ] * 9
        texts, faults = read(write_lines(tmp_path / "a.jsonl", lines))
        assert texts == ["ascii only"] * 500 + [LONG] * 9
        assert faults == []

    def test_bytes_of_no_encoding_are_one_fault(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(bytes([0xFF, 0xC0]) * 5000)
        assert read(tmp_path / "a.txt") == ([], [("a.txt", 0, "neither UTF-8 nor GB18030")])


def texts_of_lines() -> st.SearchStrategy:
    return st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12)


class TestProperties:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        texts=texts_of_lines(),
        encoding=st.sampled_from(["utf-8", "utf-8-sig", "gb18030"]),
        escape=st.booleans(),
        data=st.data(),
    )
    def test_any_texts_come_back_from_any_container(self, tmp_path_factory, texts, encoding, escape, data):
        directory = tmp_path_factory.mktemp("any")
        if encoding == "gb18030":
            texts = [LONG, *texts]  # a few random characters may be valid in both encodings
            escape = False
        lines = [json.dumps({"text": text}, ensure_ascii=escape) for text in texts]
        kind = data.draw(st.sampled_from(["jsonl", "json"]))
        content = ("\n".join(lines) if kind == "jsonl" else "[" + ",\n".join(lines) + "]").encode(encoding)
        packed = data.draw(st.sampled_from(["", ".gz", ".zst"]))
        content = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed](content)
        (directory / f"a.{kind}{packed}").write_bytes(content)
        found, faults = read(directory)
        assert found == [text for text in texts if text.strip()]
        assert [reason for *_, reason in faults] == ["empty text"] * (len(texts) - len(found))

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000), size=st.integers(1, 400), kind=st.sampled_from(["jsonl", "txt"]))
    def test_units_do_not_change_what_is_read(self, tmp_path_factory, seed, size, kind):
        directory, rng = tmp_path_factory.mktemp("units"), random.Random(seed)
        if kind == "jsonl":
            lines = [b"", b"{bad", *(as_json({"text": "文" * rng.randint(1, 60)}) for _ in range(rng.randint(1, 12)))]
        else:
            lines = [rng.choice(["文" * rng.randint(1, 40), "", "", " ", "\u3000"]).encode() for _ in range(30)]
        rng.shuffle(lines)
        content = b"\n".join(lines)
        (directory / f"a.{kind}").write_bytes(content)
        whole = read(directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "MIN_UNIT_BYTES", size)
            patch.setattr(files, "MAX_UNIT_BYTES", size)
            assert read(directory) == whole
            before = 0  # lines of the units before
            for unit in cut_into_units(list_files([Source("c", 1.0, (str(directory),))])):
                reader = Reader(unit, None, True)
                for record in reader:
                    assert before + record.line == content.count(b"\n", 0, record.offset) + 1
                before += reader.lines
            assert before == content.count(b"\n") + (not content.endswith(b"\n"))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        content=st.binary(max_size=300), name=st.sampled_from(["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet"])
    )
    def test_any_bytes_are_read_without_an_exception(self, tmp_path_factory, content, name):
        directory = tmp_path_factory.mktemp("bytes")
        (directory / name).write_bytes(content)
        for text in read(directory)[0]:
            text.encode()


class TestInputs:
    def test_directories_are_searched_in_a_fixed_order(self, tmp_path):
        (tmp_path / "b").mkdir()
        for name in ("b/z.txt", "b/a.jsonl.gz", "c.txt", "a.txt", "ignored.csv"):
            (tmp_path / name).write_text('{"text": "x"}')
        source, said = Source("corpus", 1.0, (str(tmp_path), str(tmp_path / "a.txt"))), []
        found = [str(Path(file.path).relative_to(tmp_path)) for file in list_files([source], said.append)]
        assert [line.split(": ")[1][:22] for line in said] == ["1 files are left out, "]
        assert found == ["a.txt", "b/a.jsonl.gz", "b/z.txt", "c.txt"], "sorted, and none twice"

    def test_patterns_are_expanded(self, tmp_path):
        for name in ("a1.txt", "a2.txt", "b.txt"):
            (tmp_path / name).write_text(name)
        assert [Path(f.path).name for f in list_files([Source("c", 1.0, (f"{tmp_path}/a*.txt",))])] == [
            "a1.txt",
            "a2.txt",
        ]

    def test_sources_have_names_and_weights(self, tmp_path):
        sources = merge_sources([parse_source(text) for text in ("wudao=a/*.json", "cci:2.5=b", "plain", "wudao=c")])
        assert [(s.name, s.weight, s.paths) for s in sources] == [
            ("wudao", 1.0, ("a/*.json", "c")),
            ("cci", 2.5, ("b",)),
            ("corpus", 1.0, ("plain",)),
        ]

    @pytest.mark.parametrize("text", ["a:0=b", "a:-1=b", "a:nan=b", "a:inf=b", "a:x=b"])
    def test_weights_that_are_none(self, text):
        with pytest.raises(InputError, match="expected NAME:WEIGHT=PATH with a weight over 0"):
            parse_source(text)

    def test_a_name_with_two_weights_is_an_error(self):
        with pytest.raises(InputError, match="expected one weight, got 1 and 2"):
            merge_sources([parse_source("a=x"), parse_source("a:2=y")])

    def test_a_file_called_like_a_source_is_a_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a=b.txt").write_text("x")
        assert parse_source("a=b.txt") == Source("corpus", 1.0, ("a=b.txt",))

    def test_a_file_that_vanishes_is_a_fault(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        (unit,) = cut_into_units(list_files([Source("c", 1.0, (str(tmp_path),))]))
        (tmp_path / "a.txt").unlink()
        assert [record.reason for record in Reader(unit, None, True)] == ["cannot be read: No such file or directory"]
