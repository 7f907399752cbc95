"""`vgen data info`: what a dataset holds, in words."""

from PIL import Image

from vgen.data.info import describe


def folder_of(root, captions):
    root.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(root / f"{number:02}.png")
        if caption:
            (root / f"{number:02}.txt").write_text(caption)
    return root


def test_captions_that_repeat_are_shown_once(tmp_path):
    said = describe(folder_of(tmp_path / "set", ["a cat", "a cat", "a dog", "a cat", ""]))
    assert "captions: 4 (2 different), such as" in said
    assert [line.strip() for line in said.splitlines()[-2:]] == ["a cat", "a dog"]


def test_no_captions_are_none(tmp_path):
    said = describe(folder_of(tmp_path / "set", ["", ""]))
    assert said.endswith("classes: none\n  captions: none")
