"""GGUF files as llama.cpp's converter writes them."""

from collections.abc import Iterator
from contextlib import contextmanager

import gguf

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def gguf_name(name: str, parts: dict[str, str] = PARTS) -> str:
    """The name of a tensor in the file."""
    stem, _, kind = name.rpartition(".")
    if stem not in ENDS:
        _, _, block, part = stem.split(".", 3)
        return f"blk.{block}.{parts[part]}.{kind}"
    return f"{ENDS[stem]}.{kind}"


@contextmanager
def writing(path, arch: str, sizes) -> Iterator[gguf.GGUFWriter]:
    """Writes a file with these sizes; the body adds words and tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_bpe(writer: gguf.GGUFWriter, split: str, words: list[str], merges: list[str], control: int = 1) -> None:
    """Adds a byte-level BPE, whose first words are ``control`` tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * control + [gguf.TokenType.NORMAL] * (len(words) - control))
    writer.add_token_merges(merges)
