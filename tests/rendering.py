"""What the tests of rendering share: conversations, and what of a document is trained."""

import itertools

import numpy as np

from ftjax.data.examples import to_record
from ftjax.data.render import render

EMOJI = "Héllo 👩‍👩‍👧 日本 e\u0301!"
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "a", "function": {"name": "get", "arguments": '{"z": "é", "a": {"b": [1, "x"]}}'}}]}  # fmt: skip


def chat(*turns, **more):
    """Turns "user text" / "assistant text" by turns, or whole messages."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [t if isinstance(t, dict) else {"role": next(roles), "content": t} for t in turns]
    return to_record({"messages": messages, **more}, "chat", "f.jsonl:1")


def trained(tokenizer, document, weight=None):
    """The text of each run of trained tokens."""
    on = document.loss_weight > 0 if weight is None else document.loss_weight == weight
    runs = itertools.groupby(range(len(on)), lambda i: bool(on[i]))
    ids = [document.tokens[list(run)] for yes, run in runs if yes]
    return [tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in ids]


def check(tokenizer, example, expected, **options):
    """The trained runs are as expected and the tokens are those of transformers' own rendering."""
    document = render(example, tokenizer, **options)
    assert trained(tokenizer, document) == expected
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages]
    theirs = tokenizer.apply_chat_template(
        messages, tools=example.tools, tokenize=True, return_dict=True, **options.get("template_args", {})
    )
    if "chat_template" not in options:
        assert document.tokens.tolist() == theirs["input_ids"]
    assert document.tokens.dtype == np.int32 and document.loss_weight.dtype == np.float32
    return document
