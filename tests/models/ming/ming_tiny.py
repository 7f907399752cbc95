"""A tiny Ming-UniVision with words of its own, for the tests of the model and of its pipeline."""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from vgen.models.ming.files import GATES
from vgen.models.ming.mingunivision import MingUniVisionModel

SPECIALS = ["<|endoftext|>", "<imagePatch>", "<image>", "</image>", "<role>", "</role>"]
MINGTOK = {
    "image_size": 16,
    "patch_size": 8,
    "latent_channels": 8,
    "encoder_width": 64,
    "encoder_depth": 1,
    "semantic_width": 64,
    "semantic_depth": 1,
    "pixel_patch_size": 4,
    "pixel_width": 64,
    "pixel_depth": 1,
    "latent_mean": 0.3,
    "latent_scale": 2.0,
}
TINY = {
    "words": 40,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "key_heads": 2,
    "head_dim": 8,
    "experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 16,
    "shared_hidden": 24,
    "positions": 200,
    "head_width": 48,
    "head_layers": 1,
    "grid": (2, 2),
    "channels": 8,
    "mingtok": MINGTOK,
    "understanding_size": 32,
    "end": 30,
    "image_patch": 31,
    "image_start": 32,
    "image_end": 33,
}


def word_tokenizer() -> Tokenizer:
    """Words are ids from 0, special ones from 30."""
    words = [
        "<unk>",
        "HUMAN",
        "ASSISTANT",
        *(
            "Please",
            "generate",
            "the",
            "image",
            "based",
            "on",
            "a",
            "cat",
            "dog",
            "red",
            "make",
            "it",
            "what",
            "is",
            "that",
        ),
    ]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    vocabulary |= {f"filler{number}": number for number in range(len(vocabulary), 30)}
    vocabulary |= {word: 30 + number for number, word in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIALS])
    return tokenizer


def tiny(words: bool = True, **changes) -> MingUniVisionModel:
    """Random weights, none of them zero."""
    model = MingUniVisionModel(**{**TINY, **changes})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    if words:
        model.set_words(word_tokenizer())
    return model.eval()


def published_state(model: MingUniVisionModel) -> dict[str, torch.Tensor]:
    """The state of a model under the published names."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("vis_head.", "diffloss.")):
            state[f"model.{key}"] = value
        elif not key.startswith("llm."):
            state[key] = value
    llm, config = model.llm, model.config
    state["model.lm_head.weight"] = llm.lm_head.weight
    state["model.model.word_embeddings.weight"] = llm.model.embed_tokens.weight
    state["model.model.norm.weight"] = llm.model.norm.weight
    for number, layer in enumerate(llm.model.layers):
        attention, moe, shared = layer.self_attn, layer.block_sparse_moe, layer.shared_mlp
        part = {
            "attention.query_key_value.weight": torch.cat(
                [getattr(attention, f"{name}_proj").weight for name in "qkv"]
            ),
            "attention.dense.weight": attention.o_proj.weight,
            "attention.rotary_emb.inv_freq": torch.ones(config.head_dim // 2),
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
            "mlp.shared_experts.down_proj.weight": shared.output_linear.weight,
        }
        part |= {f"mlp.{gate}.weight": weight for gate, weight in zip(GATES, moe.router.weight)}
        gate, up = shared.input_linear.weight.chunk(2)
        part |= {"mlp.shared_experts.gate_proj.weight": gate, "mlp.shared_experts.up_proj.weight": up}
        for expert in range(config.experts):
            gate, up = moe.experts.gate_up_proj[expert].chunk(2)
            names = {"gate_proj": gate, "up_proj": up, "down_proj": moe.experts.down_proj[expert]}
            part |= {f"mlp.experts.{expert}.{name}.weight": value for name, value in names.items()}
        state |= {f"model.model.layers.{number}.{key}": value for key, value in part.items()}
    return {key: value.detach().clone() for key, value in state.items()}
