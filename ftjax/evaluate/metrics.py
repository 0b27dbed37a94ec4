"""Scores of predicted texts against references: pure functions over lists, one score an item.

Item scores rather than averages come back, because the intervals and paired tests of `statistics` need them.
"""

import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftjax.errors import UserError


def _paired(predictions: Sequence, references: Sequence) -> Iterable[tuple]:
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    return zip(predictions, references, strict=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is given twice: {keys}")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def parse_json(text: str, *, anywhere: bool = False) -> Any:
    """The JSON value of a text; with `anywhere`, the first JSON object inside prose or a code fence.

    Stricter than `json.loads`: NaN, Infinity and a key given twice are refused.
    Raises ValueError where there is none.
    """
    if not anywhere:
        value, end = _DECODER.raw_decode(text.strip())
        if end != len(text.strip()):
            raise ValueError(f"text follows the JSON value: {text.strip()[end : end + 40]!r}")
        return value
    start = text.find("{")
    while start >= 0:
        try:
            return _DECODER.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    raise ValueError("no JSON object in the text")


def same_json(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: key order is free, 1 equals 1.0, and true is not 1 as in Python."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _parse_all(texts: Sequence[str], anywhere: bool) -> list[tuple[bool, Any]]:
    parsed = []
    for text in texts:
        try:
            parsed.append((True, parse_json(text, anywhere=anywhere)))
        except (ValueError, RecursionError):
            parsed.append((False, None))
    return parsed


def json_match(
    predictions: Sequence[str], references: Sequence[Any], *, anywhere: bool = False
) -> list[bool]:
    """Whether each predicted text is JSON equal, as a value, to its reference (a parsed JSON value).

    `anywhere` as in `parse_json`. Raises UserError when the lengths differ.
    """
    pairs = _paired(_parse_all(predictions, anywhere), references)
    return [found and same_json(value, reference) for (found, value), reference in pairs]


def schema_valid(
    predictions: Sequence[str], schema: Mapping[str, Any], *, anywhere: bool = False
) -> list[bool]:
    """Whether each predicted text is JSON that the JSON Schema (draft 2020-12) accepts.

    `anywhere` as in `parse_json`. Raises UserError when the schema itself is wrong.
    """
    import jsonschema  # here, so that importing metrics costs nothing

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"the JSON Schema is wrong at {error.json_path}: {error.message}") from error
    validator = jsonschema.Draft202012Validator(schema)
    return [found and validator.is_valid(value) for found, value in _parse_all(predictions, anywhere)]


def field_match(
    predictions: Sequence[str], references: Sequence[Mapping[str, Any]], *, anywhere: bool = False
) -> dict[str, list[bool]]:
    """For every top-level key of the references: whether each item with that key has its value right.

    A prediction that is no JSON object has every field wrong. A list is shorter than the items where some
    references lack the key; keys that only predictions have are not scored. Raises UserError when the
    lengths differ.
    """
    fields: dict[str, list[bool]] = {}
    for (_, value), reference in _paired(_parse_all(predictions, anywhere), references):
        for key, wanted in reference.items():
            right = isinstance(value, dict) and key in value and same_json(value[key], wanted)
            fields.setdefault(key, []).append(right)
    return fields


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each text equals its reference, surrounding white space aside; also right for class labels."""
    pairs = _paired(predictions, references)
    return [prediction.strip() == reference.strip() for prediction, reference in pairs]


def accuracy(correct: Sequence[bool]) -> float:
    """The share of true items. Raises UserError for none at all."""
    if not len(correct):
        raise UserError("accuracy of no items: give at least one")
    return sum(map(bool, correct)) / len(correct)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return [word for word in words if word not in ("a", "an", "the")]


def _f1(common: int, predicted: int, wanted: int) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    return 2 * common / (predicted + wanted)


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Each text's F1 over its bag of words with its reference, in [0, 1]; two empty texts agree.

    Words are lower-cased, without ASCII punctuation and English articles, as in the SQuAD evaluation
    (Rajpurkar et al. 2016, arXiv:1606.05250). Raises UserError when the lengths differ.
    """
    scores = []
    for prediction, reference in _paired(predictions, references):
        predicted, wanted = _words(prediction), _words(reference)
        common = sum((Counter(predicted) & Counter(wanted)).values())
        scores.append(_f1(common, len(predicted), len(wanted)))
    return scores


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Each text's ROUGE-L F1 with its reference, in [0, 1]: the longest common subsequence of words.

    Precision and recall weigh the same (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
    Summaries"); words are lower-cased alphanumeric runs, unstemmed. Raises UserError when the lengths differ.
    """
    scores = []
    for prediction, reference in _paired(predictions, references):
        predicted, wanted = (
            "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
            for text in (prediction, reference)
        )
        row = [0] * (len(wanted) + 1)  # row[j]: longest common subsequence with the first j wanted words
        for word in predicted:
            diagonal = 0
            for j, other in enumerate(wanted, 1):
                diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
        scores.append(_f1(row[-1], len(predicted), len(wanted)))
    return scores
