"""Qwen 2 and Gemma 3 GGUF files, written as llama.cpp's converter does."""

import gguf
import numpy as np
import pytest
from msgspec import structs

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import check_names, load_tokenizer, open_model
from optima_tpu.models.checkpoints.gguf_architectures import ARCHITECTURES
from optima_tpu.models.checkpoints.gguf_metadata import Vocabulary
from optima_tpu.models.checkpoints.gguf_tokenizer import tokenizer_of
from optima_tpu.models.decoder import Decoder
from tests.support.gguf_files import add_bpe, gguf_name, writing
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, far_from, tiny
from tests.support.tiny_models import NEW_READER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

USER_DEFINED = ["\n", "\n\n", "  ", "   ", "<b>"]
SPM = ["<pad>", "<eos>", "<bos>", "<unk>", *USER_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256))]
SPM += ["▁", "c", "a", "t", "h", "at", "cat", "▁t", "▁th"]
BPE = ["<|end|>", *sorted(transformers.convert_slow_tokenizer.bytes_to_unicode().values()), "Ġt", "th", "at", "cat"]
WINDOWS = dict(num_hidden_layers=6, sliding_window_pattern=6, sliding_window=7)
CASES = {
    "qwen2": ("Qwen2ForCausalLM", dict(vocab_size=len(BPE), tie_word_embeddings=True)),
    "gemma3": ("Gemma3ForCausalLM", WINDOWS | dict(vocab_size=len(SPM), head_dim=16, query_pre_attn_scalar=16)),
}


def add_gemma(writer, config, without: tuple[str, ...]) -> dict[str, int]:
    if "key_length" not in without:
        writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(SPM)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.USER_DEFINED] * len(USER_DEFINED)
    kinds += [gguf.TokenType.BYTE] * 256
    normal = len(SPM) - len(kinds)
    writer.add_token_scores([-1000.0] * (len(kinds) - 256) + [0.0] * 256 + [-float(rank) for rank in range(normal)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * normal)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    return dict(bos=2, eos=1, unk=3, pad=0)


def add_qwen(writer, config) -> dict[str, int]:
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_bpe(writer, "qwen2", BPE, ["Ġ t", "t h", "a t", "c at"])
    writer.add_add_bos_token(False)
    return dict(eos=0)


def write(path, arch: str, change=lambda writer: None, without: tuple[str, ...] = ()):
    """Writes a GGUF file; returns the model that the file holds."""
    name, settings = CASES[arch]
    reference = BY_MODEL[name]
    config, model, tensors = tiny(reference._replace(base=reference.base | settings), {})
    with writing(path, arch, config) as writer:
        writer.add_name("tiny")
        special = add_gemma(writer, config, without) if arch == "gemma3" else add_qwen(writer, config)
        for kind, number in special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        change(writer)
        parts = {theirs: ours for ours, theirs in ARCHITECTURES[arch].block.items()}
        for name, array in tensors.arrays.items():
            shift = 1 if arch == "gemma3" and name.endswith("norm.weight") else 0
            writer.add_tensor(gguf_name(name, parts), array + np.float32(shift))
    return model


@pytest.mark.parametrize("arch", CASES)
def test_the_file_computes_what_the_model_did_and_transformers_reads_the_same_tensors(tmp_path, arch):
    model = write(tmp_path / "m.gguf", arch)
    opened = open_model(str(tmp_path / "m.gguf"))
    decoder = Decoder.open(opened.config, opened.tensors, mesh(1, 1))
    check_names(decoder.tensor_names(), opened.tensors)
    tokens = np.random.default_rng(0).integers(4, 200, (2, 40)).astype(np.int32)
    assert (far_from(model, logits_of(decoder, tokens), tokens) < 1e-4).all()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32").state_dict()
    for name in opened.tensors.names():
        np.testing.assert_allclose(opened.tensors.read(name), theirs[name].numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("arch", "pieces"), [("qwen2", ["cat", "Ġt", "h"]), ("gemma3", ["<bos>", "cat", "▁th"])])
def test_the_tokenizer_of_a_file_gives_its_pieces_and_decodes_to_the_text(tmp_path, arch, pieces):
    write(tmp_path / "m.gguf", arch)
    tokenizer = load_tokenizer(open_model(str(tmp_path / "m.gguf")))
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat th").input_ids) == pieces
    text = "Grüße, 世界!\n\n  x² "
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    composed, decomposed = (tokenizer(spelling, add_special_tokens=False).input_ids for spelling in ("\u00fc", "u\u0308"))
    assert (composed == decomposed) == (arch == "qwen2"), "Qwen composes characters first"


@pytest.mark.skipif(not NEW_READER, reason="an older transformers reads another vocabulary from the file")
@pytest.mark.parametrize("arch", CASES)
def test_transformers_reads_the_same_tokenizer(tmp_path, arch):
    write(tmp_path / "m.gguf", arch)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = load_tokenizer(open_model(str(tmp_path / "m.gguf")))
    assert ours.get_vocab() == {token: index for token, index in theirs.get_vocab().items() if index < len(ours)}
    spaces = ("cat th", "  the cat\n\n\tcat  ", "cat   th     <b>", "")
    for text in (*spaces, "Grüße, 世界! x²", "don't 12345 I'LL", "👩‍👩", "<|end|>the<eos>"):
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_a_special_token_outside_the_byte_alphabet_has_the_files_id(tmp_path):
    """As in DeepSeek's distilled Qwens; each id has a row of the embedding."""
    bos, user = "<｜begin▁of▁sentence｜>", "a word"
    tokens = [BPE[0], bos, user, *BPE[1:]]
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.NORMAL] * (len(BPE) - 1)
    vocabulary = Vocabulary(
        model="gpt2",
        pre="deepseek-r1-qwen",
        tokens=tokens,
        token_type=kinds,
        merges=["Ġ t", "t h", "a t", "c at"],
        bos_token_id=1,
        eos_token_id=0,
        add_bos_token=True,
    )
    tokenizer = tokenizer_of(vocabulary, ARCHITECTURES["qwen2"])
    assert tokenizer.encode(f"cat{user}th{bos}").tokens == [bos, "cat", user, "th", bos]
    assert tokenizer.encode("<|endoftext|>").ids[0] == 1 and tokenizer.get_vocab_size() == len(tokens)
    with pytest.raises(UserError, match="bos_token around every text but does not name it"):
        tokenizer_of(structs.replace(vocabulary, bos_token_id=None), ARCHITECTURES["qwen2"])


def test_a_stretched_gemma_is_read_and_a_stretched_qwen_refused(tmp_path):
    def stretch(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    write(tmp_path / "gemma.gguf", "gemma3", stretch)
    ropes = open_model(str(tmp_path / "gemma.gguf")).config.rope_parameters
    assert (ropes["full_attention"]["rope_type"], ropes["full_attention"]["factor"]) == ("linear", 8.0)
    assert ropes["sliding_attention"]["rope_type"] == "default"
    write(tmp_path / "qwen.gguf", "qwen2", stretch)
    with pytest.raises(UserError, match="qwen2.rope.scaling"):
        open_model(str(tmp_path / "qwen.gguf"))


@pytest.mark.parametrize(
    ("factor", "kind", "expected"),
    [
        (8.0, None, 8.0),
        (8.0, gguf.RopeScalingType.NONE, None),
        (None, gguf.RopeScalingType.LINEAR, None),
        (0.0, gguf.RopeScalingType.LINEAR, None),
    ],
)
def test_half_a_statement_of_the_stretch_is_read_as_llama_cpp_does(tmp_path, factor, kind, expected):
    """A factor without a type is linear; a type alone does nothing."""

    def stretch(writer):
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        if factor is not None:
            writer.add_rope_scaling_factor(factor)

    write(tmp_path / "m.gguf", "gemma3", stretch)
    rope = open_model(str(tmp_path / "m.gguf")).config.rope_parameters["full_attention"]
    assert (rope["rope_type"], rope.get("factor")) == (("linear", expected) if expected else ("default", None))


def test_a_gemma_without_the_size_of_its_heads_is_refused_by_name(tmp_path):
    write(tmp_path / "m.gguf", "gemma3", without=("key_length",))
    with pytest.raises(UserError, match="lacks gemma3.attention.key_length"):
        open_model(str(tmp_path / "m.gguf"))
