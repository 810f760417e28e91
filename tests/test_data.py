"""Token shards and the dataset over them: what is damaged is refused, and the order of samples is a pure function."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import data, shards
from train.data import IGNORED, TokenDataset
from train.shards import BLOCK_BYTES, HEADER_BYTES, Manifest, Shard, ShardWriter, Split
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import Tokenizer

CONTEXT = 48


def examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["一二三四五六七八九十"], 257)


def documents(tokenizer: Tokenizer, seed: int, count: int) -> list[list[int]]:
    """Random documents, empty ones among them; no token of theirs is the end-of-text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, len(tokenizer), rng.integers(0, 120)).tolist() for _ in range(count)]


def write(directory: Path, tokenizer: Tokenizer, splits: dict[str, list[list[int]]], shard_tokens: int) -> Manifest:
    tokenizer.save(directory)
    written = {}
    for split in shards.SPLITS:
        writer = ShardWriter(directory, split, len(tokenizer), tokenizer.eos_id, tokenizer.sha256, shard_tokens)
        for tokens in splits.get(split, []):
            writer.add(tokens)
        written[split] = Split(writer.close(), text_bytes=0, characters=0)
    manifest = Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, written, rejects={})
    manifest.save(directory)
    return manifest


@pytest.fixture(scope="session")
def prepared(tokenizer, tmp_path_factory) -> tuple[Path, dict[str, list[list[int]]]]:
    """Two splits, the first in several shards of several blocks."""
    splits = {"train": documents(tokenizer, 1, 4000), "validation": documents(tokenizer, 2, 40)}
    directory = tmp_path_factory.mktemp("prepared")
    manifest = write(directory, tokenizer, splits, shard_tokens=100_000)
    assert len(manifest.splits["train"].shards) == 3
    assert manifest.splits["train"].shards[0].bytes > 3 * BLOCK_BYTES
    return directory, splits


@pytest.fixture
def copied(prepared, tmp_path) -> Path:
    for file in prepared[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="session")
def dataset(prepared) -> TokenDataset:
    return TokenDataset(prepared[0], "train", CONTEXT, seed=7)


def stream_of(docs: list[list[int]], eos_id: int) -> list[int]:
    return [token for document in docs for token in (*document, eos_id)]


def read_everything(directory: Path) -> None:
    for split in shards.SPLITS:
        held = TokenDataset(directory, split, CONTEXT, seed=0)
        held.batch(0, len(held))


class TestShards:
    def test_what_is_written_is_read(self, prepared, tokenizer):
        directory, splits = prepared
        manifest = Manifest.load(directory)
        for split, docs in splits.items():
            found = []
            for number in range(len(manifest.splits[split].shards)):
                shard = Shard(directory, manifest, split, number)
                shard.check()
                starts = shard.starts().tolist()
                for start, stop in itertools.pairwise([*starts, shard.tokens]):
                    found.append(shard.read(start, stop).tolist())
            assert found == [[*document, tokenizer.eos_id] for document in docs]

    def test_same_documents_same_bytes(self, prepared, tokenizer, tmp_path):
        directory, splits = prepared
        write(tmp_path, tokenizer, splits, shard_tokens=100_000)
        for file in directory.iterdir():
            assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name

    def test_a_document_longer_than_a_shard_has_its_own(self, tokenizer, tmp_path):
        manifest = write(tmp_path, tokenizer, {"train": [[1], [2] * 500, [3]]}, shard_tokens=100)
        assert [shard.tokens for shard in manifest.splits["train"].shards] == [2, 501, 2]

    @pytest.mark.parametrize(("vocab", "bytes_per_token"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
    def test_width_follows_the_vocabulary(self, tmp_path, tokenizer, vocab, bytes_per_token):
        writer = ShardWriter(tmp_path, "train", vocab, vocab - 1, tokenizer.sha256)
        writer.add([0, vocab - 2])
        tokenizer.save(tmp_path)
        splits = {"train": Split(writer.close(), 0, 0), "validation": Split([], 0, 0)}
        manifest = Manifest(vocab, vocab - 1, tokenizer.sha256, splits, {})
        shard = Shard(tmp_path, manifest, "train", 0)
        assert shard.dtype.itemsize == bytes_per_token
        assert shard.read(0, 3).tolist() == [0, vocab - 2, vocab - 1]

    @pytest.mark.parametrize("token", [-1, 257])
    def test_writer_refuses_tokens_that_do_not_exist(self, tmp_path, tokenizer, token):
        writer = ShardWriter(tmp_path, "train", 257, 0, tokenizer.sha256)
        with pytest.raises(ValueError, match=r"expected tokens in 0\.\.256"):
            writer.add([1, token])

    def test_nothing_has_its_final_name_before_it_is_complete(self, tmp_path, tokenizer):
        writer = ShardWriter(tmp_path, "train", 257, 0, tokenizer.sha256)
        writer.add([1] * 100_000)
        assert [file.name for file in tmp_path.iterdir()] == ["train-00000.bin.partial"]
        writer.close()
        assert [file.name for file in tmp_path.iterdir()] == ["train-00000.bin"]


def flip(offset: int):
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[offset] ^= 4
        file.write_bytes(content)

    return damage


def cut(size: int):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def swap(file: Path) -> None:
    other = file.with_name("train-00001.bin")
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def swap_blocks(file: Path) -> None:
    content = bytearray(file.read_bytes())
    first, second = (slice(HEADER_BYTES + i * BLOCK_BYTES, HEADER_BYTES + (i + 1) * BLOCK_BYTES) for i in (0, 1))
    content[first], content[second] = content[second], content[first]
    file.write_bytes(content)


DAMAGE = {
    "bit of a token": (flip(HEADER_BYTES + BLOCK_BYTES + 11), "block 1 .* is corrupt"),
    "bit of the first token": (flip(HEADER_BYTES), "block 0 .* is corrupt"),
    "bit of the table": (flip(-2), "checksum table is corrupt"),
    "bit of the magic": (flip(0), "without its magic"),
    "version": (flip(8), "expected version 1 .* got 5"),
    "width": (flip(12), "expected bytes per token 2 .* got 6"),
    "vocabulary": (flip(16), "expected vocab 257 .* got 261"),
    "tokenizer": (flip(60), "expected tokenizer .* as in manifest"),
    "unused bit of the header": (flip(HEADER_BYTES - 1), "header is corrupt or another run's"),
    "cut by one byte": (cut(-1), "it is cut or has grown"),
    "cut to half": (cut(90_000), "it is cut or has grown"),
    "cut to the header": (cut(HEADER_BYTES), "it is cut or has grown"),
    "cut inside the header": (cut(100), "without its magic"),
    "empty": (cut(0), "without its magic"),
    "grown": (grow, "it is cut or has grown"),
    "missing": (Path.unlink, "cannot be read"),
    "swapped with its neighbour": (swap, "expected shard number 0 .* got 1"),
    "blocks swapped": (swap_blocks, "block 0 .* is corrupt|block 1 .* is corrupt"),
}


class TestDamage:
    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
    def test_no_damaged_token_is_ever_used(self, copied, damage, message):
        damage(copied / "train-00000.bin")
        with pytest.raises(InputError, match=rf"train-00000\.bin: .*({message})"):
            read_everything(copied)

    @examples(60)
    @given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
    def test_every_bit_counts(self, prepared, tmp_path_factory, position, bit):
        directory = tmp_path_factory.mktemp("flipped")
        for file in prepared[0].iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        file = directory / "validation-00000.bin"
        content = bytearray(file.read_bytes())
        content[position % len(content)] ^= 1 << bit
        file.write_bytes(content)
        manifest = Manifest.load(directory)
        with pytest.raises(InputError, match=r"validation-00000\.bin"):
            Shard(directory, manifest, "validation", 0).check()

    def test_a_sound_block_is_used_though_another_is_not(self, copied):
        flip(HEADER_BYTES + BLOCK_BYTES + 11)(copied / "train-00000.bin")
        shard = Shard(copied, Manifest.load(copied), "train", 0)
        assert len(shard.read(0, BLOCK_BYTES // 2)) == BLOCK_BYTES // 2
        for _ in range(2):  # a refused block stays refused
            with pytest.raises(InputError, match="block 1 "):
                shard.read(0, BLOCK_BYTES // 2 + 1)

    def test_a_shard_of_another_run_is_refused(self, copied, tokenizer, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        manifest = Manifest.load(copied)
        docs = documents(tokenizer, 2, 40)
        docs[3] = [1 + (token + 1) % 256 for token in docs[3]]  # the same sizes, other tokens
        write(other, tokenizer, {"validation": docs}, shard_tokens=100_000)
        (copied / "validation-00000.bin").write_bytes((other / "validation-00000.bin").read_bytes())
        with pytest.raises(InputError, match="another run's"):
            Shard(copied, manifest, "validation", 0)

    def test_tokens_outside_the_vocabulary_are_refused_even_with_right_checksums(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        writer = ShardWriter(tmp_path, "train", len(tokenizer), tokenizer.eos_id, tokenizer.sha256)
        writer.vocab = 60_000  # a broken writer
        writer.add([1, 50_000])
        writer.vocab = len(tokenizer)
        splits = {"train": Split(writer.close(), 0, 0), "validation": Split([], 0, 0)}
        manifest = Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, splits, {})
        with pytest.raises(InputError, match="block 0 has token 50000, expected at most 256"):
            Shard(tmp_path, manifest, "train", 0).read(0, 1)

    def test_a_document_index_that_does_not_fit_is_found_by_check(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        writer = ShardWriter(tmp_path, "train", len(tokenizer), tokenizer.eos_id, tokenizer.sha256)
        writer.add([1, 2, 3])
        writer._starts.append(2)
        splits = {"train": Split(writer.close(), 0, 0), "validation": Split([], 0, 0)}
        manifest = Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, splits, {})
        with pytest.raises(InputError, match="document index"):
            Shard(tmp_path, manifest, "train", 0).check()

    def test_another_tokenizer_is_refused(self, copied):
        Tokenizer.train(["甲乙丙丁" * 5], 260).save(copied)
        with pytest.raises(InputError, match=r"tokenizer\.json: expected sha256"):
            TokenDataset(copied, "train", CONTEXT, 0)

    def test_directories_without_a_manifest_are_refused(self, copied):
        (copied / "manifest.json").unlink()
        with pytest.raises(InputError, match="found no manifest"):
            TokenDataset(copied, "train", CONTEXT, 0)

    @pytest.mark.parametrize("weight", [10**400, 0, -1, "1", True, None], ids=lambda weight: str(weight)[:4])
    def test_a_weight_that_is_none_is_refused(self, copied, weight):
        content = json.loads((copied / "manifest.json").read_bytes())
        content["sources"]["corpus"]["weight"] = weight
        (copied / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="expected a weight over 0"):
            Manifest.load(copied)

    @examples(100)
    @given(draw=st.data())
    def test_any_one_change_of_the_manifest_is_an_input_error_or_harmless(self, prepared, tmp_path_factory, draw):
        directory = tmp_path_factory.getbasetemp()
        content = json.loads((prepared[0] / "manifest.json").read_bytes())
        small = st.none() | st.booleans() | st.integers(-1, 1 << 70) | st.text(max_size=3) | st.just([]) | st.just({})
        node = content
        while True:
            key = draw.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or draw.draw(st.booleans()):
                break
            node = node[key]
        node[key] = draw.draw(small)
        (directory / "manifest.json").write_text(json.dumps(content))
        for file in prepared[0].iterdir():
            if file.name != "manifest.json" and not (directory / file.name).exists():
                (directory / file.name).symlink_to(file)
        try:
            dataset = TokenDataset(directory, "train", CONTEXT, 7)
        except InputError:
            return
        expected = TokenDataset(prepared[0], "train", CONTEXT, 7)
        assert dataset.batch(0, 3)[0].tolist() == expected.batch(0, 3)[0].tolist()


class TestOrder:
    @examples(200)
    @given(size=st.integers(1, 3000), seed=st.integers(0, 1 << 64), epoch=st.integers(0, 1000))
    def test_each_epoch_is_a_permutation(self, size, seed, epoch):
        keys = data.round_keys(seed, epoch)
        assert sorted(data.permuted(place, size, keys) for place in range(size)) == list(range(size))

    @pytest.mark.parametrize("size", [(1 << 30) - 1, 24_414_062])
    def test_large_epochs_stay_in_range_without_repeating(self, size):
        keys = data.round_keys(3, 1)
        places = [*range(2000), *range(size - 2000, size)]
        images = {data.permuted(place, size, keys) for place in places}
        assert len(images) == len(places)
        assert 0 <= min(images) <= max(images) < size

    def test_the_order_is_shuffled(self):
        """A chi-square statistic of (tenth of the epoch in, tenth out): 81 degrees of freedom, sd 12.7."""
        size = 20_000
        keys = data.round_keys(11, 0)
        counts = np.zeros((10, 10))
        for place in range(size):
            counts[place * 10 // size, data.permuted(place, size, keys) * 10 // size] += 1
        expected = size / 100
        assert ((counts - expected) ** 2 / expected).sum() < 81 + 5 * 12.7

    def test_epochs_and_seeds_differ(self, prepared, dataset):
        size = len(dataset)
        orders = [
            [data.permuted(place, size, data.round_keys(seed, epoch)) for place in range(50)]
            for seed, epoch in [(7, 0), (7, 1), (8, 0), (70, 0), (7, 10)]
        ]
        assert len({tuple(order) for order in orders}) == len(orders)

    def test_an_epoch_is_the_stream_cut_into_pieces(self, prepared, dataset, tokenizer):
        stream = stream_of(prepared[1]["train"], tokenizer.eos_id)
        assert len(dataset) == (len(stream) - 1) // CONTEXT
        pieces = [stream[start : start + CONTEXT] for start in range(0, len(dataset) * CONTEXT, CONTEXT)]
        for epoch in (0, 2):
            tokens = dataset.batch(epoch * len(dataset), len(dataset))[0].tolist()
            assert sorted(tokens) == sorted(pieces)

    def test_samples_across_two_shards_are_whole(self, prepared, tokenizer):
        docs = prepared[1]["train"]
        stream = stream_of(docs, tokenizer.eos_id)
        whole = TokenDataset(prepared[0], "train", len(stream) - 1, seed=0)
        assert len(whole) == 1
        tokens, targets, _ = whole.sample(0)
        assert tokens.tolist() == stream[:-1]
        assert [target for target in targets.tolist() if target != IGNORED] == [
            after for before, after in itertools.pairwise(stream) if before != tokenizer.eos_id
        ]

    def test_the_order_of_a_seed_never_changes(self):
        """A frozen answer: another order in a later version would silently repeat and skip data on resume."""
        order = [data.permuted(place, 1000, data.round_keys(7, 0)) for place in range(8)]
        assert order == [273, 857, 450, 805, 364, 406, 428, 547]


class TestSamples:
    def test_targets_are_the_next_tokens_but_for_the_first_of_a_document(self, dataset, tokenizer):
        for index in range(200):
            tokens, targets, _ = dataset.sample(index)
            assert tokens.shape == targets.shape == (CONTEXT,)
            ends = tokens == tokenizer.eos_id
            assert (targets[ends] == IGNORED).all()
            assert (targets[:-1][~ends[:-1]] == tokens[1:][~ends[:-1]]).all()
            assert (targets[~ends] >= 0).all()

    def test_segments_count_documents(self, dataset, tokenizer):
        for index in range(200):
            tokens, _, segments = dataset.sample(index)
            expected, segment = [], 0
            for token in tokens:
                expected.append(segment)
                segment += token == tokenizer.eos_id
            assert segments.tolist() == expected

    def test_dtypes_are_what_torch_takes(self, dataset):
        assert [array.dtype for array in dataset.batch(0, 2)] == [np.int64, np.int64, np.int32]

    def test_too_short_a_split_is_refused(self, tokenizer, tmp_path):
        write(tmp_path, tokenizer, {"train": [[1] * 10]}, shard_tokens=1000)
        assert len(TokenDataset(tmp_path, "train", 10, 0)) == 1
        with pytest.raises(InputError, match="expected over 11 tokens in split 'train', found 11"):
            TokenDataset(tmp_path, "train", 11, 0)
        with pytest.raises(InputError, match="found 0"):
            TokenDataset(tmp_path, "validation", 1, 0)
        with pytest.raises(InputError, match="expected a split of train, validation, got 'test'"):
            TokenDataset(tmp_path, "test", 1, 0)


def tokens_of(batches) -> list[list[int]]:
    return [row for tokens, _, _ in batches for row in tokens.tolist()]


class TestBatches:
    @examples(25)
    @given(
        first=st.integers(0, 9000),
        steps=st.integers(1, 6),
        count=st.integers(1, 5),
        stopped=st.lists(st.integers(0, 6), max_size=3),
    )
    def test_resuming_at_any_sample_goes_on_as_if_never_stopped(self, dataset, first, steps, count, stopped):
        stop = first + steps * count
        straight = tokens_of(dataset.batches(first, count, stop))
        consumed, position = [], first
        for attempt in [*stopped, steps]:
            for tokens, _, _ in itertools.islice(dataset.batches(position, count, stop), attempt):
                consumed += tokens.tolist()
                position += len(tokens)
        assert consumed == straight

    @examples(15)
    @given(first=st.integers(0, 9000), ranks=st.sampled_from([1, 2, 4, 8]), steps=st.integers(1, 3))
    def test_any_number_of_ranks_reads_the_same_samples(self, dataset, first, ranks, steps):
        count = 8 // ranks
        stop = first + 8 * steps
        split = [list(dataset.batches(first + rank * count, count, stop, 8)) for rank in range(ranks)]
        together = [row for step in zip(*split, strict=True) for row in tokens_of(step)]
        assert together == tokens_of([dataset.batch(first, 8 * steps)])

    def test_the_last_batch_is_cut_at_the_stop(self, dataset):
        assert [len(tokens) for tokens, _, _ in dataset.batches(0, 5, 12)] == [5, 5, 2]

    def test_a_fault_found_ahead_reaches_the_consumer(self, copied):
        flip(HEADER_BYTES + 3)(copied / "validation-00000.bin")
        held = TokenDataset(copied, "validation", CONTEXT, 0)
        with pytest.raises(InputError, match="block 0 "):
            list(held.batches(0, 2, 100))

    def test_an_abandoned_reader_ends(self, dataset):
        before = threading.active_count()
        batches = dataset.batches(0, 1, 10**9)
        next(batches)
        assert threading.active_count() == before + 1
        batches.close()
        assert threading.active_count() == before
