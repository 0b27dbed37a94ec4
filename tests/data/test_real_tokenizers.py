"""Masks with real tokenizers and templates, where they are at hand."""

import itertools
import os
from pathlib import Path

import pytest
from rendering import CALL, EMOJI, chat, check, trained

from ftjax.data.examples import BadExample, examples, to_record
from ftjax.data.options import DataSource
from ftjax.data.render import Renderer, render


def test_llama3(real_tokenizer):
    tokenizer = real_tokenizer("llama3_1")
    system = {"role": "system", "content": "Be brief."}
    document = check(tokenizer, chat(system, "Hi", f" {EMOJI}\n", "Again", EMOJI), [f"{EMOJI}<|eot_id|>"] * 2)
    assert document.tokens[0] == tokenizer.bos_token_id and document.tokens[1] != tokenizer.bos_token_id
    assert Renderer(tokenizer).stop_tokens == {tokenizer.eos_token_id}
    (bad,) = Renderer(tokenizer).units([chat("Hi", CALL)])  # its template has no tool calls
    assert isinstance(bad, BadExample) and "does not show the tool calls" in str(bad)
    text = render(to_record({"text": "Hi"}, "text", "f:1"), tokenizer)
    assert tokenizer.decode(text.tokens) == "<|begin_of_text|>Hi<|eot_id|>"


def test_gemma3(real_tokenizer):
    tokenizer = real_tokenizer("gemma3")
    system = {"role": "system", "content": "Be brief."}
    check(tokenizer, chat(system, "Hi", f" {EMOJI}\n", "Again", "model"),
          [f"{EMOJI}<end_of_turn>", "model<end_of_turn>"])  # fmt: skip
    (bad,) = Renderer(tokenizer).units([chat({"role": "assistant", "content": "I begin"})])
    assert isinstance(bad, BadExample) and "must alternate" in str(bad)


def test_qwen3_thinking(real_tokenizer):
    tokenizer = real_tokenizer("qwen3")
    said = EMOJI.replace("e\u0301", "é")  # its tokenizer composes what can be
    thought = [{"role": "assistant", "content": said, "reasoning_content": f"so\n{i}"} for i in "12"]
    document = check(
        tokenizer,
        chat("Hi", thought[0], {"role": "user", "content": "Again"}, thought[1]),
        [f"{said}<|im_end|>", f"<think>\nso\n2\n</think>\n\n{said}<|im_end|>"],
    )
    assert document.notes == ("the template leaves out the reasoning of some assistant messages",)
    check(tokenizer, chat("Hi", "<think>\nso\n</think>\n\nYes"), ["<think>\nso\n</think>\n\nYes<|im_end|>"])
    document = check(tokenizer, chat("Hi", "Yes", "Sure?", "Yes"), ["Yes<|im_end|>", "Yes<|im_end|>"])
    assert "inserts '<think>\\n\\n</think>\\n\\n'" in document.notes[0]
    quiet = check(
        tokenizer, chat("Hi", "Yes", "Sure?", "Yes"), ["Yes<|im_end|>", "Yes<|im_end|>"],
        template_args={"enable_thinking": False},
    )  # fmt: skip
    assert not quiet.notes  # the server's prompt has the empty block


def test_qwen3_tools(real_tokenizer):
    tokenizer = real_tokenizer("qwen3")
    schema = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "weather?"}, CALL,
        {"role": "tool", "content": "12 é"}, {"role": "tool", "content": "13"},
        {"role": "assistant", "content": "It is 12."}, {"role": "user", "content": "And"},
        {**CALL, "content": "Let me see.", "tool_calls": CALL["tool_calls"] * 2},
    ]  # fmt: skip
    call = '<tool_call>\n{"name": "get", "arguments": {"z": "é", "a": {"b": [1, "x"]}}}\n</tool_call>'
    check(
        tokenizer,
        chat(*messages, tools=[schema]),
        [f"{call}<|im_end|>", "It is 12.<|im_end|>", f"Let me see.\n{call}\n{call}<|im_end|>"],
    )


def test_hh_rlhf_whole(real_tokenizer):
    """Real dialogues: of every pair exactly the answers with their end of turn are trained."""
    tokenizer = real_tokenizer("qwen3")
    path = Path(os.environ["FTJAX_TEST_ASSETS"]) / "data/hh-rlhf/helpful-online.test.jsonl.gz"
    if not path.exists():
        pytest.skip("hh-rlhf is not at hand")
    renderer = Renderer(tokenizer)
    got = [e for _, e in itertools.islice(examples(DataSource(str(path))), 300)]
    good = [e for e in got if not isinstance(e, BadExample)]
    assert len(good) > 280
    for example, ((chosen, rejected),) in zip(good, renderer.units(good), strict=True):
        for document, part in ((chosen, example.chosen), (rejected, example.rejected)):
            runs = trained(tokenizer, document)
            assert [r.removesuffix("<|im_end|>") for r in runs] == [
                m["content"] for m in part if m["role"] == "assistant"
            ]
