"""A file with everything wrong in it that a file for OpenAI can have: its lines, and what is in each."""

import json

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "What is the capital of France?"}
_ANSWER = {"role": "assistant", "content": "Paris."}
_TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Paris"}'}}
_RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "12"}


def _row(*messages, **more):
    return json.dumps({"messages": list(messages), **more}, ensure_ascii=False).encode()


def _chat(**answer):
    return _row(_SYSTEM, _USER, {**_ANSWER, **answer})


def _call(*after, arguments=_CALL["function"]["arguments"], name="get", id="call_1", tools=_TOOL):
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    ask = {"role": "assistant", "content": None, "tool_calls": [call]}
    return _row(_SYSTEM, _USER, ask, *after, tools=[tools])


def _image(role="user", url="data:image/png;base64,AAAA", count=1):
    shown = {"type": "image_url", "image_url": {"url": url}}
    return _row(_SYSTEM, {"role": role, "content": [shown] * count}, _USER, _ANSWER)


LINES: list[tuple[bytes, set[str]]] = [
    (b"\xef\xbb\xbf" + _chat(), {"W110"}),
    (_chat(), set()),
    (_chat().replace(b"Paris", b"Gen\xe8ve"), {"E001"}),
    (_chat()[:-3], {"E002"}),
    (b'{"messages": NaN}', {"E002"}),
    (b'"messages"', {"E003"}),
    (b'{"prompt": "a", "completion": "b"}', {"E004"}),
    (b'{"text": "a"}', {"E004"}),
    (b'{"neither": "a"}', {"E004"}),
    (_chat()[:-1] + b', "messages": []}', {"E005"}),
    (_chat().replace(b"Paris.", b"Paris \\ud83d"), {"E006"}),
    (_chat().replace(b"Paris.", b"Par\\u0000is."), {"E006"}),
    (_row("hello"), {"E007"}),
    (_row(), {"E010"}),
    (_row({**_USER, "role": "human"}, _ANSWER), {"E011"}),
    (_row({**_USER, "content": [{"type": "input_audio"}]}, _ANSWER), {"E012"}),
    (_chat(content=None), {"E013"}),
    (_row(_SYSTEM, _USER), {"E014"}),
    (_chat(weight=-1), {"E016"}),
    (_chat(weight=0.5), {"E016"}),
    (_row(_SYSTEM, {**_USER, "weight": 1}, _ANSWER), {"E017", "W120"}),
    (_chat(weight=0), {"E018"}),
    (_call(_RESULT, _ANSWER, tools={"type": "web_search"}), {"E020", "E021"}),
    (_call(_RESULT, _ANSWER, name="put"), {"E021"}),
    (_call(_RESULT, _ANSWER, arguments="{city"), {"E022"}),
    (_call(_RESULT, _ANSWER, arguments=json.dumps('{"city": 1}')), {"E022"}),
    (_call({**_RESULT, "tool_call_id": "call_7"}, _ANSWER), {"E023", "E024"}),
    (_call(_USER, _ANSWER), {"E024"}),
    (_call(_RESULT, _ANSWER, id=""), {"E025", "E023"}),
    (_image("system"), {"E030"}),
    (_image(url="file:///etc/a.png"), {"E031"}),
    (_image(count=11), {"E032"}),
    (b"", {"W115"}),
    (_row(_USER, _ANSWER), {"W101"}),
    (_row(_SYSTEM, _USER, _ANSWER, _ANSWER), {"W102"}),
    (_row(_SYSTEM, _USER, _ANSWER, source="wiki"), {"W103"}),
    (_chat(content="Paris.\n"), {"W104"}),
    (_chat(content=" "), {"W105"}),
    (_row({**_SYSTEM, "role": "developer"}, _USER, _ANSWER), {"W106"}),
    (_call(_RESULT, _ANSWER), set()),
    (_row({**_SYSTEM, "content": "Be kind."}, _USER, _ANSWER), set()),
    (_row(_SYSTEM, _USER, {**_ANSWER, "weight": 0}, _USER, {**_ANSWER, "weight": 1}), set()),
]
"""(a line, the codes of its verdicts as a row for OpenAI)"""


def _pair(chosen=_ANSWER, rejected=None, asked=(_USER,)):
    rejected = {**_ANSWER, "content": "Lyon."} if rejected is None else rejected
    row = {
        "input": {"messages": list(asked)},
        "preferred_output": [chosen],
        "non_preferred_output": [rejected],
    }
    return json.dumps(row).encode()


def _labelled(label, **more):
    return json.dumps(
        {"prompt": "Capital of France?", "completion": " Paris.", "label": label, **more}
    ).encode()


OTHERS: dict[str, list[tuple[bytes, set[str]]]] = {
    "openai_preference": [
        (_pair(), set()),
        (
            _pair().replace(
                b'"preferred_output": [', b'"preferred_output": [{"role": "user", "content": "x"}, '
            ),
            {"E040"},
        ),
        (_pair(rejected=_ANSWER), {"E041"}),
        (_pair(asked=(_USER, _ANSWER)), {"E042"}),
    ],
    "unpaired": [(_labelled(True), set()), (_labelled(False), set()), (_labelled("perhaps"), {"E050"})],
    "mistral": [
        (_row(_SYSTEM, _USER, _ANSWER), set()),
        (_row(_SYSTEM, _USER, _ANSWER, _USER), {"E015"}),
        (_row(_SYSTEM, _USER, _ANSWER, _SYSTEM, _USER, _ANSWER), {"E026"}),
    ],
}
"""The same for other targets."""


def write(path, lines=LINES) -> None:
    path.write_bytes(b"\n".join(line for line, _ in lines) + b"\n")
