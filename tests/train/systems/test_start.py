import pytest
import torch

from vgen.errors import VgenError
from vgen.tokenizers_vis.vq import VQModel
from vgen.train.systems.start import check_start, load_start

SMALL = {"encoder_ch_mult": [1], "decoder_ch_mult": [1], "num_res_blocks": 1, "ch": 32, "codebook_size": 32}


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "100KB"}, {"variant": "ema"}])
def test_weights_in_any_saved_form(tmp_path, form):
    first, second = VQModel(**SMALL), VQModel(**SMALL)
    first.save_pretrained(tmp_path, **form)
    check_start("start", tmp_path)
    load_start(second, tmp_path)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert bool(list(tmp_path.glob("*-of-*"))) == ("max_shard_size" in form)


def test_what_is_no_start_is_named(tmp_path):
    with pytest.raises(VgenError, match=r"config: start.model: there is no folder .*nowhere"):
        check_start("start.model", tmp_path / "nowhere")
    with pytest.raises(
        VgenError, match=r"config: start: .* has no weights: diffusion_pytorch_model.safetensors is missing"
    ):
        check_start("start", tmp_path)
    VQModel(**SMALL).save_pretrained(tmp_path, max_shard_size="100KB")
    max(tmp_path.glob("*-of-*")).unlink()
    with pytest.raises(VgenError, match=r"config: start: .* lacks .*-of-.*.safetensors"):
        check_start("start", tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    VQModel(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(VgenError, match="does not fit VQModel"):
        load_start(VQModel(**{**SMALL, "codebook_size": 64}), tmp_path)
