import pytest

from copa_harness.judge.leakage import find_leakage, no_leakage, normalized, shingles
from copa_harness.results import Verdict

LONG = "The quick brown fox jumps over the lazy dog and then runs back into the dark forest before the night falls"


def text(value):
    return {"question": value}


@pytest.mark.parametrize("other", ["what is  2+2", "What is 2+2?", "WHAT IS 2+2 ?", "what is 2+2\n"])
def test_case_spacing_and_sentence_marks_do_not_hide_a_repeat(other):
    report = find_leakage({"t": text("What is 2+2?")}, seen={"train": {"a": text(other)}})
    assert report.seen_ids == {"t"}


@pytest.mark.parametrize("other", ["What is 2-2?", "What is 2+3?", "What is -2+2?", "What is 2.2?"])
def test_numbers_and_operators_make_another_example(other):
    assert not find_leakage({"t": text("What is 2+2?")}, seen={"train": {"a": text(other)}}).same


def test_fields_are_kept_apart_and_their_order_does_not_matter():
    assert normalized({"a": "x", "b": "y"}) == normalized({"b": "Y", "a": "X"})
    assert normalized({"a": "x", "b": "y"}) != normalized({"a": "y", "b": "x"})


def test_a_near_duplicate_is_reported_with_the_jaccard_index_of_its_shingles():
    other = LONG.replace("falls", "comes")
    report = find_leakage({"t": text(LONG)}, seen={"validation": {"v": text(other)}})
    one, two = shingles(text(LONG)), shingles(text(other))
    assert not report.same
    assert report.near[0].similarity == pytest.approx(len(one & two) / len(one | two))
    assert (report.near[0].seen_in, report.near[0].seen_id) == ("validation", "v")


def test_short_texts_are_compared_exactly_only():
    report = find_leakage({"t": text("capital of France")}, seen={"train": {"a": text("capital of Spain")}})
    assert (report.same, report.near) == ((), ())


def test_different_texts_are_neither():
    other = "An entirely different sentence about the weather in the mountains during a very long winter"
    report = find_leakage({"t": text(LONG)}, seen={"train": {"a": text(other)}})
    assert (report.same, report.near, report.text()) == ((), (), "")


def test_the_search_by_shingles_finds_what_comparing_all_pairs_finds():
    words = LONG.split()
    rows = {f"r{i}": text(" ".join([*words[: 10 + i % 9], f"w{i % 4}"])) for i in range(40)}
    tests = {f"t{i}": text(" ".join(words[: 11 + i % 8])) for i in range(10)}
    report = find_leakage(tests, seen={"train": rows}, near=0.7)
    for key, fields in tests.items():
        pieces = shingles(fields)
        best = max(len(pieces & shingles(r)) / len(pieces | shingles(r)) for r in rows.values())
        found = [overlap.similarity for overlap in report.near if overlap.example_id == key]
        assert found == (pytest.approx([best]) if best >= 0.7 else [])


def test_symbols_and_values_that_are_no_text_count_too():
    assert normalized(text("+")) != normalized(text("-"))
    assert normalized({"x": [1, 2]}) != normalized({"x": [1, 3]})


def test_a_demonstration_in_the_prompt_counts_as_seen_and_refuses_the_gates():
    report = find_leakage({"t": text("a b"), "u": text("c d")}, seen={"demonstrations": {"demo 1": text("A b.")}})
    answer = no_leakage(report)
    assert answer.verdict is Verdict.ERROR
    for words in ("1 of 2 test examples", "demonstrations", "t is demonstrations demo 1", "Next:"):
        assert words in answer.message


def test_near_duplicates_are_told_and_not_refused():
    report = find_leakage({"t": text(LONG)}, seen={"train": {"a": text(LONG + " again")}})
    answer = no_leakage(report)
    assert answer.verdict is Verdict.PASS
    assert "1 near-duplicate reported, not refused" in answer.message
    assert "nearly repeat" in report.text()


def test_nothing_seen_passes():
    assert no_leakage(find_leakage({"t": text("a")}, seen={})).verdict is Verdict.PASS
