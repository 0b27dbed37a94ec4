"""ftjax chat over a run folder, an adapter, a base and a model without a chat template."""

import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy
import tiny

from ftjax import generate, hf, lora, models, peft, weights
from ftjax.errors import UserError
from ftjax.recipes import chat

TOKENIZER = pathlib.Path(__file__).parent / "assets/tiny_tokenizer"
FLAGS = ["--max-new-tokens", "12"]
GREEDY = generate.GenerateOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model's folder."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny.CONFIG | {"vocab_size": 400}
    model = models.from_config(config)
    tree = weights.init(jax.random.key(0), model.table)
    tree["embed"] *= 10
    tensors = {}
    for path, x in weights.flatten(tree).items():
        tensors |= weights.to_hf(model.table, path, x)
    tensors = {name: x.copy(order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run over it, with an adapter."""
    folder = tmp_path_factory.mktemp("run")
    source = hf.open_model(str(base))
    model = models.from_config(source.config)
    config = lora.LoraConfig(r=4)
    plan = lora.plan(config, model.table)
    (folder / "base.json").write_text(json.dumps(hf.describe(source)))
    peft.save(folder / "adapter", plan, tiny.adapters(plan, model.table), config, model.table, source)
    return folder


def answer(base, adapter=None, messages=({"role": "user", "content": "Hello"},)):
    source = hf.open_model(str(base))
    model = models.from_config(source.config)
    tokenizer = hf.load_tokenizer(source)
    params = hf.load_params(source, model, dtype=jnp.float32)
    if adapter:
        _, plan, factors = peft.load(adapter, model)
        params = generate.prepare(lora.attach(params, factors, plan))
    eos = generate.end_tokens(source.config, base, tokenizer)
    generator = generate.Generator(model, params, tokenizer, eos=eos)
    return generator.generate([generate.chat_prompt(tokenizer, messages)], GREEDY)[0].text.lstrip()


def test_one_prompt_is_answered_by_the_tuned_model_and_by_its_base(run, base, capsys):
    assert chat.main([str(run), "--prompt", "Hello", *FLAGS]) == 0
    out, err = capsys.readouterr()
    tuned = answer(base, run / "adapter")
    assert out == tuned + "\n"  # nothing else on stdout
    assert "cut off after 12 tokens" in err
    assert chat.main([str(run), "--base", "--prompt", "Hello", *FLAGS]) == 0
    plain = capsys.readouterr().out
    assert plain == answer(base) + "\n" != out
    assert chat.main([str(run / "adapter"), "--prompt", "Hello", *FLAGS]) == 0
    assert capsys.readouterr().out == out
    assert chat.main([str(run), "--prompt", "Hello", "--no-merge", *FLAGS]) == 0
    assert capsys.readouterr().out == out
    assert chat.main([str(base), "--prompt", "Hello", "--system", "Be brief.", *FLAGS]) == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert capsys.readouterr().out == answer(base, messages=messages) + "\n"


def test_a_run_of_full_fine_tuning_speaks_with_its_own_weights(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "base.json").write_text(json.dumps(hf.describe(hf.open_model(str(base)))))
    assert chat.main([str(tmp_path), "--prompt", "Hello", *FLAGS]) == 0
    assert capsys.readouterr().out == answer(base) + "\n"


def test_a_conversation_through_a_pipe(base, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Hello\nAnd\n\n/nope\n/reset\nHello\n/system Hi\n/quit\nunread\n")
    )
    seen = []
    inner = chat.Speaker.prompt

    def prompt(self, messages):
        seen.append([(m["role"], m["content"]) for m in messages])
        return inner(self, messages)

    monkeypatch.setattr(chat.Speaker, "prompt", prompt)
    assert chat.main([str(base), *FLAGS]) == 0
    out, err = capsys.readouterr()
    first = answer(base)
    assert out.startswith(first + "\n") and out.endswith("\n" + first + "\n")
    assert [[role for role, _ in turn] for turn in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert seen[1][1] == ("assistant", first.strip())
    assert "no command /nope" in err and "forgotten" in err and "with this system prompt" in err
    assert "> " not in out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(base, capsys, monkeypatch):
    speaker = chat.load(str(base))
    talk = chat.Conversation(speaker, GREEDY, None)

    def interrupted(prompts, options, *, ids, on_text):
        on_text(0, "Well, ")
        raise KeyboardInterrupt

    monkeypatch.setattr(speaker.generator, "generate", interrupted)
    assert talk.turn("Hello") is False
    assert talk.messages[1:] == [{"role": "assistant", "content": "Well,"}]
    out, err = capsys.readouterr()
    assert out == "Well, \n" and "stopped" in err


def test_a_turn_beyond_the_context_is_refused_and_the_talk_goes_on(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("long " * 200 + "\nHello\n"))
    assert chat.main([str(base), *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert "the model's context is 128" in err
    assert out == answer(base) + "\n"


def test_without_a_chat_template_text_is_continued(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "bare")
    config = json.loads((tmp_path / "bare/tokenizer_config.json").read_text())
    config.pop("chat_template")
    (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps(config))
    assert chat.main([str(tmp_path / "bare"), "--prompt", "Hello", *FLAGS]) == 0
    assert "no chat template: your text is continued" in capsys.readouterr().err
    with pytest.raises(UserError, match="takes no system prompt"):
        chat.main([str(tmp_path / "bare"), "--prompt", "Hello", "--system", "x"])


def test_the_runs_own_template_is_used(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mode }}"
    (tmp_path / "own.jinja").write_text(template)
    data = {"chat_template": str(tmp_path / "own.jinja"), "template_args": {"mode": "!"}}
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": data}))
    speaker = chat.load(str(tmp_path / "run"))
    said = speaker.generator.tokenizer.decode(speaker.prompt([{"role": "user", "content": "Hello"}]))
    assert said == "<user>Hello!"
    (tmp_path / "own.jinja").unlink()
    with pytest.raises(UserError, match="own.jinja is gone"):
        chat.load(str(tmp_path / "run"))
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": {"chat_template": "none"}}))
    assert not chat.load(str(tmp_path / "run")).chats


@pytest.mark.fast
def test_what_cannot_speak_says_why(base, run, tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        chat.main([str(tmp_path / "nothing"), "--prompt", "Hello"])
    with pytest.raises(UserError, match="is no run folder: there is no base"):
        chat.main([str(base), "--base", "--prompt", "Hello"])
    with pytest.raises(UserError, match="--no-merge: nothing of .* is an adapter"):
        chat.main([str(base), "--no-merge", "--prompt", "Hello"])
    with pytest.raises(UserError, match="--prompt is empty"):
        chat.main([str(base), "--prompt", " "])
    described = json.loads((run / "base.json").read_text())
    (tmp_path / "base.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="no adapter/ or model/ yet"):
        chat.main([str(tmp_path), "--prompt", "Hello"])
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "base.json").write_text(json.dumps(described | {"fingerprint": "other"}))
    with pytest.raises(UserError, match="other weights than when it was tuned"):
        chat.main([str(tmp_path), "--prompt", "Hello"])
    (tmp_path / "base.json").write_text(json.dumps(described | {"source": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="its base cannot be opened"):
        chat.main([str(tmp_path), "--prompt", "Hello"])
