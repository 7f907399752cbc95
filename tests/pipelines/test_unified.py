"""UnifiedPipeline and Dialogue: pictures, edits, answers, saving; and text-to-image through VisualPipeline and the registry."""

import json

import numpy as np
import pytest
import torch
from models.ming.ming_tiny import TINY, published_state, tiny, word_tokenizer
from PIL import Image
from safetensors.torch import save_file

from vgen.convert import published as registry
from vgen.convert.load import load_published
from vgen.convert.published import published
from vgen.errors import VgenError
from vgen.models.ming.prompts import Reply
from vgen.pipelines.unified import UnifiedPipeline
from vgen.pipelines.visual import VisualPipeline


@pytest.fixture(scope="module")
def pipe():
    return UnifiedPipeline(tiny(positions=2000), substeps=2)


def photo(shade=120):
    return Image.fromarray(np.full((40, 60, 3), shade, dtype=np.uint8))


def same(first, second):
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


def test_pictures_depend_on_seed_and_number_only(pipe):
    images = pipe.generate("a red cat", 3, batch_size=2, seed=4)
    assert [image.size for image in images] == [(16, 16)] * 3
    again = pipe.generate("a red cat", 3, batch_size=3, seed=4)
    assert all(map(same, images, again)) and not same(images[0], images[1])
    assert not same(images[0], pipe.generate("a red cat", seed=5)[0])


def test_the_callback_sees_every_token(pipe):
    steps = []
    pipe.generate("a cat", callback_on_step_end=lambda pipe, index, step, values: steps.append(step.index))
    assert steps == [0, 1, 2, 3]


def test_edits_in_one_and_in_three_rounds(pipe):
    plain = pipe.edit(photo(), "make it red")
    assert plain.size == (16, 16) and same(plain, pipe.edit(photo(), "make it red"))
    steps = []
    whole = pipe.edit(
        photo(),
        "make it red",
        region_first=True,
        refine=True,
        callback_on_step_end=lambda pipe, index, step, values: steps.append(step),
    )
    assert len(steps) == 3 * 4 and not same(whole, plain)


def test_questions_get_text(pipe):
    assert isinstance(pipe.ask(photo(), "what is that", limit=4), str)
    model, seen = pipe.model, []
    hook = model.llm.register_forward_hook(lambda module, args, result: seen.append(args[4]))
    pipe.ask(photo(), "what is that", limit=1)
    hook.remove()
    assert int(seen[0].sum()) == 16, "pictures are looked at in the larger size"


def test_a_dialogue_remembers_until_it_is_reset(pipe):
    dialogue = pipe.dialogue(seed=1)
    first = dialogue.say("a red cat", picture=True)
    assert len(first.images) == dialogue.context.pictures == 1 and first.text == ""
    second = dialogue.say("make it red", picture=True)
    dialogue.reset()
    assert dialogue.context.length == 0
    assert not same(dialogue.say("make it red", picture=True).images[0], second.images[0])
    assert dialogue.say("a", Reply("cat"), photo(), "red", limit=1).images == []


def test_a_saved_model_makes_the_same_pictures(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    again = UnifiedPipeline.from_pretrained(tmp_path, substeps=2)
    assert same(again.generate("a red cat", seed=3)[0], pipe.generate("a red cat", seed=3)[0])
    half = UnifiedPipeline.from_pretrained(tmp_path, substeps=2, dtype=torch.bfloat16)
    assert half.model.llm.lm_head.weight.dtype == torch.bfloat16
    assert half.model.vision.pixel_decoder.head.weight.dtype == torch.float32
    assert half.edit(photo(), "make it red").size == (16, 16)


def test_the_registry_gives_a_visual_pipeline_with_the_models_own_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "folder", lambda: tmp_path)
    published.cache_clear()
    (tmp_path / "tiny.yaml").write_text(
        "version: 1\npaper: none\nnesting: folder\ncode_licence: MIT\nweights_licence: none stated\nkind: generator\n"
        f"family: mingunivision\nrepo: a/ming\nfiles: ['*.safetensors']\nsize: 16b-a3b\noptions: {json.dumps(TINY)}\n"
        "sampling: {guidance_scale: 3.5, substeps: 2}\n"
    )
    (tmp_path / "ming").mkdir()
    model = tiny(words=False)
    save_file(published_state(model), tmp_path / "ming" / "model.safetensors")
    word_tokenizer().save(str(tmp_path / "ming" / "tokenizer.json"))
    try:
        visual = load_published("tiny", tmp_path)
    finally:
        published.cache_clear()
    assert visual.tokenizer is visual.model.vision
    result = visual(["a red cat", "dog"], seed=2)
    assert result.stats.calls == 4 and result.stats.call_rows == 16 and result.images[0].size == (16, 16)
    visual.save_pretrained(tmp_path / "saved")
    again = VisualPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(["a red cat", "dog"], seed=2).tokens, result.tokens)
    with pytest.raises(VgenError, match="raster"):
        visual("a cat", order="random")


def test_bad_input_is_one_sentence(pipe):
    for call, words in (
        (lambda: pipe.generate(""), "needs text: say what to make"),
        (lambda: pipe.generate(["a cat"]), "the prompt must be a text"),
        (lambda: pipe.generate("a cat", batch_size=True), "batch size must be a whole number"),
        (lambda: pipe.generate("a cat", seed=None), "the seed must be a whole number"),
        (lambda: pipe.edit(photo(), None), "the instruction must be a text"),
        (lambda: UnifiedPipeline(pipe.model, text_guidance="3"), "text guidance .* must be a finite number"),
        (lambda: pipe.generate("a cat", 0), "at least 1, got 0"),
        (lambda: pipe.edit(photo(), " "), "needs text: say what to change"),
        (lambda: pipe.ask(photo(), ""), "a prompt needs text"),
        (lambda: pipe.dialogue().say("a cat", 3), "the picture is a path, bytes, a PIL image.*got a int"),
        (lambda: pipe.ask(Image.new("RGB", (3000, 10)), "what is that"), "at most 200 times"),
        (lambda: UnifiedPipeline(pipe.model, text_guidance=0.5), "text guidance .* must be"),
        (lambda: UnifiedPipeline(tiny(words=False)).generate("a cat"), "no text tokenizer yet"),
    ):
        with pytest.raises(VgenError, match=words):
            call()
