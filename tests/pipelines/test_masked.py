"""MaskGIT and MaskGen through the pipeline: 1-D tokens, continuous tokens, text-aware decoders, named choices."""

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.models.conditions.base import Conditions
from vgen.models.conditions.clip import ClipFeatures
from vgen.models.masked.maskgen import MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel
from vgen.models.masked.maskgit import MaskGITViTModel
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.titok.titok import TiTokVAE, TiTokVQ

SHAPES = {"image_size": 16, "encoder_patch_size": 8, "decoder_patch_size": 4, "num_tokens": 6}
SHAPES |= {"encoder_shape": (16, 1, 2), "decoder_shape": (16, 1, 2), "channels": 4}
SMALL = {"grid": (1, 1, 6), "width": 16, "layers": 1, "heads": 2}
TEXT = {"text_tokens": 5, "text_width": 8}


class Captions(Conditions):
    """Stands for `ClipCaptions`: features drawn from the words."""

    def captions(self, captions, limit=0, strict=False):
        rows = [torch.Generator().manual_seed(sum(caption.encode()) + 1) for caption in captions]
        text = torch.stack([torch.randn(5, 8, generator=row) for row in rows])
        return ClipFeatures(text, text.mean(dim=1), text.flip(1)).condition()

    def null(self, batch):
        return self.captions([""] * batch)


def quiet(module):
    return module.eval().requires_grad_(False)


@pytest.fixture
def maskgit():
    torch.manual_seed(0)
    tokenizer = quiet(TiTokVQ(**SHAPES, codebook_size=19))
    model = quiet(MaskGITViTModel(codes=19, classes=5, hidden=32, **SMALL))
    return VisualPipeline(
        tokenizer, model, order="confidence:steps=4,schedule=maskgit,temperature=9.5", choice="maskgit", temperature=9.5
    )


@pytest.fixture
def continuous():
    torch.manual_seed(0)
    tokenizer = quiet(TiTokVAE(**SHAPES, **TEXT, scale=0.5))
    model = MaskGenKLModel(channels=4, head_width=16, head_layers=1, text_width=8, micro_width=8, **SMALL)
    torch.nn.init.zeros_(model.diffloss.net.final_layer.linear.weight)  # random outputs would blow the tokens up
    model.vocabulary = Captions()
    return VisualPipeline(
        tokenizer,
        quiet(model),
        order="random:steps=3,schedule=mar",
        guidance_schedule="linear-clamped",
        substeps="ddim2",
        temperature=0.5,
    )


def test_maskgit_makes_pictures_of_1d_tokens(maskgit, tmp_path):
    result = maskgit(class_labels=[0, 4], num_images_per_prompt=2, seed=1)
    assert len(result.images) == 4 and result.images[0].size == (16, 16) and result.tokens.shape == (4, 6)
    assert result.stats.calls == 4
    assert maskgit(class_labels=0, num_inference_steps=6).stats.calls == 6, (
        "what is asked for wins over the default order's own steps"
    )
    assert maskgit(class_labels=0, order="raster").stats.calls == 6
    assert not torch.equal(result.tokens, maskgit(class_labels=[0, 4], num_images_per_prompt=2, seed=2).tokens)
    maskgit.save_pretrained(tmp_path)
    again = VisualPipeline.from_pretrained(tmp_path)
    assert again.config.choice == "maskgit"
    assert torch.equal(again(class_labels=[0, 4], num_images_per_prompt=2, seed=1).tokens, result.tokens)


def test_masks_say_nothing_about_1d_tokens(maskgit):
    picture, mask = Image.new("RGB", (16, 16)), Image.new("L", (16, 16), 255)
    with pytest.raises(VgenError, match="no places in the picture"):
        maskgit(class_labels=0, init_image=picture, mask=mask)


def test_continuous_tokens_are_denoised_and_decoded_with_the_caption(continuous):
    seen = []
    decode = continuous.tokenizer.decode

    def spy(tokens, grid=None, condition=None, **options):
        seen.append(condition)
        return decode(tokens, grid, condition, **options)

    continuous.tokenizer.decode = spy
    result = continuous("a cat", num_images_per_prompt=2, seed=1)
    assert result.tokens.shape == (2, 6, 4) and torch.isfinite(result.tokens).all()
    assert result.stats.calls == 3 and result.images[0].size == (16, 16)
    expected = Captions().captions(["a cat"]).extras["decoder_text"]
    assert [torch.equal(rows, expected.expand(4, -1, -1)) for rows in seen] == [True]  # small pictures go by fours
    alone = continuous("a cat", num_images_per_prompt=2, batch_size=1, seed=1)
    torch.testing.assert_close(alone.tokens, result.tokens, atol=1e-4, rtol=1e-4)
    with pytest.raises(VgenError, match="no top-k or top-p"):
        continuous("a cat", top_k=5)
    with pytest.raises(VgenError, match="takes prompts and knows no classes"):
        continuous(class_labels=1)


def test_guidance_may_begin_at_two_and_one_is_none():
    torch.manual_seed(0)
    model = MaskGenVQModel(codes=19, spare_rows=1, text_width=8, micro_width=8, **SMALL)
    model.vocabulary = Captions()
    pipe = VisualPipeline(
        quiet(TiTokVQ(**SHAPES, **TEXT, codebook_size=19)),
        quiet(model),
        order="confidence-3",
        guidance_scale=13.0,
        guidance_start=2.0,
        guidance_schedule="step-cosine",
    )
    assert pipe(["a cat", "a dog"]).stats.call_rows == 3 * 4
    assert pipe(["a cat", "a dog"], guidance_scale=1.0).stats.call_rows == 3 * 2


def test_tokenizer_and_generator_must_fit(maskgit, continuous):
    with pytest.raises(VgenError, match="has 19 codes, the generator was made for none"):
        VisualPipeline(maskgit.tokenizer, continuous.model)
    with pytest.raises(VgenError, match="no codes, the generator was made for 19"):
        VisualPipeline(continuous.tokenizer, maskgit.model)
