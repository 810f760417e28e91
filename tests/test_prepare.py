"""prepare.py, from raw text to shards: all of a good record is kept, nothing of a bad one, and memory stays flat."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import corpus, prepare
from train.corpus import MAX_RECORD_BYTES, Corpus, Document, Reject
from train.shards import SPLITS, Manifest, Shard
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import END_OF_TEXT, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学"
)


@functools.cache
def article(seed: int, characters: int) -> str:
    """Made-up Chinese: common characters, more of the more common, with punctuation."""
    rng = random.Random(seed)
    weights = [1 / (rank + 2) for rank in range(len(COMMON))]
    text = "".join(rng.choices(COMMON, weights, k=characters))
    return "".join(char + ("，" if rng.random() < 0.08 else "") for char in text) + "。"


def write_jsonl(file: Path, records: list[object]) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([article(seed, 400) for seed in range(20)], 500).save(directory)
    return directory


def kept(directory: Path, split: str) -> list[str]:
    """The split's documents, as text."""
    manifest, tokenizer, texts = Manifest.load(directory), Tokenizer.load(directory), []
    for number in range(len(manifest.splits[split].shards)):
        shard = Shard(directory, manifest, split, number)
        stops = [*shard.starts()[1:], shard.tokens]
        for start, stop in zip(shard.starts(), stops, strict=True):
            *tokens, last = shard.read(int(start), int(stop)).tolist()
            assert last == tokenizer.eos_id
            texts.append(tokenizer.decode(tokens))
    return texts


def rejects(directory: Path) -> list[tuple[str, int, str]]:
    lines = (directory / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


def read(*inputs: Path, key: str | None = None) -> tuple[list[str], list[tuple[str, int, str]]]:
    items = list(Corpus(list(inputs), key))
    texts = [item.text for item in items if isinstance(item, Document)]
    return texts, [(Path(item.file).name, item.line, item.reason) for item in items if isinstance(item, Reject)]


class TestJsonl:
    @pytest.mark.parametrize("key", corpus.TEXT_KEYS)
    def test_usual_keys_are_found(self, tmp_path, key):
        file = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "title": "题", key: "正文一"}, {"id": 2, key: "正文二"}])
        assert read(file) == (["正文一", "正文二"], [])

    def test_order_of_the_keys(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", [{"正文": "否", "content": "是", "data": "否"}])
        assert read(file)[0] == ["是"]

    def test_the_key_of_a_file_is_the_one_of_its_first_text(self, tmp_path):
        records = [{"id": 1}, {"content": "甲"}, {"text": "乙", "content": "丙"}, {"text": "丁"}]
        file = write_jsonl(tmp_path / "a.jsonl", records)
        texts, rejected = read(file)
        assert texts == ["甲", "丙"]
        assert [(line, reason) for _, line, reason in rejected] == [
            (1, f"no text under any of {', '.join(corpus.TEXT_KEYS)}"),
            (4, "no key 'content'"),
        ]

    def test_a_given_key_wins(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", [{"text": "否", "answer": "是"}])
        assert read(file, key="answer") == (["是"], [])

    def test_bad_records_are_named_and_the_others_kept(self, tmp_path):
        records = [
            {"text": "一"},
            b'{"text": "\xff"}',
            b'{"text": "cut',
            b'["a"]',
            {"text": None},
            {"text": ["a"]},
            {"text": " \n\u3000"},
            {"other": "a"},
            b'{"text": "\\ud83d"}',
            b'{"text": "a\x01b"}',
            b'{"text": "b", "n": ' + b"9" * 5000 + b"}",
            b'{"a":' * 100_000,
            b"",
            b'{"text": "\\ud83d\\ude00"}',
            '{"text": "二\u2028三\u0085"}\r'.encode(),
        ]
        texts, rejected = read(write_jsonl(tmp_path / "a.jsonl", records))
        assert texts == ["一", "😀", "二\u2028三\u0085"]
        reasons = ["not UTF-8", "not JSON", "not a JSON object", "'text' is not a string", "'text' is not a string"]
        reasons += ["empty text", "no key 'text'", "lone surrogate", "not JSON", "not JSON", "not JSON"]
        assert rejected == [("a.jsonl", line, reason) for line, reason in enumerate(reasons, 2)]

    def test_byte_order_mark_and_a_last_line_without_end(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}')
        assert read(tmp_path / "a.jsonl") == (["a", "b"], [])

    @pytest.mark.parametrize("ending", [b"\n", b""])
    def test_a_gigantic_line_is_one_reject(self, tmp_path, ending):
        gigantic = b'{"text": "' + b"x" * MAX_RECORD_BYTES * 2 + b'"}'
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + gigantic + ending)
        with (tmp_path / "a.jsonl").open("ab") as stream:
            stream.write(b'{"text": "b"}\n' if ending else b"")
        assert read(tmp_path / "a.jsonl") == (["a", "b"] if ending else ["a"], [("a.jsonl", 2, "over 16 MiB")])

    def test_a_line_of_just_the_limit_is_kept(self, tmp_path):
        text = "x" * (MAX_RECORD_BYTES - len('{"text": ""}\n'))
        write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "x"}])
        texts, rejected = read(tmp_path / "a.jsonl")
        assert texts == [text]
        assert rejected == [("a.jsonl", 2, "over 16 MiB")]


class TestTxt:
    def test_blank_lines_separate_documents(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("\ufeff\n\n　甲\r\n乙 \n\n \u3000\n\n丙\u2028丁\n".encode())
        assert read(tmp_path / "a.txt") == (["　甲\n乙 ", "丙\u2028丁"], [])

    def test_a_document_with_a_bad_line_is_left_out_whole(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a\nb\xff\nc\xff\nd\n\ne\n\n\xff")
        assert read(tmp_path / "a.txt") == (["e"], [("a.txt", 2, "not UTF-8"), ("a.txt", 8, "not UTF-8")])

    def test_an_endless_document_is_one_reject(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a\n\n" + (b"x" * 999 + b"\n") * (MAX_RECORD_BYTES // 500) + b"\nb\n")
        texts, rejected = read(tmp_path / "a.txt")
        assert texts == ["a", "b"]
        assert [(name, reason) for name, _, reason in rejected] == [("a.txt", "over 16 MiB")]

    def test_empty_files_have_no_documents(self, tmp_path):
        for name in ("a.txt", "b.jsonl"):
            (tmp_path / name).write_bytes(b"")
        assert read(tmp_path) == ([], [])


class TestInputs:
    def test_directories_are_searched_in_a_fixed_order(self, tmp_path):
        (tmp_path / "b").mkdir()
        for name in ("b/z.txt", "b/a.jsonl", "c.txt", "a.txt", "ignored.csv"):
            (tmp_path / name).write_text('{"text": "x"}')
        files = [str(file.relative_to(tmp_path)) for file in Corpus([tmp_path, tmp_path / "a.txt"]).files]
        assert files == ["a.txt", "b/a.jsonl", "b/z.txt", "c.txt"], "sorted, and none twice"

    def test_a_file_that_cannot_be_read_is_a_reject(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").write_text("b")
        found = Corpus([tmp_path])
        (tmp_path / "a.txt").unlink()
        items = list(found)
        assert [type(item) for item in items] == [Reject, Document]
        assert (items[0].line, items[0].reason) == (0, "cannot be read: No such file or directory")
        assert found.barren == [tmp_path / "a.txt"]

    def test_progress_ends_at_the_total(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
        (tmp_path / "b.txt").write_text("a\n\nb\n")
        found = Corpus([tmp_path])
        seen = [found.read_bytes for _ in found]
        assert seen == sorted(set(seen)), "every record moves it on"
        assert found.read_bytes == found.total_bytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=12),
    holdout=st.sampled_from([0.0, 0.3]),
)
def test_what_is_kept_decodes_back_exactly(tokenizer_dir, tmp_path_factory, texts, holdout):
    directory = tmp_path_factory.mktemp("exact")
    source = write_jsonl(directory / "a.jsonl", [{"text": "总有一篇"}, *({"text": text} for text in texts)])
    prepare.shards([source], out=directory / "out", tokenizer=tokenizer_dir, holdout=holdout)
    expected = ["总有一篇", *(text for text in texts if text.strip())]
    split_of = prepare._split_by_hash(holdout)
    for split in SPLITS:
        assert kept(directory / "out", split) == [text for text in expected if split_of(text.encode()) == split]
    assert len(rejects(directory / "out")) == len(texts) + 1 - len(expected)


class TestShards:
    def test_spelled_end_of_text_ends_no_document(self, tokenizer_dir, tmp_path):
        text = f"正文{END_OF_TEXT}注入"
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0)
        assert kept(tmp_path / "out", "train") == [text]

    def test_held_out_files_are_the_validation_split(self, tokenizer_dir, tmp_path):
        for name in "ab":
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{number}"} for number in range(50)])
        out = tmp_path / "out"
        prepare.shards([tmp_path / "a.jsonl"], out=out, tokenizer=tokenizer_dir, holdout_files=(tmp_path / "b.jsonl",))
        assert kept(out, "train") == [f"a{number}" for number in range(50)]
        assert kept(out, "validation") == [f"b{number}" for number in range(50)]

    def test_copies_of_a_text_are_on_one_side(self, tokenizer_dir, tmp_path):
        texts = [f"第{number % 100}篇" for number in range(300)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0.3)
        train, validation = (kept(tmp_path / "out", split) for split in SPLITS)
        assert len(train) + len(validation) == 300
        assert not set(train) & set(validation)
        assert 45 < len(validation) < 135, "the hash does not part 0.3 : 0.7"

    def test_the_rejects_are_counted_and_listed(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}, b"{", b"[", {"text": 3}])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert rejects(tmp_path / "out") == [
            (str(source), 2, "not JSON"),
            (str(source), 3, "not JSON"),
            (str(source), 4, "'text' is not a string"),
        ]
        assert Manifest.load(tmp_path / "out").rejects == {"'text' is not a string": 1, "not JSON": 2}

    def test_the_manifest_measures_the_text(self, tokenizer_dir, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "好a"}, {"text": "年"}])
        prepare.shards([tmp_path / "a.jsonl"], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0)
        split = Manifest.load(tmp_path / "out").splits["train"]
        assert (split.documents, split.characters, split.text_bytes) == (2, 3, 7)

    def test_two_runs_give_the_same_bytes(self, tmp_path):
        texts = [{"text": article(seed, 300)} for seed in range(60)]
        source = write_jsonl(tmp_path / "a.jsonl", texts)
        for name in "xy":
            prepare.shards([source], out=tmp_path / name, vocab=400, holdout=0.2)
        names = sorted(file.name for file in (tmp_path / "x").iterdir())
        assert len(names) == 7
        for name in names:
            assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes(), name

    def test_batches_do_not_change_what_is_written(self, tokenizer_dir, tmp_path, monkeypatch):
        texts = [{"text": article(seed, 200)} for seed in range(50)]
        source = write_jsonl(tmp_path / "a.jsonl", texts)
        for name, characters in (("x", 1), ("y", 3000), ("z", 1 << 20)):
            monkeypatch.setattr(prepare, "BATCH_CHARACTERS", characters)
            prepare.shards([source], out=tmp_path / name, tokenizer=tokenizer_dir, holdout=0)
        written = {(tmp_path / name / "train-00000.bin").read_bytes() for name in "xyz"}
        assert len(written) == 1

    def test_held_out_text_does_not_train_the_tokenizer(self, tmp_path):
        texts = [article(seed, 200) for seed in range(40)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        split_of = prepare._split_by_hash(0.3)
        trained, held_out = prepare._train_tokenizer(Corpus([source]), 300, split_of)
        assert held_out == [text for text in texts if split_of(text.encode()) == "validation"]
        rest = [text for text in texts if text not in held_out]
        assert trained.sha256 == Tokenizer.train(rest, 300).sha256 != Tokenizer.train(texts, 300).sha256

    def test_a_large_corpus_is_sampled_for_the_tokenizer(self, tmp_path, monkeypatch):
        texts = [article(seed, 100) for seed in range(200)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        monkeypatch.setattr(prepare, "SAMPLE_BYTES", source.stat().st_size // 4)
        trained_on = []
        monkeypatch.setattr(Tokenizer, "train", staticmethod(lambda texts, vocab: trained_on.extend(texts)))
        prepare._train_tokenizer(Corpus([source]), 300, prepare._split_by_hash(0))
        assert 25 < len(trained_on) < 80
        assert min(map(texts.index, trained_on)) < 40
        assert max(map(texts.index, trained_on)) >= 160, "the sample is of the beginning only"


class TestRefusals:
    def test_a_prepared_directory_is_not_overwritten(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        with pytest.raises(InputError, match="is prepared already"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)

    def test_what_an_interrupted_run_left_is_cleared(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}])
        (tmp_path / "out").mkdir()
        for name in ("train-00007.bin", "validation-00000.bin.partial"):
            (tmp_path / "out" / name).write_bytes(b"x")
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0)
        assert [file.name for file in (tmp_path / "out").glob("*.bin*")] == ["train-00000.bin"]

    def test_text_without_a_usable_record_is_an_error(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"x": "y"}])
        with pytest.raises(InputError, match="found no usable record"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert len(rejects(tmp_path / "out")) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "expected either --tokenizer DIR or --vocab N"),
            (["--vocab", "300", "--tokenizer", "x"], "expected either --tokenizer DIR or --vocab N"),
            (["--vocab", "100"], "expected vocab in 257"),
            (["--vocab", "300", "--holdout", "1.5"], "expected --holdout in 0 .. 1, got 1.5"),
            (["--vocab", "300", "--holdout", "nan"], "expected --holdout in 0 .. 1, got nan"),
            (["--tokenizer", "nowhere"], "nowhere: expected tokenizer.json"),
            (["--vocab", "300", "--holdout-files", "nowhere"], "nowhere: no such file or directory"),
        ],
    )
    def test_one_line_and_exit_code_2(self, tmp_path, monkeypatch, capsys, arguments, message):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", "shards", "a.jsonl", "--out", "out", *arguments])
        with pytest.raises(SystemExit) as stopped:
            prepare.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error

    @pytest.mark.parametrize("inputs", [[], ["nowhere.txt"], ["a.csv"], ["empty"]])
    def test_inputs_that_are_not_text(self, tokenizer_dir, tmp_path, inputs):
        (tmp_path / "empty").mkdir()
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(InputError, match=r"expected|no such file"):
            prepare.shards([tmp_path / name for name in inputs], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert not (tmp_path / "out").exists()


def run(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    """`python train/prepare.py ...` from another directory, with nothing installed and no PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "train" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, **options)


class TestCommand:
    def test_the_whole_chain_from_anywhere(self, tmp_path):
        texts = [{"content": article(seed, 300)} for seed in range(40)]
        write_jsonl(tmp_path / "a.jsonl", texts)
        done = run("tokenizer", "a.jsonl", "--vocab", 400, "--out", "tok", "--holdout", 0.3, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "400 tokens in tok" in done.stdout
        assert "tokens per character" in done.stdout
        command = ("shards", "a.jsonl", "--tokenizer", "tok", "--out", "out", "--holdout", 0.3)
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = run("verify", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "2 shards" in done.stdout
        done = run("stats", "out", cwd=tmp_path)
        assert "bytes per token" in done.stdout

        shard = tmp_path / "out" / "train-00000.bin"
        content = bytearray(shard.read_bytes())
        content[5000] ^= 1
        shard.write_bytes(content)
        done = run("verify", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("error: out/train-00000.bin: block 0 ")

    def test_help_needs_no_torch(self):
        code = "import sys, train.prepare; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": ".:kernels"})
        assert done.returncode == 0

    def test_help_teaches(self, tmp_path):
        done = run("--help", cwd=tmp_path)
        assert done.returncode == 0
        for command in ("shards", "tokenizer", "verify", "stats"):
            assert command in done.stdout

    @pytest.mark.parametrize("moment", ["ShardWriter.add", "ShardWriter._finish_shard", "os.replace", "Manifest.save"])
    def test_killed_at_any_moment_it_is_not_taken_for_prepared(self, tokenizer_dir, tmp_path, moment):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(seed, 300)} for seed in range(40)])
        code = "import os, sys; from pathlib import Path; from train import prepare, shards; "
        code += f"shards.{moment} = lambda *arguments: os.kill(os.getpid(), 9); "
        code += "prepare.shards([Path('a.jsonl')], out=Path('out'), tokenizer=Path(sys.argv[1]))"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        killed = subprocess.run([sys.executable, "-c", code, tokenizer_dir], cwd=tmp_path, env=environment)
        assert killed.returncode == -signal.SIGKILL
        with pytest.raises(InputError, match="found no manifest"):
            Manifest.load(tmp_path / "out")
        for name in ("out", "straight"):
            prepare.shards([source], out=tmp_path / name, tokenizer=tokenizer_dir)
        for file in (tmp_path / "straight").iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "straight").iterdir()))


PEAK = """
import resource, sys
from pathlib import Path
from train import prepare
prepare.BATCH_CHARACTERS = 1 << 16
prepare.shards([Path(sys.argv[1])], out=Path(sys.argv[2]), tokenizer=Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_input(tokenizer_dir, tmp_path):
    """Peak resident memory with 1 and with 9 MB of text, a bad line after each good one."""
    lines = [json.dumps({"text": article(seed, 380)}, ensure_ascii=False) + "\n{bad\n" for seed in range(100)]
    peaks = []
    for name, times in (("small", 8), ("large", 72)):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(lines) * times, encoding="utf-8")
        arguments = [sys.executable, "-c", PEAK, f"{name}.jsonl", name, str(tokenizer_dir)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 3000, f"{peaks} KiB for 8 MB more"
