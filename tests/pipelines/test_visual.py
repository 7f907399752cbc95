"""The pipeline: prompts and classes in, pictures out, whatever the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.models.flexar.flexar import FlexARModel
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.flextok.flextok import FlexTok


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_pictures_and_stats(pipeline):
    steps = []
    result = pipeline(
        ["red apple", "a cat"],
        num_images_per_prompt=3,
        batch_size=4,
        callback_on_step_end=lambda pipe, index, step, values: steps.append(step.index),
    )
    assert len(result.images) == 6 and result.images[0].size == (8, 8) and result.tokens.shape == (6, 16)
    stats = result.stats.report()
    assert steps == [0, 1, 2, 3, 4] * 2 and stats["calls"] == 10 and stats["calls_per_batch"] == 5
    assert stats["call_rows"] == 2 * 5 * 6  # two guidance rows
    assert stats["images"] == 6 and stats["tokens"] == 96


def test_pictures_do_not_depend_on_the_batch_size(pipeline):
    prompts = ["red apple", "a cat", "mat", "a red cat on a mat"] * 4
    one = pipeline(prompts, batch_size=1, seed=3)
    many = pipeline(prompts, batch_size=16, seed=3)
    assert torch.equal(one.tokens, many.tokens)
    assert np.array_equal(pixels(one.images), pixels(many.images))
    assert not torch.equal(one.tokens, pipeline(prompts, seed=4).tokens)


def test_a_stream_makes_what_is_asked_for_and_nothing_else(pipeline):
    prompts = ["red apple", "a cat", "mat"]
    whole = pipeline(prompts, num_images_per_prompt=2, seed=3)
    calls = []
    stream = pipeline.stream(
        prompts,
        num_images_per_prompt=2,
        seed=3,
        batch_size=2,
        skip={1, 2},
        callback_on_step_end=lambda pipe, index, step, values: calls.append(values["canvas"].samples),
    )
    assert not calls, "nothing is decoded before it is asked for"
    batches = [next(stream)]
    assert len(calls) == 5 and batches[0].numbers == [0, 3]
    batches += stream
    assert [batch.numbers for batch in batches] == [[0, 3], [4, 5]]
    for batch in batches:
        assert torch.equal(batch.tokens, whole.tokens[batch.numbers]) and len(batch.images) == len(batch.numbers)
    rest = pipeline(prompts[1:], num_images_per_prompt=2, seed=3, first=2)
    assert torch.equal(rest.tokens, whole.tokens[2:])


def test_prompts_of_a_text_encoder_are_read_a_block_at_a_time(pipeline, monkeypatch):
    from vgen.pipelines import visual

    prompts, read = ["red apple", "a cat", "mat", "red cat", "a mat"], []
    whole = pipeline(prompts, num_images_per_prompt=2, seed=3)
    vocabulary, captions = pipeline.model.vocabulary, pipeline.model.vocabulary.captions
    monkeypatch.setattr(visual, "ENCODED", 2)
    monkeypatch.setattr(vocabulary, "encodes", True)
    monkeypatch.setattr(vocabulary, "captions", lambda texts, limit: read.append(list(texts)) or captions(texts, limit))
    stream = pipeline.stream(prompts, num_images_per_prompt=2, seed=3, batch_size=3)
    first = next(stream)
    assert read == [["red apple", "a cat"]]
    batches = [first, *stream]
    assert read == [["red apple", "a cat"], ["mat", "red cat"], ["a mat"]]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), whole.tokens)


@pytest.mark.parametrize(
    "one, same",
    [
        ({"class_labels": 1}, {"class_labels": np.int64(1)}),
        ({"class_labels": 1}, {"class_labels": "1"}),
        ({"class_labels": 1}, {"class_labels": torch.tensor(1)}),
        ({"class_labels": [0, 2]}, {"class_labels": np.array([0, 2])}),
        ({"class_labels": [0, 2]}, {"class_labels": torch.tensor([0, 2])}),
        ({"class_labels": [0, 1]}, {"class_labels": range(2)}),
        ({"prompt": ["a", "cat"]}, {"prompt": ("a", "cat")}),
        ({"prompt": ["a", "cat"]}, {"prompt": (word for word in ("a", "cat"))}),
        ({"prompt": ["a", "cat"]}, {"prompt": np.array(["a", "cat"])}),
        (
            {
                "prompt": "a",
                "seed": 3,
                "num_inference_steps": 3,
                "num_images_per_prompt": 2,
                "top_k": 5,
                "guidance_scale": 3.0,
                "temperature": 0.5,
            },
            {
                "prompt": "a",
                "seed": np.int64(3),
                "num_inference_steps": np.int32(3),
                "num_images_per_prompt": torch.tensor(2),
                "top_k": np.uint8(5),
                "guidance_scale": torch.tensor(3.0),
                "temperature": np.float32(0.5),
                "batch_size": np.int16(1),
            },
        ),
    ],
)
def test_numbers_and_lists_of_numpy_and_torch_are_numbers_and_lists(pipeline, one, same):
    assert torch.equal(pipeline(**one).tokens, pipeline(**same).tokens)


def test_the_fingerprint_tells_weights_apart(pipeline):
    before = pipeline.fingerprint()
    assert before == pipeline.fingerprint() and len(before) == 16
    with torch.no_grad():
        pipeline.tokenizer.decoder.conv_out.bias += 1e-3
    assert pipeline.fingerprint() != before


def test_order_names_may_hold_their_own_steps_and_seed(pipeline):
    assert pipeline("mat", order="random:steps=3,seed=9").stats.calls == 3
    assert pipeline("mat", order="random-4", seed=5).stats.calls == 4


def test_saved_pipeline_makes_the_same_pictures(pipeline, pipeline_folder):
    loaded = VisualPipeline.from_pretrained(pipeline_folder)
    assert loaded.config.order == "random" and loaded.config.steps == 5 and loaded.config.guidance_scale == 2.0
    assert torch.equal(loaded("red apple").tokens, pipeline("red apple").tokens)


def test_generic_diffusers_loading_needs_only_our_class(pipeline_folder):
    from diffusers import DiffusionPipeline

    assert issubclass(VisualPipeline, DiffusionPipeline)
    assert (pipeline_folder / "model_index.json").is_file() and (
        pipeline_folder / "model" / "vocabulary.json"
    ).is_file()


def test_class_labels(pipeline):
    assert len(pipeline(class_labels=[0, 2]).images) == 2
    with pytest.raises(VgenError, match="0 to 2, got 3"):
        pipeline(class_labels=3)


def test_no_guidance_runs_one_row(pipeline):
    assert pipeline("mat", guidance_scale=1.0).stats.call_rows == 5


def test_inpainting_keeps_the_tokens_under_the_black_area(pipeline):
    image = pipeline("red apple", seed=1)
    original = pipeline.tokenizer.encode(_tensor(image.images[0]))[0]
    mask = Image.new("RGB", (8, 8))
    mask.paste("white", (4, 0, 8, 8))  # the right half is new
    result = pipeline("a cat", num_images_per_prompt=4, init_image=image.images[0], mask=mask)
    tokens, original = result.tokens.view(4, 4, 4), original.view(4, 4)
    assert torch.equal(tokens[:, :, :2], original[:, :2].expand(4, 4, 2))
    assert not torch.equal(tokens[:, :, 2:], original[:, 2:].expand(4, 4, 2))


def _tensor(image):
    from vgen.layers.pixels import to_pixels

    return to_pixels(image)[None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either prompts or class labels"),
        ({"prompt": "a", "class_labels": 1}, "either prompts or class labels"),
        ({"prompt": "red unicorn"}, "'unicorn'"),
        ({"prompt": "a", "order": "rastr"}, "did you mean 'raster'"),
        ({"prompt": "a", "order": "raster", "num_inference_steps": 4}, "no option 'steps'"),
        ({"prompt": "a", "num_inference_steps": 99}, "99"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance scale"),
        ({"prompt": "a", "guidance_schedule": "linaer"}, "did you mean 'linear'"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top-p"),
        ({"prompt": "a", "top_k": -3}, "top-k"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1"),
        ({"prompt": []}, "prompts .* must not be empty"),
        ({"prompt": 3}, "must be a list, got 3"),
        ({"prompt": ["a", None]}, "a prompt must be a text .* got None"),
        ({"prompt": b"a"}, r"got b'a' \(bytes\)"),
        ({"prompt": {"a", "cat"}}, "must be a list"),
        ({"prompt": [["a"]]}, "a prompt must be a text"),
        ({"class_labels": []}, "class labels must not be empty"),
        ({"class_labels": 1.7}, "a class label must be a whole number .* got 1.7"),
        ({"class_labels": [0, True]}, "a class label must be a whole number .* got True"),
        ({"class_labels": np.zeros((2, 2), int)}, "array of 2 dimensions"),
        ({"prompt": "a", "seed": None}, "the seed must be a whole number .* got None"),
        ({"prompt": "a", "seed": 1.0}, "the seed must be"),
        ({"prompt": "a", "seed": 2**32}, "the seed must be a whole number from 0 to 4294967295"),
        ({"prompt": "a", "first": 2**32 - 1, "num_images_per_prompt": 2}, "the number of the last picture"),
        ({"prompt": "a", "guidance_scale": "3"}, r"the guidance scale must be a finite number, got '3' \(str\)"),
        ({"prompt": "a", "guidance_scale": True}, "the guidance scale must be a finite number, got True"),
        ({"prompt": "a", "guidance_schedule": 3}, "the guidance schedule must be a text"),
        ({"prompt": "a", "temperature": "1"}, "the temperature must be a finite number"),
        ({"prompt": "a", "temperature": float("inf")}, "the temperature must be a finite number"),
        ({"prompt": "a", "top_p": "0.5"}, "top-p must be a finite number"),
        ({"prompt": "a", "top_p": float("nan")}, "top-p must be a finite number"),
        ({"prompt": "a", "top_k": 1.5}, "top-k .* must be a whole number"),
        ({"prompt": "a", "num_inference_steps": True}, "steps must be a whole number"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "steps must be a whole number"),
        ({"prompt": "a", "num_images_per_prompt": None}, "number of images must be"),
        ({"prompt": "a", "batch_size": 2.0}, "batch size must be"),
        ({"prompt": "a", "order": 3}, "an order is a name"),
        ({"prompt": "a", "order_options": ["steps"]}, "options of an order are a dict"),
        ({"prompt": "a", "order_options": {1: 2}}, "name of an option of an order must be a text"),
        ({"prompt": "a", "skip": 3}, "skip holds the numbers of pictures"),
        ({"prompt": "a\ud800"}, "a prompt must be a text of whole characters"),
        ({"prompt": "a", "callback_on_step_end": 3}, "callback_on_step_end must be a function"),
        ({"prompt": "a", "init_image": Image.new("RGB", (8, 8))}, "both an init image and a mask"),
        ({"prompt": "a", "init_image": Image.new("RGB", (8, 8)), "mask": Image.new("L", (4, 4))}, "same size"),
        ({"prompt": "a", "init_image": Image.new("RGB", (8, 8)), "mask": Image.new("L", (8, 8))}, "no white area"),
        ({"prompt": "a", "init_image": "/nowhere.png", "mask": "/nowhere.png"}, "no image file"),
    ],
)
def test_bad_input_is_one_sentence(pipeline, arguments, message):
    with pytest.raises(VgenError, match=message):
        pipeline(**arguments)


def test_tokenizer_and_generator_must_fit(pipeline):
    from vgen.models.anyorder import AnyOrderModel

    other = AnyOrderModel(10, 64, (1, 4, 4), width=64, content_layers=1, query_layers=1, heads=2)
    with pytest.raises(VgenError, match=r"32 codes.*made for 64"):
        VisualPipeline(pipeline.tokenizer, other)


def test_a_flexible_tokenizer_makes_pictures_of_other_shapes(pipeline):
    torch.manual_seed(0)
    tokenizer = FlexTok(
        vae_family=None, encoder_width=16, encoder_depth=1, decoder_width=16, decoder_depth=1, head_dim=8, patch_size=4,
        max_grid=(3, 5), registers=6, levels=(5, 4), frequencies=8, steps=1,
    ).eval()  # fmt: skip
    model = FlexARModel(conditioning="class", codes=20, tokens=6, width=16, depth=1, heads=2, hidden=16, classes=3)
    flexible = VisualPipeline(tokenizer, model.eval(), order="raster")
    assert flexible(class_labels=1).images[0].size == (20, 12)
    wide = flexible(class_labels=[1, 2], size=(4, 12), batch_size=1)
    assert [image.size for image in wide.images] == [(12, 4)] * 2, "PIL says width x height"
    assert torch.equal(wide.tokens, flexible(class_labels=[1, 2]).tokens)
    for size, words in (
        ((16, 12), "up to 12x20"),
        ((4, 6), "multiples of 4"),
        (8, "height, width"),
        ((4, 8, 4), "height, width"),
        ((4, "8"), "height, width"),
    ):
        with pytest.raises(VgenError, match=words):
            flexible(class_labels=1, size=size)
    assert pipeline("mat", size=(8, 8)).images[0].size == (8, 8)
    with pytest.raises(VgenError, match="make pictures of 8x8, got the size 8x12"):
        pipeline("mat", size=(8, 12))


def test_an_empty_prompt_asks_for_nothing(pipeline):
    """The rows of guidance are the same then: any scale gives what no guidance gives."""
    made, plain = (pipeline("", num_images_per_prompt=2, seed=4, guidance_scale=scale).tokens for scale in (3.0, 1.0))
    assert torch.equal(made, plain)
    assert not torch.equal(pipeline("a cat", num_images_per_prompt=2, seed=4, guidance_scale=1.0).tokens, plain)
