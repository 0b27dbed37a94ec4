import pytest

from ftjax.errors import UserError
from ftjax.evaluate import metrics

pytestmark = pytest.mark.fast

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "n": {"type": ["string", "null"], "pattern": "^[0-9]{4}$"}},
    "required": ["a", "n"],
    "additionalProperties": False,
}


def test_json_match_compares_values_not_texts():
    texts = ['{"b": 1.0, "a": [true]}', '{"a": [1], "b": 1}', "not json", '{"a": [true], "b": 1} and more']
    assert metrics.json_match(texts, [{"a": [True], "b": 1}] * 4) == [True, False, False, False]


def test_null_is_json_and_failure_to_parse_is_not_null():
    assert metrics.json_match(["null", ""], [None, None]) == [True, False]


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1, "a": 1}', "", "[1", '{"a": 1}}', "[" * 100_000])
def test_what_is_no_json(text):
    assert metrics.json_match([text], [{"a": 1}]) == [False]


def test_json_anywhere_finds_the_first_object():
    fenced = 'Sure {here} it is:\n```json\n{"a": {"b": 2}}\n```\n{"a": 3}'
    assert metrics.parse_json(fenced, anywhere=True) == {"a": {"b": 2}}
    assert metrics.json_match([fenced], [{"a": {"b": 2}}]) == [False]
    with pytest.raises(ValueError, match="no JSON object"):
        metrics.parse_json("nothing", anywhere=True)


def test_schema_valid():
    texts = [
        '{"a": "x", "n": null}',
        '{"n": "1234", "a": "y"}',
        '{"a": "z", "n": null}',
        '{"a": "x", "n": "12345"}',
        '{"a": "x", "n": 1234}',
        '{"a": "x"}',
        '{"a": "x", "n": null, "m": 1}',
        '["x"]',
        "x",
    ]
    assert metrics.schema_valid(texts, SCHEMA) == [True, True] + [False] * 7
    with pytest.raises(UserError, match=r"schema is wrong|Schema is wrong"):
        metrics.schema_valid(["1"], {"type": "strnig"})


def test_field_match():
    fields = metrics.field_match(
        ['{"a": "x", "n": null}', '{"a": "y"}', "broken"],
        [{"a": "x", "n": None}, {"a": "y", "n": None}, {"a": "x"}],
    )
    assert fields == {"a": [True, True, False], "n": [True, False]}


def test_token_f1_by_hand():
    # 2 words common of 3 predicted ("the" is dropped) and 2 wanted: 2*2/5
    assert metrics.token_f1(["The cat sat down."], ["cat sat"]) == [pytest.approx(0.8)]
    assert metrics.token_f1(["", "a", "x"], ["", "x", ""]) == [1.0, 0.0, 0.0]
    assert metrics.token_f1(["b b b"], ["b b c"]) == [pytest.approx(2 / 3)]


def test_rouge_l_by_hand():
    # Lin 2004, section 3.1: "police killed the gunman" scores 3/4 and 2/4 for the two candidates
    wanted = ["police killed the gunman"] * 2
    assert metrics.rouge_l(["police kill the gunman", "the gunman kill police"], wanted) == [0.75, 0.5]
    assert metrics.rouge_l(["", "a b"], ["", "b"]) == [1.0, pytest.approx(2 / 3)]


def test_exact_match_and_accuracy():
    assert metrics.exact_match([" yes\n", "Yes"], ["yes", "yes"]) == [True, False]
    assert metrics.accuracy([True, False, False, False]) == 0.25
    with pytest.raises(UserError, match="no items"):
        metrics.accuracy([])


@pytest.mark.parametrize(
    "score", [metrics.json_match, metrics.exact_match, metrics.token_f1, metrics.rouge_l, metrics.field_match]
)
def test_lengths_must_agree(score):
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        score(["a", "b"], ["a"])
