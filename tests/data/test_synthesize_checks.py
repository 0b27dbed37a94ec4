import re
from pathlib import Path

import pytest

from ftjax.data.synthesize.checks import (
    Fact,
    agreement,
    facts,
    find_quote,
    is_echo,
    is_right,
    missing_facts,
    not_self_contained,
)

pytestmark = pytest.mark.fast

SECTION = """## Uploads

The limit `MAX_CONTENT_LENGTH` is 16 MB by
default since version 2.3.1 (released on March 5, 2023).  Call `app.run(debug=True)` or pass
`--debug`; see https://flask.palletsprojects.com/en/stable/. There are three modes, 1,048,576 bytes a part.
"""


@pytest.mark.parametrize(
    "quote,found",
    [
        ("is 16 MB by default since", "is 16 MB by\ndefault since"),
        ("  (released on\tMarch 5, 2023).   Call", "(released on March 5, 2023).  Call"),
        ("`app.run(debug=True)`", "`app.run(debug=True)`"),
        ("is 16 MB per default", None),
        ("is 16MB by default", None),
        ("IS 16 MB", None),
        ("   ", None),
        ("", None),
    ],
)
def test_find_quote(quote, found):
    place = find_quote(quote, SECTION)
    assert (None if place is None else SECTION[slice(*place)]) == found


def test_facts_of_every_kind():
    text = (
        "1. In v2.3.1 (5 March 2023) set `MAX_CONTENT_LENGTH` to 1,048,576 with --debug, e.g. by "
        "app.run at https://x.org/a_b. The HTTPException has 2 parts."
    )
    assert set(facts(text)) == {
        Fact("URL", "https://x.org/a_b"),
        Fact("date", "5 March 2023"),
        Fact("version", "2.3.1"),
        Fact("number", "1,048,576"),
        Fact("number", "2"),
        Fact("identifier", "MAX_CONTENT_LENGTH"),
        Fact("identifier", "--debug"),
        Fact("identifier", "app.run"),
        Fact("identifier", "HTTPException"),
    }
    assert facts("Plain words, a sha256 and nothing else. Next sentence.") == []


@pytest.mark.parametrize(
    "answer,missing",
    [
        ("It is 16 MB, since v2.3.1.", []),
        ("Released 2023-03-05, or 5th of March 2023, or in three modes: 3.", []),
        ("1048576 bytes a part; 1_048_576.", []),
        ("Call `app.run()` with `debug=True`, or pass `--debug`.", []),
        ("See https://flask.palletsprojects.com/en/stable/.", []),
        ("1. First\n2. Second\n10) Tenth", []),
        ("It is 32 MB.", [Fact("number", "32")]),
        ("Since 2.3.2.", [Fact("version", "2.3.2")]),
        ("Since 2.3.", [Fact("version", "2.3")]),
        ("Released on March 6, 2023.", [Fact("date", "March 6, 2023")]),
        ("Set `MAX_UPLOAD`.", [Fact("identifier", "MAX_UPLOAD")]),
        ("Set MAX_CONTENT.", [Fact("identifier", "MAX_CONTENT")]),  # a part of a name is another name
        ("Pass `--debugger`.", [Fact("identifier", "--debugger")]),
        ("Use `app.start`.", [Fact("identifier", "app.start")]),
        ("See https://flask.dev/.", [Fact("URL", "https://flask.dev/")]),
        ("```python\nserver.listen_on(16)\n```", [Fact("identifier", "server.listen_on")]),
    ],
)
def test_missing_facts(answer, missing):
    assert missing_facts(answer, SECTION) == missing


@pytest.mark.parametrize("page", ["adapters.md", "multihost.md", "quantised.md"])
def test_a_text_has_the_facts_of_its_own_sentences(page):
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    for section in re.split(r"\n(?=#)", text):
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", section):
            assert missing_facts(sentence, section) == [], sentence
            assert not sentence.strip() or find_quote(sentence, section), sentence


def test_markdowns_escapes_are_no_difference():
    assert missing_facts("`my_name`", r"call my\_name here") == []


@pytest.mark.parametrize(
    "question",
    [
        "According to the passage, what is the limit?",
        "What is the default in this section?",
        "What does the text say about uploads?",
        "What does the documentation recommend for uploads?",
        "How does the above example start the server?",
        "Which options are mentioned above?",
        "What does it do?",
        "How can they be changed?",
        "Why is this necessary for uploads in the given text?",
        "What does the author recommend?",
        "Based on the provided context, what is 16 MB?",
    ],
)
def test_questions_that_point_at_what_is_not_there(question):
    assert not_self_contained(question)


@pytest.mark.parametrize(
    "question",
    [
        "What is the default of MAX_CONTENT_LENGTH in Flask?",
        "How is a section of a config file read with ConfigParser?",
        "Is it possible to limit uploads in Flask?",
        "When should the application context be pushed?",
        "How does Flask read text from a request?",
        "What does str.split do when it gets no argument?",
        "How do I open a document in the editor?",
        "What is kept in the application context in Flask?",
        "How is the title of the page set?",
        "What is read from the section of pyproject.toml named tool.flask?",
    ],
)
def test_questions_that_stand_by_themselves(question):
    assert not not_self_contained(question)


def test_echo():
    assert is_echo("What is the default limit of uploads?", "The default limit of uploads.")
    assert is_echo(
        "How do you set the maximum length of content in Flask?",
        "You do set the maximum length of content in Flask so.",
    )
    assert not is_echo("Is the limit 16 MB or 32 MB?", "16")
    assert not is_echo("What is the default limit of uploads?", "The default limit of uploads is 16 MB.")
    assert not is_echo("Does Flask limit uploads?", "Yes.")
    assert not is_echo(
        "What is the name of a triangle whose sides are all equal?",
        "The name of a triangle whose sides are all equal is equilateral.",
    )
    assert not is_echo("Is a secret key or dark magic used?", "A secret key.")
    assert not is_echo("What is the total number of pages in the book?", "The total number of pages is 350.")


@pytest.mark.parametrize(
    "a,b,same",
    [
        ("16 MB", "The default limit is 16 MB.", True),
        ("Call app.run with debug set.", "You call `app.run` with debug set to true.", True),
        ("16 MB", "It is 32 MB by default.", False),
        ("Yes, it can.", "No, it can not.", False),
        ("It stores the session in a cookie.", "The server restarts when files change.", False),
        ("", "something", False),
    ],
)
def test_agreement(a, b, same):
    assert (agreement(a, b) >= 0.5) is same and agreement(a, b) == agreement(b, a)


@pytest.mark.parametrize(
    "answer,reference,right",
    [
        ("I think that it is 16 MB.", "16 MB", True),
        ("It is 32 MB.", "16 MB", False),
        ("The capital is Paris.", "Paris", True),
        ("Berlin", "Paris", False),
        ("Use the test client.", "Call `app.test_client` to get the test client.", False),
        ("Flask keeps the session in a signed cookie.", "The session is kept in a signed cookie.", True),
        ("", "Paris", False),
    ],
)
def test_right_from_memory(answer, reference, right):
    assert is_right(answer, reference) is right
