"""How two tokenizers cut a text, or how much they differ over a file of texts.

ctopd align --student Qwen/Qwen2.5-0.5B --teacher meta-llama/Llama-3.2-1B "twenty-three" [--html out.html]
ctopd align --student path/to/one --teacher path/to/other --file data.jsonl --column text [--json]
ctopd align --explain-template path/to/one
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...text.aligner import TextAligner, encode_as_text
from ...text.token_bytes import UnsupportedTokenizerError
from .segments import WHY, figures, segments
from .shown import TextAlignment


_BATCH = 256  # texts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trl_ctopd.align") -> None:
    parser = _parser(prog)
    args = parser.parse_args(arguments)
    if args.explain_template is not None:
        return _explain(parser, args)
    if missing := [f"--{name}" for name in ("student", "teacher") if getattr(args, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.text is not None and args.file:
        parser.error("give a text or --file, not both")
    if args.text is None and not args.file:
        parser.error("give a text, or --file for a file of texts")
    if args.text == "":
        parser.error("the text is empty")
    if args.html and args.file:
        parser.error("--html shows one text, and --file has many")
    if args.column and not args.file:
        parser.error("--column names a column of --file")
    try:
        texts = [args.text] if args.file is None else _texts(args.file, args.column)
        for text in texts:
            _check_has_bytes(text)
        student, teacher = (_tokenizer(name, args.trust_remote_code) for name in (args.student, args.teacher))
        aligner = TextAligner(student, teacher)
    except (_InputError, UnsupportedTokenizerError) as error:
        parser.error(str(error))
    alignments = _aligned(texts, student, aligner)
    if args.file:
        _show_file(args, figures(alignments))
    else:
        _show_text(parser, args, next(alignments))


def _parser(prog: str) -> _Parser:
    parser = _Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="what to align; the student's tokenizer encodes it")
    parser.add_argument("--student", help="tokenizer: a folder or a name on the hub")
    parser.add_argument("--teacher", help="the same of the teacher")
    parser.add_argument("--file", type=Path, help="a text a line, or with --column a JSON object a line")
    parser.add_argument("--column", help="which of the object's strings is the text")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the picture as a page of its own")
    parser.add_argument(
        "--explain-template",
        metavar="TOKENIZER",
        help="print what is found of a tokenizer's chat template: its turns' openings, sections and ends, and what it leaves out",
    )
    parser.add_argument("--json", action="store_true", help="figures, and for one text its chunks, as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a tokenizer")
    return parser


def _explain(parser: _Parser, args: argparse.Namespace) -> None:
    # loads transformers, which `--help` must not
    from ...text.chat import Speaker
    from ..templates import explain

    given = [name for name in ("text", "student", "teacher", "file", "column", "html", "json") if getattr(args, name)]
    if given:
        parser.error(f"--explain-template takes one tokenizer, and nothing else ({', '.join(given)} given)")
    try:
        print(explain(Speaker(_tokenizer(args.explain_template, args.trust_remote_code))))
    except ValueError as error:
        parser.error(str(error))


class _InputError(ValueError):
    """The user's input cannot be read."""


def _texts(file: Path, column: str | None) -> list[str]:
    try:
        rows = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _InputError(f"cannot read {file}: {error}") from error
    rows = [(number, row) for number, row in enumerate(rows, 1) if row.strip()]
    if column is None and file.suffix == ".jsonl":
        raise _InputError(f"{file} has JSON objects: say with --column which of their strings is the text")
    texts = [row if column is None else _column(file, number, row, column) for number, row in rows]
    if not any(texts):
        raise _InputError(f"{file} has no text")
    return texts


def _column(file: Path, number: int, row: str, column: str) -> str:
    try:
        found = json.loads(row)
    except json.JSONDecodeError as error:
        raise _InputError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(found, dict) or column not in found:
        has = f"it has {', '.join(map(repr, found))}" if isinstance(found, dict) else "it is not an object"
        raise _InputError(f"{file}, line {number} has no column {column!r}: {has}")
    if not isinstance(found[column], str):
        raise _InputError(
            f"{file}, line {number}: {column!r} must be a string, and is a {type(found[column]).__name__}"
        )
    return found[column]


def _check_has_bytes(text: str) -> None:
    """Bytes of a shell's argument that are not UTF-8, and lone surrogates of JSON, are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _InputError(f"{text!a} is not UTF-8 text: nothing stands for its character {error.start}") from error


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    import huggingface_hub.utils as hub
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    if not Path(name).is_dir():
        try:
            hub.validate_repo_id(name)
        except hub.HFValidationError as error:
            raise _InputError(f"{name!r} is not a folder, and not a valid name on the hub") from error
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen classes, depending on whether folder, name or network is at fault
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _InputError(f"no tokenizer could be loaded from {name!r}: {reason}") from error


def _aligned(texts: list[str], student: Any, aligner: TextAligner) -> Iterator[TextAlignment]:
    for start in range(0, len(texts), _BATCH):
        yield from aligner([tokens.ids for tokens in encode_as_text(student, texts[start : start + _BATCH])])


def _show_text(parser: _Parser, args: argparse.Namespace, alignment: TextAlignment) -> None:
    if args.html:
        try:
            alignment.to_html(args.html)
        except OSError as error:
            parser.error(f"cannot write {args.html}: {error.strerror}")
    if args.json:
        found = {**_named(args), **figures([alignment]), "segments": _segments(alignment)}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif args.html:
        print(f"written to {args.html}")
    else:
        alignment.print()


def _segments(alignment: TextAlignment) -> list[dict]:
    return [
        {
            "text": alignment._spelled[segment.start : segment.end].decode("utf-8", "backslashreplace"),
            "start": segment.start,
            "end": segment.end,
            "student_ids": [alignment.student_ids[token] for token in segment.student],
            "teacher_ids": [alignment.teacher_ids[token] for token in segment.teacher],
            **({} if segment.chunk >= 0 else {"masked": list(segment.reasons)}),
        }
        for segment in segments(alignment)
    ]


def _named(args: argparse.Namespace) -> dict[str, str]:
    return {"student": args.student, "teacher": args.teacher}


def _show_file(args: argparse.Namespace, found: dict) -> None:
    if args.json:
        print(json.dumps({**_named(args), **found}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{found['texts']:,}", f"texts, {found['bytes']:,} bytes")
    table.add_row(_percent(found["one_to_one_fraction"]), "of student tokens one-to-one")
    table.add_row(_percent(found["coverage"]), "of bytes compared")
    for side in ("student", "teacher"):
        per_chunk = found[f"{side}_tokens_per_chunk"]
        shown = "–" if per_chunk is None else f"{per_chunk:.3f}"
        table.add_row(shown, f"{side} tokens a chunk, {found[f'{side}_tokens']:,} in all")
    for reason, count in found["masked_bytes"].items():
        table.add_row(f"{count:,}", f"bytes masked: {WHY[reason][1]}")
    Console().print(table)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
