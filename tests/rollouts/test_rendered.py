"""Rows come in whatever shape and format, go to the models that they were rendered for, and are named where they cannot."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from toys import TEACHER_TEMPLATE, prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.rollouts.frames import Share, to_json
from trl_ctopd.rollouts.pairing import Prompt
from trl_ctopd.rollouts.prompts import BLEND, COLUMNS, RENDERED_FOR, _without_overlong, check_room, render_row
from trl_ctopd.text.chat import Speaker, read_example


def retemplated(tokenizer, old: str, new: str):
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


@pytest.mark.parametrize(
    "others",
    [
        {"processing_class": teacher_tokenizer, "model": teacher_model, "teacher_processing_class": teacher_tokenizer},
        {"processing_class": lambda: retemplated(student_tokenizer(), "assistant", "model")},
        {"teacher_processing_class": lambda: retemplated(teacher_tokenizer(), "<|end|>", "<|end|> ")},
        {"chat_template_kwargs": lambda: {"enable_thinking": False}},
    ],
    ids=["other tokenizer", "other student template", "other teacher template", "other template kwargs"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_that_was_rendered_for_other_models_is_refused(build, others, streamed):
    rendered = build().train_dataset
    if streamed:
        rendered = rendered.to_iterable_dataset()
    with pytest.raises(ValueError, match="train dataset was rendered for other models .* than these .*rendered from"):
        build(dataset=rendered, **{name: make() for name, make in others.items()})


def test_a_dataset_that_was_rendered_for_the_same_models_is_taken_as_it_is(build, tmp_path):
    rendered = build().train_dataset
    rendered.save_to_disk(tmp_path / "rendered")
    again = build(dataset=Dataset.load_from_disk(tmp_path / "rendered")).train_dataset
    assert again[:] == rendered[:] and set(again.column_names) == {*COLUMNS, RENDERED_FOR}
    tokenizer = student_tokenizer()
    tokenizer(["one", "two three"], padding=True, truncation=True, max_length=2)  # it keeps how it was called
    build(dataset=rendered, processing_class=tokenizer)


def test_prompts_that_are_all_text_are_warned_of_where_both_models_have_templates(build, caplog):
    def warned(rows, **settings):
        caplog.clear()
        build(dataset=Dataset.from_list(rows), **settings)
        return caplog.text.count("All prompts are text, and the models have chat templates")

    def plain(tokenizer):
        tokenizer.chat_template = None
        return tokenizer

    question = "What is 3 plus 4?"
    text, asked = [{"prompt": question}] * 2, [{"prompt": [{"role": "user", "content": question}]}] * 2
    side = Speaker(student_tokenizer())
    rendered = side.tokenizer.decode(side.prompt_ids(read_example(asked[0]))).removeprefix(
        side.tokenizer.bos_token or ""
    )
    assert warned(text) == 1
    assert warned(asked) == 0
    assert warned([{"prompt": rendered}] * 2) == 0
    assert warned(text, processing_class=plain(student_tokenizer())) == 0
    assert warned(text, teacher_processing_class=plain(teacher_tokenizer())) == 0


TRIMS = TEACHER_TEMPLATE.replace("message['content']", "message['content'] | trim")


@pytest.mark.parametrize(
    ("template", "begun", "refused"),
    [(TRIMS, "It is  ", True), (TRIMS, "It is", False), (TRIMS, " ", False), (TEACHER_TEMPLATE, "It is\n", False)],
)
def test_a_begun_answer_whose_blanks_one_template_leaves_out_is_refused(build, template, begun, refused):
    tokenizer = teacher_tokenizer()
    tokenizer.chat_template = template
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": begun}]}]
    )
    if not refused:
        build(dataset=rows, teacher_processing_class=tokenizer)
        return
    with pytest.raises(
        ValueError, match=r"Row 0 of the train dataset: .*'It is  '.* leaves '  ' and the teacher's ''.*rstrip"
    ):
        build(dataset=rows, teacher_processing_class=tokenizer)


def test_a_dataset_that_was_rendered_without_saying_for_whom_is_refused(build):
    rendered = build().train_dataset.remove_columns(RENDERED_FOR)
    with pytest.raises(ValueError, match="rendered for other models .an unknown pair."):
        build(dataset=rendered)


@pytest.mark.parametrize("read_as", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_are_rendered_alike_whatever_format_they_are_read_in(build, read_as, streamed):
    expected = build().train_dataset
    rows = prompts()
    rows = rows.to_iterable_dataset().with_format(read_as) if streamed else rows.with_format(read_as)
    found = build(dataset=rows).train_dataset
    assert [row["prompt_ids"] for row in found] == [row["prompt_ids"] for row in expected]


USER = {"role": "user", "content": "What is 2+2?"}
REFERENCE = {"role": "assistant", "content": "It is four."}
SECRET = "Sphinx of black quartz, judge my vow: 4."


@pytest.mark.parametrize(
    "name", ["qwen2.5", "llama-3.2", "phi-3-mini", "deepseek-v3", "mistral-v3", "smollm2-instruct"]
)
@pytest.mark.parametrize("place", ["system", "before the question", "a turn of its own"])
def test_the_student_reads_nothing_of_what_only_the_teacher_reads(real_tokenizer, name, place):
    side = Speaker(real_tokenizer(name), {"date_string": "26 Jul 2024"})  # Llama's template prints the day otherwise
    hinted = {
        "system": [{"role": "system", "content": SECRET}, USER],
        "before the question": [{"role": "user", "content": f"{SECRET}\n\n{USER['content']}"}],
        "a turn of its own": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "Yes."}, USER],
    }[place]
    row = {"prompt": [USER], "completion": [REFERENCE]}
    plain, told = (render_row(one, 0, side, {"": side}, None, True) for one in (row, {**row, "teacher_prompt": hinted}))
    assert told["prompt_ids"] == plain["prompt_ids"] and told["reference_ids"] == plain["reference_ids"]
    prompts = [Prompt(*(found[column] for column in COLUMNS)) for found in (plain, told)]
    assert prompts[0].before_reference().student_ids == prompts[1].before_reference().student_ids
    assert prompts[0].framed.student == prompts[1].framed.student
    assert SECRET in side.tokenizer.decode(told["teacher_prompt_ids"])
    alone = render_row({"prompt": hinted}, 0, side, {"": side}, None, False)
    assert told["teacher_prompt_ids"] == alone["teacher_prompt_ids"]
    teachers = [prompt.framed.plain(prompt.teacher_ids) for prompt in (prompts[1], Prompt(*map(alone.get, COLUMNS)))]
    assert teachers[0] == teachers[1]


def test_a_teacher_prompt_changes_what_the_teacher_reads_and_nothing_of_the_students(build):
    rows = prompts().to_list()
    hint = {"role": "system", "content": "one two three"}
    told = [{**row, "teacher_prompt": [hint, *row["prompt"]]} for row in rows]
    plain, found = (build(dataset=Dataset.from_list(given)) for given in (rows, told))
    student = [name for name in COLUMNS if name not in ("teacher_prompt_ids", "frame")]
    for before, after in zip(plain.train_dataset, found.train_dataset, strict=True):
        assert {name: before[name] for name in student} == {name: after[name] for name in student}
        assert len(after["teacher_prompt_ids"]) > len(before["teacher_prompt_ids"])
    hinted = build(dataset=Dataset.from_list([{"prompt": row["teacher_prompt"]} for row in told])).train_dataset
    assert found.train_dataset["teacher_prompt_ids"] == hinted["teacher_prompt_ids"]
    found.train()
    assert found.state.log_history[0]["alignment/masked_fraction"] < 1


def test_a_model_is_its_own_teacher_by_what_only_the_teacher_reads(build):
    """Self-distillation: with the same prompt there is no gap, with a hint there is."""
    hint = {"role": "system", "content": "one two three"}
    rows = [{**row, "teacher_prompt": [hint, *row["prompt"]]} for row in prompts().to_list()]
    same = {"teacher": student_model(), "teacher_processing_class": student_tokenizer()}
    gaps = []
    for given in (prompts(), Dataset.from_list(rows)):
        trainer = build(dataset=given, **same)
        trainer.train()
        gaps.append(abs(trainer.state.log_history[0]["gap/nats_per_byte"]))
    assert gaps[0] < 1e-5 < 1e-3 < gaps[1]


def long_in(*places: int, rows: int = 12) -> list[dict]:
    found = prompts(rows).to_list()
    for n in places:
        found[n]["prompt"][0]["content"] += " and two" * 60
    return found


def room(build, rows: list[dict]) -> int:
    """`max_length` for prompts as long as the longest that is not meant to be too long."""
    short = [row for row in rows if " and two" not in row["prompt"][0]["content"]]
    return max(map(len, build(dataset=Dataset.from_list(short)).train_dataset["prompt_ids"])) + 8


def test_a_prompt_that_leaves_no_room_is_an_error_by_default(build):
    rows = long_in(3)
    build(dataset=Dataset.from_list(rows[:3]), max_length=room(build, rows))
    with pytest.raises(
        ValueError,
        match=r"Row 3 of the train dataset: its prompt has \d+ student tokens, and a context of \d+ .*leaves room for \d+ beside "
        r'max_new_tokens=8. Set overlong_prompts="drop" to leave such rows out[.]$',
    ):
        build(dataset=Dataset.from_list(rows), max_length=room(build, rows))


def test_rows_whose_prompts_leave_no_room_are_dropped_counted_and_named(build, caplog):
    overlong = [1, 2, 4, 5, 7, 8, 10]
    rows = long_in(*overlong)
    longest = room(build, rows)
    settings = {"overlong_prompts": "drop", "max_length": longest}
    found = build(dataset=Dataset.from_list(rows), **settings).train_dataset
    kept = Dataset.from_list([row for n, row in enumerate(rows) if n not in overlong])
    assert found[:] == build(dataset=kept, max_length=longest).train_dataset[:] and len(found) == 5
    [said] = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert "7 of 12 rows of the train dataset are dropped" in said and said.endswith("rows 1, 2, 4, 5, 7, ....")
    assert f"leave room for {longest - 8} student tokens" in said
    caplog.clear()
    build(dataset=kept, **settings).train()
    assert "dropped" not in caplog.text


def test_a_dataset_of_which_no_row_is_left_is_an_error(build):
    with pytest.raises(ValueError, match="All 12 rows of the train dataset have prompts that leave no room"):
        build(dataset=prompts(12), overlong_prompts="drop", max_length=10)


def test_a_streams_rows_whose_prompts_leave_no_room_are_dropped_and_named_once(build, caplog):
    rows = long_in(0, 3)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = build(dataset=stream, overlong_prompts="drop", max_length=room(build, rows)).train_dataset
    for _ in range(2):
        assert len(list(found)) == 10
    said = [record.getMessage() for record in caplog.records if "is dropped" in record.getMessage()]
    assert [text[:40] for text in said] == [
        "Row 0 of the train dataset is dropped, t",
        "Row 3 of the train dataset is dropped, t",
    ]


PARTS = [{"type": "text", "text": "What is 3 plus 4?"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": [{"role": "user", "content": [["What"], ["is"]]}]},
            r"`prompt` holds content that is a list with \['What'\] in it",
        ),
        (
            {"prompt": [{"role": "user", "content": [*PARTS, {"type": "text"}]}]},
            "`prompt` holds a text part without `text`",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "`prompt` holds a text part without",
        ),
        ({"prompt": "half \ud83d of a face"}, r"`prompt` holds a lone surrogate .U\+D83D at character 5."),
        (
            {"messages": [{"role": "user", "content": "\udc00"}]},
            r"`messages` holds a lone surrogate .U\+DC00 at character 0.",
        ),
        ({"prompt": [{"role": "user", "content": 7}]}, "`prompt` holds content of the type int"),
        ({"prompt": [{"role": 3, "content": "Hi"}]}, "`prompt` must hold dicts with `role` and `content`"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": 3}, "must be a dict, got 3"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named(build, row, said):
    good = (
        {"prompt": "What is 3?"}
        if isinstance(row.get("prompt"), str)
        else {"prompt": [{"role": "user", "content": "Hi"}]}
    )
    stream = IterableDataset.from_generator(lambda: iter([good, row]))
    trainer = build(dataset=IterableDataset.from_generator(lambda: iter([good])))
    with pytest.raises(ValueError, match=f"Row 1 of the test dataset: .*{said}"):
        list(trainer._prepare_dataset(stream, None, trainer.args, False, None, "test"))


@pytest.mark.parametrize(
    ("made", "way"),
    [(Dataset.to_list, "Dataset.from_list"), (lambda rows: DatasetDict(test=rows), "one of its splits")],
)
def test_what_is_no_dataset_is_told_how_it_becomes_one(build, made, way):
    with pytest.raises(TypeError, match=f"The test dataset must be a `Dataset` or `IterableDataset`, got .*{way}"):
        build().predict(made(prompts(2)))


def blended_rows():
    """The second is read by a light teacher whose prompt is longer than the heavy one's."""
    shares = [Share("heavy", 0.7, [1] * 5, ""), Share("light", 0.3, [1] * 9, "")]
    row = {"prompt_ids": [1, 2], "teacher_prompt_ids": [1] * 5, "teacher": "heavy", "reference_ids": [], "frame": ""}
    return Dataset.from_list([{**row, BLEND: ""}, {**row, BLEND: to_json(shares)}])


def test_the_room_of_every_teacher_of_a_blend_is_checked(caplog):
    rows = blended_rows()
    check_room(rows, {"heavy": 6, "light": 10}, 1, "train")
    with pytest.raises(ValueError, match="Row 1 of the train dataset: its prompt has 9 tokens for the teacher 'light'"):
        check_room(rows, {"heavy": 6, "light": 9}, 1, "train")
    caplog.clear()
    check_room(rows, {"light": 10}, 2, "train")
    assert "The longest prompt of the train dataset has 9 tokens for the teacher 'light'" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("contexts", "kept"), [({"light": 9}, 1), ({"light": 10}, 2), ({"heavy": 6, "light": 9}, 1)])
def test_rows_without_room_for_one_teacher_of_a_blend_are_dropped(contexts, kept, streamed):
    rows = blended_rows().to_iterable_dataset() if streamed else blended_rows()
    assert len(list(_without_overlong(rows, None, contexts, "train"))) == kept
