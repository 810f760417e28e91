"""Mixtures of sources: the order is a pure function, shares are exact, and phases can be added to a run."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import config_of, events_of, losses_of, make_place, make_text
from train import mixture
from train.loop import train
from train.mixture import BLOCK, HeldOut, Mixture, same_past
from train.prepare import shards
from train.shards import Manifest
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import Tokenizer

CONTEXT = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A place with three sources made with one tokenizer: shards/, maths/ and code/."""
    directory = make_place(tmp_path_factory.mktemp("place"))
    for seed, name in enumerate(("maths", "code"), start=11):
        (directory / f"{name}.txt").write_text(make_text(12 * seed, seed), encoding="utf-8")
        held_out = (directory / "validation.txt",)
        shards(
            [directory / f"{name}.txt"], out=directory / name, tokenizer=directory / "shards", holdout_files=held_out
        )
    return directory


def write(place: Path, *phases: tuple[int, dict[str, float]], name: str = "mix.json") -> Path:
    content = {"phases": [{"from_sample": first, "sources": sources} for first, sources in phases]}
    (place / name).write_text(json.dumps(content))
    return place / name


def test_directory_is_a_mixture_of_one_in_its_own_order(place):
    mixed, plain = (
        Mixture(place / "shards", CONTEXT, seed=3),
        mixture.TokenDataset(place / "shards", "train", CONTEXT, 3),
    )
    assert len(mixed) == len(plain)
    for index in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 17):
        for one, other in zip(mixed.sample(index), plain.sample(index), strict=True):
            assert np.array_equal(one, other)


def test_sources_of_one_directory_are_drawn_by_weight_and_by_name(place, tmp_path):
    """One directory of two sources: by weight, and each alone as DIR#NAME; held out is the whole directory."""
    inputs = [f"zh={place / 'maths.txt'}", f"code:3={place / 'code.txt'}"]
    shards(inputs, out=tmp_path / "both", tokenizer=place / "shards", holdout_files=(place / "validation.txt",))
    records = {shard.source: shard.tokens for shard in Manifest.load(tmp_path / "both").splits["train"].shards}
    mixed = Mixture(tmp_path / "both", CONTEXT, seed=3)
    drawn = Counter(mixed.locate(index)[0].name for index in range(BLOCK))
    assert drawn.keys() == {"both#zh", "both#code"}
    assert abs(drawn["both#code"] / drawn["both#zh"] - 3 * records["code"] / records["zh"]) < 0.02
    assert mixed.tokenizer_directory == tmp_path / "both"
    code = Mixture(write(tmp_path, (0, {"both#code": 1})), CONTEXT, seed=3)
    alone = mixture.TokenDataset(place / "code", "train", CONTEXT, 3)
    assert len(code) == len(alone)
    for index in (0, len(alone) - 1):
        assert np.array_equal(code.sample(index)[0], alone.sample(index)[0])
    assert code.description() != mixed.description()
    held_out = mixture.TokenDataset(tmp_path / "both", "validation", CONTEXT, 3)
    for data in ("both", "mix.json"):
        assert len(HeldOut(tmp_path / data, CONTEXT, seed=3)) == len(held_out)
    with pytest.raises(InputError, match="both#maths: expected over"):
        Mixture(write(tmp_path, (0, {"both#maths": 1})), CONTEXT, seed=3)


def test_shares_are_exact_in_each_thousand_and_each_source_goes_through_its_samples_in_order(place):
    weights = {"shards": 0.7, "maths": 0.2, "code": 0.1}
    mixed = Mixture(write(place, (0, weights)), CONTEXT, seed=3)
    taken = [mixed.locate(index) for index in range(3 * BLOCK)]
    for block in range(3):
        found = Counter(source.name for source, _ in taken[block * BLOCK : (block + 1) * BLOCK])
        assert found == {"shards": 700, "maths": 200, "code": 100}
    for name in weights:
        numbers = [number for source, number in taken if source.name == name]
        assert numbers == list(range(len(numbers)))
    orders = [[source.name for source, _ in taken[b * BLOCK : (b + 1) * BLOCK]] for b in range(3)]
    assert orders[0] != orders[1] != orders[2], "blocks are drawn apart"


phases = st.lists(
    st.dictionaries(st.sampled_from(["shards", "maths", "code"]), st.integers(1, 9), min_size=1), min_size=1, max_size=4
)
lengths = st.lists(st.integers(1, 2500), min_size=3, max_size=3)


@given(phases, lengths)
@settings(max_examples=25, deadline=None)
def test_a_source_goes_on_where_it_was_from_phase_to_phase(place, shares, steps):
    """Nothing is left out or seen twice, wherever a phase ends, also in the middle of a block."""
    firsts = [0, *np.cumsum(steps).tolist()][: len(shares)]
    mixed = Mixture(write(place, *zip(firsts, shares, strict=True), name="drawn.json"), CONTEXT, seed=3)
    end = firsts[-1] + 1500
    numbers: dict[str, list[int]] = {}
    for index in range(end):
        source, number = mixed.locate(index)
        numbers.setdefault(source.name, []).append(number)
    for found in numbers.values():
        assert found == list(range(len(found)))
    lengths = {source.name: len(data) for source, data in mixed._sources.items()}
    assert mixed.epochs(end) == {name: len(numbers.get(name, [])) / lengths[name] for name in lengths}


def test_weights_in_thousandths_sum_up_and_small_ones_are_refused(place):
    mixed = Mixture(write(place, (0, {"shards": 1, "maths": 1, "code": 1})), CONTEXT, seed=3)
    found = Counter(mixed.locate(index)[0].name for index in range(BLOCK))
    assert sorted(found.values()) == [333, 333, 334]
    with pytest.raises(InputError, match="expected weights of at least 1/1000 of their sum, got less for code"):
        Mixture(write(place, (0, {"shards": 1, "code": 0.0001})), CONTEXT, seed=3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "no 'phases'"),
        ({"phases": []}, "expected from_sample 0 first"),
        ({"phases": [{"from_sample": 5, "sources": {"shards": 1}}]}, "expected from_sample 0 first"),
        ({"phases": [{"from_sample": 0, "sources": {}}]}, "expected weights above 0"),
        ({"phases": [{"from_sample": 0, "sources": {"shards": -1}}]}, "expected weights above 0"),
        ({"phases": [{"from_sample": 0, "sources": {"shards": "all"}}]}, "expected weights above 0"),
        ({"phases": [{"from_sample": 0}]}, "no 'sources'"),
    ],
)
def test_file_that_is_no_mixture_is_one_line(place, content, complaint):
    (place / "bad.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"bad\.json: not a mixture") as error:
        Mixture(place / "bad.json", CONTEXT, seed=3)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_of_two_tokenizers_are_refused(place, tmp_path):
    (tmp_path / "other.txt").write_text(make_text(20, 5), encoding="utf-8")
    shards([tmp_path / "other.txt"], out=tmp_path / "other", vocab=280, holdout_files=(place / "validation.txt",))
    (tmp_path / "shards").symlink_to(place / "shards")
    with pytest.raises(InputError, match="other: expected the tokenizer of "):
        Mixture(write(tmp_path, (0, {"shards": 1, "other": 1})), CONTEXT, seed=3)


def test_held_out_samples_come_from_all_sources_in_turn(place):
    held_out = HeldOut(write(place, (0, {"shards": 1}), (50, {"shards": 1, "code": 1})), CONTEXT, seed=3)
    parts = [mixture.TokenDataset(place / name, "validation", CONTEXT, 3) for name in ("shards", "code")]
    assert len(held_out) == 2 * min(map(len, parts))
    for index in range(4):
        assert np.array_equal(held_out.sample(index)[0], parts[index % 2].sample(index // 2)[0])


def test_same_past_looks_at_what_was_used_alone():
    one, two = {"from_sample": 0, "sources": [["a", 1000]]}, {"from_sample": 100, "sources": [["b", 1000]]}
    assert same_past([one], [one, two], sample=100)
    assert not same_past([one], [one, two], sample=101)
    assert not same_past([two], [one], sample=200)


def test_source_can_be_added_to_a_run_from_a_sample_on_and_the_past_cannot_be_changed(place, tmp_path):
    """Continued pretraining: the run goes on with its moments, and its samples from there on are the new ones."""
    config = config_of(place, tmp_path / "run", steps=8, save_every=4)
    assert train(config).finished
    added = write(place, (0, {"shards": 1}), (32, {"shards": 0.5, "maths": 0.5}), name="added.json")
    longer = dataclasses.replace(config, data=added, steps=12)
    assert train(longer).finished
    first, second = events_of(config, "start")
    assert (first["sample"], second["sample"]) == (0, 32)
    assert first["epochs"] == {"shards": 0.0}
    assert second["epochs"] == {"shards": 32 / len(Mixture(place / "shards", CONTEXT, seed=1)), "maths": 0.0}
    seen = events_of(config, "finish")[-1]["epochs"]
    assert 0 < seen["maths"] < seen["shards"] + 1
    straight = dataclasses.replace(longer, out=tmp_path / "straight")
    train(dataclasses.replace(straight, resume="never"))
    assert [step for step, *_ in losses_of(longer)] == list(range(1, 13))

    changed = write(place, (0, {"shards": 1}), (31, {"shards": 0.5, "maths": 0.5}), name="changed.json")
    with pytest.raises(InputError, match="expected the samples before number 48 as it was begun with"):
        train(dataclasses.replace(longer, data=changed))
    assert Tokenizer.load(config.out / "model").sha256 == Tokenizer.load(place / "shards").sha256
