"""Files of public benchmarks as they are published, and what a model is asked of them. Reads files alone: no network.

C-Eval      DIR/{dev,val}/SUBJECT_{dev,val}.csv, UTF-8: id, question, A, B, C, D, answer; dev: explanation too. The
            test split is published without answers
CMMLU       DIR/{dev,test}/SUBJECT.csv: (no name), Question, A, B, C, D, Answer
GSM8K       DIR/{train,test}.jsonl: question, answer
BBH         DIR/TASK.json: {"canary", "examples": [{"input", "target"}]}
HumanEval   HumanEval.jsonl.gz: task_id, prompt, entry_point, canonical_solution, test

Sources: Huang et al. 2023, arXiv:2305.08322; Li et al. 2023, arXiv:2306.09212; Cobbe et al. 2021, arXiv:2110.14168;
Suzgun et al. 2022, arXiv:2210.09261; Chen et al. 2021, arXiv:2107.03374.
"""

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xiangxin_fast.errors import InputError

LETTERS = ("A", "B", "C", "D")
INSTRUCTION = "以下是单项选择题，请选出其中的正确答案。\n\n"
BBH_SHOTS = 3  # the first examples of a task are shown, and not asked


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the letter of the right option."""

    text: str
    options: tuple[str, str, str, str]
    answer: str

    def prompt(self) -> str:
        """Everything up to where the letter stands."""
        lines = [
            self.text.strip(),
            *(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)),
        ]
        return "\n".join(lines) + "\n答案："


def read_questions(directory: Path, benchmark: str, split: str) -> dict[str, list[Question]]:
    """Questions by subject of "ceval" or "cmmlu". InputError names the file and row that do not fit."""
    ending, upper = (f"_{split}.csv", False) if benchmark == "ceval" else (".csv", True)
    files = sorted((directory / split).glob(f"*{ending}"))
    if not files:
        raise InputError(f"{directory / split}: expected files *{ending} of {benchmark}, got none")
    names = ("Question", *LETTERS, "Answer") if upper else ("question", *LETTERS, "answer")
    return {file.name.removesuffix(ending): _questions(file, names) for file in files}


def _questions(file: Path, names: Sequence[str]) -> list[Question]:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        if missing := [name for name in names if name not in (rows.fieldnames or ())]:
            raise InputError(f"{file}: expected columns {', '.join(names)}, got none of {', '.join(missing)}")
        questions = []
        for number, row in enumerate(rows, 1):
            text, *options, answer = ((row[name] or "").strip() for name in names)
            if answer not in LETTERS:
                raise InputError(f"{file}: expected an answer of A to D in row {number}, got {answer!r:.40}")
            questions.append(Question(text, tuple(options), answer))
    return questions


def read_jsonl(file: Path, fields: Sequence[str]) -> list[dict]:
    """The objects of a JSON Lines file, plain or .gz; InputError where one lacks a field."""
    opened = gzip.open if file.suffix == ".gz" else open
    found = []
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(filter(str.strip, stream), 1):
                found.append(_checked(json.loads(line), fields, f"{file}, object {number}"))
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: expected JSON Lines with {', '.join(fields)}: {error}") from None
    return found


def read_bbh(directory: Path) -> dict[str, list[dict]]:
    """The examples of every task."""
    files = sorted(directory.glob("*.json"))
    if not files:
        raise InputError(f"{directory}: expected the tasks of BBH as *.json, got none")
    tasks = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: expected JSON: {error}") from None
        examples = _checked(content, ("examples",), str(file))["examples"]
        tasks[file.stem] = [_checked(e, ("input", "target"), f"{file}, example {i}") for i, e in enumerate(examples, 1)]
    return tasks


def _checked(value: object, fields: Sequence[str], where: str) -> dict:
    if not isinstance(value, dict) or (missing := [name for name in fields if name not in value]):
        got = f"none of {', '.join(missing)}" if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{where}: expected an object with {', '.join(fields)}, got {got}")
    return value


def write_tasks(directory: Path, gsm8k: Path | None, bbh: Path | None) -> list[str]:
    """Writes tasks of lm-evaluation-harness that read local files only; returns their names.

    They ask what the harness's own tasks of that name ask: GSM8K with five worked examples, BBH without reasoning. Its
    own read their data from the Hugging Face hub. A task's YAML is written as JSON, which is YAML too.
    """
    names = []
    if gsm8k is not None:
        parts = {split: read_jsonl(gsm8k / f"{split}.jsonl", ("question", "answer")) for split in ("train", "test")}
        _write_task(
            directory,
            "gsm8k_local",
            parts,
            fewshot_split="train",
            num_fewshot=5,
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["Question:"], "do_sample": False},
            metric_list=[_exact_match(regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"])],
            filter_list=[
                {
                    "name": "strict-match",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
        )
        names.append("gsm8k_local")
    for task, examples in (read_bbh(bbh) if bbh is not None else {}).items():
        if len(examples) <= BBH_SHOTS:
            raise InputError(f"{bbh / task}.json: expected over {BBH_SHOTS} examples, got {len(examples)}")
        _write_task(
            directory,
            f"bbh_{task}_local",
            {"train": examples[:BBH_SHOTS], "test": examples[BBH_SHOTS:]},
            fewshot_split="train",
            num_fewshot=BBH_SHOTS,
            doc_to_text="Q: {{input}}\nA:",
            doc_to_target="{{target}}",
            generation_kwargs={"until": ["Q:", "\n\n"], "do_sample": False},
            metric_list=[_exact_match()],
            filter_list=[
                {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
        )
        names.append(f"bbh_{task}_local")
    return names


def _exact_match(**options: object) -> dict:
    return {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, **options}


def _write_task(directory: Path, name: str, parts: dict[str, list[dict]], **settings: object) -> None:
    files = {}
    for split, rows in parts.items():
        file = directory / f"{name}-{split}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file.resolve())
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        **settings,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")
