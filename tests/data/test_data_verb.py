from pathlib import Path

import pytest

from ftjax.errors import UserError
from ftjax.recipes.data import main

pytestmark = pytest.mark.fast
MODEL = str(Path(__file__).parent.parent / "assets" / "tiny_tokenizer")


def test_render_shows_what_is_trained_and_counts(write, capsys):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(9)] + [
        {"prompt": "q", "completion": ""}
    ]
    main(["render", write(rows), "--model", MODEL, "--n", "2"])
    out = capsys.readouterr().out
    assert "⟦a0<|im_end|>⟧" in out and "⟦a1<|im_end|>⟧" in out and "a2" not in out
    assert "prompt_completion format, 10 rows, 9 kept" in out and "data.jsonl:1" in out
    assert "1 left out, empty_content; the first: " in out and "data.jsonl:10: completion is empty" in out
    assert "trained (" in out


def test_render_preference_and_weights(write, capsys):
    main(["render", write([{"prompt": "q", "chosen": "good", "rejected": "bad"}]), "--model", MODEL])
    out = capsys.readouterr().out
    assert "chosen" in out and "⟦good<|im_end|>⟧" in out and "rejected" in out and "⟦bad<|im_end|>⟧" in out
    half = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    }
    main(["render", write([half]), "--model", MODEL])
    assert "⟦×0.5 a<|im_end|>⟧" in capsys.readouterr().out


def test_render_options(write, capsys, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    path = write([{"question": "why", "answer": "because"}])
    main(["render", path, "--model", MODEL, "--column", "prompt=question", "--column", "completion=answer",
          "--chat-template", str(tmp_path / "t.jinja")])  # fmt: skip
    assert "why<|im_end|>⟦because<|im_end|>⟧" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(UserError, match="write OURS=THEIRS"):
        main(["render", path, "--model", MODEL, "--column", "prompt"])
