"""Every mutation still applies, and every mutant is noticed by the tests it names."""

import pytest

from tests.mutation import MUTATIONS, Mutation, is_noticed

KERNEL, CORPUS = "def layer_norm(", "def clean_unit("
PREPARATION = "tests/test_prepare.py tests/test_prepare_killed.py tests/test_corpus_stages.py"
UNCHANGED = [
    Mutation("no kernel", "layer_norm.py", KERNEL, KERNEL, "tests/kernels/test_layer_norm.py"),
    Mutation("no corpus", "clean.py", CORPUS, CORPUS, PREPARATION, "train/corpus"),
]


def _by_name(mutation: Mutation) -> str:
    return mutation.name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_by_name)
def test_mutation_applies(mutation):
    assert mutation.source.count(mutation.old) == 1
    assert mutation.old != mutation.new


@pytest.mark.slow
@pytest.mark.parametrize("mutation", UNCHANGED, ids=_by_name)
def test_what_is_unchanged_passes(mutation, tmp_path):
    noticed, output = is_noticed(mutation, tmp_path)
    assert not noticed, output


# A mutant costs up to a minute: every sixth stands for the rest, which `python -m tests.mutation` goes through.
@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS[::6], ids=_by_name)
def test_mutant_is_noticed(mutation, tmp_path):
    noticed, output = is_noticed(mutation, tmp_path)
    assert noticed, f"no test failed:\n{output}"
