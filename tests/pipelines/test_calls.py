"""Pipelines are called with diffusers' names: pictures per prompt, steps, generators, forms of the result, callbacks, progress bar."""

import numpy as np
import pytest
import torch

from tests.pipelines.test_unified import tiny
from vgen.errors import VgenError
from vgen.pipelines.unified import UnifiedPipeline


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def test_every_output_type_shows_the_same_pictures(pipeline):
    pil = pipeline(["red apple", "a cat"], seed=3, batch_size=1)
    arrays = pipeline(["red apple", "a cat"], seed=3, batch_size=1, output_type="np").images
    tensor = pipeline(["red apple", "a cat"], seed=3, output_type="pt").images
    latent = pipeline(["red apple", "a cat"], seed=3, output_type="latent").images
    width, height = pil.images[0].size
    assert arrays.shape == (2, height, width, 3) and arrays.dtype == np.float32
    assert np.array_equal((arrays * 255).round(), np.stack([np.asarray(image) for image in pil.images]))
    assert tensor.shape == (2, 3, height, width) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), arrays)
    assert torch.equal(latent, pil.tokens)


def test_latents_are_not_decoded(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline), "decode_tokens", None)  # would be a TypeError
    assert pipeline("a cat", output_type="latent").images.shape == (1, 16)


def test_a_tuple_begins_with_the_pictures(pipeline):
    made = pipeline("a cat", return_dict=False)
    assert isinstance(made, tuple) and made[0][0].tobytes() == pipeline("a cat").images[0].tobytes()


def test_a_generator_moves_on_and_the_same_state_makes_the_same_pictures(pipeline):
    source = generator()
    first, second = (pipeline("a cat", num_images_per_prompt=2, generator=source).tokens for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, pipeline("a cat", num_images_per_prompt=2, generator=generator()).tokens)
    drawn = int(torch.randint(2**32, (), generator=generator()))
    assert torch.equal(first, pipeline("a cat", num_images_per_prompt=2, seed=drawn).tokens)


def test_a_generator_for_every_picture(pipeline):
    """Picture i of a list is picture 0 of a call with generator i alone, also where the order is drawn."""
    made = pipeline(["a cat", "red apple"], order="random", generator=[generator(1), generator(2)], batch_size=16)
    alone = [
        pipeline(word, order="random", generator=generator(k)).tokens for k, word in ((1, "a cat"), (2, "red apple"))
    ]
    assert torch.equal(made.tokens, torch.cat(alone))
    numbers = [batch.numbers for batch in pipeline.stream("a cat", first=4, generator=[generator()])]
    assert numbers == [[4]]


def test_a_refused_call_leaves_the_generator_where_it_was(pipeline):
    source = generator()
    with pytest.raises(VgenError):
        pipeline("a cat", generator=source, top_p=7)
    assert torch.equal(source.get_state(), generator().get_state())


@pytest.mark.parametrize("case", [
    ({"num_images": 2}, "num_images is called num_images_per_prompt"),
    ({"steps": 2}, "steps is called num_inference_steps"),
    ({"callback": print}, "callback is called callback_on_step_end"),
    ({"guidance_scal": 2}, "did you mean 'guidance_scale'|guidance_scale"),
    ({"generator": 3}, "a number is a seed"),
    ({"generator": [3]}, "a number is a seed"),
    ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
    ({"generator": torch.Generator(), "seed": 3}, "not both"),
    ({"output_type": "jpg"}, "output_type is one of pil, np, pt, latent"),
    ({"output_type": ["pil"]}, "output_type is one of"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(pipeline, case):
    settings, message = case
    with pytest.raises(VgenError, match=message):
        pipeline("a cat", **settings)


def test_callbacks_get_diffusers_arguments(pipeline):
    seen = []
    pipeline(
        ["a cat", "red apple"],
        batch_size=1,
        callback_on_step_end=lambda pipe, index, step, values: seen.append((pipe, index, step.index, values["canvas"])),
    )
    assert [(index, number) for _, index, number, _ in seen] == [(k, k) for k in range(5)] * 2
    assert all(pipe is pipeline for pipe, *_ in seen) and bool(seen[-1][3].known.all())


def test_a_call_shows_a_progress_bar_that_can_be_turned_off(pipeline, capsys):
    pipeline("a cat")
    assert "5/5" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline("a cat")
    finally:
        pipeline.set_progress_bar_config()
    assert capsys.readouterr().err == ""


def test_the_unified_pipeline_has_the_same_names():
    pipe = UnifiedPipeline(tiny(positions=2000), substeps=2)
    steps = []
    made = pipe.generate(
        "a cat",
        num_images_per_prompt=2,
        generator=generator(),
        callback_on_step_end=lambda who, index, step, values: steps.append(
            (who is pipe, index, values["canvas"].known.shape)
        ),
    )
    drawn = int(torch.randint(2**32, (), generator=generator()))
    again = pipe.generate("a cat", num_images_per_prompt=2, seed=drawn)
    assert [a.tobytes() for a in made] == [b.tobytes() for b in again] and steps[0][:2] == (True, 0)
    for settings in ({"num_images": 2}, {"callback": print}):
        with pytest.raises(VgenError, match=f"{next(iter(settings))} is called"):
            pipe.generate("a cat", **settings)
    with pytest.raises(VgenError, match="one generator"):
        pipe.generate("a cat", generator=[generator()])
