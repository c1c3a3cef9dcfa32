"""Suggest a grant in TOML that allows a refused request. The operator narrows it and adds it to the configuration."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .judging import EXPORTS, WITHOUT_KEY, Question

__all__ = ["suggested"]


def suggested(questions: Sequence[Question], grant_names: Collection[str], user: str | None) -> str:
    """Return a `[[grant]]` table that allows the questions. `grant_names`: names that are not free."""
    example = questions[0]
    actions = list(dict.fromkeys(question.action for question in questions))
    name = base = f"{user or example.peer.access_key or example.peer.uid}-{actions[0].removeprefix('kms:')}"
    number = 2
    while name in grant_names:
        name, number = f"{base}-{number}", number + 1
    lines = ["[[grant]]", f"name = {_text(name)}", f"to = {_table(_to(example, user))}", f"actions = {_list(actions)}"]
    keys = [_key(question) for question in questions]
    lines.append(f"keys = {_list(list(dict.fromkeys(keys)))}")
    if any(question.names is None for question in questions):
        lines.append("# the key is not recorded: put its name in the place of alias/NAME")
    is_export = [question for question in questions if question.action in EXPORTS]
    if is_export and example.fingerprint is not None:
        lines.append(f"recipients = {_list([example.fingerprint])}")
    elif is_export:
        lines.append("# without recipients, data keys go to any public key that the caller names")
    if example.context:
        lines.append(f"encryption_context = {_table(example.context)}")
    elif example.context_keys:
        lines.append(f"# encryption_context can demand values of: {', '.join(map(_text, example.context_keys))}")
    return "\n".join(lines)


def _to(question: Question, user: str | None) -> dict[str, Any]:
    peer = question.peer
    to: dict[str, Any] = {"access_key": peer.access_key} if peer.access_key else {}
    if user is not None:
        to["user"] = user
    elif peer.uid is not None or not peer.access_key:
        to["uid"] = peer.uid
    for selector in ("unit", "pod", "exe", "sha256"):
        value = getattr(peer, selector)
        if value is not None:
            to[selector] = value
    return to


def _key(question: Question) -> str:
    """Return the most readable name of the key: an alias, or else the ID."""
    if question.action in WITHOUT_KEY:
        return "*"
    names = [name for name in question.names or ("alias/NAME",) if not name.startswith("acs:")]
    return next((name for name in names if name.startswith("alias/")), names[0])


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, texts))}]"


def _table(pairs: Mapping[str, Any]) -> str:
    values = [f"{_name(name)} = {_text(value) if isinstance(value, str) else value}" for name, value in pairs.items()]
    return f"{{ {', '.join(values)} }}"


def _name(name: str) -> str:
    return name if name.isascii() and name.isidentifier() else _text(name)
