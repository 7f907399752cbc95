"""Names and layouts of Ming-UniVision's published files, and ours.

    model.model.*       the language model, BailingMoe's names -> llm.model.*, GraniteMoeShared's: queries, keys and values
                        apart; experts, and the gates of a router, stacked
    model.lm_head       -> llm.lm_head
    model.vis_head, model.diffloss, linear_proj, vision    the same without "model."

Rope tables, which are constants, are dropped.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

from vgen.errors import VgenError

GATES = ("gate", "image_gate", "audio_gate")  # of a router; a token's modality is an index into them
TEXT_GATE, IMAGE_GATE, AUDIO_GATE = range(len(GATES))
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_RENAMED = {
    "attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.shared_experts.down_proj.weight": "shared_mlp.output_linear.weight",
}


def published_names(state: dict[str, Tensor], heads: int, key_heads: int, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a published file under the names of `MingUniVisionModel`. Unknown keys stay, for `load_exactly` to refuse.

    `state` is emptied, so that the experts of a large model are not held twice. heads, key_heads, head_dim: of the language
    model. Raises VgenError where a block is not as it should be.
    """
    trunk, rest = {}, {}
    for key in list(state):
        inner = key.removeprefix("model.")
        ours = inner == key or inner.startswith(("vis_head.", "diffloss."))
        (rest if ours else trunk)[inner] = state.pop(key)
    trunk = granite_names(trunk, heads * head_dim, key_heads * head_dim)
    return {f"llm.{key}": value for key, value in trunk.items()} | rest


def granite_names(state: dict[str, Tensor], query_rows: int, key_rows: int) -> dict[str, Tensor]:
    """Bailing's tensors under the names and in the layouts of `MingLLM` (without "llm."). Unknown keys stay as they are;
    `state` is emptied.

    query_rows, key_rows: heads x head size of queries, and of keys (and values), which the files hold in one matrix. Raises
    VgenError where a matrix or an expert is not as it should be.
    """
    blocks: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    named: dict[str, Tensor] = {}
    for key in list(state):
        if found := _LAYER.fullmatch(key):
            blocks[int(found[1])][found[2]] = state.pop(key)
        else:
            named[key.replace("word_embeddings", "embed_tokens")] = state.pop(key)
    for number, block in blocks.items():
        prefix = f"model.layers.{number}."
        named |= {prefix + key: value for key, value in _granite_block(block, prefix, query_rows, key_rows).items()}
    return named


def _granite_block(block: dict[str, Tensor], prefix: str, query_rows: int, key_rows: int) -> dict[str, Tensor]:
    """One block's tensors. `block` is emptied."""

    def take(key: str) -> Tensor:
        if key not in block:
            raise VgenError(
                f"the checkpoint has no {prefix}{key}, which every block of Ming-UniVision has; it is incomplete, or another model's"
            )
        return block.pop(key)

    def joined(part: str) -> Tensor:
        return torch.cat((take(f"{part}.gate_proj.weight"), take(f"{part}.up_proj.weight")))

    block.pop("attention.rotary_emb.inv_freq", None)  # a constant
    heads = take("attention.query_key_value.weight")
    if len(heads) != query_rows + 2 * key_rows:
        raise VgenError(
            f"{prefix}attention.query_key_value.weight has {len(heads)} rows, expected {query_rows} + 2 x {key_rows}; "
            "choose the size that the file was trained with"
        )
    query, key, value = heads.split((query_rows, key_rows, key_rows))
    named = {f"self_attn.{name}_proj.weight": part for name, part in (("q", query), ("k", key), ("v", value))}
    gates = [take(f"mlp.{gate}.weight") for gate in GATES if f"mlp.{gate}.weight" in block or gate == "gate"]
    named["block_sparse_moe.router.weight"] = torch.stack(gates)
    experts = range(sum(key.startswith("mlp.experts.") and key.endswith(".down_proj.weight") for key in block))
    if not experts:
        raise VgenError(f"{prefix}mlp has no experts; expected a mixture of experts in every block")
    named["block_sparse_moe.experts.gate_up_proj"] = torch.stack([joined(f"mlp.experts.{e}") for e in experts])
    named["block_sparse_moe.experts.down_proj"] = torch.stack(
        [take(f"mlp.experts.{e}.down_proj.weight") for e in experts]
    )
    named["shared_mlp.input_linear.weight"] = joined("mlp.shared_experts")
    return named | {_RENAMED.get(key, key): value for key, value in block.items()}
