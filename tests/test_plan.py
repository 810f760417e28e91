"""What a run is predicted to need: memory held against tensors that exist, time against arithmetic and its sources."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import predicted
from bench.roofline import REPORTED
from train import plan
from train.gpus import GPUS, Gpu, gpu_called
from train.plan import DAY, Kernels, Plan
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi

from .training import ROOT

PHI = PhiConfig.from_preset("xiangxin-3b")
TINY = PhiConfig(vocab=160, channels=32, layers=2, heads=2, rotary_dim=8, mlp_hidden=64, context=32, eos_id=0)


def _results(directory, **row):
    """A results directory in which every kernel has that row, and one GPU run."""
    cases = {r["case"] for r in json.loads((plan.RESULTS / "static.json").read_text())["rows"]}
    rows = [{"case": case, "arch": arch, "dtype": "bf16", **row} for case in cases for arch in (80, 90)]
    (directory / "static.json").write_text(json.dumps({"rows": rows}))
    return directory


def test_the_cards_claim_in_the_same_terms_as_a_prediction():
    text = plan.claim()
    for figure in ("15,501 tokens/s", "84% of peak with causal", "89% with full", "is 87% of it", "about 69%"):
        assert figure in text


def test_gpus_have_the_figures_that_rooflines_are_drawn_with():
    for arch, board in REPORTED.items():
        gpu = gpu_called(board.called)
        assert (arch, board.flops, board.bandwidth) == (gpu.arch, gpu.flops, gpu.bandwidth)
    assert [round(board.clock / 1e9, 2) for board in REPORTED.values()] == [1.41, 1.83]
    assert all(gpu.best_product < gpu.flops for gpu in GPUS.values())


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A800-SXM4-80GB", "A800-80G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A800 40GB Active", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_board_is_known_by_its_whole_name(device, name):
    """Others with the same chip have less memory, bandwidth or power: their peak is not guessed."""
    assert gpu_called(device) is (name and GPUS[name])


def test_kernels_at_the_roofline_leave_a_step_that_only_arithmetic_and_traffic_bound(tmp_path):
    """Every product once forward and twice backward, attention's nine (two, three and four), and no part twice."""
    kernels = Kernels(
        Gpu("", 80, 1, 0, 1.0, 1e30, 1.0, 1.0), _results(tmp_path, floor_us=3.0, bound_us=3.0, estimate_us=3.0)
    )
    B, T = 2, 64
    parts = plan.forward_backward(PHI, B, T, kernels)
    full = PHI.flops_per_token(T)[1]
    assert parts["matrix products"].best == pytest.approx(B * T * (full - 12 * PHI.layers * PHI.channels * T))
    nine_products = 9 * 2 * B * PHI.heads * T * (T + 1) / 2 * PHI.head_dim * PHI.layers
    assert parts["attention"].best == pytest.approx(nine_products)
    assert sum(span.expected for span in parts.values()) == pytest.approx(sum(span.best for span in parts.values()))


def test_the_expected_time_scales_each_kernel_by_its_own_row(tmp_path):
    kernels = Kernels(GPUS["A800-80G"], _results(tmp_path, floor_us=2.0, bound_us=3.0, estimate_us=5.0))
    span = kernels.traffic(2.04e12)
    assert (span.expected, span.best) == (pytest.approx(2.5), pytest.approx(1.5))
    assert kernels.product(271.2e12).best == pytest.approx(1.0)
    assert kernels.product(312e12).expected == pytest.approx(2.5)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_a_prediction_between_nothing_and_its_peak(gpu):
    """At the recorded rows: a kernel renamed in bench/results/static.json would raise."""
    asked = Plan(gpu=gpu)
    expected, best = (sum(getattr(s, end) for s in plan.step(asked).values()) for end in ("expected", "best"))
    assert 0 < best < expected
    causal, full = plan.speed(asked, best).mfu_causal, plan.speed(asked, best).mfu_full
    assert causal < GPUS[gpu].best_product / GPUS[gpu].flops < 1, "a whole step cannot beat the best product"
    assert full / causal == pytest.approx(PHI.flops_per_token(2048)[1] / PHI.flops_per_token(2048)[0])


def test_eight_a800_are_expected_to_reach_65_percent():
    """Full attention counted, at the recorded rows: llm-foundry reached 62.1%, FlashAttention-2 65.7%."""
    asked = Plan(preset="xiangxin-3b", gpu="A800-80G", gpus=8)
    assert plan.speed(asked, sum(span.expected for span in plan.step(asked).values())).mfu_full >= 0.65


def test_readme_has_the_predictions_of_today(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert predicted.updated(readme) == readme, f"run: {predicted.COMMAND}"
    other = _results(tmp_path, floor_us=1.0, bound_us=1.0, estimate_us=2.0)
    assert predicted.updated(readme, other) != readme


def test_days_are_tokens_over_speed():
    asked = Plan(tokens=8 * DAY * 512 * 2048 / 10.0)
    fast = plan.speed(asked, 10.0)
    assert fast.days == pytest.approx(8.0)
    assert fast.tokens_per_second * asked.gpus * 10.0 == pytest.approx(512 * 2048)
    assert fast.mfu_full * 312e12 == pytest.approx(fast.tokens_per_second * PHI.flops_per_token(2048)[1])


def test_a_measured_forward_and_backward_stands_in_place_of_the_expected_one(tmp_path):
    """The newest on such a GPU, at that length; one on another GPU or by another provider counts for nothing."""
    results = _results(tmp_path, floor_us=1.0, bound_us=1.0, estimate_us=1.0)
    train = {"kind": "train", "provider": "ours", "T": 2048, "micro_batch": 4, "forward_backward_ms": 1000.0}
    runs = {
        "old": ("NVIDIA A800-SXM4-80GB", "2026-01-01", [train | {"forward_backward_ms": 5000.0}]),
        "new": ("NVIDIA A800-SXM4-80GB", "2026-02-01", [train, train | {"provider": "transformers"}]),
        "short": ("NVIDIA A800-SXM4-80GB", "2026-03-01", [train | {"T": 64, "forward_backward_ms": 9.0}]),
        "other": ("NVIDIA H100 80GB HBM3", "2026-03-01", [train | {"forward_backward_ms": 1.0}]),
    }
    for name, (device, date, records) in runs.items():
        environment = {"kind": "environment", "device": device, "date": date}
        text = "".join(json.dumps(record) + "\n" for record in [environment, *records])
        (results / f"gpu-{name}.jsonl").write_text(text)
    parts = plan.step(Plan(), results)
    assert parts["forward and backward, measured"].expected == pytest.approx(8 * 2.0)
    assert "attention" not in parts
    assert "forward and backward, measured" not in plan.step(Plan(gpu="A100-80G"), results)


def test_resharding_gathers_once_more_in_every_backward():
    assert Plan().micro_batches == 8
    resharded = plan.step(Plan(reshard=True))["NVLink"].expected
    assert resharded / plan.step(Plan())["NVLink"].expected == pytest.approx((2 * 9 + 4) / 6)


def test_parameters_cross_nvlink_once_a_step_and_the_network_carries_shards():
    one_node = plan.step(Plan())
    assert one_node["NVLink"].expected == pytest.approx(6 * PHI.parameters * 7 / 8 / (200e9 * 0.8))
    two_nodes = plan.step(Plan(gpus=16, link=25.0))
    assert two_nodes["NVLink"] == one_node["NVLink"]
    assert two_nodes["between nodes"].expected == pytest.approx(8 * PHI.parameters / 8 / 2 / 25e9)
    assert "NVLink" not in plan.step(Plan(gpus=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 3}, "--batch divisible by 3 GPUs x 8"),
        ({"gpus": 16}, "--link with more than 8 GPUs"),
        ({"link": 25.0}, "--link with more than 8 GPUs"),
        ({"gpus": 12, "batch": 96}, "whole nodes"),
        ({"context": 4096}, "--context of at most 2048"),
        ({"tokens": 0.0}, "--tokens above 0"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_named(options, message):
    with pytest.raises(InputError, match=message):
        Plan(**options)


def test_the_command_prints_parts_claim_and_cost_without_a_gpu():
    """Through train/run.py, at a small shape: the worker's process is started and read."""
    options = ["--preset", "demo", "--context", "64", "--batch", "8", "--micro-batch", "1", "--price", "2.5"]
    command = [sys.executable, "train/run.py", "--plan", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("saved for the backward", "largest micro-batch that fits", "MFU, full attention", "15,501"):
        assert expected in done.stdout
    assert "cost at 2.5 per GPU-hour" in done.stdout
    wrong = subprocess.run([*command, "--gpux", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def eight_ranks():
    from train import memory

    with memory.fake_group(8):
        yield memory


@pytest.mark.interpreter
def test_eight_ranks_hold_a_micro_batch_of_eight_in_80_gb(eight_ranks):
    """The whole 2.78 B model, accumulating, with what the kernels really save."""
    parts = eight_ranks.predict(PHI, 2048, 8, True)
    assert sum(parts.values()) < 80e9
    a_number = {"PARAMETERS": 4 / 8, "MOMENTS": 8 / 8, "GATHERED": 2, "ACCUMULATED": 4}
    for name, size in a_number.items():  # b_out's two rows do not divide by eight and are padded
        assert parts[getattr(eight_ranks, name)] == pytest.approx(size * PHI.parameters, rel=1e-3)
    beside = parts[eight_ranks.SAVED] - 46_216 * 8 * 2048 * PHI.layers
    assert 0 <= beside < 0.001 * parts[eight_ranks.SAVED], "rotary tables, the last LayerNorm's statistics"


@pytest.mark.interpreter
@pytest.mark.parametrize("accumulate", [False, True])
def test_parts_are_affine_in_the_number_of_layers(eight_ranks, accumulate):
    config = dataclasses.replace(TINY, channels=64, mlp_hidden=256, layers=5)
    assert eight_ranks.predict(config, 32, 2, accumulate) == eight_ranks.trace(config, 32, 2, accumulate)


@pytest.mark.interpreter
@pytest.mark.parametrize("accumulate", [False, True])
def test_resharding_leaves_one_block_gathered_and_not_all(eight_ranks, accumulate):
    config = dataclasses.replace(TINY, channels=64, mlp_hidden=256, layers=5)
    whole, resharded = (eight_ranks.predict(config, 32, 2, accumulate, reshard) for reshard in (False, True))
    assert whole[eight_ranks.GATHERED] > 2 * resharded[eight_ranks.GATHERED] > 0
    assert whole[eight_ranks.SAVED] == resharded[eight_ranks.SAVED]
    assert resharded == eight_ranks.trace(config, 32, 2, accumulate, True)


@pytest.mark.interpreter
@pytest.mark.slow
def test_all_layers_traced_need_what_was_predicted_from_two_traces(eight_ranks):
    assert eight_ranks.trace(PHI, 2048, 8, True) == eight_ranks.predict(PHI, 2048, 8, True)


@pytest.mark.interpreter
def test_the_largest_micro_batch_fits_and_the_next_does_not(eight_ranks):
    four = sum(eight_ranks.predict(TINY, 32, 4, False).values())
    assert eight_ranks.largest_micro_batch(TINY, 32, 8, False, four) == 4
    assert eight_ranks.largest_micro_batch(TINY, 32, 8, False, four - 1) == 3
    assert eight_ranks.largest_micro_batch(TINY, 32, 2, False, four) == 2
    assert eight_ranks.largest_micro_batch(TINY, 32, 8, False, 1000) == 0


@pytest.mark.interpreter
def test_what_is_said_to_be_saved_is_what_real_tensors_keep(eight_ranks):
    """The storages that a real forward through the kernels hands to autograd, parameters aside, to the byte."""
    model = Phi(TINY, dtype=torch.bfloat16).init_weights(1)
    tokens = torch.randint(TINY.vocab, (2, TINY.context))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), tokens)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tokens, tokens, torch.zeros_like(tokens), reduction="sum")
    saved = sum(storage.nbytes() for storage in kept.values())
    assert saved + loss.nbytes == eight_ranks.snapshots(TINY, TINY.context, 2, False)["forward"][eight_ranks.SAVED]
