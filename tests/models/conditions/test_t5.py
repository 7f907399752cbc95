"""Captions through a real, tiny T5: cleaning, padding, features, guidance, files."""

import shutil
import sys

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.t5 import T5Captions, clean_caption
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.models.llama.nar import NARModel
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.vq import VQModel

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog", "on", "the", "mat"]
TOKENS = 8


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A T5 encoder of width 16 and a word tokenizer that ends every caption with </s>, saved as transformers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captions(encoder_folder):
    return T5Captions.from_pretrained(str(encoder_folder), TOKENS, torch.float32)


def test_features_are_those_of_the_caption_alone_and_padding_is_left_and_zero(captions):
    condition = captions.captions(["a red cat", "the dog on the mat"])
    features, mask = condition.extras["features"], condition.mask
    assert features.shape == (2, TOKENS, 16) and mask.sum(dim=1).tolist() == [4, 6]  # words and </s>
    assert not mask[0, : TOKENS - 4].any() and mask[0, TOKENS - 4 :].all()
    assert not features[~mask].any()
    ids = captions.tokenizer("a red cat", return_tensors="pt")["input_ids"]
    alone = captions.encoder(input_ids=ids)["last_hidden_state"][0]
    torch.testing.assert_close(features[0, TOKENS - 4 :], alone, atol=1e-5, rtol=1e-5)


def test_captions_are_cleaned(captions):
    assert clean_caption("A  RED   cat\n") == "a red cat"
    assert clean_caption("<b>a</b> red cat http://example.com") == "a red cat"
    one, other = (captions.captions([text]).extras["features"] for text in ("A <i>red</i>  cat", "a red cat"))
    assert torch.equal(one, other)


def test_a_caption_that_does_not_fit_is_cut_in_training_and_refused_from_a_user(captions):
    long = "the cat on the mat on the mat on the mat"
    assert captions.captions([long]).mask.sum() == TOKENS
    with pytest.raises(VgenError, match=r"may have 8 tokens, .* has 12; shorten it"):
        captions.captions([long], strict=True)


@pytest.mark.parametrize("kind", [LlamaGenModel, NARModel])
def test_from_words_to_pictures(captions, kind):
    torch.manual_seed(0)
    tokenizer = VQModel(
        ch=8, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=32,
        codebook_embed_dim=4, usage_window=16, num_groups=4,
    )  # fmt: skip
    model = kind(
        codes=32, grid=(4, 4), width=32, depth=2, heads=2, hidden=64, conditioning="text", caption_width=16,
        caption_tokens=TOKENS,
    )  # fmt: skip
    torch.nn.init.normal_(model.output.weight, std=0.5)
    model.vocabulary = captions
    pipe = VisualPipeline(tokenizer.eval(), model.eval(), order=model.default_order().name, guidance_scale=3.0)
    both = pipe(["a red cat", "the dog on the mat"], seed=1)
    assert len(both.images) == 2 and both.stats.call_rows == both.stats.calls * 4
    alone = pipe(["a red cat"], seed=1)
    assert torch.equal(both.tokens[:1], alone.tokens)  # padding and neighbours in the batch change nothing
    assert not torch.equal(both.tokens[:1], pipe(["the dog on the mat"], seed=1).tokens)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(VgenError, match=r"captions need ftfy.*vgen\[text\]"):
        T5Captions.from_pretrained("/nowhere")


def test_an_encoder_in_two_shards_gives_the_same_features(encoder_folder, captions, tmp_path):
    """As FLAN-T5-XL is published: model-0000x-of-00002.safetensors and an index."""
    folder = tmp_path / "flan-t5-xl"
    shutil.copytree(encoder_folder, folder)
    (folder / "model.safetensors").unlink()
    captions.encoder.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) >= 2 and (folder / "model.safetensors.index.json").is_file()
    sharded = T5Captions.from_pretrained(str(folder), TOKENS, torch.float32)
    one, other = (found.captions(["a red cat"]).extras["features"] for found in (captions, sharded))
    assert one.abs().sum() > 0 and torch.equal(one, other)
