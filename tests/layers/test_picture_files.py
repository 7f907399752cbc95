"""Picture files: what is written, and whose they are."""

import pytest
from PIL import Image

from vgen.errors import VgenError
from vgen.layers.picture_files import FORMATS, is_ours, save_animation, save_picture


@pytest.mark.parametrize("suffix", FORMATS)
def test_vgen_knows_its_own_pictures(suffix, tmp_path):
    path, theirs = tmp_path / f"ours{suffix}", tmp_path / f"theirs{suffix}"
    image = Image.effect_noise((24, 16), 40).convert("RGB")
    save_picture(image, path)
    image.save(theirs)
    assert is_ours(path) and not is_ours(theirs)
    with Image.open(path) as again:
        assert again.size == (24, 16)
        if suffix in (".png", ".webp"):
            assert again.convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_vgen_knows_its_own_animations(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    save_animation(frames, tmp_path / f"ours{suffix}", [50, 50, 200])
    frames[0].save(tmp_path / f"theirs{suffix}", save_all=True, append_images=frames[1:])
    assert is_ours(tmp_path / f"ours{suffix}") and not is_ours(tmp_path / f"theirs{suffix}")
    with Image.open(tmp_path / f"ours{suffix}") as again:
        assert again.n_frames == 3


def test_what_is_no_picture_is_not_ours(tmp_path):
    (tmp_path / "notes.png").write_text("vgen")
    assert not is_ours(tmp_path / "notes.png") and not is_ours(tmp_path / "missing.png")
    with pytest.raises(VgenError, match=r"\.png, \.jpg.* got 'a\.bmp'"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.bmp")
