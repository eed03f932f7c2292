"""Tools and tool calls of a record, as chat templates read them."""

from __future__ import annotations

import json
from typing import Any

from pocl_ds.data.field_names import is_empty
from pocl_ds.errors import DataError


def read_tools(value: Any, place: str, name: str, setting: str) -> tuple[dict[str, Any], ...]:
    """The tools of a field: a list of JSON schemas, one of them, or the JSON text of either.

    setting: the recipe field that names the field. Raises DataError, which names both.
    """
    if is_empty(value):
        return ()
    tools = []
    for tool in _list(value, place, name):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{place}: field {name!r} must hold tools as JSON schemas with a name, found "
                f"{_excerpt(tool)}: fix or remove the record, or set {setting}=null to ignore the "
                "field",
                reason="tools",
            )
        tools.append(tool)
    return tuple(tools)


def read_tool_calls(value: Any, where: str, name: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in the form of the OpenAI API, with their arguments as an object.

    value: calls in that form or as `name` and `arguments`: a list, one of them, or the JSON text of
    either. where: place, turn and role; name: the key, for messages. Raises DataError.
    """
    calls = []
    for call in _list(value, where, name):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or is_empty(function.get("name")):
            raise _wrong_call(where, name, call)
        arguments = _arguments(function, where, name)
        named = {**function, "arguments": arguments}
        if function is call:
            outer = {key: named.pop(key) for key in ("id", "type") if key in named}
        else:
            outer = {key: part for key, part in call.items() if key != "function"}
        outer = {key: part for key, part in outer.items() if part is not None}
        calls.append({"type": "function", **outer, "function": named})
    return tuple(calls)


def _arguments(function: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """The arguments of a call: an object, or its JSON text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parse(arguments)
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, dict):
        raise _wrong_call(where, name, function)
    return arguments


def _wrong_call(where: str, name: str, call: Any) -> DataError:
    return DataError(
        f"{where}: {name} must hold calls with a name and arguments as an object or its JSON text, "
        f"found {_excerpt(call)}: fix or remove the record",
        reason="tool calls",
    )


def _list(value: Any, where: str, name: str) -> list[Any]:
    """A list, the list of one object, or what the JSON texts in them say."""
    value = _parse(value) if isinstance(value, str) else value
    items = value if isinstance(value, list) else [value]
    return [_parse(item) if isinstance(item, str) else item for item in items]


def _parse(text: str) -> Any:
    """The value of a JSON text; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text[:80])
