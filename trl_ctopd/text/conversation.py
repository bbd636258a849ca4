"""One dataset row as a conversation, whatever shape the row has: what is asked, the reference, tools, template kwargs.

Left out: content that is not text, several reference messages in one row.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


_MESSAGES = ("prompt", "completion", "messages", "conversations", "teacher_prompt")  # columns that may hold messages
_ASKS = ("prompt", "messages", "conversations")  # one of them holds what is asked
SPEAKERS = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
REASONING = ("reasoning_content", "reasoning", "thinking")  # all three name a thought
# arguments of `apply_chat_template` itself
_OF_THE_CALL = {
    "conversation",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
}
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Conversation:
    """One dataset row: a prompt and, for off-policy training, a reference answer.

    Attributes:
        prompt: text (a standard row) or messages (a conversational one).
        reference: text beside a text prompt, one assistant message beside messages; None for a row without an answer.
        tools: JSON schemas, as `apply_chat_template` takes them.
        chat_template_kwargs: the row's own variables for both templates.
        teacher_prompt: what the teacher reads in the place of `prompt`, of the same kind; None where it reads `prompt`.
    """

    prompt: str | list[dict]
    reference: str | dict | None = None
    tools: list[dict] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    teacher_prompt: str | list[dict] | None = None

    @property
    def begun(self) -> str | None:
        """The text of an answer that the prompt ends in, which is to be continued; None where it ends otherwise."""
        last = {} if isinstance(self.prompt, str) else self.prompt[-1]
        return last.get("content", "") if last.get("role") == "assistant" else None

    @property
    def for_teacher(self) -> "Conversation":
        """As the teacher reads it."""
        if self.teacher_prompt is None:
            return self
        return replace(self, prompt=self.teacher_prompt, teacher_prompt=None)

    @property
    def for_student(self) -> "Conversation":
        """As the student reads it: without what only the teacher reads."""
        return replace(self, teacher_prompt=None)


def read_example(example: Mapping) -> Conversation:
    """Reads a row of any TRL shape: `prompt`, `prompt` + `completion`, or `messages`; `tools`, `chat_template_kwargs`; and
    `teacher_prompt`, which the teacher reads in place of the prompt.

    The last message of `messages` is the reference if the assistant wrote it; a `prompt` that ends in an assistant
    message is continued. ShareGPT's `conversations`, and `from` and `value` in any column of messages, are read as TRL's
    `maybe_convert_to_chatml` converts them, with human for user and gpt for assistant. None counts as absent, also inside
    messages and tools: Arrow fills missing keys with it.

    Raises `ValueError` for a row without exactly one of `prompt` and `messages`, for a malformed one, for one whose last user message
    is empty, and for a `teacher_prompt` of another kind than the prompt.
    """
    row = {column: value for column, value in example.items() if value is not None}
    if not row.keys() & _ASKS and (missing := [column for column in _ASKS if column in example]):
        raise ValueError(
            f"its `{'` and its `'.join(missing)}` is None, so that nothing is asked: give the row one, or leave it out (`dataset.filter`)"
        )
    row = _as_messages(row)
    for column in ("prompt", "completion", "messages", "tools", "teacher_prompt"):
        _refuse_lone_surrogates(row.get(column), column)
    conversation = _read(row)
    if (teacher_prompt := row.get("teacher_prompt")) is None:
        return conversation
    return replace(conversation, teacher_prompt=_teacher_prompt(teacher_prompt, conversation.prompt))


def check_template_kwargs(kwargs: Mapping):
    """Raises `ValueError` where `kwargs` has more than variables of a chat template."""
    if taken := sorted(_OF_THE_CALL & kwargs.keys()):
        raise ValueError(
            f"`chat_template_kwargs` has {', '.join(taken)}, which says how a template is called. The trainer says that itself: leave it out"
        )
    if "tools" in kwargs:
        raise ValueError("`chat_template_kwargs` has tools: give them in the column `tools`")


def _read(row: dict) -> Conversation:
    if "prompt" in row and "messages" in row:
        raise ValueError(
            f"a row needs one of `prompt` and `messages`, and this one has both (columns {sorted(row)}): remove one of the two "
            "(`dataset.remove_columns`)"
        )
    if "prompt" not in row and "messages" not in row:
        raise ValueError(
            f"a row needs `prompt` or `messages`, and this one has neither (columns {sorted(row)}): rename the column with what is asked "
            "(`dataset.rename_column(name, 'prompt')`; on the command line `--prompt_column name`)"
        )
    kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"`chat_template_kwargs` must be a dict, got {kwargs!r}")
    kwargs = _without_none(kwargs)
    check_template_kwargs(kwargs)
    rest = {"tools": _tools(row.get("tools")), "chat_template_kwargs": kwargs}
    if "messages" in row:
        *prompt, last = _asked(row["messages"], "messages")
        if last["role"] != "assistant":
            return Conversation([*prompt, last], **rest)
        if not prompt:
            raise ValueError("`messages` holds an assistant turn only: put the turn that it answers before it")
        return Conversation(prompt, last, **rest)
    if isinstance(row["prompt"], str):
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise ValueError(
                f"`prompt` is text and `completion` is {type(completion).__name__}: make both the same kind"
            )
        return Conversation(row["prompt"], completion, **rest)
    prompt = _asked(row["prompt"], "prompt")
    if "completion" not in row:
        return Conversation(prompt, **rest)
    completion = _messages(row["completion"], "completion")
    if [message["role"] for message in completion] != ["assistant"]:
        raise ValueError(
            "a conversational `completion` is one assistant message, and this one has the roles "
            f"{[message['role'] for message in completion]}: move the earlier turns to `prompt`"
        )
    return Conversation(prompt, completion[0], **rest)


def _as_messages(row: dict) -> dict:
    """The row with ShareGPT's names replaced by OpenAI's."""
    lists = {column: value for column, value in row.items() if column in _MESSAGES and isinstance(value, list)}
    names = {name for value in lists.values() for message in value if isinstance(message, Mapping) for name in message}
    if "conversations" not in row and not names & {"from", "value"}:
        return row
    if others := sorted(row.keys() & {"conversations", "messages", "prompt"} if "conversations" in row else {})[1:]:
        raise ValueError(
            f"a row needs one of `conversations`, `messages` and `prompt`, and this one has {', '.join(others)} beside "
            "`conversations`: remove columns of the dataset (`dataset.remove_columns`)"
        )
    from trl.data_utils import maybe_convert_to_chatml  # a conversation in OpenAI's form needs no TRL

    # it changes messages in place, and knows TRL's columns alone
    copies = {column: [_with_known_speaker(message, column) for message in value] for column, value in lists.items()}
    converted = maybe_convert_to_chatml({**row, **copies})
    if "teacher_prompt" in copies:
        converted["teacher_prompt"] = maybe_convert_to_chatml({"prompt": copies["teacher_prompt"]})["prompt"]
    return converted


def _with_known_speaker(message, column: str):
    """A copy whose speaker is called as in OpenAI's form. TRL leaves ShareGPT's names as they are, and a template then writes
    turns of the role gpt, which no reader takes for answers."""
    if not isinstance(message, Mapping) or message.get("from") is None:
        return _without_none(message)
    speaker = message["from"]
    if speaker not in SPEAKERS:
        raise ValueError(f"`{column}` holds a message `from` {speaker!r}: make it one of {', '.join(SPEAKERS)}")
    return {**_without_none(message), "from": SPEAKERS[speaker]}


def _teacher_prompt(value, prompt: str | list[dict]) -> str | list[dict]:
    if isinstance(value, str) != isinstance(prompt, str):
        kinds = ["text" if isinstance(one, str) else "messages" for one in (prompt, value)]
        raise ValueError(
            f"the prompt is {kinds[0]} and `teacher_prompt` is {kinds[1]}: make both the same kind. `teacher_prompt` is the whole "
            "of what the teacher reads before the answer, the question included"
        )
    if isinstance(value, str):
        return value
    messages = _asked(value, "teacher_prompt")
    begun = [own[-1].get("content", "") if own[-1]["role"] == "assistant" else None for own in (prompt, messages)]
    if begun[0] != begun[1]:
        said = ["no begun answer" if answer is None else f"the begun answer {answer!r}" for answer in begun]
        raise ValueError(
            f"the prompt ends with {said[0]} and `teacher_prompt` with {said[1]}: what the student writes has to go on from the "
            "same on both sides"
        )
    return messages


def _messages(value, column: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        text = "text or " if column in ("prompt", "teacher_prompt") else ""
        raise ValueError(f"`{column}` must be {text}a list of at least one message, got {value!r}")
    return [_message(message, column) for message in value]


def _asked(value, column: str) -> list[dict]:
    """Messages of which the last one of a user is not empty. The answer that an assistant has begun may be."""
    messages = _messages(value, column)
    asked = [message.get("content", "") for message in messages if message["role"] == "user"]
    if asked and not asked[-1].strip():
        raise ValueError(
            f"the last user message of `{column}` is empty ({asked[-1]!r}), so that nothing is asked: leave such rows out (`dataset.filter`)"
        )
    return messages


def _message(value, column: str) -> dict:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise ValueError(f"`{column}` must hold dicts with `role` and `content`, got {value!r}")
    message = _without_none(value)
    if isinstance(message.get("content"), list):
        parts = message["content"]
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        if strange := [part for part in parts if not isinstance(part, Mapping)]:
            raise ValueError(
                f"`{column}` holds content that is a list with {strange[0]!r} in it: make it one text, or a list of texts or of "
                "parts {'type': 'text', 'text': ...}"
            )
        if any(part.get("type") != "text" for part in parts):
            raise ValueError(
                f"`{column}` holds {[part.get('type') for part in parts]} content: only text can be distilled"
            )
        if strange := [part for part in parts if not isinstance(part.get("text"), str)]:
            raise ValueError(f"`{column}` holds a text part without `text`: {strange[0]!r}")
        message["content"] = "".join(part["text"] for part in parts)
    if not isinstance(message.get("content", ""), str):
        raise ValueError(
            f"`{column}` holds content of the type {type(message['content']).__name__}, {message['content']!r}: make it text"
        )
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], column)
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"`{column}` holds a {message['role']} message with neither `content` nor `tool_calls`")
    return message


def _calls(value, column: str) -> list[dict]:
    """Calls in OpenAI's form, except that their arguments are always a dict. In a row they may be a dict or JSON text."""
    calls = _parsed(value, f"`tool_calls` in `{column}`")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"`tool_calls` in `{column}` must be a list of dicts, or the JSON text of one, got {value!r}")
    found = []
    for call in calls:
        function = dict(call["function"] if isinstance(call.get("function"), Mapping) else call)
        if not isinstance(function.get("name"), str):
            raise ValueError(f"`tool_calls` in `{column}` holds a call without a `name`: {call!r}")
        function["arguments"] = _parsed(
            function.get("arguments") or {}, f"`arguments` of {function['name']!r} in `{column}`"
        )
        if not isinstance(function["arguments"], Mapping):
            raise ValueError(
                f"`arguments` of {function['name']!r} in `{column}` must be a dict, or the JSON text of one, got "
                f"{function['arguments']!r}"
            )
        wrapped = isinstance(call.get("function"), Mapping)
        beside = dict(call) if wrapped else {key: call[key] for key in ("id", "type") if key in call}
        function = {key: value for key, value in function.items() if wrapped or key in ("name", "arguments")}
        found.append({"type": "function", **beside, "function": function})
    return found


def _parsed(value, what: str):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is text that is not JSON ({error}): {value!r}") from error


def _tools(value) -> list | None:
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"`tools` is text that is not JSON ({error}): {value!r}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list or the JSON text of one, got {value!r}")
    return _without_none(tools) or None  # Llama's template takes [] for tools


def _refuse_lone_surrogates(value, column: str):
    if isinstance(value, Mapping):
        for item in value.values():
            _refuse_lone_surrogates(item, column)
    elif isinstance(value, list):
        for item in value:
            _refuse_lone_surrogates(item, column)
    elif isinstance(value, str) and (found := SURROGATE.search(value)):
        raise ValueError(
            f"`{column}` holds a lone surrogate (U+{ord(found[0]):04X} at character {found.start()}), which is half a character "
            "and has no bytes: decode the text with errors='replace'"
        )


def _without_none(value):
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
