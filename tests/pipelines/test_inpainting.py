"""In- and outpainting: which cells stay, whose pixels they show, masks of every kind, pictures of other shapes, precisions."""

import io
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.layers.pictures import ORIENTATION
from vgen.layers.pixels import to_images
from vgen.models.mar.mar import MARModel
from vgen.pipelines.inpainting import Painting, read_painting
from vgen.pipelines.masks import read_mask
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.vq import VQModel

ROWS, COLUMNS, CELL = 3, 5, 4
HEIGHT, WIDTH = ROWS * CELL, COLUMNS * CELL


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(
        ch=8, encoder_ch_mult=(1, 1, 1), decoder_ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, codebook_size=32,
        codebook_embed_dim=4, usage_window=16, num_groups=4,
    ).eval()  # fmt: skip


def photo(width=WIDTH, height=HEIGHT, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask_of(box, width=WIDTH, height=HEIGHT, mode="L"):
    mask = Image.new(mode, (width, height))
    mask.paste("white", box)
    return mask


def read(tokenizer, image, mask=None, outpaint=None):
    return read_painting(tokenizer, [(1, ROWS, COLUMNS)], image, mask, outpaint)


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# what stays


def test_a_cell_is_new_where_the_mask_touches_it(tokenizer):
    # One pixel of row 1, column 3: rows and columns must not change places on a grid that is not square.
    made = read(tokenizer, photo(), mask_of((3 * CELL, CELL, 3 * CELL + 1, CELL + 1)))
    expected = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    expected[1, 3] = False
    assert torch.equal(made.kept, expected) and torch.equal(made.stays, expected.flatten())
    pixels = torch.from_numpy(np.asarray(photo()).copy()).permute(2, 0, 1)
    assert torch.equal(made.original, pixels)
    assert torch.equal(made.tokens, tokenizer.encode(pixels[None].float() / 127.5 - 1)[0])


def test_noise_of_a_lossy_mask_changes_nothing(tokenizer):
    clean = mask_of((0, 0, 2 * CELL, HEIGHT))
    noise = np.random.default_rng(1).normal(0, 15, (HEIGHT, WIDTH))
    noisy = Image.fromarray((np.asarray(clean) + noise).clip(0, 255).astype(np.uint8))
    for mask in (stored(noisy, "JPEG", quality=40), stored(noisy.convert("RGB"), "WEBP", quality=40)):
        assert np.asarray(Image.open(io.BytesIO(mask)).convert("L"))[:, 2 * CELL + 1 :].max() > 3
        assert torch.equal(read(tokenizer, photo(), mask).kept, read(tokenizer, photo(), clean).kept)


def test_the_middle_of_the_levels_is_where_white_begins():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert read_mask(mask, photo(4, 1)).tolist() == [[False, False, True, True]]
    assert read_mask(np.array([[0, 1, 1, 0]], bool), photo(4, 1)).tolist() == [[False, True, True, False]]


def white_strokes():
    mask = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, CELL, CELL))
    return mask


def white_strokes_beside_black_ones():
    mask = white_strokes()
    mask.paste((0, 0, 0, 255), (CELL, 0, 2 * CELL, CELL))
    return mask


def hole_in_black():
    mask = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 255))
    mask.paste((255, 0, 0, 0), (0, 0, CELL, CELL))
    return mask


def erased_copy():
    mask = photo().convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, CELL, CELL))
    return mask


def palette_with_a_hole():
    mask = Image.new("P", (WIDTH, HEIGHT), 1)
    mask.putpalette([255, 0, 0, 0, 0, 0])
    mask.paste(0, (0, 0, CELL, CELL))
    return Image.open(io.BytesIO(stored(mask, "PNG", transparency=0)))


def opaque_with_alpha():
    return mask_of((0, 0, CELL, CELL), mode="RGB").convert("RGBA")


def colours_under_full_transparency():
    mask = opaque_with_alpha()
    mask.putalpha(0)
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        white_strokes,
        white_strokes_beside_black_ones,
        hole_in_black,
        erased_copy,
        palette_with_a_hole,
        opaque_with_alpha,
        colours_under_full_transparency,
    ],
)
def test_masks_that_are_painted_in_alpha(mask):
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:CELL, :CELL] = True
    assert np.array_equal(read_mask(mask(), photo()), expected)


def test_unclear_masks_are_refused():
    marker = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    marker.paste((255, 0, 0, 255), (0, 0, CELL, CELL))
    other = photo(seed=5).convert("RGBA")
    other.paste((0, 0, 0, 0), (0, 0, CELL, CELL))
    for mask in (marker, other):
        with pytest.raises(VgenError, match="save it without transparency"):
            read_mask(mask, photo())


# pictures of every kind


def test_a_picture_and_its_mask_are_turned_upright(tokenizer):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    mask = mask_of((0, 0, CELL, HEIGHT))
    sideways = [stored(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif) for image in (photo(), mask)]
    made, expected = read(tokenizer, *sideways), read(tokenizer, photo(), mask)
    assert torch.equal(made.original, expected.original) and torch.equal(made.kept, expected.kept)


def test_transparency_of_palettes_is_white_as_in_datasets(tokenizer):
    palette = Image.new("P", (WIDTH, HEIGHT))
    made = read(tokenizer, stored(palette, "PNG", transparency=0), mask_of((0, 0, 1, 1)))
    assert (made.original == 255).all()


@pytest.mark.parametrize("size, box", [((50, 12), (15, 0, 35, 12)), ((20, 31), (0, 9, 20, 21))])
def test_another_shape_is_cut_to_its_centre_with_its_mask_and_said(tokenizer, caplog, size, box):
    image, mask = photo(*size), mask_of((box[0], box[1], box[0] + CELL, box[1] + CELL), *size)
    with caplog.at_level(logging.WARNING, "vgen.pipelines"):
        made = read(tokenizer, image, mask)
    expected = read(tokenizer, image.crop(box), mask.crop(box))
    assert torch.equal(made.original, expected.original) and torch.equal(made.kept, expected.kept)
    assert not made.kept[0, 0] and made.kept.sum() == ROWS * COLUMNS - 1
    (record,) = caplog.records
    assert f"{size[0]}x{size[1]}" in record.getMessage() and f"{WIDTH}x{HEIGHT}" in record.getMessage()


def test_squares_are_seen_as_datasets_see_them(tokenizer):
    from vgen.data.images import read_image, view

    image = photo(33, 21)
    made = read_painting(tokenizer, [(1, 3, 3)], image, mask_of((0, 0, 33, 10), 33, 21))
    seen = to_images(view(read_image(image), 12, None, None)[None])[0]
    assert made.original.permute(1, 2, 0).numpy().tobytes() == seen.tobytes()


# margins


def test_margins_are_new_and_the_picture_is_exact(tokenizer, caplog):
    inner = photo(WIDTH - 2 * CELL, HEIGHT - CELL)
    with caplog.at_level(logging.WARNING, "vgen.pipelines"):
        made = read(tokenizer, inner, outpaint=(CELL, 0, CELL, CELL))
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    expected[:2, 1:4] = True
    assert torch.equal(made.kept, expected) and not caplog.records
    shown = made.original[:, : HEIGHT - CELL, CELL : WIDTH - CELL]
    assert shown.permute(1, 2, 0).numpy().tobytes() == inner.tobytes()
    shares = read(tokenizer, inner, outpaint=(1 / 3, 0.0, 1 / 3, 0.5))
    assert torch.equal(shares.original, made.original) and torch.equal(shares.kept, made.kept)


def test_a_cell_that_a_margin_touches_is_new_and_so_is_what_the_mask_says(tokenizer):
    mask = mask_of((0, 0, 1, 1), WIDTH - 1, HEIGHT)
    made = read(tokenizer, photo(WIDTH - 1, HEIGHT), mask, outpaint=(1, 0, 0, 0))
    expected = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    expected[:, 0] = False
    assert torch.equal(made.kept, expected)
    mask = mask_of((WIDTH - 2, 0, WIDTH - 1, 1), WIDTH - 1, HEIGHT)
    made = read(tokenizer, photo(WIDTH - 1, HEIGHT), mask, outpaint=(1, 0, 0, 0))
    expected[0, -1] = False
    assert torch.equal(made.kept, expected)


@pytest.mark.parametrize("size, kept", [((12, 12), (0, 3, 1, 4)), ((60, 12), (1, 2, 0, 5)), ((24, 24), (0, 3, 1, 4))])
def test_margins_of_nothing_keep_the_whole_picture(tokenizer, caplog, size, kept):
    with caplog.at_level(logging.WARNING, "vgen.pipelines"):
        made = read(tokenizer, photo(*size), outpaint=(0, 0, 0, 0))
    top, bottom, left, right = kept
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    expected[top:bottom, left:right] = True
    assert torch.equal(made.kept, expected)
    assert "grows to" in caplog.records[0].getMessage()


def test_a_tiny_picture_in_a_huge_canvas_costs_no_memory(tokenizer):
    with pytest.raises(VgenError, match="nothing of the init image would stay"):
        read(tokenizer, photo(4, 4), outpaint=(10**6, 10**6, 10**6, 10**6))


# pasting back


def test_what_stays_has_its_own_bytes_behind_a_seam_inside_the_kept_cells():
    kept = torch.tensor([[True, True, False], [True, True, True]])
    original = torch.randint(256, (3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    painting = Painting(torch.zeros(6), kept.flatten(), original, kept)
    other = Image.fromarray((255 - original.permute(1, 2, 0)).numpy())
    made = torch.from_numpy(np.asarray(painting.paste([other])[0]).copy()).permute(2, 0, 1)
    new = ~kept.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(made[:, new], 255 - original[:, new])
    # Half a cell, 4 pixels, around the new cell (rows 0-7, columns 16-23) is seam, and nothing else.
    seam = torch.zeros_like(new)
    seam[:12, 12:] = True
    seam &= ~new
    assert torch.equal(made[:, ~seam & ~new], original[:, ~seam & ~new])
    weight = painting.weight
    assert ((weight[seam] > 0) & (weight[seam] < 1)).any() and weight[0, 12:16].tolist() == sorted(
        weight[0, 12:16].tolist(), reverse=True
    )
    assert 0 < weight[0, 15] < 0.5 < weight[0, 12] < 1


@pytest.fixture(scope="module")
def pipe():
    return VisualPipeline.shipped("emoji")


def test_kept_pixels_are_the_originals_in_the_shipped_model(pipe):
    base, mask = photo(64, 64), mask_of((32, 0, 64, 64), 64, 64)
    made = pipe("red heart", init_image=base, mask=mask, num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(made)[:, :28], np.asarray(base)[:, :28])
    plain = pipe("red heart", init_image=base, mask=mask, num_inference_steps=2, paste_back=False).images[0]
    assert np.array_equal(np.asarray(made)[:, 32:], np.asarray(plain)[:, 32:])
    assert not np.array_equal(np.asarray(plain)[:, :28], np.asarray(base)[:, :28])


def test_a_picture_comes_out_the_same_in_any_batch(pipe):
    base, mask = photo(64, 64), mask_of((32, 0, 64, 64), 64, 64)

    def pictures(batch_size):
        made = pipe(
            "ghost", num_images_per_prompt=5, init_image=base, mask=mask, num_inference_steps=2, batch_size=batch_size
        ).images
        return [image.tobytes() for image in made]

    assert pictures(1) == pictures(2) == pictures(5)


def test_both_files_can_be_checked_before_torch_is_loaded():
    code = "import sys; from vgen.pipelines.masks import read_parts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_half_precision(pipeline, kind, dtype):
    if kind == "codes":
        pipe, subject = pipeline, {"prompt": "red apple"}
    else:
        torch.manual_seed(0)
        latents = KLModel(ch=8, ch_mult=(1, 2), num_res_blocks=1, latent_channels=3, num_groups=4, scale=1.0).eval()
        stacks = {
            f"{stack}_{key}": value
            for stack in ("encoder", "decoder")
            for key, value in (("width", 16), ("layers", 1), ("heads", 2))
        }
        model = MARModel(
            channels=3, head="flow", grid=(4, 4), buffer=2, classes=5, head_width=16, head_layers=1, **stacks
        ).eval()
        pipe, subject = VisualPipeline(latents, model, order="random", substeps=3), {"class_labels": 1}
    for part in (pipe.tokenizer, pipe.model):
        torch.nn.Module.to(part, dtype)
    mask = mask_of((4, 0, 8, 8), 8, 8)
    result = pipe(
        **subject,
        init_image=photo(8, 8),
        mask=mask,
        order="random",
        num_inference_steps=2,
        batch_size=1,
        num_images_per_prompt=2,
    )
    for image in result.images:
        assert image.size == (8, 8)
        assert np.array_equal(np.asarray(image)[:, :2], np.asarray(photo(8, 8))[:, :2])


# bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image": photo()}, "both an init image and a mask"),
        ({"image": None, "mask": photo()}, "both an init image and a mask"),
        ({"image": None, "outpaint": (1, 1, 1, 1)}, "outpainting an init image and margins"),
        ({"image": photo(), "mask": mask_of((0, 0, 1, 1), 3, 3)}, "20x12, its mask 3x3"),
        ({"image": photo(), "mask": np.ones((HEIGHT, WIDTH), np.uint8)}, "numbers 0 and 1 is black"),
        ({"image": photo(50, 12), "mask": mask_of((0, 0, 5, 12), 50, 12)}, "no white area in the centre"),
        ({"image": photo(), "outpaint": (0, 0, 0, 0)}, "margins add nothing"),
        ({"image": photo(), "outpaint": (1, 2, 3)}, "four margins"),
        ({"image": photo(), "outpaint": (1, -2, 3, 4)}, "a margin must be"),
        ({"image": photo(), "outpaint": (0.5, float("nan"), 0, 0)}, "a margin must be"),
        ({"image": photo(), "outpaint": 4}, "must be a list"),
        (
            {"image": photo(), "mask": Image.new("L", (WIDTH, HEIGHT), 255), "outpaint": (4, 4, 4, 4)},
            "nothing of the init image",
        ),
        ({"image": stored(photo(), "PNG")[:200], "mask": photo()}, "the init image is not an image that can be read"),
        ({"image": photo(), "mask": "/nowhere.png"}, "no image file /nowhere.png"),
    ],
)
def test_bad_input_is_one_sentence(tokenizer, arguments, words):
    with pytest.raises(VgenError, match=words):
        read(tokenizer, **arguments)
