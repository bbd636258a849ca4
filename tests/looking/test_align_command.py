"""`python -m trl_ctopd.align`: what it prints, writes and refuses."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from tokenizers_for_tests import byte_level, metaspace_bpe
from transformers import PreTrainedTokenizerFast

from trl_ctopd import TextAligner, align_text
from trl_ctopd.looking.viewer.cli import main
from trl_ctopd.looking.viewer.segments import figures


TEXT = "The quick brown fox doesn't care: 1234567890 🙂"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """`--student A --teacher B` of two tokenizers saved to disk."""
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level().save_pretrained(folder / "student")
    metaspace_bpe().save_pretrained(folder / "teacher")
    return ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]


@pytest.fixture
def refusal(capsys):
    """The one line that a call is refused with."""

    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments)])
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        [line] = err.splitlines()
        return line.removeprefix("python -m trl_ctopd.align: error: ")

    return refusal


def test_from_a_shell_it_prints_both_tokenizations_and_no_warning(folders):
    done = subprocess.run(
        [sys.executable, "-m", "trl_ctopd.align", *folders, TEXT], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split("│") for line in done.stdout.splitlines() if "│" in line]
    student = "".join(cell.strip() for row in rows if row[0].strip() == "student" for cell in row[1:])
    assert student.replace("╎", "") == TEXT.replace(" ", "␣")


def test_json_of_a_text_has_its_chunks(folders, capsys):
    main([*folders, "--json", TEXT])
    found = json.loads(capsys.readouterr().out)
    alignment = align_text(encode(byte_level(), TEXT), byte_level(), metaspace_bpe())
    assert "".join(segment["text"] for segment in found["segments"]) == TEXT
    assert [segment["text"].encode() for segment in found["segments"]] == alignment.chunk_bytes
    for side in ("student", "teacher"):
        ids = [i for segment in found["segments"] for i in segment[f"{side}_ids"]]
        assert ids == getattr(alignment, f"{side}_ids")
    assert {name: found[name] for name in figures([alignment])} == figures([alignment])


def test_json_of_a_file_counts_over_its_texts(folders, capsys, tmp_path):
    texts = [TEXT, "def add(a, b):", "你好 নমস্কার"] * 120
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n")
    main([*folders, "--file", str(file), "--column", "text", "--json"])
    found = json.loads(capsys.readouterr().out)
    aligner = TextAligner(byte_level(), metaspace_bpe())
    expected = figures(aligner([encode(byte_level(), text) for text in texts]))
    assert found == {"student": folders[1], "teacher": folders[3], **expected}
    assert found["texts"] == 360


def test_a_plain_file_is_a_text_a_line(folders, capsys, tmp_path):
    file = tmp_path / "data.txt"
    file.write_text(f"{TEXT}\n\n{TEXT}\n")
    main([*folders, "--file", str(file)])
    printed = capsys.readouterr().out
    [alignment] = TextAligner(byte_level(), metaspace_bpe())([encode(byte_level(), TEXT)])
    found = figures([alignment])
    assert f"2  texts, {2 * found['bytes']} bytes" in printed
    assert f"{found['one_to_one_fraction']:.1%}  of student tokens one-to-one" in printed
    assert f"{found['teacher_tokens_per_chunk']:.3f}  teacher tokens a chunk" in printed


def test_html_writes_the_page(folders, capsys, tmp_path):
    main([*folders, "--html", str(tmp_path / "out.html"), TEXT])
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"written to {tmp_path / 'out.html'}\n"


@pytest.mark.parametrize(("out", "reason"), [("no/dir/out.html", "No such file or directory"), (".", "Is a directory")])
def test_a_page_that_cannot_be_written_is_refused_with_the_reason(folders, refusal, tmp_path, out, reason):
    assert refusal(*folders, TEXT, "--html", tmp_path / out) == f"cannot write {tmp_path / out}: {reason}"


def test_what_cannot_be_read_is_refused_in_one_line(folders, refusal, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"text": 3}\n{"other": "a"}\nnone\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert refusal(*folders) == "give a text, or --file for a file of texts"
    assert refusal(*folders, "") == "the text is empty"
    assert refusal(*folders, "a", "--file", lines) == "give a text or --file, not both"
    assert refusal(*folders, "a", "--column", "text") == "--column names a column of --file"
    assert refusal(*folders, "--file", lines, "--html", "x") == "--html shows one text, and --file has many"
    assert refusal(*folders, "--file", empty) == f"{empty} has no text"
    assert refusal(*folders, "--file", tmp_path / "none").startswith(f"cannot read {tmp_path / 'none'}: ")
    assert "say with --column which" in refusal(*folders, "--file", lines)
    assert "line 2: 'text' must be a string, and is a int" in refusal(*folders, "--file", lines, "--column", "text")
    assert "line 1 has no column 'txt': it has 'text'" in refusal(*folders, "--file", lines, "--column", "txt")
    assert refusal(*folders, "caf\udce9") == "'caf\\udce9' is not UTF-8 text: nothing stands for its character 3"
    lines.write_text('{"text": "\\ud800"}\n')
    assert "is not UTF-8 text" in refusal(*folders, "--file", lines, "--column", "text")
    lines.write_text("none\n")
    assert "line 1 is not JSON" in refusal(*folders, "--file", lines, "--column", "text")
    assert refusal("--student", "a", "text") == "the following arguments are required: --teacher"


def test_an_unknown_or_unsupported_tokenizer_is_refused_in_one_line(folders, refusal, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert refusal(*folders[:2], "--teacher", nowhere, "a").startswith(f"{nowhere!r} is not a folder")
    (tmp_path / "nowhere").mkdir()
    assert refusal(*folders[:2], "--teacher", nowhere, "a").startswith(
        f"no tokenizer could be loaded from {nowhere!r}: "
    )
    backend = byte_level().backend_tokenizer
    without_decoder = json.loads(backend.to_str()) | {"decoder": None, "pre_tokenizer": None}
    backend = type(backend).from_str(json.dumps(without_decoder))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "undecodable")
    said = refusal(*folders[:2], "--teacher", tmp_path / "undecodable", "a")
    assert "its backend has no decoder" in said


def test_of_real_tokenizers_by_folder(assets, capsys):
    tokenizers = assets / "tokenizers"
    main(
        ["--student", str(tokenizers / "llama-3.2"), "--teacher", str(tokenizers / "qwen2.5"), "--json", " costs 1234"]
    )
    found = json.loads(capsys.readouterr().out)
    assert [segment["text"] for segment in found["segments"]] == [" costs", " ", "123", "4"]
    assert found["one_to_one_fraction"] == 0.75
    assert found["coverage"] == 1.0


def test_a_template_is_explained_by_what_it_was_seen_to_write(tmp_path, capsys):
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    runpy.run_module("benchmarks.templates.census")["tokenizer_for"](template).save_pretrained(tmp_path)
    main(["--explain-template", str(tmp_path)])
    printed = capsys.readouterr().out
    assert r'"<think>\n" THOUGHT "\n</think>\n\n" ANSWER "<|im_end|>"' in printed
    assert "reasoning of earlier turns: no" in printed
    assert "stops at  <EOS>, <|im_end|>" in printed


def test_a_tokenizer_without_a_template_says_so(folders, refusal):
    assert "no chat template" in refusal("--explain-template", folders[1])
    assert "nothing else (student given)" in refusal("--explain-template", "a", "--student", "b")
