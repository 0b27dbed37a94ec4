"""The verb `ftjax add-tokens`: a base model whose tokenizer and vocabulary have more tokens."""

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp

from ftjax import hf, hf_export, models
from ftjax.errors import UserError
from ftjax.resize import resize_vocabulary
from ftjax.weights import flatten, unflatten


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ftjax add-tokens",
        description="Write a model folder like MODEL with more tokens, to be tuned as any other.",
        epilog="The rows of new tokens in embedding and head begin at the mean of the others. Train them "
        "with lora.trainable_token_indices (the ids are printed), or lora.modules_to_save.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or a .gguf file")
    parser.add_argument("tokens", nargs="+", metavar="TOKEN")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--special", action="store_true", help="as special tokens: never split, not shown")
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="rows up to one, as mesh.tp may need"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    args = parser.parse_args(argv)
    source = hf.open_model(args.model)
    model = models.from_config(source.config)
    tokenizer = hf.load_tokenizer(source)
    known = [t for t in args.tokens if t in tokenizer.get_vocab()]
    if known:
        raise UserError(f"{args.model}: its tokenizer has {', '.join(map(repr, known))} already")
    tokenizer.add_tokens(list(dict.fromkeys(args.tokens)), special_tokens=args.special)
    ids = tokenizer.convert_tokens_to_ids(args.tokens)
    params = hf.load_params(source, model)
    rows = model.config.vocab_size
    if args.multiple_of < 1:
        raise UserError(f"--multiple-of {args.multiple_of}: at least 1")
    wanted = max(rows, max(ids) + 1)
    larger, params = resize_vocabulary(model, params, wanted + -wanted % args.multiple_of)
    spare = [i for i in ids if i < rows]  # rows beyond the tokenizer's, which many models have
    if spare:
        params = begin_at_mean(larger, params, spare, min(ids))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    saved = hf_export.save_model(
        args.output,
        larger,
        params,
        source,
        config={"vocab_size": larger.config.vocab_size},
        tokenizer=files,
        check=hf_export.probe(larger, params, tokenizer),
        overwrite=args.overwrite,
    )
    print(f"{saved.folder}: {rows} -> {larger.config.vocab_size} rows, re-opened: {saved.drift}")
    print("; ".join(f"{token!r} is {i}" for token, i in zip(args.tokens, ids, strict=True)))
    print(f"lora.trainable_token_indices={ids}")
    return 0


def begin_at_mean(model: models.Model, params: dict, ids: list[int], used: int) -> dict:
    """The rows `ids` of embedding and head as new tokens begin: the mean of the first `used`."""

    def one(path: str, x):
        axis = model.table.dims(path).find("V")
        if axis < 0:
            return x
        x = jnp.moveaxis(x, axis, 0)
        mean = jnp.mean(x[:used].astype(jnp.float32), axis=0).astype(x.dtype)
        return jnp.moveaxis(x.at[jnp.array(ids)].set(mean), 0, axis)

    return unflatten({path: one(path, x) for path, x in flatten(params).items()})
