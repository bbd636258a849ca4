"""Short programming tasks with tests (MBPP, arXiv 2108.07732): the prompt, the code in an answer, and whether it is right.

Decisions:
- The prompt shows one test, since a function's name and signature cannot be guessed. All tests must pass.
- The code is the first fenced block or, without one, everything from the first line that defines or imports something.
- Rows are shuffled once, with a fixed seed. Held-out tasks take no part in training, whatever the sizes.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset

from .sandbox import passes


HUB_NAME = "google-research-datasets/mbpp"
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BEGINS = re.compile(r"^(?:def |import |from |class |@)", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """The task's text, the dataset's code, and the tests, which may need `setup`."""

    text: str
    code: str
    tests: tuple[str, ...]
    setup: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        asked = f"{self.text}\nYour code should pass this test:\n{self.tests[0]}\nAnswer with the code alone."
        return [{"role": "user", "content": asked}]

    @property
    def reference(self) -> list[dict[str, str]]:
        code = self.code.replace("\r\n", "\n").strip()
        return [{"role": "assistant", "content": f"```python\n{code}\n```"}]


def load_problems(source: str = HUB_NAME) -> list[Problem]:
    """All tasks of a dataset on the hub, or of a local .jsonl file with MBPP's columns, in a fixed random order."""
    if Path(source).suffix == ".jsonl":
        rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        splits = load_dataset(source)
        rows = [row for name in sorted(splits) for row in splits[name]]
    missing = {"text", "code", "test_list"} - set(rows[0])
    if missing:
        raise ValueError(f"{source} has no column {', '.join(sorted(missing))}: it has {', '.join(rows[0])}.")
    rows.sort(key=lambda row: row["task_id"])
    random.Random(0).shuffle(rows)
    return [
        Problem(row["text"], row["code"], tuple(row["test_list"]), row.get("test_setup_code") or "") for row in rows
    ]


def code_of(answer: str) -> str:
    """The code in an answer; all of the answer where nothing looks like code."""
    if block := _FENCED.search(answer):
        return block.group(1)
    begins = _BEGINS.search(answer)
    return answer[begins.start() :] if begins else answer


def is_python(answer: str) -> bool:
    try:
        compile(code_of(answer), "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return bool(code_of(answer).strip())


def solves(problem: Problem, answer: str) -> bool:
    """Whether the answer's code passes all tests, in a process of its own."""
    return is_python(answer) and passes("\n".join([problem.setup, code_of(answer), *problem.tests]))


def solved(problems: Sequence[Problem], answers: Sequence[str]) -> list[bool]:
    return [solves(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
