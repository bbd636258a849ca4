"""Removes secrets from everything that is printed, logged, saved or put on a card.

Decisions
- A secret is recognised by its value, where an environment variable with a secret's name holds it; by its form (`hf_…`,
  `sk-…`, a JWT); by what precedes it (`Bearer`, `--api_key`, `"token":`, `?key=`); or by its place in an address
  (`user:password@`).
- Names of text tokens (`eos_token`, `max_new_tokens`) are not secret, nor are numbers, truth values and None.
- A secret is replaced as a whole by `HIDDEN`, which shows neither its length nor its ends. In doubt, a word is hidden.
"""

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from urllib.parse import quote


HIDDEN = "…"
_SHORTEST = 8  # characters; a shorter value of a variable may be an ordinary word, and is not searched for
_ALWAYS = {
    "apikey", "accesskey", "secretkey", "authtoken", "accesstoken", "hubtoken", "password", "passwd", "passphrase", "pwd",
    "secret", "credential", "authorization", "auth", "bearer", "cookie", "signature", "sig",
}  # fmt: skip
_SECRET_AFTER_OWNER = {"token", "key"}  # secret as whole names, or after one of `_OWNERS`
_OWNERS = {
    "api", "access", "auth", "hub", "hf", "id", "refresh", "session", "bearer", "secret", "private", "security", "server",
    "service", "account", "aws", "azure", "github", "gitlab", "wandb", "openai", "anthropic", "fireworks", "user", "admin",
    "deploy", "write", "read", "registry", "encryption", "signing", "subscription", "license", "client", "teacher",
    "sas", "oauth", "jwt", "sso", "pat", "bot", "app", "device", "slack", "discord", "google", "gcp", "vault", "storage",
    "database", "db", "cloud", "ngrok", "replicate", "together", "groq", "mistral", "cohere", "runpod", "modal", "comet",
    "neptune", "mlflow", "clearml", "trackio",
}  # fmt: skip
_BY_FORM = re.compile(
    r"\b(?:hf_\w{8,}|api_org_\w{8,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{8,}|fw_\w{16,}|"
    r"xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{12,}|AIza[\w-]{30,}|nvapi-[\w-]{16,}|gsk_\w{16,}|r8_\w{16,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_USERINFO = re.compile(r"(\w[\w+.-]*://)[^\s/@'\"<>]+@")
_WORD = rf"(?:{'|'.join(sorted({*_ALWAYS, *_SECRET_AFTER_OWNER}))})s?"
_QUOTED_OR_BARE = r"""(?:\[[^\]]*\]|\\*"(?:[^"\\]|\\[^"])*\\*"|\\*'(?:[^'\\]|\\[^'])*\\*'|[^\s'"&,;)}\]]+)"""
_NAMED = re.compile(
    rf"""(?<!\w)([\w.\-]*{_WORD})(\\*["']?\s*(?:=>|[:=])\s*|\s+(?=["']))((?:Bearer|Basic|Token)\s+)?({_QUOTED_OR_BARE})""",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(?<!\w)(--?[\w.\-]*{_WORD})(\s+)({_QUOTED_OR_BARE})", re.IGNORECASE)
_SCHEME = re.compile(r"\b(Bearer|Basic)(\s+)[\w.~+/=%\-]{3,}", re.IGNORECASE)
_NOTHING = re.compile(r"""\\*["']?(?:-?\d+(?:\.\d*)?|true|false|none|null|…|\*+|<[\w ]+>)?\\*["']?""", re.IGNORECASE)


@lru_cache(maxsize=4096)  # every text that is redacted asks for all environment variables
def is_secret_name(name: str) -> bool:
    """Whether the value of an option, variable, header or field with this name must be hidden."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.strip()).lower()
    *before, last = [word for word in re.split(r"[^a-z0-9]+", words) if word] or [""]
    one = last.removesuffix("s")
    if one in _ALWAYS or last in _ALWAYS:
        return True
    if one not in _SECRET_AFTER_OWNER:
        return False
    return before[-1] in _OWNERS if before else last == one


def redact(text: str, *secrets: str) -> str:
    """`text` without secrets, and without the given `secrets` in any spelling that a program may give them."""
    for spelling in sorted({form for held in (*secrets, *_held()) for form in _spellings(held)}, key=len, reverse=True):
        text = text.replace(spelling, HIDDEN)
    text = _BY_FORM.sub(HIDDEN, _USERINFO.sub(rf"\1{HIDDEN}@", text))
    text = _SCHEME.sub(rf"\1\2{HIDDEN}", _NAMED.sub(_hide_named, text))
    return _OPTION.sub(lambda match: _hide(match, match[1], match[1] + match[2], match[3]), text)


def redacted(value: object, name: str = "") -> object:
    """`value` of the field `name`, with all secrets hidden, also inside dicts and lists."""
    if isinstance(value, Mapping):
        return {key: redacted(own, str(key)) for key, own in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redacted(own, name) for own in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if is_secret_name(name) and not _is_harmless(name, value) else redact(value)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: without the values of options with a secret's name, and without what `redact` finds."""
    shown, hide = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        if hide and not option:
            shown.append(HIDDEN)
            continue
        secret = bool(option) and is_secret_name(option)
        shown.append(f"{option}={HIDDEN}" if secret and equals else f"{option}{equals}{_argument(value)}")
        hide = secret and not equals
    return shown


def _is_harmless(name: str, value: str) -> bool:
    """Whether a value cannot be a secret. A number is not a token, but may be a password."""
    number = any(character.isdigit() for character in value)
    return _NOTHING.fullmatch(value) is not None and not (number and re.search("pass|pwd|secret", name, re.IGNORECASE))


def _argument(value: str) -> str:
    """Redacts one argument. JSON stays JSON."""
    if value.lstrip()[:1] in ("{", "["):
        try:
            return json.dumps(redacted(json.loads(value)), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
    return redact(value)


def _held() -> list[str]:
    """The secrets in this process's environment."""
    return [
        value.strip()
        for name, value in os.environ.items()
        if len(value.strip()) >= _SHORTEST
        and is_secret_name(name)
        and not name.endswith("PWD")  # PWD: a shell's folders
    ]


def _spellings(secret: str) -> set[str]:
    """The secret as it is, and as addresses, JSON, `repr` and basic authentication spell it."""
    forms = {secret, secret.strip()}
    forms |= {spelled for form in forms for spelled in (quote(form, safe=""), base64.b64encode(form.encode()).decode())}
    forms |= {repr(secret)[1:-1], json.dumps(secret)[1:-1], repr(secret.encode())[2:-1]}
    return {form for form in forms if form}


def _hide_named(match: re.Match) -> str:
    name, between, scheme, value = match.groups()
    return _hide(match, name, f"{name}{between}{scheme or ''}", value)


def _hide(match: re.Match, name: str, before: str, value: str) -> str:
    if not is_secret_name(name) or _is_harmless(name, value):
        return match.group()
    mark = re.match(r"""(?:\\*["'])?""", value).group()
    return f"{before}{mark}{HIDDEN}{mark}"
