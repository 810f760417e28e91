"""The checks of decode that a GPU run brings, on a CPU: they pass, and tell what they are there to tell."""

import pytest
import torch

from bench import decode_check
from bench.cases import SHAPES
from xiangxin_fast.decode_batch import DecodeBatch


class _Work:
    dry_run, device, dtype, shape = True, torch.device("cpu"), torch.bfloat16, SHAPES["tiny"]

    def __init__(self):
        self.records: list[dict] = []

    def emit(self, record: dict) -> None:
        self.records.append(record)


def _passed(check) -> set[bool]:
    work = _Work()
    check(work)
    assert {record["kind"] for record in work.records} == {"check"}
    return {record["passed"] for record in work.records}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(decode_check, "ROWS", (1, 3))


def test_rounded_weights(monkeypatch):
    assert _passed(decode_check.check_rounded) == {True}
    head = decode_check.decode_head

    def wrong(x, ln_w, ln_b, head_w, head_b):
        return head(x, ln_w, ln_b, head_w._replace(scale=head_w.scale * 1.02), head_b)

    monkeypatch.setattr(decode_check._Layer.run, "__defaults__", (decode_check.decode_block, wrong, None))
    assert False in _passed(decode_check.check_rounded)


def test_rows_alone(monkeypatch):
    assert _passed(decode_check.check_rows_alone) == {True}
    run = decode_check._Layer.run

    def depends_on_its_company(layer, rows, *rest):
        return [t * (1 + (rows.stop - rows.start > 1) / 64) for t in run(layer, rows, *rest)]

    monkeypatch.setattr(decode_check._Layer, "run", depends_on_its_company)
    assert False in _passed(decode_check.check_rows_alone)


def test_graphs(monkeypatch):
    assert _passed(decode_check.check_graphs) == {True}
    emit = DecodeBatch._emit

    def drafts_change_a_logprob(batch, *rest):
        values = emit(batch, *rest)
        values[:, (values.shape[1] + 2) // 2 :] += 1e-6 * batch._lookup
        return values

    monkeypatch.setattr(DecodeBatch, "_emit", drafts_change_a_logprob)
    assert _passed(decode_check.check_graphs) == {False}
