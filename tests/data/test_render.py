import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering import CALL, EMOJI, chat, check, trained

from ftjax.data.examples import BadExample, to_record
from ftjax.data.render import Renderer, read_template, render
from ftjax.errors import UserError

fast = pytest.mark.fast
ARGUMENTS = '{"z": "é", "a": {"b": [1, "x"]}}'
THOUGHT = {"role": "assistant", "content": "b", "reasoning_content": "a"}


@pytest.fixture(params=["marks", "generation"])
def template(request, generation_template):
    return {} if request.param == "marks" else {"chat_template": generation_template}


# ── a small template, found by marks and by {% generation %} ─────────────────────────────────────────────


@fast
@pytest.mark.parametrize(
    "turns, expected",
    [
        (["Hi", "Hello"], ["Hello<|im_end|>"]),
        (["Hi", "Yes", "Sure?", "Yes"], ["Yes<|im_end|>", "Yes<|im_end|>"]),
        (["Yes", "Yes"], ["Yes<|im_end|>"]),
        ([EMOJI, EMOJI, EMOJI, EMOJI], [f"{EMOJI}<|im_end|>"] * 2),
        ([{"role": "system", "content": "assistant"}, "Hi", "  spaced \n"], ["  spaced \n<|im_end|>"]),
        (["Hi", THOUGHT], ["<think>a</think>b<|im_end|>"]),
        (["Hi", "<think>\na\n</think>\n\nb"], ["<think>\na\n</think>\n\nb<|im_end|>"]),
        (
            ["Hi", CALL, {"role": "tool", "content": "12 é"}, {"role": "assistant", "content": "It is 12."}],
            [
                f'<tool_call>{{"name": "get", "arguments": {ARGUMENTS}}}</tool_call><|im_end|>',
                "It is 12.<|im_end|>",
            ],
        ),
        (["Hi", "Hello", "And?"], ["Hello<|im_end|>"]),
    ],
)
def test_trained_text(tiny, template, turns, expected):
    check(tiny, chat(*turns), expected, **template)


@fast
def test_message_weights(tiny, template):
    example = chat(
        "a", {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "half", "weight": 0.5},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "full"},
    )  # fmt: skip
    document = render(example, tiny, **template)
    assert trained(tiny, document, 0.5) == ["half<|im_end|>"]
    assert trained(tiny, document, 1.0) == ["full<|im_end|>"]


@fast
def test_train_on_last_and_all(tiny, template):
    example = chat("a", "one", "b", "two")
    assert trained(tiny, render(example, tiny, train_on="last", **template)) == ["two<|im_end|>"]
    document = render(example, tiny, train_on="all", **template)
    assert document.loss_weight[0] == 0 and document.loss_weight[1:].all()


letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Co"], exclude_characters="\0")
text = st.text(letters, max_size=30)


@fast
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=4))
def test_any_text_is_trained_whole(tiny, turns):
    """Whatever the answers hold, exactly they and their end-of-turn tokens are trained."""
    try:
        document = render(
            chat(*[said for asked, answer in turns for said in (asked.strip() or "x", answer)]), tiny
        )
    except BadExample as e:
        assert e.reason == "control_token"
        return
    # Tokens may straddle the beginning of an answer that begins with what the template ends with.
    got = trained(tiny, document)
    for run, (_, answer) in zip(got, turns, strict=True):
        assert f"{answer}<|im_end|>".endswith(run) or "\ufffd" in run
        assert len(run) >= len(answer.lstrip()) + len("<|im_end|>") or "\ufffd" in run


@fast
def test_a_token_over_the_beginning_is_not_trained(tiny):
    """A server would have tokenised the prompt's part of it by itself, so such a token can't be learned."""
    example = to_record({"prompt": "The pri", "completion": "nter"}, "prompt_completion", "f:1")
    document = render(example, tiny, chat_template="none")
    whole = tiny("The printer", add_special_tokens=False)["input_ids"]
    assert document.tokens.tolist() == whole + [tiny.eos_token_id]
    begins = np.cumsum([0] + [len(tiny.decode([i])) for i in whole[:-1]])
    assert (document.loss_weight[:-1] > 0).tolist() == (begins >= len("The pri")).tolist()
    assert document.loss_weight[-1] == 1


@fast
def test_dates_are_fixed(tiny):
    source = "{{ strftime_now('%d %b %Y') }}" + (tiny.chat_template or "")
    document = render(chat("Hi", "Hello"), tiny, chat_template=source, template_date="2024-02-29")
    assert tiny.decode(document.tokens).startswith("29 Feb 2024<|im_start|>")
    assert trained(tiny, document) == ["Hello<|im_end|>"]


@fast
def test_the_weight_of_an_example_multiplies(tiny):
    row = {"task": "sft", "sample_weight": 0.25, "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 2},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    document = render(to_record(row, "ftjax", "f:1"), tiny)
    assert sorted({float(w) for w in document.loss_weight}) == [0, 0.25, 0.5]
    text = render(to_record({"task": "lm", "text": "Hi", "sample_weight": 3}, "ftjax", "f:1"), tiny)
    assert set(text.loss_weight[1:].tolist()) == {3.0}


@fast
def test_plain_text_and_pairs_without_template(tiny):
    document = render(to_record({"text": "Hello there"}, "text", "f:1"), tiny)
    assert tiny.decode(document.tokens) == "Hello there<|im_end|>"
    assert document.loss_weight.tolist() == [0] + [1] * (len(document.tokens) - 1)
    renderer = Renderer(tiny, chat_template="none")
    pair = to_record({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, "preference", "f:1")
    assert [trained(tiny, d) for d in renderer.render_pair(pair)] == [["4<|im_end|>"], ["5<|im_end|>"]]


@fast
def test_prompt_completion_and_alpaca_become_chats(tiny):
    for row, name in [
        ({"prompt": "q", "response": "a"}, "prompt_completion"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
    ]:
        document = render(to_record(row, name, "f:1"), tiny)
        assert tiny.decode(document.tokens) == (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        )
        assert trained(tiny, document) == ["a<|im_end|>"]


@fast
def test_preference_trains_only_the_answers(tiny, template):
    messages = chat("a", "b", "c").messages
    pair = to_record({"prompt": messages, "chosen": "good", "rejected": "bad"}, "preference", "f:1")
    chosen, rejected = Renderer(tiny, **template).render_pair(pair)
    assert trained(tiny, chosen) == ["good<|im_end|>"] and trained(tiny, rejected) == ["bad<|im_end|>"]


# ── guards ───────────────────────────────────────────────────────────────────────────────────────────────


@fast
def test_guards(tiny):
    zero = {"role": "assistant", "content": "b", "weight": 0}

    def reason(example, **options):
        (result,) = Renderer(tiny, **options).units([example])
        assert isinstance(result, BadExample) and str(result).startswith("f.jsonl:1: ")
        return result.reason

    assert reason(chat("a", zero)) == "nothing_to_train"
    assert reason(chat("a <|im_end|>", "b")) == "control_token"
    no_end = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    assert reason(chat("a", "b", "c", "d"), chat_template=no_end) == "no_end_of_turn"
    ended = no_end + "{{ eos_token }}"
    assert reason(chat("a", "b", "c", "d"), chat_template=ended) == "no_end_of_turn"
    assert reason(chat("a", "b"), chat_template="{{ messages[0].content }}") == "template"
    assert reason(chat("a", CALL), chat_template=ended) == "template"
    assert reason(chat("a", "b"), chat_template="{{ raise_exception('no system') }}") == "template"
    counts = (
        "{% for m in messages %}{{ (m.content | length | string) + m.content + '<|im_end|>' }}{% endfor %}"
    )
    assert reason(chat("a", "b"), chat_template=counts) == "template"
    outside = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ ' and more<|im_end|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert reason(chat("a", "b"), chat_template=outside) == "no_end_of_turn"


@fast
def test_a_doubled_bos_is_refused(tiny):
    with_bos = copy.deepcopy(tiny)
    with_bos.bos_token = "<|endoftext|>"
    once = "{{ bos_token }}" + str(tiny.chat_template)
    assert trained(tiny, render(chat("a", "b"), with_bos, chat_template=once)) == ["b<|im_end|>"]
    with pytest.raises(BadExample, match="twice") as e:
        render(chat("a", "b"), with_bos, chat_template="{{ bos_token }}" + once)
    assert e.value.reason == "doubled_bos"


@fast
def test_overlong(tiny):
    example = chat("question " * 10, "answer " * 10)
    whole = render(example, tiny)
    first = int(np.flatnonzero(whole.loss_weight)[0])
    limit = first + 5

    def one(**options):
        return Renderer(tiny, max_length=limit, **options).units([example])[0]

    error = one()
    assert isinstance(error, BadExample) and error.reason == "overlong"
    assert f"has {len(whole.tokens)} tokens, more than max_length = {limit}" in str(error)
    ((cut,),) = one(overlong="truncate")
    assert cut.truncated and cut.loss_weight.sum() == 5
    assert cut.tokens.tolist() == whole.tokens[:limit].tolist()
    gone = Renderer(tiny, max_length=first, overlong="truncate").units([example])[0]
    assert isinstance(gone, BadExample) and gone.reason == "truncated_answer"


@fast
def test_split_text_trains_every_token_once(tiny):
    example = to_record({"text": "Once upon a time there was a small model. " * 20}, "text", "f:1")
    whole = render(example, tiny)
    windows = [d for (d,) in Renderer(tiny, max_length=32, overlong="split").units([example])[0]]
    assert all(len(w.tokens) <= 32 for w in windows) and len(windows) > 5
    again = [t for w in windows for t, x in zip(w.tokens, w.loss_weight, strict=True) if x]
    assert again == whole.tokens[1:].tolist()


@fast
def test_pairs_are_cut_together(tiny):
    pair = to_record({"prompt": "q", "chosen": "good " * 30, "rejected": "bad"}, "preference", "f:1")
    whole = Renderer(tiny).render_pair(pair)
    limit = len(whole[1].tokens) + 40
    (cut,) = Renderer(tiny, max_length=limit, overlong="truncate").units([pair])[0]
    assert [len(d.tokens) for d in cut] == [40, len(whole[1].tokens)]


@fast
def test_settings_errors(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="chat template can't be used"):
        Renderer(tiny, chat_template="{% if %}")
    with pytest.raises(UserError, match="is no file"):
        read_template(str(tmp_path / "no.jinja"))
    monkeypatch.setattr(tiny, "chat_template", None)
    with pytest.raises(UserError, match="data.chat_template"):
        render(chat("a", "b"), tiny)
    with pytest.raises(UserError, match="data.chat_template"):
        Renderer(tiny).prompt([{"role": "user", "content": "a"}])
    joined = render(to_record({"prompt": "a ", "completion": "b"}, "prompt_completion", "f:1"), tiny)
    assert tiny.decode(joined.tokens) == "a b<|im_end|>" and "joined as they are" in joined.notes[0]


@fast
def test_what_is_trained_follows_the_prompt(tiny, template):
    """The prompt a server would send, and then what is trained, are the document."""
    renderer = Renderer(tiny, **template)
    example = chat("Hi", "Hello", "And?", "Yes")
    document = renderer.render(example)
    prompt = renderer.prompt(example.messages[:-1])
    last = np.flatnonzero(document.loss_weight == 0)[:-1]
    assert document.tokens[: len(prompt)].tolist() == prompt and last[-1] == len(prompt) - 1
    assert renderer.stop_tokens == {tiny.eos_token_id}


@fast
def test_the_fingerprint_covers_what_tokens_depend_on(tiny, generation_template):
    fingerprints = [
        Renderer(tiny, **options).fingerprint
        for options in (
            {},
            {"chat_template": generation_template},
            {"template_args": {"a": 1}},
            {"train_on": "all"},
            {"max_length": 9},
            {"overlong": "truncate"},
            {"template_date": "2025-01-01"},
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert Renderer(tiny).fingerprint == fingerprints[0]


@fast
def test_tool_templates_of_other_shapes(tiny):
    """Special tokens inside of a call, names looked up, string arguments, an end of its own for calls."""
    call = chat("a", CALL, {"role": "tool", "content": "ok then"}, {"role": "assistant", "content": "done"})
    header = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    end = "{{ '<|im_end|>\n' }}{% endfor %}" + prompt
    looked_up = (
        header + "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'GET ' if c.function.name == 'get' else 'PUT ' }}{{ c.function.arguments | tojson }}{% endfor %}"
        + end
    )
    args = ARGUMENTS
    check(tiny, call, [f"GET {args}<|im_end|>", "done<|im_end|>"], chat_template=looked_up)
    strings = (
        header
        + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
        "{% endfor %}" + end
    )
    check(tiny, call, [f"get{args}<|im_end|>", "done<|im_end|>"], chat_template=strings)
    special = (
        header + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}<|endoftext|>"
        "{{ c.function.arguments | tojson }}<|endoftext|>{% endfor %}" + end
    )
    expected = [f"get<|endoftext|>{args}<|endoftext|><|im_end|>", "done<|im_end|>"]
    check(tiny, call, expected, chat_template=special)
    own_end = (
        header + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}" + prompt
    )
    check(tiny, call, [f"get{args}<|endoftext|>", "done<|im_end|>"], chat_template=own_end)


@fast
def test_a_template_without_generation_prompt(tiny):
    """Llama 2's and Mistral's kind: the prompt ends with the user's turn, a space comes before the answer."""
    source = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
        "else ' ' + m.content | trim + eos_token }}{% endfor %}"
    )
    document = check(tiny, chat("a", "one", "b", "one "), [" one<|im_end|>"] * 2, chat_template=source)
    assert not document.notes


@fast
def test_rendering_is_json_safe(tiny):
    """Templates that print a whole message as JSON still show where the answer is."""
    source = "{% for m in messages %}{{ '<|im_start|>' + m.content | tojson + '<|im_end|>' }}{% endfor %}"
    (result,) = Renderer(tiny, chat_template=source).units([chat("a", 'say "hi"\n\n')])
    assert isinstance(result, BadExample) or json.dumps('say "hi"\n\n')[1:] in trained(tiny, result[0][0])[0]
