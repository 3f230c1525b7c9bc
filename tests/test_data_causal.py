"""Instructions and documents: prompts, answers, cutting, sides, groups, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora import config as experiments
from fslora.config import DataConfig, PartitionConfig
from fslora.data import load_dataset
from fslora.data.answers import choices_in, first_choice, found, last_number
from fslora.data.documents import cut, runs
from fslora.data.instruct import options_of
from fslora.data.partition import partition
from fslora.data.prompts import columns_of, render, user_message
from fslora.data.types import Dataset
from fslora.errors import ConfigError, DataError
from fslora.rng import Rng

NUMBERS = st.fractions(-(10**9), 10**9, max_denominator=10**6)
TEXTS = st.text(alphabet=st.sampled_from("ab {}\n\r\t\u2028é–x."), max_size=200)


def load(source: Path | str, task: str = "instruct", seed: int = 0, **fields) -> Dataset:
    return load_dataset(DataConfig(task=task, source=str(source), **fields), Rng(seed))


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quiz(n: int = 40, **changes) -> list[dict]:
    """Rows of the LLM-Adapters form, answered true and false in turn."""
    rows = []
    for i in range(n):
        answer = "true" if i % 2 else "false"
        question = f"is {i} odd?\n\nAnswer format: true/false"
        row = {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        rows.append({**row, "site": f"site{i % 4}", **changes})
    return rows


def sides(data: Dataset):
    return {"train": data.train, "validation": data.validation, "test": data.test}


# --- prompts


def test_headings_hold_the_input_only_where_there_is_one():
    row = {"instruction": "Add.", "input": "1 and 2"}
    assert render("headings", row) == "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    for nothing in ({}, {"input": ""}, {"input": None}, {"input": " \n"}):
        assert render("headings", {"instruction": "Add.", **nothing}) == "### Instruction:\nAdd.\n\n### Response:\n"


def test_a_chat_is_what_the_user_says():
    assert render("chat", {"instruction": "Add."}) == "Add."
    assert user_message({"instruction": "Add.", "input": "1 and 2"}) == "Add.\n\n1 and 2"


def test_a_template_keeps_white_space_and_takes_braces_in_cells_as_text():
    row = {"a b": "{c}", "c": 3}
    assert render(" {{{a b}}}\n{c} ", row) == " {{c}}\n3 "
    assert columns_of(" {{{a b}}}\n{c} ") == {"a b", "c"}


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["x", "long name", "ü"]), TEXTS), min_size=1, max_size=4))
def test_rendering_is_concatenation(parts):
    row = {name: cell for _, name, cell in parts}
    template = "".join(f"{text.replace('{', '{{').replace('}', '}}')}{{{name}}}" for text, name, _ in parts)
    assert columns_of(template) == set(row)
    assert render(template, row) == "".join(text + row[name] for text, name, _ in parts)


@pytest.mark.parametrize(
    "template", ["{", "a } b", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{ }", "{a:{b}}"]
)
def test_bad_templates_name_the_key_and_the_remedy(template, tmp_path):
    for bad in (template, f"{{question}} {template}"):
        with pytest.raises(ConfigError, match=r"(?s)data\.prompt is .*names of columns in braces"):
            columns_of(bad)
    with pytest.raises(ConfigError, match=r"data\.prompt"):
        load(tmp_path / "nothing.jsonl", prompt=template)  # before anything is read


def test_a_misspelt_keyword_is_a_template_without_columns():
    with pytest.raises(ConfigError, match=r"'heading': it names no column.*'headings', 'chat'"):
        columns_of("heading")


# --- answers


def test_choices_stand_after_the_last_answer_format():
    assert choices_in("Answer format: x/y\nWhich?\n\nAnswer format: true / false \n\n### Response:\n") == (
        "true",
        "false",
    )
    assert choices_in("no such thing") == choices_in("Answer format: ") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The correct answer is TRUE.", "true"),
        ("untrue, so false", "false"),
        ("true or false", "true"),
        ("It is not  \n true that...", "not true"),
        ("nothing of the kind", None),
        ("", None),
    ],
)
def test_the_first_choice(text, expected):
    assert first_choice(text, ("true", "false", "not true", "")) == expected


def test_of_two_choices_at_one_place_the_longer_one():
    for choices in (("answer1", "answer1 or 2"), ("answer1 or 2", "answer1")):
        assert first_choice("answer1 or 2", choices) == "answer1 or 2"
    assert first_choice("answer10", ("answer1",)) is None
    assert first_choice("it is (b)", ("(a)", "(b)")) == "(b)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7", "7"),
        ("It costs $1,000.00.", "1000"),
        ("1,000 and 20", "20"),
        ("+12.50 euros", "12.5"),
        ("€-3", "-3"),
        ("-$1,234,567.80", "-1234567.8"),
        ("it fell to \u22124 degrees", "-4"),
        ("10-3", "3"),
        ("pages 10 -3", "-3"),
        ("-0.0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("1,2,3", "3"),
        ("<<48/2=24>>24 clips", "24"),
        ("3/4", "0.75"),
        ("-6/3", "-2"),
        ("2/6 of it", "1/3"),
        ("1/2/2024", "2024"),
        ("3/0", "0"),
        ("5 apples #### 72", "72"),
        ("#### 1 ... #### 72\n\nQuestion 3", "72"),
        ("72 #### none", None),
        ("none", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number(text, expected):
    assert last_number(text) == expected


@given(NUMBERS)
def test_a_number_is_read_back_and_normal(number):
    read = last_number(f"about {number}.")
    assert Fraction(read) == number
    assert last_number(read) == read


@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from(["", "$", "£ "]))
def test_equal_numbers_are_equal_texts(number, zeros, currency):
    sign = "-" if number < 0 else "+"
    written = f"{sign}{currency}{abs(number):,}" + ("." + "0" * zeros if zeros else "") + "."
    assert last_number(f"1 or 2, so #### {written}") == str(number)


@given(st.text(max_size=80), st.sampled_from(["choice", "number", "text"]))
def test_any_text_can_be_searched(text, extract):
    assert found(extract, text, ("yes", "no"), "yes") in (True, False)
    assert found("text", f" {text.upper()}\n", (), text.upper())


def test_found_reads_the_answer_as_it_reads_the_text():
    choices = ("true", "false")
    assert found("choice", "I think True", choices, "true")
    assert found("choice", "I think true", choices, "the correct answer is true")
    assert not found("choice", "no idea", choices, "true")
    assert found("number", "is $1,000.00", (), "so 10 * 100 = 1000\n#### 1000")
    assert not found("number", "nothing", (), "nothing")
    assert found("text", " New\n york ", (), "new York")
    assert not found("text", "New York!", (), "New York")


# --- instruct


def test_choices_from_the_prompt_give_every_target(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", quiz())
    data = load(rows, answer="answer", choices="answer-format", evaluate="choice", group="site", label="answer")
    assert (data.kind, data.label_names) == ("causal", ("false", "true"))
    assert [len(side) for side in sides(data).values()] == [30, 4, 6]
    for side in sides(data).values():
        assert np.bincount(side.labels).tolist() == [len(side) // 2] * 2
        for target, answer, options, choices in zip(*(side.columns[n] for n in COLUMNS), strict=True):
            assert choices == ("the correct answer is true", "the correct answer is false")
            assert target == choices[options.index(answer)]
    assert set(data.train.groups) == {"site0", "site1", "site2", "site3"}
    assert data.train.texts[0].endswith("Answer format: true/false\n\n### Response:\n")


COLUMNS = ("target", "answer", "options", "choices")


def test_the_same_for_the_same_seed_only(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", quiz())
    first, again, other = (load(rows, seed=seed).test.texts for seed in (0, 0, 1))
    assert first == again != other


def test_without_data_answer_the_response_is_the_answer(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", [{"q": f"Is {i} odd?", "a": " yes" if i % 2 else " no"} for i in range(20)])
    data = load(rows, prompt="{q}", response="a", choices=("yes", "no"), evaluate="choice")
    assert set(data.train.columns["target"]) == {" yes", " no"}
    assert set(data.train.columns["answer"]) == {"yes", "no"}
    assert set(data.train.columns["choices"]) == {(" yes", " no")}
    assert (data.label_names, data.train.groups) == (("all",), None)
    assert not data.train.labels.any()


def test_choices_from_a_column_may_be_lists_or_texts(tmp_path):
    for name, choices in (("lists", ["red", "blue"]), ("texts", "red / blue")):
        rows = [{"instruction": f"{i}", "output": "It is blue.", "answer": "blue", "of": choices} for i in range(20)]
        data = load(jsonl(tmp_path / f"{name}.jsonl", rows), answer="answer", choices="of")
        assert set(data.train.columns["options"]) == {("red", "blue")}
        assert set(data.train.columns["choices"]) == {("It is red.", "It is blue.")}
    numbers = jsonl(tmp_path / "numbers.jsonl", [{**row, "of": 3} for row in rows])
    with pytest.raises(DataError, match=r"'of' \(data\.choices\) holds 3; it has to hold a list"):
        load(numbers, answer="answer", choices="of")


def test_the_last_whole_word_is_the_answer_that_is_replaced():
    assert options_of("the answer to a is a", "a", ("a", "b")) == ("the answer to a is a", "the answer to a is b")
    assert options_of("answer10", "answer1", ("answer1", "answer2")) is None
    assert options_of("x+y", "x+y", (r"\1", "z")) == (r"\1", "z")


def test_some_unusable_rows_are_dropped_and_counted(tmp_path):
    bad = [
        {**quiz(1)[0], "instruction": " "},
        {**quiz(1)[0], "output": None},
        {**quiz(1)[0], "answer": "maybe"},
        {**quiz(1)[0], "output": "I do not know"},
        {**quiz(1)[0], "instruction": "Answer format: false"},
    ]
    data = load(jsonl(tmp_path / "a.jsonl", bad + quiz(20)), answer="answer", choices="answer-format")
    assert sum(map(len, sides(data).values())) == 20
    for what in (
        "no instruction",
        "no output",
        "the answer is none of the choices",
        "the answer is not in the response",
        "fewer than two choices",
    ):
        assert data.statistics[f"train rows dropped: {what}"] == 1


def test_where_every_answer_is_outside_the_choices_the_error_shows_a_row(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{**quiz(1)[0], "output": ""}, *quiz(9, answer="maybe")])
    with pytest.raises(
        DataError, match=r"row 2 of train: the answer 'maybe' .*\['true', 'false'\].*data\.answer.*data\.c"
    ):
        load(path, answer="answer", choices="answer-format")


def test_a_number_is_asked_for_only_where_numbers_are_looked_for(tmp_path):
    rows = [{"instruction": f"{i}", "output": f"so #### {i}" if i else "so it is"} for i in range(20)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert "train rows dropped: no number in the answer" not in load(path).statistics
    data = load(path, evaluate="generate", extract="number")
    assert data.statistics["train rows dropped: no number in the answer"] == 1


def test_own_sides_are_read_and_what_they_share_is_counted(tmp_path):
    train, test = jsonl(tmp_path / "a.jsonl", quiz(20)), jsonl(tmp_path / "b.jsonl", quiz(24)[18:])
    data = load(train, test=str(test), validation=str(test), group="site")
    assert [len(side) for side in sides(data).values()] == [20, 6, 6]
    assert data.statistics["test texts that are also in train"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response": "reply"}, r"no column 'reply'; it has 'instruction'.*data\.response"),
        ({"prompt": "{question}"}, r"no column 'question'.*data\.prompt"),
        ({"group": "shop"}, r"no column 'shop'.*data\.group"),
        ({"answer": "solution"}, r"no column 'solution'.*data\.answer"),
        ({"choices": "options"}, r"no column 'options'.*data\.choices"),
    ],
)
def test_missing_columns_name_their_key(fields, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path / "a.jsonl", quiz()), **fields)


def test_a_prompt_must_not_show_what_is_to_be_found(tmp_path):
    with pytest.raises(ConfigError, match=r"shows the column 'output', which data\.response names"):
        load(tmp_path / "nothing.jsonl", prompt="{instruction} {output}")
    with pytest.raises(ConfigError, match=r"shows the column 'input', which data\.response names"):
        load(tmp_path / "nothing.jsonl", response="input")
    hint = {"prompt": "{instruction} (It is {answer}.)", "answer": "answer"}
    assert len(load(jsonl(tmp_path / "a.jsonl", quiz()), **hint).train) == 30
    with pytest.raises(ConfigError, match=r"shows the column 'answer', which data\.answer names"):
        load(tmp_path / "nothing.jsonl", evaluate="generate", **hint)


def test_strata_have_to_be_everywhere_if_train_has_them(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", quiz(20, label=1.0))
    test = jsonl(tmp_path / "b.jsonl", quiz(20))
    assert load(train).label_names == ("1",)
    with pytest.raises(DataError, match=r"data\.label names, but test has not"):
        load(train, test=str(test))
    assert load(test, test=str(train)).label_names == ("all",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluate": "choice"}, r"data\.evaluate is 'choice', but data\.choices does not say"),
        ({"evaluate": "generate", "extract": "choice"}, r"data\.extract is 'choice', but data\.choices"),
        ({"choices": ["yes"]}, r"data\.choices.*list two choices"),
        ({"choices": ["yes", "yes "]}, r"data\.choices.*all different"),
        ({"source": "stdlib"}, r"'instruct' needs a file"),
    ],
)
def test_the_experiment_is_checked_before_anything_is_read(fields, message):
    data = {"task": "instruct", "source": "none.jsonl", **fields}
    with pytest.raises(ConfigError, match=message):
        experiments.build({"data": data, "partition": {"kind": "iid"}}, "test")


def test_natural_partitions_need_a_group():
    with pytest.raises(ConfigError, match=r"data\.group names no column that tells whose row it is"):
        experiments.build({"data": {"task": "instruct", "source": "none.jsonl"}}, "test")
    experiments.build({"data": {"task": "instruct", "source": "none.jsonl", "group": "file"}}, "test")
    experiments.build({"data": {"task": "text"}}, "test")


# --- text


@given(st.text(alphabet=st.sampled_from("ab \n\r\u2028é"), max_size=400), st.integers(1, 40))
def test_pieces_are_short_and_joined_they_are_the_text(text, size):
    pieces = cut(text, size)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_pieces_end_at_lines_then_at_spaces_then_anywhere():
    assert cut("one\ntwo\nthree\n", 8) == ["one\ntwo\n", "three\n"]
    assert cut("a bc def\nx\n", 6) == ["a bc ", "def\nx\n"]
    assert cut("abcdefgh", 3) == ["abc", "def", "gh"]
    assert cut("", 3) == []


@given(st.lists(st.sampled_from("abc"), max_size=300), st.integers(0, 9))
def test_runs_share_out_everything_in_runs(strands, seed):
    test, validation, train = runs(strands, (0.15, 0.1), Rng(seed))
    assert sorted([*test, *validation, *train]) == list(range(len(strands)))
    for name in set(strands):
        own = [i for i, strand in enumerate(strands) if strand == name]
        place = {position: i for i, position in enumerate(own)}
        spans = -(-len(own) // 100)
        for side, share in ((test, 0.15), (validation, 0.1)):
            held = sorted(place[position] for position in side if position in place)
            assert len(held) - sum(b == a + 1 for a, b in pairwise(held)) <= spans
            assert abs(len(held) - share * len(own)) <= spans
        assert any(position in place for position in train)


def folder(root: Path) -> Path:
    for site in ("alpha", "beta"):
        (root / site / "deep").mkdir(parents=True)
        for i in range(3):
            lines = [f"{site} {i}: line {j} of the text of this file\n" for j in range(60)]
            (root / site / "deep" / f"{i}.txt").write_text("".join(lines))
    (root / "notes.md").write_text("A note.\n" * 40)
    (root / "empty.txt").write_text(" \n")
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "table.csv").write_text("a,b\n1,2\n")
    (root / ".hidden").write_text("not read")
    return root


def test_a_folder_s_groups_are_what_lies_below_it(tmp_path):
    data = load(folder(tmp_path), "text", characters=100)
    assert (data.kind, data.label_names) == ("causal", ("all",))
    assert set(data.train.groups) == {"alpha", "beta", "notes.md"}
    assert set(data.train.texts) == {""}
    assert max(map(len, data.train.columns["target"])) <= 100
    statistics = data.statistics
    assert statistics["documents"] == 7
    assert statistics["empty files, passed over"] == 1
    assert statistics["files that are not UTF-8 text, passed over"] == 2
    assert statistics["tables passed over"] == 1
    counts = [len(side) for side in sides(data).values()]
    assert abs(counts[2] / sum(counts) - 0.15) < 0.03
    pattern = load(f"{tmp_path}/*/deep/*.txt", "text", characters=100)
    assert set(pattern.train.groups) == {"alpha", "beta"}


def test_nothing_is_lost_or_used_twice(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"line {i} of a book\r\n" for i in range(600))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = load(path, "text", characters=60)
    pieces = [piece for side in sides(data).values() for piece in side.columns["target"]]
    assert sorted(pieces) == sorted(cut(text, 60))
    assert data.statistics["a group is"] == "block of neighbouring pieces"
    parts = partition(PartitionConfig(min_examples=4), data.train, 10, Rng(0))
    assert len(parts.train) == 10
    assert load(path, "text", characters=60, seed=1).test.columns != data.test.columns


def test_own_sides_of_text(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} has this line\n" * 100)
    data = load(tmp_path / "train.txt", "text", test=str(tmp_path / "test.txt"), max_test=0)
    assert all("test has" in piece for piece in data.test.columns["target"])
    assert not any("test has" in piece for piece in data.train.columns["target"])
    with pytest.raises(DataError, match=r"data\.test is '.*', but data\.source is text"):
        load(tmp_path / "train.txt", "text", test="other.csv")


def test_rows_of_a_table_are_documents_by_group_and_stratum(tmp_path):
    rows = [{"text": "word " * 30, "user": f"u{i % 3}", "label": "ab"[i % 2]} for i in range(30)]
    rows += [{"text": "short", "user": "tiny", "label": "a"}, {"text": "", "user": "u0", "label": "a"}]
    data = load(jsonl(tmp_path / "a.jsonl", rows), "text", group="user", characters=50)
    assert set(data.train.groups) >= {"u0", "u1", "u2"}
    assert data.label_names == ("a", "b")
    assert data.statistics["train rows dropped: no text"] == 1
    for side in sides(data).values():
        assert set(side.labels.tolist()) == {0, 1}
    assert load(tmp_path / "a.jsonl", "text", characters=50).train.groups is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"data\.source is .*gone\.txt', but there is no such file"),
        ("blob.bin", b"\0\1", r"holds no usable text. Found files that are not UTF-8 text, passed over: 1"),
        ("one.txt", b"one line", r"data\.source .* is cut into 1 examples: give more text"),
    ],
)
def test_what_is_no_text_says_so(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name, "text")


def test_the_standard_library_by_top_level_module():
    data = load("stdlib", "text", max_test=0, max_validation=0)
    assert data.statistics["a group is"] == "top-level module"
    assert set(data.test.groups) <= set(data.train.groups)
    assert data.statistics["source"].startswith("standard library of Python")


# --- the sets in shared/data


@pytest.mark.parametrize("name", ["boolq", "arc_easy", "hellaswag_val", "piqa_val"])
def test_commonsense_sets_are_used_whole(name, shared):
    path = shared / "data" / name
    data = load(
        path / "train.jsonl.gz",
        test=str(path / "test.jsonl.gz"),
        answer="answer",
        choices="answer-format",
        evaluate="choice",
        max_test=0,
    )
    with gzip.open(path / "test.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    assert data.test.columns["target"] == tuple(row["output"] for row in rows)
    assert data.test.columns["answer"] == tuple(row["answer"] for row in rows)
    for target, choices in zip(data.train.columns["target"], data.train.columns["choices"], strict=True):
        assert target in choices
    assert not any("dropped" in key for key in data.statistics)
    assert all(
        found("choice", target, options, answer)
        for target, options, answer in zip(
            *(data.test.columns[n] for n in ("target", "options", "answer")), strict=True
        )
    )


def test_every_solution_of_gsm8k_has_its_answer(shared):
    fields = {"answer": "answer", "evaluate": "generate", "extract": "number"}
    data = load(shared / "data" / "gsm8k" / "train.jsonl.gz", max_test=0, **fields)
    assert not any("dropped" in key for key in data.statistics)
    for target, answer in zip(data.train.columns["target"], data.train.columns["answer"], strict=True):
        assert found("number", target, (), answer)


def test_alpaca_has_inputs_for_some(shared):
    data = load(shared / "data" / "alpaca_sample" / "train.jsonl.gz")
    assert 0 < sum("### Input:\n" in text for text in data.train.texts) < len(data.train)


@pytest.mark.parametrize(("name", "groups"), [("shakespeare_roles", 260), ("brown_genres", 15)])
def test_natural_groups_stay_in_train(name, groups, shared):
    data = load(shared / "data" / name / "train.jsonl.gz", "text", group="user", max_test=0, max_validation=0)
    assert len(set(data.train.groups)) == groups
    counts = [len(side) for side in sides(data).values()]
    assert np.allclose(np.array(counts) / sum(counts), [0.75, 0.1, 0.15], atol=0.01)
    assert len(partition(PartitionConfig(), data.train, 10, Rng(0)).train) == 10
