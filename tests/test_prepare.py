"""prepare.py, from raw text to shards: what is kept comes back exactly, and how a run went does not show in bytes."""

import contextlib
import functools
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.corpus import write_corpus
from train import prepare
from train.corpus import clean, files, pipeline, tokens, workers
from train.corpus.normalize import normalize
from train.shards import SPLITS, Manifest, Shard
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import END_OF_TEXT, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学"
)
RAW = {"normalize": False, "filters": False, "exact_duplicates": False, "near_duplicates": False, "workers": 1}


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


@contextlib.contextmanager
def directory_in_memory(otherwise: Path) -> Iterator[Path]:
    """A directory in memory where the system has one: a run syncs each of its files, which takes a disk its time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else otherwise) as directory:
        yield Path(directory)


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


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=12),
    holdout=st.sampled_from([0.0, 0.3]),
    normalized=st.booleans(),
    encoding=st.sampled_from(["utf-8", "gb18030"]),
)
def test_what_is_kept_decodes_back_exactly(tokenizer_dir, tmp_path_factory, texts, holdout, normalized, encoding):
    with directory_in_memory(tmp_path_factory.getbasetemp()) as directory:
        texts = [article(3, 60), *texts]  # tells the encoding
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode(encoding) for text in texts]
        source = write_jsonl(directory / "a.jsonl", lines)
        options = RAW | {"normalize": normalized, "exact_duplicates": normalized}
        prepare.shards([source], out=directory / "out", tokenizer=tokenizer_dir, holdout=holdout, **options)
        found = [kept(directory / "out", split) for split in SPLITS]
    expected = [text for text in texts if text.strip()]
    if normalized:
        expected = [text for text in dict.fromkeys(map(normalize, expected)) if text]
    assert sorted(found[0] + found[1]) == sorted(expected)
    for part in found:
        assert part == [text for text in expected if text in part], "not in the order of the input"
    assert holdout or not found[1]


class TestShards:
    def test_spelled_end_of_text_ends_no_document(self, tokenizer_dir, tmp_path):
        text = f"正文{END_OF_TEXT}注入"
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0, **RAW)
        assert kept(tmp_path / "out", "train") == [text]

    def test_held_out_files_are_the_validation_split_and_their_copies_no_training_text(self, tokenizer_dir, tmp_path):
        texts = [article(seed, 60) for seed in range(40)]
        write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts[30:]])
        out = tmp_path / "out"
        prepare.shards([tmp_path / "a.jsonl"], out=out, tokenizer=tokenizer_dir, holdout_files=(tmp_path / "b.jsonl",))
        assert kept(out, "train") == texts[:30]
        assert kept(out, "validation") == texts[30:]

    def test_copies_of_a_text_are_on_one_side(self, tokenizer_dir, tmp_path):
        texts = [f"第{number % 100}篇" for number in range(300)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0.3, **RAW)
        train, validation = (kept(tmp_path / "out", split) for split in SPLITS)
        assert len(train) + len(validation) == 300
        assert not set(train) & set(validation)
        assert 45 < len(validation) < 135, "the hash does not part 0.3 : 0.7"

    def test_sources_keep_apart(self, tokenizer_dir, tmp_path):
        for name in "ab":
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": article(100 * ord(name) + n, 80)} for n in range(30)])
        inputs = [f"wudao={tmp_path / 'a.jsonl'}", f"cci:2.5={tmp_path / 'b.jsonl'}"]
        prepare.shards(inputs, out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0.2)
        manifest = Manifest.load(tmp_path / "out")
        assert {name: source.weight for name, source in manifest.sources.items()} == {"wudao": 1.0, "cci": 2.5}
        assert [shard.source for shard in manifest.splits["train"].shards] == ["wudao", "cci"]
        both = [article(100 * ord(name) + n, 80) for name in "ab" for n in range(30)]
        assert sorted(kept(tmp_path / "out", "train") + kept(tmp_path / "out", "validation")) == sorted(both)
        size = sum(sum(source.text_bytes.values()) for source in manifest.sources.values())
        assert size == sum(len(text.encode()) for text in both)

    def test_the_report_accounts_for_every_record(self, tokenizer_dir, tmp_path, monkeypatch):
        good = [article(seed, 100) for seed in range(10)]
        texts = [*good, good[0], good[1][:40] + "了" + good[1][40:], "短", "\u200b"]
        source = write_jsonl(tmp_path / "a.jsonl", [*({"text": text} for text in texts), b"{", {"text": 3}])
        monkeypatch.setattr(files, "MIN_UNIT_BYTES", 1 << 11)
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["corpus"]
        dropped = {
            stage: {r: e["documents"] for r, e in reasons.items()} for stage, reasons in report["dropped"].items()
        }
        assert dropped == {
            "normalize": {"nothing visible": 1},
            "filter": {"too short": 1},
            "decontaminate": {},
            "exact duplicates": {"of an earlier document": 1},
            "near-duplicates": {"of an earlier document": 1},
        }
        assert report["dropped"]["exact duplicates"]["of an earlier document"]["examples"][0]["start"] == good[0][:80]
        assert sum(entry["documents"] for entry in report["rejected"].values()) == 2
        assert (report["records"], report["kept"]["documents"]) == (16, 10)
        lines = (tmp_path / "out" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
        rejects = [(json.loads(line)["line"], json.loads(line)["reason"][:8]) for line in lines]
        assert rejects == [(15, "not JSON"), (16, "no text ")]
        assert Manifest.load(tmp_path / "out").rejects.keys() == report["rejected"].keys()

    def test_stages_can_be_switched_off(self, tokenizer_dir, tmp_path):
        texts = ["短", "短", "\u200b长", article(1, 90), article(1, 90) + "。"]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0, **RAW)
        assert kept(tmp_path / "out", "train") == texts

    def test_benchmarks_stay_out_and_are_listed(self, tokenizer_dir, tmp_path):
        item = {"question": article(50, 40), "answer": "二十四"}
        (tmp_path / "gsm8k.jsonl").write_text(json.dumps(item) + "\n")
        texts = [article(1, 90), article(2, 90) + item["question"].replace("，", " ,") + article(3, 90), article(4, 90)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        benchmark = (tmp_path / "gsm8k.jsonl",)
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0, benchmarks=benchmark)
        assert kept(tmp_path / "out", "train") == [texts[0], texts[2]]
        (line,) = (tmp_path / "out" / "benchmarks.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["item"].startswith("gsm8k: " + item["question"][:20])

    def test_held_out_text_does_not_teach_the_tokenizer(self, tmp_path):
        texts = [article(seed, 200) for seed in range(40)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        prepare.shards([source], out=tmp_path / "out", vocab=300, holdout=0.3)
        training = kept(tmp_path / "out", "train")
        assert len(training) < 40
        sha256 = Manifest.load(tmp_path / "out").tokenizer_sha256
        assert sha256 == Tokenizer.train(training, 300).sha256 != Tokenizer.train(texts, 300).sha256

    def test_a_large_corpus_is_sampled_for_the_tokenizer(self, tmp_path, monkeypatch):
        texts = [article(seed, 100) for seed in range(200)]
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        monkeypatch.setattr(pipeline, "SAMPLE_BYTES", sum(len(text.encode()) for text in texts) // 4)
        learned, train = [], Tokenizer.train
        monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab: learned.extend(texts) or train(texts, vocab))
        prepare.shards([source], out=tmp_path / "out", vocab=300, holdout=0, workers=1)
        assert 25 < len(learned) < 80
        assert min(map(texts.index, learned)) < 40
        assert max(map(texts.index, learned)) >= 160, "the sample is of the beginning only"

    def test_the_tokenizer_does_not_depend_on_the_number_of_workers(self, tmp_path, monkeypatch):
        """Of the steps, only sampling goes to other processes: it is what learning adds to those of other tests."""
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(seed, 200)} for seed in range(60)])
        monkeypatch.setattr(tokens, "MIN_SHARD_BYTES", 1 << 12)
        monkeypatch.setattr(clean, "BATCH_CHARACTERS", 1 << 10)

        def run(title: str, *arguments: object) -> list:
            monkeypatch.setattr(workers, "SMALL_BYTES", 0 if title == "sample" else 1 << 30)
            return workers.run(title, *arguments)

        monkeypatch.setattr(pipeline, "run", run)
        for count in (1, 2):
            prepare.shards([source], out=tmp_path / str(count), vocab=300, workers=count)
        assert len(Manifest.load(tmp_path / "1").splits["train"].shards) > 4
        assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


class TestRefusals:
    def test_a_prepared_directory_is_not_overwritten(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(1, 90)}])
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        with pytest.raises(InputError, match="is prepared already"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)

    @pytest.mark.parametrize("name", ["a.jsonl", "train-00000.bin", "work/notes.txt", "work/clean/a.json", ".hidden"])
    def test_a_directory_with_something_in_it_is_left_as_it_was(self, tokenizer_dir, tmp_path, name):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(1, 90)}])
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).write_text("the only copy")
        with pytest.raises(
            InputError, match=f"expected a new or empty directory, .* got one with {name.split('/')[0]}$"
        ):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert bytes_of(tmp_path / "out") == {name: b"the only copy"}

    @pytest.mark.parametrize("out", ["corpus", "corpus/out", "."])
    @pytest.mark.parametrize("given", ["corpus", "corpus/*.jsonl"])
    def test_the_output_is_apart_from_the_input(self, tokenizer_dir, tmp_path, monkeypatch, out, given):
        (tmp_path / "corpus").mkdir()
        write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": article(1, 90)}])
        monkeypatch.chdir(tmp_path)
        before = bytes_of(tmp_path)
        if (out, given) == ("corpus/out", "corpus/*.jsonl"):
            prepare.shards([given], out=out, tokenizer=tokenizer_dir)
            return
        with pytest.raises(InputError, match="expected --out apart from the input, got the input corpus"):
            prepare.shards([given], out=out, tokenizer=tokenizer_dir)
        assert bytes_of(tmp_path) == before

    def test_what_others_put_into_the_work_directory_stays(self, tokenizer_dir, tmp_path, monkeypatch):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(1, 90)}])
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "plan_shards", None)
            with pytest.raises(TypeError):
                prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        (tmp_path / "out" / "work" / "notes.txt").write_text("the only copy")
        prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        with pytest.raises(InputError, match="is prepared already"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert bytes_of(tmp_path / "out" / "work") == {"notes.txt": b"the only copy"}

    def test_an_unfinished_run_is_not_gone_on_with_in_another_way(self, tokenizer_dir, tmp_path, monkeypatch):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(1, 90)}])
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "plan_shards", None)
            with pytest.raises(TypeError):
                prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        with pytest.raises(InputError, match="to go on with the same options, tokenizer;"):
            prepare.shards([source], out=tmp_path / "out", vocab=300, holdout=0.1)
        source.touch()
        with pytest.raises(InputError, match="to go on with the same units;"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)

    def test_a_cut_file_of_an_unfinished_run_is_made_again(self, tokenizer_dir, tmp_path, monkeypatch):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(seed, 90)} for seed in range(9)])
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "plan_shards", None)
            with pytest.raises(TypeError):
                prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        (texts,) = (tmp_path / "out").rglob("*.text")
        os.truncate(texts, texts.stat().st_size // 2)
        for out in ("out", "straight"):
            prepare.shards([source], out=tmp_path / out, tokenizer=tokenizer_dir)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "straight")

    def test_the_name_of_the_held_out_source_is_taken(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(1, 90)}])
        with pytest.raises(InputError, match="expected another name than 'held-out'"):
            prepare.shards([f"held-out={source}"], tmp_path / "out", tokenizer_dir, holdout_files=(source,))

    def test_text_without_a_usable_record_is_an_error(self, tokenizer_dir, tmp_path):
        source = write_jsonl(tmp_path / "a.jsonl", [{"x": "y"}])
        with pytest.raises(InputError, match="found none to keep"):
            prepare.shards([source], out=tmp_path / "out", tokenizer=tokenizer_dir)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "expected either --tokenizer DIR or --vocab N"),
            (["--vocab", "300", "--tokenizer", "x"], "expected either --tokenizer DIR or --vocab N"),
            (["--vocab", "100"], "expected vocab in 257"),
            (["--vocab", "300", "--holdout", "1.5"], "expected --holdout in 0 .. 1, got 1.5"),
            (["--vocab", "300", "--holdout", "nan"], "expected --holdout in 0 .. 1, got nan"),
            (["--vocab", "300", "--workers", "0"], "expected --workers of 1 or more, got 0"),
            (["--tokenizer", "nowhere"], "nowhere: expected tokenizer.json"),
            (["--vocab", "300", "--holdout-files", "nowhere"], "nowhere: no such file or directory"),
            (["--vocab", "300", "--benchmarks", "a.jsonl"], "a.jsonl: expected a benchmark as"),
            (["--vocabulary", "300"], "Unrecognized options: --vocabulary, 300"),
        ],
    )
    @pytest.mark.parametrize("command", [[], ["shards"]])
    def test_one_line_and_exit_code_2(self, tmp_path, monkeypatch, capsys, command, arguments, message):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *command, "a.jsonl", "--out", "out", *arguments])
        with pytest.raises(SystemExit) as stopped:
            prepare.main()
        assert stopped.value.code == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ")
        assert message in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--out PATH"),
            (["--bogus"], "error: Unrecognized options: --bogus ("),
            (["tokenizer", "--bogus"], "error: Unrecognized options: --bogus ("),
        ],
    )
    def test_the_option_that_does_not_exist_is_named_first(self, monkeypatch, capsys, arguments, message):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            prepare.main()
        assert stopped.value.code == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error

    @pytest.mark.parametrize("inputs", [[], ["nowhere.txt"], ["a.csv"], ["empty"], ["*.parquet"]])
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
    def test_the_whole_chain_from_anywhere(self, tmp_path, monkeypatch, capsys):
        texts = [{"content": article(seed, 300)} for seed in range(40)]
        write_jsonl(tmp_path / "a.jsonl", texts)
        monkeypatch.chdir(tmp_path)

        def call(*arguments: str) -> str:
            monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
            prepare.main()
            return capsys.readouterr().out

        said = call("tokenizer", "a.jsonl", "--vocab", "400", "--out", "tok", "--holdout", "0.3")
        assert "400 tokens in tok" in said
        assert "tokens per character" in said
        done = run("a.jsonl", "--tokenizer", "tok", "--out", "out", "--holdout", 0.3, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "40 records in 1 files, 40 kept" in done.stdout
        assert not (tmp_path / "out" / "work").exists()
        assert "2 shards" in call("verify", "out")

        shard = tmp_path / "out" / "train-00000.bin"
        content = bytearray(shard.read_bytes())
        content[5000] ^= 1
        shard.write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            call("verify", "out")
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: out/train-00000.bin: block 0 ")

    def test_tokenizers_are_compared(self, tokenizer_dir, tmp_path, capsys):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": article(seed, 200)} for seed in range(50)])
        prepare.tokenizer([source], out=tmp_path / "t", vocab=300, holdout=0.3, compare=(tokenizer_dir,), workers=1)
        lines = capsys.readouterr().out.splitlines()
        figures = [float(line.split(": ")[1].split()[0]) for line in lines if "tokens per character" in line]
        assert len(figures) == 2
        assert 0.4 < figures[1] < figures[0] < 3

    def test_a_sample_of_compressed_text_is_cut_to_size_and_still_even(self, tmp_path, monkeypatch):
        texts = [article(seed, 100) for seed in range(200)]
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        limit = sum(len(text.encode()) for text in texts) // 8
        monkeypatch.setattr(prepare, "SAMPLE_BYTES", limit)
        learned, train = [], Tokenizer.train
        monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab: learned.extend(texts) or train(texts, vocab))
        prepare.tokenizer([tmp_path / "a.jsonl.gz"], out=tmp_path / "t", vocab=300, holdout=0, workers=1)
        assert limit * 0.9 < sum(len(text.encode()) for text in learned) <= limit
        assert min(map(texts.index, learned)) < 60
        assert max(map(texts.index, learned)) >= 140, "the sample is of the beginning only"
        assert learned == sorted(learned, key=texts.index)

    def test_stats_of_many_sources_fit_a_narrow_terminal(self, tokenizer_dir, tmp_path, monkeypatch, capsys):
        names = [f"source-{letter}" for letter in "abcdefgh"]
        for name in names:
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": article(100 * ord(name[-1]) + n, 40)} for n in range(12)])
        inputs = [f"{name}:2.5={tmp_path / name}.jsonl" for name in names]
        prepare.shards(inputs, out=tmp_path / "out", tokenizer=tokenizer_dir, holdout=0.3, workers=1)
        manifest = Manifest.load(tmp_path / "out")
        capsys.readouterr()
        monkeypatch.setenv("COLUMNS", "80")
        prepare.stats(tmp_path / "out")
        rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
        for split in SPLITS:
            for name in names:
                shards = [shard for shard in manifest.splits[split].shards if shard.source == name]
                counted = [f"{sum(getattr(shard, field) for shard in shards):,}" for field in ("documents", "tokens")]
                assert not shards or [name, split, "2.5", *counted] in [row[:5] for row in rows]
        for split in SPLITS:
            lengths = [int(row[-1]) for row in rows if row[1:2] == [split] and row[3:4] == ["to"]]
            assert sum(lengths) == manifest.splits[split].documents

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sources": {"a": {"records": "x"}}}', '{"sources": 1}'])
    def test_a_report_that_is_none_is_one_line(self, tmp_path, content):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match=r"report\.json: expected"):
            prepare._tell_report(tmp_path / "report.json")

    def test_no_process_needs_torch(self):
        code = "import sys, train.prepare; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": ".:kernels"})
        assert done.returncode == 0

    def test_help_teaches(self, tmp_path):
        done = run("--help", cwd=tmp_path)
        assert done.returncode == 0
        for word in ("shards", "tokenizer", "verify", "stats", "NAME:WEIGHT=PATH"):
            assert word in done.stdout


def test_made_up_corpus_gives_up_what_was_planted(tokenizer_dir, tmp_path):
    planted = write_corpus(tmp_path / "made", 3, gigantic=False)
    benchmark = (tmp_path / "made" / "benchmark",)
    prepare.shards([tmp_path / "made" / "corpus"], out=tmp_path / "out", tokenizer=tokenizer_dir, benchmarks=benchmark)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["corpus"]
    found = {reason: entry["documents"] for reasons in report["dropped"].values() for reason, entry in reasons.items()}
    copies = {
        stage: report["dropped"][stage]["of an earlier document"]["documents"] for stage in list(report["dropped"])[3:]
    }
    assert copies == {"exact duplicates": planted["exact copy"], "near-duplicates": planted["near copy"]}
    assert report["kept"]["documents"] == planted["clean"] + planted["messy"]
    names = {"too short": "short", "too little Chinese": "english", "repetition": "repetition"}
    names |= {"boilerplate": "boilerplate", "mis-decoded": "mis-decoded", "benchmark": "contaminated"}
    assert {name: found[name] for name in names} == {name: planted[kind] for name, kind in names.items()}
    assert sum(entry["documents"] for entry in report["rejected"].values()) == planted["unusable line"] + 1


PEAK = """
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from train import prepare
from train.corpus import clean, files
files.MAX_UNIT_BYTES = 1 << 20
clean.BATCH_CHARACTERS = 1 << 15
prepare.shards([Path(sys.argv[1])], out=Path(sys.argv[2]), tokenizer=Path(sys.argv[3]), workers=1)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had before exec
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_input(tokenizer_dir, tmp_path):
    """Peak resident memory with 1.4 and with 2.9 MB of text, a bad line after each good one."""
    rng, page = random.Random(1), article(0, 20_000)
    peaks = []
    for name, count in (("small", 1200), ("large", 2500)):
        pages = ("".join(rng.sample(page, 400)) for _ in range(count))
        lines = [json.dumps({"text": page}, ensure_ascii=False) + "\n{bad\n" for page in pages]
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
        arguments = [sys.executable, "-c", PEAK, f"{name}.jsonl", name, str(tokenizer_dir)]
        one_thread = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1"}  # what threads hold on to differs by chance
        environment = os.environ | one_thread | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 1200, f"{peaks} KiB for 1.5 MB more"
