"""How many programming tasks the pretrained pair solves, and a student with a trained adapter: greedy, and a student also in any of
four samples.

    python -m benchmarks.real_models.solved [--models FOLDER] [--data mbpp.jsonl]            # the student as published, and the teacher
    python -m benchmarks.real_models.solved [...] --adapter demo_real_output/student        # also with the adapter of `make demo-real`

Decisions:
- The tasks are the first of those that `make demo-real` and its figures hold out.
- A task is solved where all of its tests pass, in a process of its own (`examples/demo_real/sandbox.py`).
- The teacher answers greedily alone: its samples would take most of the time, and it is not what is trained.
- Two rows are compared task by task: the standard error of their difference is that of the paired differences.
- What the output file has already is not run again. An adapter is known by its name.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from demo_real import problems
from demo_real.answering import answers
from demo_real.run import ANSWER_TOKENS, HELD_OUT, STUDENT, TEACHER, named

from benchmarks import report
from benchmarks.clock import stopwatch
from benchmarks.speed.models import quiet

from . import script


RESULTS = Path(__file__).parents[1] / "results" / "real_models" / "solved.json"
TASKS, SAMPLES = 100, 4


def count(model: str, adapter: str | None, tasks: Sequence[problems.Problem], samples: int) -> dict:
    """`greedy`: for each task whether the greedy answer solves it. `any`: whether one of `samples` answers does."""
    own, tokenizer = script.loaded(model, adapter)
    asked = [task.messages for task in tasks]
    with stopwatch() as spent:
        texts, lengths, _ = zip(*answers(own, tokenizer, asked, ANSWER_TOKENS), strict=True)
        found = {
            "greedy": problems.solved(tasks, texts),
            "python": sum(map(problems.is_python, texts)),
            "mean_length": round(sum(lengths) / len(lengths), 1),
        }
        if samples:
            drawn = [text for text, _, _ in answers(own, tokenizer, asked, ANSWER_TOKENS, samples)]
            each = problems.solved([task for task in tasks for _ in range(samples)], drawn)
            found["any"] = [any(each[n : n + samples]) for n in range(0, len(each), samples)]
    return {**found, "cpu_seconds": round(spent.cpu_seconds, 1)}


def gain(after: Sequence[bool], before: Sequence[bool]) -> tuple[float, float]:
    """The mean difference of paired outcomes, and its standard error."""
    differences = [int(own) - int(other) for own, other in zip(after, before, strict=True)]
    mean = sum(differences) / len(differences)
    spread = sum((own - mean) ** 2 for own in differences) / (len(differences) - 1)
    return mean, math.sqrt(spread / len(differences))


def gained(row: dict, student: dict, how: str) -> str:
    """How many tasks `row` solves, "greedy" or in "any" sample, and the mean difference from `student`."""
    mean, error = gain(row[how], student[how])
    return f"{sum(row[how])}" + ("" if row is student else f" ({mean:+.2f} ± {error:.2f})")


def table(kept: dict) -> str:
    """Of an output file: a row for each model and adapter."""
    rows, samples = kept["rows"], max(row["samples"] for row in kept["rows"].values())
    lines = [f"| of {kept['tasks']} tasks | greedy | in any of {samples} samples | Python, greedy | tokens, greedy |"]
    lines += ["|---" * 5 + "|"]
    for name, row in rows.items():
        sampled = gained(row, rows["student"], "any") if "any" in row else ""
        lines += [
            f"| {name} | {gained(row, rows['student'], 'greedy')} | {sampled} | {row['python']} | {row['mean_length']:.0f} |"
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--adapter", help="folder of a trained adapter")
    parser.add_argument("--name", default="trained", help="of the adapter's row")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"at most {HELD_OUT}, which no step has learned from")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="answers drawn for each task; 0: greedy alone")
    options = parser.parse_args(arguments)
    if options.tasks > HELD_OUT:
        parser.error(f"--tasks={options.tasks}: only {HELD_OUT} tasks are held out")
    quiet()
    settings = {"student": STUDENT, "teacher": TEACHER, "tasks": options.tasks, "answer_tokens": ANSWER_TOKENS}
    if options.output.exists():
        kept = json.loads(options.output.read_text())
        if any(kept[name] != value for name, value in settings.items()):
            parser.error(f"{options.output} is of other settings than {settings}: choose another --output")
    else:
        kept = {**report.header(), **settings, "rows": {}}
    tasks = problems.load_problems(options.data)[: options.tasks]
    student, teacher = (named(name, options.models) for name in (STUDENT, TEACHER))
    wanted = {"student": (student, None), "teacher": (teacher, None)}
    if options.adapter:
        wanted[options.name] = student, options.adapter
    rows = kept["rows"]
    for name, (model, adapter) in wanted.items():
        if name not in rows:
            samples = 0 if name == "teacher" else options.samples
            rows[name] = {"samples": samples, **count(model, adapter, tasks, samples)}
            report.save(options.output, kept)
    print(table(kept))


if __name__ == "__main__":
    main()
