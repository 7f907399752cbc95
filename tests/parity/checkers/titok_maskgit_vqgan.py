"""The MaskGIT-VQGAN tokenizer (specs/titok.md, section 2.5)."""

import inspect

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN


@checker("titok.maskgit_vqgan")
@torch.no_grad()
def check_maskgit_vqgan(fixture: Fixture):
    inputs, out = fixture.inputs, fixture.outputs
    config = {**fixture.config, "beta": fixture.config["commitment_cost"]}
    known = inspect.signature(MaskGITVQGAN.__init__).parameters
    model = MaskGITVQGAN.from_original(fixture.weights, {k: v for k, v in config.items() if k in known})
    image = inputs["image"]  # in [0, 1]: the original's range
    pixels = image * 2 - 1
    hidden = model.encoder(image)
    assert_close(hidden, out["hidden"], what="encoder")
    assert_close(model.features(pixels), out["hidden"], what="features")
    found = model.quantize.train()(hidden)  # in eval mode there are no losses
    assert_equal(found.indices, out["indices"], "indices")
    assert_equal(model.encode(pixels), out["indices"], "encode")
    assert_close(found.quantized, out["z_q"], what="quantised map")
    assert_close(found.vq + found.commit, out["quant_loss"], what="quantizer loss")
    assert_close(model.quantize.soft_codes(hidden), out["soft_code"], what="soft codes")
    tokens = inputs["tokens"]
    grid = (1, *tokens.shape[1:])
    raw = model.decoder(model.quantize.embedding(tokens).movedim(-1, 1))
    assert_close(raw, out["decoded_raw"], what="decoder")
    assert_close((model.decode(tokens.flatten(1), grid) + 1) / 2, out["decoded"], what="decode")
