"""Executes tool calls during generation: the student writes a call, reads the result and continues.

Decisions
- As in TRL's `DistillationTrainer`: tools are functions with type hints and a docstring, a result is returned as `str(result)`,
  an error as `{"error": message}`, and `max_new_tokens` limits everything after the prompt, results included.
- Calls are parsed by the student's own template (`text.calls`). Text that cannot be parsed as a call ends the conversation. Of a
  turn's calls all are executed or none.
- Each model reads the results in its own template, after its own form of the call.
- One conversation is one completion. Its frame says where its turns begin. Only what the student wrote is scored.
- If a call cannot be answered (too many rounds, no room, a template that cannot write it), the completion ends with it.
- All processes take the same number of rounds. One that has nothing left to do generates for its first prompt, and drops the text.

Left out: asynchronous tools, results that are not text, tools that keep state between two calls of one conversation.
"""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import get_json_schema

from ..config import CrossTokenizerGKDConfig
from ..text.calls import with_ids
from ..text.chat import Conversation, Speaker
from ..text.parsing import Grammar, spelled, symbols, text_of
from ..text.planning import kept_kinds
from ..text.sections import read_calls
from ..text.token_bytes import token_table
from ..text.turns import ANSWER, CALL, CALLS, RESULT, RESULT_PROBE, THOUGHT, USER, Unrenderable, read_turn
from .frames import Frame, Later, Prompt, conversation_from_json
from .generation import Writer, Written


logger = logging.getLogger(__name__)


def schemas(tools: Sequence[Callable]) -> list[dict]:
    """
    JSON schemas of functions, in the form that `apply_chat_template` needs.

    Raises `ValueError` for a tool that is not a function, is asynchronous, has no type hints or docstring, or whose name is taken.
    """
    found = []
    for tool in tools:
        if not callable(tool) or not hasattr(tool, "__name__"):
            raise ValueError(
                f"tools holds {tool!r}: pass functions, with type hints and a docstring that names each argument."
            )
        if inspect.iscoroutinefunction(tool):
            raise ValueError(f"The tool {tool.__name__!r} is asynchronous: pass a function that calls it and waits.")
        try:
            found.append(get_json_schema(tool))
        except Exception as error:  # of transformers, which has several kinds
            raise ValueError(f"The tool {tool.__name__!r} cannot be described to a model: {error}") from error
    names = [schema["function"]["name"] for schema in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tools holds several functions of the name {twice[0]!r}: rename all but one.")
    return found


def with_tools(conversation: Conversation, tools: list[dict]) -> Conversation:
    """The conversation with `tools`, unless its row has its own. Raises `ValueError` for a plain-text prompt."""
    if isinstance(conversation.prompt, str):
        raise ValueError("its prompt is text, and tools need a conversation: make it a list of messages")
    return conversation if conversation.tools else replace(conversation, tools=tools)


def check_sides(tools: list[dict], student: Speaker, teachers: Mapping[str, Speaker]) -> None:
    """Raises `ValueError` where a template cannot write a call and its result, or where the student's calls cannot be read."""
    result = Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT], None, tools)
    for side in (student, *teachers.values()):
        whose = "student" if side is student else "teacher"
        try:
            side.prompt_ids(result)
            side.after_calls(result)
        except ValueError as refusal:
            raise ValueError(
                f"tools: the {whose} cannot go on after a call ({refusal}). Give it a template that writes calls and results "
                f"(`chat_template` in {'' if side is student else 'teacher_'}chat_template_kwargs)."
            ) from refusal
    if student.call_reader is None:
        raise ValueError(
            "tools: the way in which the student's template writes calls is not understood, so none could be executed. Give it "
            "another template (`chat_template` in chat_template_kwargs)."
        )


@dataclass
class _Writing:
    """A conversation so far: its prompt, the completion with the writer's log-probs, and its turns."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    later: list[Later] = field(default_factory=list)
    turn: str = ""  # the student's next turn
    conversation: Conversation | None = None
    rounds: int = 0

    def take(self, written: Written, room: int) -> list[int]:
        """Adds the written ids, as many as there is room for, and returns them."""
        ids, scores = written
        if scores is not None:
            self.scores = (self.scores or []) + scores[:room]
        self.ids += ids[:room]
        return ids[:room]

    @property
    def next_prompt(self) -> Prompt:
        return replace(self.prompt, student_ids=[*self.prompt.student_ids, *self.ids])

    @property
    def done(self) -> tuple[Prompt, Written]:
        if not self.later:
            return self.prompt, (self.ids, self.scores)
        frame = replace(self.prompt.framed, later=tuple(self.later)).to_json()
        return replace(self.prompt, frame=frame), (self.ids, self.scores)


class ToolLoop:
    """
    Generates completions in which calls are executed.

    Args:
        tools: functions that the student may call.
        student, teachers: the sides of the conversation, teachers by name.
        stop_ids: student ids that end a turn.
        args: the run's settings.
        context: tokens of prompt and completion that the student can read; `None` for no limit.

    Raises `ValueError` for tools or templates that do not work together.
    """

    def __init__(
        self,
        tools: Sequence[Callable],
        student: Speaker,
        teachers: Mapping[str, Speaker],
        stop_ids: Sequence[int],
        args: CrossTokenizerGKDConfig,
        context: int | None = None,
    ):
        check_sides(schemas(tools), student, teachers)
        self._tools = {tool.__name__: tool for tool in tools}
        self._student, self._teachers, self._stop_ids = student, teachers, set(stop_ids)
        self._room, self._rounds, self._context = args.max_new_tokens, args.max_tool_calling_iterations, context
        self._table = token_table(student.tokenizer)
        self._grammar = cache(lambda turn: Grammar(read_turn(turn), self._table))
        self._said: set[str] = set()

    def __call__(
        self, write: Writer, model: nn.Module, prompts: Sequence[Prompt], step: int
    ) -> tuple[list[tuple[Prompt, Written]], dict[str, tuple[float, float]]]:
        """
        For each prompt: the prompt, with a frame that describes the turns, and the completion, with results between its turns. Also
        metrics.

        Raises `ValueError` for prompts that were rendered without tools.
        """
        rows = [_Writing(prompt, turn=prompt.framed.student) for prompt in prompts]
        for row in rows:
            if not row.prompt.framed.asked:
                raise ValueError(
                    "The dataset was rendered without tools: give the trainer the one that it was rendered from."
                )
            row.conversation = conversation_from_json(row.prompt.framed.asked)
        counts = {"executed": 0, "failed": 0, "unanswered": 0}
        pending = rows
        while True:
            ready = self._that_fit(pending)
            asked = [row.next_prompt for row in ready] or list(prompts[:1])
            for row, written in zip(ready, write(model, asked, step), strict=False):
                if not self._goes_on(row, row.take(written, self._room - len(row.ids)), counts):
                    pending = [other for other in pending if other is not row]
            if not any(gather_object([bool(pending)])):
                break
        count = sum(not prompt.is_padding for prompt in prompts)
        return [row.done for row in rows], {
            "tools/call_frequency": (counts["executed"], count),
            "tools/failure_frequency": (counts["failed"], counts["executed"]),
            "tools/unanswered_fraction": (counts["unanswered"], count),
        }

    def _that_fit(self, rows: Sequence[_Writing]) -> list[_Writing]:
        """The rows that have room for `max_new_tokens`, or else for as many tokens as the row with the most room. The others wait
        until those have written."""
        if self._context is None or not rows:
            return list(rows)
        most = max(self._room - len(row.ids) for row in rows)
        return [row for row in rows if len(row.next_prompt.student_ids) + most <= self._context]

    def _goes_on(self, row: _Writing, ids: list[int], counts: dict[str, int]) -> bool:
        """Whether the turn `ids` ends with calls that were answered. If so, the results are added to `row`."""
        if not ids or ids[-1] not in self._stop_ids or row.prompt.is_padding or not row.turn:
            return False
        written, _ = symbols(np.array(ids), self._table)
        parsed = self._grammar(row.turn).parse(written, ended=True)
        tag = self._student.call_reader.tag
        said = [written[start:end] for kind, start, end in parsed.sections if kind == ANSWER]
        is_garbled = bool(tag) and any(tag in spelled(own, self._table) for own in said)
        if parsed.kinds[-1] != CALLS and not is_garbled:
            return False
        tools = row.conversation.tools
        calls = None if is_garbled else read_calls(parsed, written, self._student, self._table, tools)
        if calls is None or row.rounds == self._rounds or not self._room > len(row.ids):
            counts["unanswered"] += 1
            return False
        made = sum(len(json.loads(turn.calls)) for turn in row.later)
        calls = with_ids(calls, made)
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        for kind, start, end in parsed.sections:
            if kind != CALLS:
                message[{ANSWER: "content", THOUGHT: "reasoning_content"}[kind]] = text_of(written[start:end])
        kinds = parsed.without_empty_thought(written).kinds
        expected = _extended(row.conversation, [message, *(_result(call, RESULT_PROBE) for call in calls)])
        try:
            self._after(row, kinds, expected, calls)  # raises before a tool is run for a result that nobody reads
            results = [_result(call, self._execute(call, counts)) for call in calls]
            asked = _extended(row.conversation, [message, *results])
            student, between, later = self._after(row, kinds, asked, calls)
        except ValueError as refusal:
            if str(refusal) not in self._said:
                self._said.add(str(refusal))
                logger.warning(f"A call was not answered, and the completion ends with it: {refusal}")
            counts["unanswered"] += 1
            return False
        if len(row.ids) + len(between) >= self._room:
            counts["unanswered"] += 1
            return False
        row.ids += between
        if row.scores is not None:
            row.scores += [float("nan")] * len(between)
        row.later.append(later)
        row.turn, row.conversation, row.rounds = student, asked, row.rounds + 1
        return True

    def _after(
        self, row: _Writing, kinds: tuple[str, ...], asked: Conversation, calls: list[dict]
    ) -> tuple[str, list[int], Later]:
        """The student's next turn, the ids it is given before that, and the same for the teacher."""
        student, teacher = self._student, self._teachers[row.prompt.teacher]
        before = teacher.turn(replace(row.conversation, reference=None).for_teacher)
        kept = kept_kinds(kinds, before)
        if kept not in before.forms:
            raise Unrenderable(f"the teacher's template {before.missing.get(kept, 'leaves out calls of tools')}")
        opened, theirs = student.opened(asked.for_student), teacher.opened(asked.for_teacher)
        between, given = student.after_calls(asked.for_student), teacher.after_calls(asked.for_teacher)
        frame = Frame.of(opened, theirs, opened.ids)
        if max(frame.plain.dropped, frame.stem.dropped) > len(given):
            raise Unrenderable("the teacher's template changes the results when an answer follows")
        start = len(row.ids)
        later = Later(json.dumps(calls), start, start + len(between), tuple(given), frame.to_json())
        return frame.student, between, later

    def _execute(self, call: Mapping, counts: dict[str, int]) -> str:
        """A call's result or error."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        counts["executed"] += 1
        try:
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            content = str(self._tools[name](**deepcopy(arguments)))  # both models read the call as it was written
        except (Exception, SystemExit) as error:  # any error goes back to the student
            counts["failed"] += 1
            content = str({"error": str(error)})
        return content.encode(errors="backslashreplace").decode()  # half a character has no bytes


def _result(call: Mapping, content: str) -> dict:
    """The message with a call's result."""
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": content}


def _extended(conversation: Conversation, messages: list[dict]) -> Conversation:
    """The conversation with `messages` added, for both models."""
    hint = conversation.teacher_prompt
    return replace(
        conversation,
        prompt=[*conversation.prompt, *messages],
        teacher_prompt=None if hint is None else [*hint, *messages],
    )
