"""Decoding equals the full forward pass, and transformers; sampling equals transformers' processors."""

import dataclasses
import functools
import os
import pathlib
import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tpu

from ftjax import generate, hf, lora, models, weights
from ftjax.errors import UserError
from ftjax.generate import Filters, GenerateOptions, Generator

ASSETS = pathlib.Path(__file__).parent / "assets"
GREEDY = GenerateOptions(max_new_tokens=12)
SAMPLED = GenerateOptions(max_new_tokens=12, temperature=1.3, top_p=0.95, seed=5)


@functools.cache
def model():
    return tiny.model(vocab_size=400)


@functools.cache
def windowed():
    return tiny.model(vocab_size=400, model_type="mistral", sliding_window=6)


@functools.cache
def recurrent():
    m = tiny.model(
        vocab_size=400, model_type="qwen3_5_text", num_hidden_layers=2, head_dim=16, linear_conv_kernel_dim=3,
        layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, rms_norm_eps=1e-5,
    )  # fmt: skip
    tree = weights.init(jax.random.key(0), m.table)
    return m, tree | {"embed": tree["embed"] * 10}


MODELS = {"llama": model, "mistral": windowed}


@functools.cache
def params(seed=0):
    tree = weights.init(jax.random.key(seed), model().table)
    return tree | {"embed": tree["embed"] * 10}  # logits that differ by more than rounding


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "tiny_tokenizer")


def prompts(lengths, prefix=(), seed=0):
    rng = np.random.default_rng(seed)
    return [[*prefix, *map(int, rng.integers(5, 400, n))] for n in lengths]


@functools.cache
def _forward(kind):
    m = MODELS[kind]()
    return jax.jit(lambda params, tokens, segments: m.logits(params, tokens, None, segments))


def full_forward(m, params, prompt, count, eos=()):
    """Greedy decoding without a cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        row = np.zeros((1, 96), np.int32)
        row[0, : len(tokens)] = tokens
        logits = _forward(m.config.model_type)(
            params, row, (np.arange(96) < len(tokens)).astype(np.int32)[None]
        )
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
        if tokens[-1] in eos:
            break
    return tuple(tokens[len(prompt) :])


def tokens_of(completions):
    return [c.tokens for c in completions]


def test_a_ragged_batch_equals_the_full_forward_pass():
    asked = prompts([3, 16, 9])
    want = [full_forward(model(), params(), p, 12) for p in asked]
    generator = Generator(model(), params())
    got = generator.generate(asked, GREEDY)
    assert tokens_of(got) == want
    assert [(c.finish, c.prompt_tokens, c.new_tokens) for c in got] == [("length", n, 12) for n in (3, 16, 9)]
    assert tokens_of(generator.generate(asked[1:2], GREEDY)) == want[1:2]
    # An end token stops its row, is part of its tokens, and leaves the others alone.
    eos = want[0][4]
    ended = Generator(model(), params(), eos=[eos]).generate(asked, GREEDY)
    cut = [t[: t.index(eos) + 1] if eos in t else t for t in want]
    assert tokens_of(ended) == cut and ended[0].finish == "stop"


def test_a_sliding_window_counts_positions_not_slots():
    m = windowed()
    asked = prompts([2, 14])
    got = Generator(m, params()).generate(asked, GREEDY)
    assert tokens_of(got) == [full_forward(m, params(), p, 12) for p in asked]


def test_a_shared_prefix_changes_nothing():
    asked = prompts([5, 1, 9], prefix=prompts([30], seed=1)[0])
    generator = Generator(model(), params())
    want = [full_forward(model(), params(), p, 12) for p in asked]
    assert tokens_of(generator.generate(asked, GREEDY)) == want
    assert tokens_of(generator.generate(asked, GREEDY, share_prefix=False)) == want
    penalised = dataclasses.replace(GREEDY, repetition_penalty=1.5)
    plain = generator.generate(asked, penalised, share_prefix=False)
    assert tokens_of(generator.generate(asked, penalised)) == tokens_of(plain) != want


def test_an_answer_depends_on_seed_and_id_not_on_neighbours():
    asked = prompts([5, 8, 11, 6, 3])
    generator = Generator(model(), params())
    all_ = tokens_of(generator.generate(asked, SAMPLED))
    assert tokens_of(generator.generate_many(asked, SAMPLED, batch_size=2)) == all_
    assert tokens_of(generator.generate(asked[2:3], SAMPLED, ids=[2])) == all_[2:3]
    again = generator.generate([asked[0]] * 2, SAMPLED)
    assert again[0].tokens == all_[0] != again[1].tokens
    other = generator.generate(asked, dataclasses.replace(SAMPLED, seed=6))
    assert all(a != b for a, b in zip(tokens_of(other), all_, strict=True))


def test_lengths_of_one_bucket_and_other_temperatures_compile_nothing():
    generator = Generator(model(), params())
    generator.generate(prompts([5, 8]), SAMPLED)
    spent = generator.compile_s
    generator.generate(prompts([16, 2]), dataclasses.replace(SAMPLED, temperature=0.4, top_p=0.5, seed=1))
    Generator(model(), params(1)).generate(prompts([7, 7]), SAMPLED)
    assert generator.compile_s == spent
    seen = []
    generator.generate_many(prompts([5] * 4), SAMPLED, batch_size=2, progress=lambda *a: seen.append(a))
    assert generator.compile_s == spent and seen == [(2, 4), (4, 4)]


def test_a_row_that_ends_goes_to_a_prompt_that_waits():
    """Whatever the size of the batch and the order, each answer is the prompt's own."""
    asked = prompts([5, 16, 11, 6, 3, 9, 4, 14])
    most = [60, 4, 9, 1, 30, 3, 12, 5]
    stop = full_forward(model(), params(), asked[6], 12)[4]
    want = [full_forward(model(), params(), p, n, [stop]) for p, n in zip(asked, most, strict=True)]
    generator, seen = Generator(model(), params(), eos=[stop]), []
    three = functools.partial(generator.generate_many, batch_size=3)
    got = three(asked, GREEDY, max_new_tokens=most, progress=lambda *a: seen.append(a))
    assert tokens_of(got) == want
    assert [c.finish for c in got] == ["stop" if t[-1] == stop else "length" for t in want]
    assert all(c.prompt_tokens == len(p) for c, p in zip(got, asked, strict=True))
    assert seen == sorted(set(seen)) and seen[-1] == (8, 8) and len(seen) > 2
    sampled = tokens_of(generator.generate(asked, SAMPLED, max_new_tokens=most))
    assert sampled != want
    assert tokens_of(three(asked, SAMPLED, max_new_tokens=most)) == sampled
    spent = generator.compile_s
    turned = three(asked[::-1] * 2, SAMPLED, max_new_tokens=most[::-1] * 2, ids=[*range(8)][::-1] * 2)
    assert tokens_of(turned) == sampled[::-1] * 2
    assert generator.compile_s == spent, "more prompts and other lengths compile nothing"
    with pytest.raises(UserError, match=r"max_new_tokens=\[1\] for 8 prompts"):
        generator.generate_many(asked, GREEDY, max_new_tokens=[1])


def test_no_row_waits_for_the_slowest(monkeypatch):
    """One long answer and many short ones in two rows take as many steps as the long one, not one long answer
    a batch; and a batch that is done stops."""
    generator, steps = Generator(model(), params()), []
    inner = generator._programs.decode

    def decode(*args):
        spent, out = inner(*args)
        steps.append(int(out[2]))
        return spent, out

    monkeypatch.setattr(generator._programs, "decode", decode)
    most = [64, *[8] * 7]
    got = generator.generate_many(prompts([6] * 8), GREEDY, batch_size=2, max_new_tokens=most)
    assert [c.new_tokens for c in got] == most
    assert sum(steps) == 63  # the first token is the prefill's
    steps.clear()
    generator.generate(prompts([6, 6]), dataclasses.replace(GREEDY, max_new_tokens=6))
    assert sum(steps) == 5, "it ends with the last row"


def test_the_ring_goes_around():
    """Rows use slots again that others have left, and see nothing of theirs."""
    generator = Generator(model(), params())
    asked, most = prompts([3 + i % 5 for i in range(12)]), [20] * 12
    want = tokens_of([generator.generate([p], GREEDY, max_new_tokens=[20])[0] for p in asked])
    batch = generate._Batch(
        generator,
        GREEDY,
        [generate._Prompt(i, asked[i], most[i], i, -1) for i in range(12)],
        2, 1, None, 0.0, False,
    )  # fmt: skip
    got = batch.run(None, None)
    cache = batch.state.cache
    assert tokens_of(got) == want
    ring = cache.segments.shape[1] - cache.prompt
    assert ring == 64 < int(cache.length) - cache.prompt


def test_a_recurrent_family_shares_rows_too():
    m, tree = recurrent()
    asked = prompts([5, 2, 9, 4, 12])
    most = [9, 3, 5, 12, 4]
    generator = Generator(m, tree)
    want = tokens_of(generator.generate(asked, GREEDY, max_new_tokens=most))
    assert m.recurrent and len(set(want)) == 5
    got = generator.generate_many(asked, GREEDY, batch_size=2, max_new_tokens=most)
    assert tokens_of(got) == want


def test_samples_of_a_prompt_share_its_prefill():
    asked = prompts([7, 12, 5])
    generator = Generator(model(), params())
    calls = []
    inner = generator._programs.prefill

    def prefill(*args):
        calls.append(args[3].shape[0])
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator._programs, "prefill", prefill)
        got = tokens_of(generator.generate(asked, SAMPLED, samples=4))
    assert calls == [3]
    assert len(got) == 12 and all(len(set(got[i : i + 4])) == 4 for i in (0, 4, 8))
    assert got[::4] == tokens_of(generator.generate(asked, SAMPLED)), "sample 0 is what one sample gives"
    assert tokens_of(generator.generate_many(asked, SAMPLED, samples=4, batch_size=3)) == got
    assert tokens_of(generator.generate(asked[1:2], SAMPLED, samples=2, ids=[1])) == got[4:6]
    greedy = tokens_of(generator.generate(asked, GREEDY, samples=2))
    assert greedy[::2] == greedy[1::2] == tokens_of(generator.generate(asked, GREEDY))
    with pytest.raises(UserError, match="samples=0: at least 1"):
        generator.generate(asked, GREEDY, samples=0)
    with pytest.raises(UserError, match="2 ids for 3 prompts"):
        generator.generate(asked, GREEDY, ids=[1, 2])


def _step(m, size, prompt, ring, dtype):
    """The decode program's function and the shapes of its arguments."""
    programs = generate._Programs.get(m)
    state = jax.eval_shape(lambda: programs._start((size, prompt, ring, False)))
    done = jax.ShapeDtypeStruct((size,), bool)
    args = weights.abstract(m.table, dtype), state, done, np.zeros(1, np.int32), generate.numbers(GREEDY)
    return functools.partial(programs._decode, Filters.of(GREEDY)), (*args, np.int32(4), np.int32(size))


def _written(hlo: str, least: int) -> list[tuple[str, str]]:
    """(operation, result) of what a program writes to memory in arrays of at least so many bytes."""
    fused = set(re.findall(r"calls=%?([\w.\-]+)", hlo))
    found, inside = [], ""
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = head[1]
        op = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
        free = ("parameter", "get-tuple-element", "tuple", "while", "bitcast")
        if op is None or inside in fused or op[3] in free:
            continue
        for kind, dims in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", op[2]):
            if prod(map(int, dims.split(","))) * int(re.sub(r"\D", "", kind)) // 8 >= least:
                found.append((f"{op[1]} {op[3]}", f"{kind}[{dims}]"))
    return found


@tpu.needs_libtpu
@pytest.mark.parametrize("unroll", [1, True])
def test_a_step_on_tpu_reads_the_cache_where_it_lies(unroll):
    L, B, S = 2, 64, 1024
    m = tiny.model(
        vocab_size=2048, num_hidden_layers=L, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128,
    ).with_options(dtype=jnp.bfloat16, unroll=unroll)  # fmt: skip
    step, args = _step(m, B, 256, S - 256, jnp.bfloat16)
    program = tpu.program(step, *args, donate_argnums=1)
    keys = args[1].cache.states["layers/"].k
    assert keys.shape == (L, B, 4, S, 128)
    whole = keys.size * 2
    # one write a step of all layers' new keys, one of their values, in place; no copy, slice or transpose of
    # so much as a layer's, in no memory
    writes = _written(program.hlo, whole // L // 2)
    assert all("update" in op and size == f"bf16[{L},{B},4,{S},128]" for op, size in writes), writes
    assert len(writes) == 2
    used = program.compiled.memory_analysis()
    assert used.alias_size_in_bytes >= 2 * whole and used.temp_size_in_bytes < whole // L // 2
    if unroll is True:  # a loop's body is counted once
        needed = generate.step_bytes(m, args[0], B, S)
        assert needed < program.bytes_accessed < 1.3 * needed  # activations, and what is moved ahead


def test_a_step_on_cpu_updates_the_cache_in_place():
    """What XLA does not do on CPU is read a layer where it lies: it is copied to a buffer, one at a time."""
    L = 8
    m = tiny.model(vocab_size=400, num_hidden_layers=L)
    step, args = _step(m, 16, 64, 448, jnp.float32)
    used = jax.jit(step, donate_argnums=1).lower(*args).compile().memory_analysis()
    whole = args[1].cache.states["layers/"].k.size * 4
    assert used.temp_size_in_bytes < 2.5 * whole / L, "more than a layer's keys and values"
    assert used.alias_size_in_bytes > 2 * whole, "the cache is not updated in place"


def test_lora_unmerged_and_merged_answer_alike():
    plan = lora.plan(lora.LoraConfig(r=4, rank_pattern={"q_proj": 2}), model().table)
    attached = lora.attach(params(), tiny.adapters(plan, model().table), plan)
    asked = prompts([4, 9])
    beside = Generator(model(), generate.prepare(attached, merge=False)).generate(asked, GREEDY)
    merged = Generator(model(), generate.prepare(attached)).generate(asked, GREEDY)
    assert tokens_of(beside) == tokens_of(merged)
    assert tokens_of(beside) != tokens_of(Generator(model(), params()).generate(asked, GREEDY))
    # Merged in float32 and rounded once, though the base is kept in less.
    low = lora.attach(generate.prepare(params(), jnp.bfloat16), tiny.adapters(plan, model().table), plan)
    got = generate.prepare(low, jnp.float32)["layers"]["up"]
    w = low["layers"]["up"]
    want = w.base.astype(jnp.float32) + jnp.einsum("ldr,lrf,l->ldf", w.a, w.b, w.scale)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert generate.prepare(low, jnp.bfloat16)["layers"]["up"].dtype == jnp.bfloat16


def test_the_context_cuts_or_refuses(caplog):
    generator = Generator(model(), params())
    got = generator.generate(prompts([120, 4]), GREEDY)
    assert [(c.new_tokens, c.finish) for c in got] == [(8, "length"), (12, "length")]
    assert "leaves 1 of 2 prompts fewer than max_new_tokens=12 (least: 8)" in caplog.text
    with pytest.raises(UserError, match="prompt 0 has 128 tokens, the model's context is 128"):
        generator.generate(prompts([128]), GREEDY)


@pytest.mark.fast
def test_prompts_are_checked():
    generator = Generator(model(), {})
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generator.generate([[1], []], GREEDY)
    with pytest.raises(UserError, match="has token 400, the model's vocabulary is 400"):
        generator.generate([[1, 400]], GREEDY)
    with pytest.raises(UserError, match="needs a tokenizer"):
        generator.generate(["a"], GREEDY)
    assert generator.generate([], GREEDY) == generator.generate_many([], GREEDY) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0: at least 1"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0: a share"),
        (dict(temperature=1.0, min_p=1.5), "min_p=1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0: above 0"),
        (dict(seed=-1), "seed=-1"),
        (dict(stop=("",)), "stop"),
        (dict(top_k=5), "no effect with temperature=0"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        GenerateOptions(**changes)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(temperature=1.0, top_k=7),
        dict(temperature=1.5, top_k=1000),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.0, top_p=1e-6),
        dict(temperature=1.0, min_p=0.2),
        dict(temperature=1.0, repetition_penalty=1.7),
        dict(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=0.8),
    ],
    ids=lambda o: ",".join(o),
)
def test_sampling_filters_equal_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 50)).astype(np.float32)
    context = rng.integers(0, 50, (3, 9))
    o = GenerateOptions(**options)
    steps = [lp.TemperatureLogitsWarper(o.temperature)]
    if o.repetition_penalty != 1:
        steps.insert(0, lp.RepetitionPenaltyLogitsProcessor(o.repetition_penalty))
    steps += [lp.TopKLogitsWarper(min(o.top_k, 50))] if o.top_k else []
    steps += [lp.TopPLogitsWarper(o.top_p)] if o.top_p < 1 else []
    steps += [lp.MinPLogitsWarper(o.min_p)] if o.min_p else []
    want = torch.tensor(logits)
    for step in steps:
        want = step(torch.tensor(context), want)
    seen = np.zeros((3, 50), bool)
    np.put_along_axis(seen, context, True, axis=1)
    got = generate.filter_logits(jnp.asarray(logits), seen, Filters.of(o), generate.numbers(o))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@pytest.mark.fast
def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    o = GenerateOptions(temperature=1.0)
    drawing = Filters.of(o), generate.numbers(o), jnp.array([3]), jnp.array([0])
    draw = jax.vmap(lambda i: generate.choose(logits, None, *drawing, i[None]))
    share = np.bincount(np.asarray(draw(jnp.arange(4000)))[:, 0], minlength=3) / 4000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.fast
def test_buckets_and_prefixes():
    sizes = [generate.bucket(n) for n in range(1, 2000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert sorted(set(sizes)) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert generate.common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
    assert generate.common_prefix([[1, 2, 3], [1, 2, 3]]) == 2  # each keeps a token of its own
    assert generate.common_prefix([[1], [2, 3]]) == 0


def _fed(text, chunks, **kwargs):
    row = generate._Row(tokenizer(), [5, 6], **{"budget": 999, "eos": frozenset(), "stop": ()} | kwargs)
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    pieces = []
    for i in range(0, len(ids), chunks):
        row.feed(ids[i : i + chunks])
        pieces.append(row.piece())
    return row, pieces, ids


@pytest.mark.fast
@pytest.mark.parametrize("chunks", [1, 3, 99])
def test_stop_strings_are_found_across_tokens(chunks):
    row, pieces, ids = _fed("one two STOPPED three", chunks, stop=("never", "o STOP"))
    assert row.final() == "".join(pieces) == "one tw" and row.finish == "stop"
    assert row.tokens == ids[: len(row.tokens)]
    assert "o STOP" in tokenizer().decode(row.tokens) and "o STOP" not in tokenizer().decode(row.tokens[:-1])


@pytest.mark.fast
def test_streamed_text_never_shows_half_a_character_or_half_a_stop_string():
    text = "h\u00e9 \U0001f600 \u4f60\u597d ##"
    row, pieces, _ = _fed(text, 1, stop=("###",))
    assert not any("\ufffd" in p or "#" in p for p in pieces)
    row.feed([tokenizer().eos_token_id])
    assert row.finish is None
    row.finish = "length"
    assert "".join(pieces) + row.piece() == row.final() == text


@pytest.mark.fast
def test_end_tokens_come_from_everywhere(tmp_path):
    t = tokenizer()
    turn = t.convert_tokens_to_ids("<|im_end|>")
    assert generate.end_of_turn(t) == turn
    assert generate.end_tokens({"eos_token_id": 7}, None, t) == (7, turn)
    assert generate.end_tokens({}, None, t) == (t.eos_token_id,)
    assert generate.end_tokens({}, None, None) == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert generate.end_tokens({"eos_token_id": 7}, tmp_path, t) == (8, 9, turn)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json"):
        generate.end_tokens({}, tmp_path, t)


@pytest.mark.fast
def test_chat_prompts_end_where_the_assistant_speaks():
    ids = generate.chat_prompt(tokenizer(), [{"role": "user", "content": "Hi"}])
    assert tokenizer().decode(ids).endswith("<|im_start|>assistant\n")

    class Bare:
        chat_template = None

    with pytest.raises(UserError, match="no chat template"):
        generate.chat_prompt(Bare(), [])


def test_streaming_and_stop_strings_end_to_end():
    generator = Generator(model(), params(), tokenizer())
    asked = prompts([5, 9], seed=3)
    o = dataclasses.replace(GREEDY, max_new_tokens=40)
    plain = generator.generate(asked, o)
    pieces = {0: [], 1: []}
    streamed = generator.generate(asked, o, on_text=lambda i, piece: pieces[i].append(piece))
    assert tokens_of(streamed) == tokens_of(plain)
    assert ["".join(pieces[i]) for i in (0, 1)] == [c.text for c in plain]
    stop = plain[0].text[6:9]
    assert stop
    for c in generator.generate(asked[:1], dataclasses.replace(o, stop=(stop,))):
        assert c.text == plain[0].text[: plain[0].text.find(stop)]
        assert c.finish == "stop" and c.tokens == plain[0].tokens[: c.new_tokens]


def _against_transformers(source, asked, count):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    opened = hf.open_model(str(source))
    m = models.from_config(opened.config)
    t = hf.load_tokenizer(opened)
    asked = [x if isinstance(x, str) else generate.chat_prompt(t, x) for x in asked]
    eos = generate.end_tokens(opened.config, opened.path, t)
    generator = Generator(m, hf.load_params(opened, m, dtype=jnp.float32), t, eos=eos)
    got = generator.generate(asked, GenerateOptions(max_new_tokens=count))
    # transformers reads a GGUF file with code of its own
    where = (
        dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
        if source.suffix
        else dict(pretrained_model_name_or_path=source)
    )
    reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    for prompt, c in zip(generator.encode(asked), got, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=list(eos),
                pad_token_id=0,
            )
        assert c.tokens == tuple(out[0, len(prompt) :].tolist())
    one = generator.generate(asked[:1], GenerateOptions(max_new_tokens=count))
    assert tokens_of(one) == tokens_of(got[:1])
    return got


def test_stories260k_equals_transformers():
    assets = os.environ.get("FTJAX_TEST_ASSETS")
    if not assets or not (pathlib.Path(assets) / "models/stories260K").is_dir():
        pytest.skip("FTJAX_TEST_ASSETS has no models/stories260K")
    folder = pathlib.Path(assets) / "models/stories260K"
    got = _against_transformers(folder, ["Once upon a time", "One day, a big dog saw a", "Lily"], count=100)
    assert got[0].text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day"
    )


def test_smollm2_equals_transformers():
    file = os.environ.get("FTJAX_TEST_SMOLLM2")
    if not file:
        pytest.skip("FTJAX_TEST_SMOLLM2 names no GGUF file")
    asked = [
        [{"role": "user", "content": text}]
        for text in (
            "Hi!",
            "What is the capital of France? Answer in a word, please.",
            "Write a haiku: sea, gull.",
        )
    ]
    got = _against_transformers(pathlib.Path(file), asked, count=24)
    assert got[0].text.startswith("Hello")
