"""Caption tables, and text as files hold it."""

import json

import pytest
from data.made import PNG, put
from hypothesis import given
from hypothesis import strategies as st

from vgen.data.sources import open_data
from vgen.data.tables import tidy
from vgen.data.text import BadFile, caption_in, caption_of, read_text, whole_text
from vgen.errors import VgenError


def captions(root, split="train"):
    source = open_data(root).source(split)
    return {sample.key: sample.caption for sample in source.samples}


# values


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, ""),
        (" a cat \n", "a cat"),
        ([], ""),
        (["first", "second"], "first"),
        (["", None, "second"], "second"),
        ({"a": 1}, ""),
        (True, ""),
        (7, "7"),
        ("\ud83d\ude00", "😀"),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_captions_of_json_values(value, caption):
    assert caption_of(value) == caption


def test_the_first_field_with_words_counts():
    assert caption_in({"caption": None, "text": "t"}) == "t" and caption_in({"captions": ["a", "b"]}) == "a"
    assert caption_in({"caption": " ", "prompt": "p"}) == "p" and caption_in({"label": "x"}) == ""


@given(st.text(st.characters()) | st.text(st.characters(categories=["Cs", "L"])))
def test_whole_text_can_always_be_written(text):
    whole = whole_text(text)
    assert whole.encode().decode() == whole and (
        whole == text or "\ufffd" in whole or any("\ud800" <= c <= "\udfff" for c in text)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding):
    assert read_text("naïve 猫".encode(encoding)) == "naïve 猫"


@pytest.mark.parametrize("contents", [b"caf\xe9", b"\xff\xfe\x00"])
def test_other_encodings_are_refused(contents):
    with pytest.raises(BadFile, match="not UTF-8"):
        read_text(contents)


# tables

ODD = "line\u2028separator\x0cand\x85more\x1cend"


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
def test_csv_rows_end_where_csv_says(tmp_path, name):
    table = f'\ufefffile_name,text\r\na.png,{ODD}\r\nb.png,"two\nlines, quoted"\r\nc.png,\r\n'
    put(tmp_path, {"a.png": PNG, "b.png": PNG, "c.png": PNG, name: table})
    assert captions(tmp_path) == {"a": ODD, "b": "two\nlines, quoted", "c": ""}
    assert f"2 captions from {name}" in str(open_data(tmp_path).report)


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_jsonl_lines_end_at_line_feeds_alone(tmp_path, name):
    rows = [
        {"file_name": "a.png", "caption": ODD},
        {"file_name": "b.png", "text": ["x", "y"]},
        {"file_name": "c.png", "text": None},
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    put(tmp_path, {"a.png": PNG, "b.png": PNG, "c.png": PNG, name: f"\ufeff{lines}\n\n"})
    assert captions(tmp_path) == {"a": ODD, "b": "x", "c": ""}


def test_json_tables_with_marks_lists_and_null(tmp_path):
    put(tmp_path, {"a.png": PNG, "b.png": PNG, "c.png": PNG})
    put(tmp_path, {"captions.json": '\ufeff{"a.png": null, "b": ["one", "two"], "./c.png": {"caption": "\\ud83d"}}'})
    assert captions(tmp_path) == {"a": "", "b": "one", "c": "\ufffd"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_several_rows_a_picture_give_the_first_and_say_so(tmp_path, delimiter):
    rows = [("Image", "Caption"), ("a.png", ""), ("a.png", "second"), ("a.png", "third"), ("b.png", "b")]
    put(tmp_path, {"a.png": PNG, "b.png": PNG, "captions.csv": "\n".join(delimiter.join(row) for row in rows)})
    assert captions(tmp_path) == {"a": "second", "b": "b"}
    assert "captions.csv has several rows for a picture (2 more than pictures): the first is used" in str(
        open_data(tmp_path).report
    )


def test_tables_lie_beside_pictures_or_beside_the_splits(tmp_path):
    put(
        tmp_path,
        {
            "Train/x/1.png": PNG,
            "Train/x/2.png": PNG,
            "val/3.png": PNG,
            "val/4.png": PNG,
            "Train/x/metadata.csv": "file_name,text\n1.png,nearest wins\n",
            "metadata.jsonl": '{"file_name": "Train/x/1.png", "text": "far"}\n{"file_name": "Train\\\\x\\\\2.png", "text": "two"}\n'
            '{"file_name": "./val/3.png", "text": "three"}\n{"file_name": "val/9.png", "text": "nine"}\n',
            "val/4.txt": "not asked, as a table speaks of this split",
        },
    )
    assert captions(tmp_path) == {"x/1": "nearest wins", "x/2": "two"} and captions(tmp_path, "val") == {
        "3": "three",
        "4": "",
    }
    assert "metadata.jsonl names 1 pictures that are not there" in str(open_data(tmp_path).report)


def test_sidecars_count_where_no_table_speaks(tmp_path):
    put(
        tmp_path,
        {"train/1.png": PNG, "train/captions.csv": "file,caption\n1.png,one\n", "val/2.png": PNG, "val/2.TXT": "two"},
    )
    assert captions(tmp_path) == {"1": "one"} and captions(tmp_path, "val") == {"2": "two"}


def test_composed_and_decomposed_names_are_one(tmp_path):
    put(tmp_path, {"cafe\u0301.png": PNG, "captions.csv": "file,caption\ncaf\u00e9.png,coffee\n"})
    assert list(captions(tmp_path).values()) == ["coffee"] and tidy(".\\a\\b") == "a/b"


def test_metadata_of_another_kind_is_no_caption_table(tmp_path):
    put(tmp_path, {"1.png": PNG, "1.txt": "one", "metadata.csv": "id,size\n1,2\n", "metadata.parquet": b"PAR1"})
    assert captions(tmp_path) == {"1": "one"}
    said = str(open_data(tmp_path).report)
    assert "metadata.csv has no column of files or none of captions" in said and "metadata.parquet is not read" in said


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions.csv": "name;words\n"}, "needs the columns file and caption, found 'name;words'"),
        ({"captions.jsonl": '{"file": "a.png"}\n'}, "must be"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{"file_name"\n'}, "line 2: JSON that cannot be read"),
        (
            {"metadata.csv": "file_name,text\nimages/a.png,x\n"},
            "names no picture of its folder: expected paths from there, like a.png",
        ),
        ({"metadata.csv": "file_name,text\na.png,caf\xe9\n".encode("latin-1")}, "is not UTF-8 text: save it as UTF-8"),
        ({"captions.json": "[" * 100_000}, "is not JSON"),
    ],
)
def test_bad_tables(tmp_path, files, message):
    put(tmp_path, {"a.png": PNG, **files})
    with pytest.raises(VgenError, match=message):
        open_data(tmp_path)


def test_captions_that_lose_against_others_are_named(tmp_path):
    put(
        tmp_path,
        {
            **{f"{number}.png": PNG for number in range(2)},
            "captions.csv": "file_name,text\n0.png,zero\n1.png,one\n",
            "metadata.jsonl": '{"file_name": "0.png", "text": "nought"}\n',
            "0.txt": "null",
        },
    )
    data = open_data(tmp_path)
    assert [sample.caption for sample in data.source("train").samples] == ["zero", "one"]
    assert "the captions of metadata.jsonl are not used: captions.csv has some for the same pictures" in str(
        data.report
    )
    assert "1 caption files beside the pictures are not read: captions.csv has the captions" in str(data.report)


def test_a_table_of_other_columns_is_one_line(tmp_path):
    put(tmp_path, {"0.png": PNG, "captions.csv": '"not closed\n0.png,x\n'})
    with pytest.raises(VgenError) as error:
        open_data(tmp_path)
    assert "found 'not closed\\n0.png,x\\n'" in str(error.value) and "\n" not in str(error.value)
