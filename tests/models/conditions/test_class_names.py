"""The names of classes travel with a model, and its labels may be names."""

import json

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.class_names import FILE, class_number
from vgen.models.conditions.classes import ClassVocabulary
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.llama.llamagen import LlamaGenModel

NAMES = ("ant", "Bee", "bee", "3", "snow leopard")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = LlamaGenModel(
        codes=16, grid=(1, 2, 2), width=32, depth=1, heads=2, hidden=32, conditioning="class", classes=5
    )
    made.vocabulary = ClassVocabulary(5, NAMES)
    return made


def test_they_are_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["names"] == list(NAMES)
    assert LlamaGenModel.from_pretrained(tmp_path).vocabulary == ClassVocabulary(5, NAMES)


def test_models_of_the_past_have_none(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    old = LlamaGenModel.from_pretrained(tmp_path)
    assert old.vocabulary == ClassVocabulary(5) and old.vocabulary.labels([4]).ids.tolist() == [[4]]
    with pytest.raises(VgenError, match="does not know what its classes are called: give a number from 0 to 4"):
        old.vocabulary.labels(["ant"])
    old.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / FILE).exists()


@pytest.mark.parametrize("label", [0, "ant", "3"])
def test_without_classes_a_prompt_is_asked_for(label):
    vocabulary = Vocabulary.build(["a red apple"])
    with pytest.raises(VgenError, match=r"trained without classes; give a prompt$"):
        vocabulary.labels([label])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"names": ["a"]}', "names 1 classes, the model beside it has 5"),
        ('{"names": [1, 2, 3, 4, 5]}', "a name that is no text"),
        ("[]", "must hold"),
        ("{", "must hold"),
    ],
)
def test_other_files_are_one_sentence(model, tmp_path, text, message):
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(VgenError, match=message):
        LlamaGenModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("label", "number"),
    # A name wins over a number that is written the same, and capital letters count where they tell two names apart.
    [(0, 0), (3, 3), ("ant", 0), ("ANT", 0), ("Bee", 1), ("bee", 2), ("3", 3), ("4", 4), ("Snow Leopard", 4)],
)
def test_a_class_by_number_or_name(label, number):
    assert class_number(label, 5, NAMES) == number
    words = Vocabulary.build(["a word"], 5, NAMES)
    assert words.labels([label]).ids[0, 0] == words.first_class + number


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("aant", "no class 'aant' .*did you mean 'ant'.*its classes are ant, Bee, bee, 3, snow leopard, or 0 to 4"),
        ("BEE", "no class 'BEE'"),
        ("-1", "no class '-1'"),
        ("²", "no class '²'"),
        ("", "no class ''"),
        (5, "0 to 4, got 5"),
        ("7", "0 to 4, got 7"),
        (-1, "0 to 4, got -1"),
        (1.0, "a number or a name, got 1.0"),
    ],
)
def test_classes_that_are_not_there(label, message):
    with pytest.raises(VgenError, match=message):
        class_number(label, 5, NAMES)


def test_words_with_classes_keep_the_names(tmp_path):
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(["a word"], 5, NAMES)
    model = LlamaGenModel(
        codes=16, grid=(1, 2, 2), width=32, depth=1, heads=2, hidden=32, conditioning="words", classes=len(vocabulary)
    )
    model.vocabulary = vocabulary
    model.save_pretrained(tmp_path)
    loaded = LlamaGenModel.from_pretrained(tmp_path).vocabulary
    assert loaded.class_names == NAMES and loaded.words == ["a", "word"] and not loaded.unconditional
