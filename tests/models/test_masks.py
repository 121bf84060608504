"""Imported masks come back bit for bit; misfits are refused by name."""

import contextlib
import hashlib
import os
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

import optima_tpu.models.masks
from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.masks import check_masks, open_masks
from tests.support.fake_run import ASSETS, BLOCKS, MANIFEST, finished_run, open_journal, pruned_block, small_model
from tests.support.runs import folder_tensors
from tests.support.tiny_models import MemoryTensors, tiny_folder

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (6, 12),
    "model.layers.0.mlp.down_proj.weight": (5, 20),
    "model.layers.10.mlp.down_proj.weight": (3, 4),
}  # 12 bits: the last byte of a packed mask is not full
Q, DOWN, LAST = SHAPES


def dense_model(seed: int = 0) -> MemoryTensors:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return MemoryTensors({name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()})


def largest(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask of the n largest of every m."""
    groups = np.abs(weight.astype(np.float32)).reshape(-1, m)
    ranks = groups.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (ranks >= m - n).reshape(weight.shape)


def masks_of(model: MemoryTensors, n: int = 2, m: int = 4) -> dict[str, np.ndarray]:
    return {name: largest(model.read(name), n, m) for name in SHAPES}


def two_four(names=SHAPES) -> dict[str, NM]:
    return dict.fromkeys(names, NM(2, 4))


def check(path, patterns=None, shapes=SHAPES, model=None) -> str:
    return check_masks(open_masks(str(path)), shapes, patterns or two_four(shapes), model or dense_model())


def assert_holds(source, masks: dict[str, np.ndarray]) -> None:
    assert source.names() == tuple(sorted(masks))
    for name, expected in masks.items():
        keep = source.read(name, expected.shape)
        assert keep.dtype == bool and keep.shape == expected.shape
        np.testing.assert_array_equal(keep, expected)


def write_maskllm(path, masks, suffix=".mask"):
    np.savez_compressed(path, **{name + suffix: np.packbits(keep) for name, keep in masks.items()})


# Formats


@pytest.mark.parametrize("suffix", [".mask", ""])
def test_the_masks_of_maskllm_are_read_as_they_are(tmp_path, suffix):
    masks = masks_of(dense_model())
    write_maskllm(tmp_path / "mask_compressed.npz", masks, suffix)
    for path in (tmp_path, tmp_path / "mask_compressed.npz"):
        source = open_masks(str(path))
        assert (source.how, source.from_zeros, source.origin) == ("MaskLLM npz", False, str(path))
        assert_holds(source, masks)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 37), st.integers(0, 2**31))
def test_packed_and_plain_masks_agree(tmp_path_factory, rows, columns, seed):
    keep = np.random.default_rng(seed).random((rows, columns)) < 0.5
    folder = tmp_path_factory.mktemp("masks")
    write_maskllm(folder / "packed.npz", {Q: keep})
    # The first bit is the first weight, in the highest place of the first byte.
    assert int(np.load(folder / "packed.npz")[Q + ".mask"][0]) >> 7 == keep[0, 0]
    np.savez(folder / "plain.npz", **{Q: keep})
    for name in ("packed.npz", "plain.npz"):
        assert_holds(open_masks(str(folder / name)), {Q: keep})


@pytest.mark.parametrize("strip", ["", ".weight"])
@pytest.mark.parametrize("add", ["", ".mask"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_plain_matrices_with_any_suffix_in_any_dtype(tmp_path, strip, add, dtype):
    masks = masks_of(dense_model())
    arrays = {name.removesuffix(strip) + add: keep.astype(dtype) for name, keep in masks.items()}
    np.savez(tmp_path / "masks.npz", **arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "masks.safetensors")
    for ending in ("npz", "safetensors"):
        source = open_masks(str(tmp_path / f"masks.{ending}"))
        assert source.how == f"{ending} of 0/1 matrices"
        assert_holds(source, masks)


def test_a_run_and_its_export_give_the_masks_of_the_run(tmp_path):
    model = small_model()
    finished_run(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "out")
    masks = {}
    for block in range(BLOCKS):
        masks |= pruned_block(model, block)[1]
    shapes, patterns = {name: keep.shape for name, keep in masks.items()}, dict.fromkeys(masks, Unstructured(0.5))
    # What this random mask keeps is no larger than what it prunes: only magnitudes that agree pass for one.
    dense = MemoryTensors({name: keep + 0.5 for name, keep in masks.items()})
    digests = set()
    for path, how in (
        (tmp_path / "run", "masks of a run directory"),
        (tmp_path / "out", "pruning_masks.npz of this program"),
        (tmp_path / "out" / "pruning_masks.npz", "pruning_masks.npz of this program"),
    ):
        source = open_masks(str(path))
        assert (source.how, source.from_zeros) == (how, False)
        assert_holds(source, masks)
        digests.add(check_masks(source, shapes, patterns, dense))
    assert len(digests) == 1 and set(read_masks(tmp_path / "out")) == set(masks)
    packed = np.load(tmp_path / "out" / "pruning_masks.npz")[DOWN]
    assert packed.shape == (12, 3) and packed.dtype == np.uint8  # 20 inputs: bits, not bytes


def test_an_unfinished_run_is_refused(tmp_path):
    open_journal(tmp_path / "run", MANIFEST, ASSETS).save(0, *pruned_block(small_model(), 0))
    with pytest.raises(UserError, match="expected a finished run, got .* no checkpoint yet"):
        open_masks(str(tmp_path / "run"))


def test_the_zeros_of_a_checkpoint(tmp_path):
    def prune(arrays):
        for name in arrays:
            if "_proj" in name:
                arrays[name] = arrays[name] * largest(arrays[name], 2, 4)
                arrays[name][0, np.flatnonzero(arrays[name][0, :4])[0]] = 0
                arrays[name][1, arrays[name][1] == 0] = -0.0

    folder = tiny_folder(tmp_path / "model", dtype="bfloat16", change=prune)
    tensors = folder_tensors(folder)
    source = open_masks(str(folder))
    assert (source.how, source.from_zeros) == ("zeros of a checkpoint", True)
    pruned = {name: array for name, array in tensors.items() if "_proj" in name}
    assert set(pruned) < set(source.names()) and not any("norm" in name for name in source.names())
    for name, array in pruned.items():
        np.testing.assert_array_equal(source.read(name, array.shape), array.astype(np.float32) != 0)
    # A group that keeps one is no violation here, and layers that are not pruned do not matter.
    shapes = {name: array.shape for name, array in pruned.items()}
    some = {name: shape for name, shape in shapes.items() if "mlp" in name}
    digest = check_masks(source, shapes, two_four(shapes), MemoryTensors({}))
    assert digest != check_masks(source, some, two_four(some), MemoryTensors({}))
    np.savez(tmp_path / "same.npz", **{name: array != 0 for name, array in pruned.items()})
    with pytest.raises(UserError, match=r"expected 2 kept of every 4, got 1 in row 0, group 0 \(inputs 0 to 3\)"):
        check_masks(open_masks(str(tmp_path / "same.npz")), shapes, two_four(shapes), MemoryTensors(tensors))
    keep_more = dict.fromkeys(shapes, NM(1, 4))
    with pytest.raises(UserError, match="expected 1 kept of every 4, got 2"):
        check_masks(source, shapes, keep_more, MemoryTensors({}))


def test_a_dense_checkpoint_has_no_masks(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    shapes = {DOWN: (36, 36)}
    with pytest.raises(UserError, match=rf"{DOWN}: expected 50.00% of the weights pruned, got 0.00% in .*zeros of a"):
        check_masks(open_masks(str(folder)), shapes, {DOWN: Unstructured(0.5)}, MemoryTensors({}))


# PyTorch's files


@pytest.mark.parametrize("dtype", ["bfloat16", "bool", "uint8", "float32"])
def test_the_masks_of_proxsparse_are_read_as_they_are(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    masks = masks_of(dense_model())
    for name, keep in masks.items():
        torch.save(torch.from_numpy(keep).to(getattr(torch, dtype)), tmp_path / f"{name}.pt")
    source = open_masks(str(tmp_path))
    assert (source.how, source.from_zeros) == ("ProxSparse .pt files", False)
    assert_holds(source, masks)


@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_a_dictionary_of_torch_tensors(tmp_path, ending):
    torch = pytest.importorskip("torch")
    masks = masks_of(dense_model())
    tensors = {name + ".mask": torch.from_numpy(keep).half() for name, keep in masks.items()}
    torch.save(tensors, tmp_path / f"mask.{ending}")
    source = open_masks(str(tmp_path / f"mask.{ending}"))
    assert source.how == "PyTorch dictionary of masks"
    assert_holds(source, masks)


class Runs:
    """Unpickled without care, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "masks.pt", tmp_path / "folder" / f"{Q}.pt"):
        torch.save({Q: Runs(tmp_path / "ran")}, path)
        with pytest.raises(UserError, match="other objects than tensors, which are not loaded"):
            open_masks(str(path if path.parent == tmp_path else path.parent)).read(Q, SHAPES[Q])
    assert not (tmp_path / "ran").exists()


def test_torch_files_that_hold_something_else(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.ones(3, 4), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="expected a dictionary of masks .* got Tensor"):
        open_masks(str(tmp_path / "tensor.pt"))
    torch.save({LAST: [1, 0]}, tmp_path / "list.pt")
    with pytest.raises(UserError, match=f"{LAST}: expected a dense matrix of 0 and 1 in .*, got list"):
        open_masks(str(tmp_path / "list.pt")).read(LAST, SHAPES[LAST])
    for strange, kind in ((torch.ones(3, 4).to_sparse(), "sparse_coo"), (torch.ones(3, 4, device="meta"), "empty .meta.")):
        torch.save({LAST: strange}, tmp_path / "strange.pt")
        with pytest.raises(UserError, match=f"expected a dense matrix of 0 and 1 in .*strange.pt, got {kind} Tensor"):
            open_masks(str(tmp_path / "strange.pt")).read(LAST, (3, 4))
    torch.save({LAST: torch.full((3, 4), 0.25)}, tmp_path / "quarter.pt")
    with pytest.raises(UserError, match=f"{LAST}: expected a mask of 0 and 1, .* holds 0.25"):
        open_masks(str(tmp_path / "quarter.pt")).read(LAST, SHAPES[LAST])
    data = (tmp_path / "quarter.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(data[:300])
    torch.save({LAST: torch.ones(3, 4)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in ("damaged.pt", "old.pt"):
        with pytest.raises(UserError, match=f"{path} is damaged or older than PyTorch 1.6"):
            open_masks(str(tmp_path / path))
    np.savez(tmp_path / "masks.npz", **{LAST: np.ones((3, 4))})
    (tmp_path / "masks.npz").rename(tmp_path / "renamed.pt")
    with pytest.raises(UserError, match="renamed.pt can't be read"):
        open_masks(str(tmp_path / "renamed.pt"))


def test_without_torch_its_files_say_what_to_do_and_the_others_open(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / f"{Q}.pt").write_bytes(b"any")
    for path in (tmp_path, tmp_path / f"{Q}.pt"):
        with pytest.raises(UserError, match="only PyTorch can read .*: pip install torch, or save the masks"):
            open_masks(str(path))
    masks = masks_of(dense_model())
    np.savez(tmp_path / "masks.npz", **masks)
    assert_holds(open_masks(str(tmp_path / "masks.npz")), masks)


# The hub


def test_the_mask_file_of_a_hub_model_is_taken_and_only_without_one_its_zeros(tmp_path, monkeypatch):
    masks = masks_of(dense_model())
    write_maskllm(tmp_path / "mask_compressed.npz", masks)
    requests = []

    def download(name, file, revision=None):
        requests.append((name, file, revision))
        if file == "mask_compressed.npz" and name == "org/masks":
            return str(tmp_path / file)
        raise EntryNotFoundError("404")

    monkeypatch.setattr(optima_tpu.models.masks, "hf_hub_download", download)
    source = open_masks("org/masks@main")
    assert (source.how, source.origin) == ("MaskLLM npz", "org/masks@main") and requests[-1][2] == "main"
    assert_holds(source, masks)
    folder = tiny_folder(tmp_path / "model")
    monkeypatch.setattr(optima_tpu.models.masks.hub, "download", lambda spec: folder)
    assert open_masks("org/pruned").how == "zeros of a checkpoint"


# Formats that are not known


def test_what_is_no_mask_file_is_refused_with_a_list_of_what_is(tmp_path):
    (tmp_path / "notes.txt").write_text("masks")
    (tmp_path / "folder").mkdir()
    for path in ("notes.txt", "folder", "nowhere.npz"):
        with pytest.raises(UserError, match="known are a MaskLLM npz, an npz or safetensors file .* ProxSparse"):
            open_masks(str(tmp_path / path))
    with pytest.raises(UserError, match="give --selector.path"):
        open_masks(None)
    with pytest.raises(UserError, match="runs/masks.npz does not exist"):  # it has the form of a hub id
        open_masks("runs/masks.npz")


def test_npz_files_that_hold_something_else(tmp_path):
    for arrays, message in (
        ({}, "got none"),
        ({Q: np.zeros((2, 2, 2))}, r"is float64\[2, 2, 2\]"),
        ({Q: np.array([None])}, r"is object\[1\]"),
        ({Q: np.zeros((6, 2), np.uint8), f"{Q}.shape": np.array([6, 12]), DOWN: np.eye(2)}, rf"'{DOWN}' without '{DOWN}.shape'"),
        ({Q: np.eye(3), f"{Q}.mask": np.eye(3)}, f"two masks for {Q}"),
    ):
        np.savez(tmp_path / "masks.npz", **arrays)
        with pytest.raises(UserError, match=message):
            open_masks(str(tmp_path / "masks.npz"))
    data = (tmp_path / "masks.npz").read_bytes()
    (tmp_path / "masks.npz").write_bytes(data[:-30])
    with pytest.raises(UserError, match="can't be read as an npz file"):
        open_masks(str(tmp_path / "masks.npz"))


@pytest.mark.parametrize("local, central, value", [(6, 8, 1), (8, 10, 99)], ids=["encrypted", "packed by another method"])
def test_an_archive_that_python_cannot_unpack_is_named(tmp_path, local, central, value):
    np.savez(tmp_path / "masks.npz", **{LAST: np.ones((3, 4), bool)})
    data = bytearray((tmp_path / "masks.npz").read_bytes())
    data[data.find(b"PK\x03\x04") + local] |= value
    data[data.find(b"PK\x01\x02") + central] |= value
    (tmp_path / "masks.npz").write_bytes(data)
    with pytest.raises(UserError, match="masks.npz can't be read as an npz file"):
        open_masks(str(tmp_path / "masks.npz"))


def test_masks_in_a_dtype_without_numpy_are_named(tmp_path):
    safetensors.numpy.save_file({LAST: np.ones((3, 4), ml_dtypes.float8_e4m3fn)}, tmp_path / "masks.safetensors")
    with pytest.raises(UserError, match="is stored as float8_e4m3fn; save it as bool"):
        open_masks(str(tmp_path / "masks.safetensors"))


def test_a_file_of_weights_is_not_taken_for_masks(tmp_path):
    weights = {name: weight.astype(np.float32) for name, weight in dense_model().arrays.items()}
    np.savez(tmp_path / "w.npz", **weights)
    safetensors.numpy.save_file(weights, tmp_path / "w.safetensors")
    for path in ("w.npz", "w.safetensors"):
        with pytest.raises(UserError, match=f"{Q}: expected a mask of 0 and 1, .* give its folder"):
            open_masks(str(tmp_path / path)).read(Q, SHAPES[Q])
    safetensors.numpy.save_file(weights | {"model.norm.weight": np.ones(12, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="'model.norm.weight' has shape .* give its folder"):
        open_masks(str(tmp_path / "w.safetensors"))


def test_two_mask_files_in_one_folder_are_ambiguous(tmp_path):
    for name in ("pruning_masks.npz", "mask_compressed.npz"):
        write_maskllm(tmp_path / name, masks_of(dense_model()))
    with pytest.raises(UserError, match="holds pruning_masks.npz and mask_compressed.npz: give the path of one"):
        open_masks(str(tmp_path))


# Checks against model and pattern


def test_the_digest_is_that_of_the_masks_and_not_of_the_file(tmp_path):
    masks = masks_of(dense_model())
    write_maskllm(tmp_path / "a.npz", masks)
    np.savez(tmp_path / "b.npz", **{name: masks[name].astype(int) for name in reversed(masks)})
    safetensors.numpy.save_file(masks, tmp_path / "c.safetensors")
    parts = (f"{name} {SHAPES[name]}\n".encode() + np.packbits(masks[name]).tobytes() for name in sorted(masks))
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert {check(tmp_path / name) for name in ("a.npz", "b.npz", "c.safetensors")} == {expected}
    other = MemoryTensors(dense_model().arrays | {LAST: dense_model(1).read(LAST)})
    np.savez(tmp_path / "d.npz", **masks_of(other))
    assert not np.array_equal(masks_of(other)[LAST], masks[LAST])
    assert check(tmp_path / "d.npz", model=other) != expected


def test_missing_and_unexpected_masks(tmp_path):
    masks = masks_of(dense_model())
    np.savez(tmp_path / "masks.npz", **{Q: masks[Q], "model.layers.7.mlp.up_proj.weight": masks[DOWN]})
    with pytest.raises(UserError) as error:
        check(tmp_path / "masks.npz")
    for part in (
        f"no mask for 2 pruned layers ({DOWN}, {LAST}); it holds {Q}, model.layers.7",
        "masks for 1 layer beside those that are pruned (model.layers.7.mlp.up_proj.weight)",
        "npz of 0/1 matrices",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="beside those that are pruned") as error:
        check(tmp_path / "masks.npz", shapes={Q: SHAPES[Q]})
    assert "no mask for" not in str(error.value)


@pytest.mark.parametrize("shape, said", [((12, 6), r"got \(12, 6\) \(it looks transposed\)"), ((6, 8), r"got \(6, 8\) in")])
def test_a_mask_of_another_shape(tmp_path, shape, said):
    masks = masks_of(dense_model()) | {Q: np.ones(shape, bool)}
    np.savez(tmp_path / "masks.npz", **masks)
    with pytest.raises(UserError, match=rf"{Q}: expected a mask of the weight's shape \(6, 12\), {said}"):
        check(tmp_path / "masks.npz")


@pytest.mark.parametrize("packed", [np.zeros(8, np.uint8), np.full(2, 255, np.uint8)])
def test_a_packed_mask_of_another_size(tmp_path, packed):
    # Twelve bits are two bytes, of which the last four bits are zero.
    np.savez(tmp_path / "masks.npz", **{LAST + ".mask": packed})
    with pytest.raises(UserError, match=rf"{LAST}.*: expected the 12 packed bits of a mask of the weight's shape \(3, 4"):
        open_masks(str(tmp_path / "masks.npz")).read(LAST, SHAPES[LAST])


@pytest.mark.parametrize("change", [True, False])
def test_a_group_that_keeps_too_many_or_too_few(tmp_path, change):
    masks = masks_of(dense_model())
    group = masks[DOWN][3, 8:12]
    group[np.flatnonzero(group != change)[0]] = change
    np.savez(tmp_path / "masks.npz", **masks)
    count = 3 if change else 1
    with pytest.raises(
        UserError,
        match=rf"{DOWN}: expected 2 kept of every 4, got {count} in row 3, group 2 \(inputs 8 "
        r"to 11\), wrong in 1 of [\d,]+ groups in .* \(npz of 0/1 matrices\)",
    ):
        check(tmp_path / "masks.npz")


def test_a_pattern_that_does_not_divide_the_inputs_names_the_layer(tmp_path):
    np.savez(tmp_path / "masks.npz", **masks_of(dense_model()))
    with pytest.raises(UserError, match=f"{DOWN}: pattern 4:8 needs a number of inputs divisible by 8, got .* 20"):
        check(tmp_path / "masks.npz", patterns=two_four() | {DOWN: NM(4, 8)})


@pytest.mark.parametrize("off, accepted", [(0, True), (9, True), (-9, True), (11, False), (-11, False)])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_sparsity_may_miss_the_pattern_by_one_percentage_point(tmp_path, off, accepted, group):
    weight = np.random.default_rng(0).standard_normal((20, 50))
    order = np.abs(weight).ravel().argsort()
    keep = np.ones(1000, bool)
    keep[order[: 600 + off]] = False
    np.savez(tmp_path / "masks.npz", **{Q: keep.reshape(20, 50)})
    arguments = (
        open_masks(str(tmp_path / "masks.npz")),
        {Q: (20, 50)},
        {Q: Unstructured(0.6, group)},
        MemoryTensors({Q: weight}),
    )
    if accepted:
        check_masks(*arguments)
        return
    with pytest.raises(UserError, match=f"{Q}: expected 60.00% of the weights pruned, got {(600 + off) / 10:.2f}%"):
        check_masks(*arguments)


def test_a_count_rounded_down_in_every_row_is_the_pattern(tmp_path):
    # 0.6 of 12 is 7: 58.3 % of the layer.
    weight = dense_model().read(Q).astype(np.float32)
    np.savez(tmp_path / "masks.npz", **{Q: largest(weight, 5, 12)})
    source = open_masks(str(tmp_path / "masks.npz"))
    check_masks(source, {Q: (6, 12)}, {Q: Unstructured(0.6, "row")}, MemoryTensors({Q: weight}))
    with pytest.raises(UserError, match="got 58.33%"):
        check_masks(source, {Q: (6, 12)}, {Q: Unstructured(0.6, "layer")}, MemoryTensors({Q: weight}))


@pytest.mark.parametrize(
    "pattern, n, m", [(NM(2, 4), 2, 4), (Unstructured(0.5), 2, 4), (NM(1, 4), 1, 4), (Unstructured(0.75, "layer"), 1, 4)]
)
def test_flipped_masks_are_refused_at_any_sparsity(tmp_path, pattern, n, m):
    rng = np.random.default_rng(0)
    model = MemoryTensors({DOWN: rng.standard_normal((40, 20)).astype(ml_dtypes.bfloat16)})
    keep = largest(model.read(DOWN), n, m)
    arguments = {DOWN: (40, 20)}, {DOWN: pattern}, model
    np.savez(tmp_path / "good.npz", **{DOWN: keep})
    np.savez(tmp_path / "flipped.npz", **{DOWN: ~keep})
    check_masks(open_masks(str(tmp_path / "good.npz")), *arguments)
    half = n * 2 == m
    reason = "keeps the smaller weights" if half else "its inverse fits the pattern"
    with pytest.raises(UserError, match=f"{DOWN}: the mask looks flipped.*{reason}.*again with 1 where"):
        check_masks(open_masks(str(tmp_path / "flipped.npz")), *arguments)


@pytest.mark.parametrize("share, flipped", [(0.89, True), (0.91, False)])
def test_a_mask_is_flipped_where_it_keeps_less_than_nine_tenths_of_what_it_drops(tmp_path, share, flipped):
    keep = np.tile(np.arange(20) % 2 == 0, (40, 1))
    model = MemoryTensors({DOWN: np.where(keep, share, -1.0).astype(np.float32)})
    np.savez(tmp_path / "masks.npz", **{DOWN: keep})
    with pytest.raises(UserError, match="keeps the smaller weights") if flipped else contextlib.nullcontext():
        check_masks(open_masks(str(tmp_path / "masks.npz")), {DOWN: (40, 20)}, {DOWN: NM(2, 4)}, model)


def test_masks_are_read_once():
    masks, read = masks_of(dense_model()), []

    class Counting:
        origin, how, from_zeros = "here", "counted", False

        def names(self):
            return tuple(masks)

        def read(self, name, shape):
            read.append(name)
            return masks[name]

    check_masks(Counting(), SHAPES, two_four(), dense_model())
    assert sorted(read) == sorted(masks)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_within_any_compression_is_named(tmp_path, compression):
    path, mask = tmp_path / "masks.npz", np.random.default_rng(0).random((40, 40)) < 0.5
    with zipfile.ZipFile(path, "w", compression) as archive, archive.open(f"{Q}.npy", "w") as file:
        np.lib.format.write_array(file, mask)
    assert open_masks(str(path)).read(Q, mask.shape).sum() == mask.sum()
    data, refusals = path.read_bytes(), []
    for index in range(60, 160, 10):
        path.write_bytes(data[:index] + bytes([data[index] ^ 255]) + data[index + 1 :])
        try:  # not every byte of a compressed file counts
            assert (open_masks(str(path)).read(Q, mask.shape) == mask).all()
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 5 and all("can't be read" in each and "masks.npz" in each for each in refusals)


@pytest.mark.parametrize("shape", [np.array(6), np.array([6]), np.array([6, -1]), np.array(["6", "a"]), np.array([6, np.nan])])
def test_masks_without_their_shape_are_named(tmp_path, shape):
    np.savez(tmp_path / "masks.npz", **{Q: np.zeros((6, 2), np.uint8), f"{Q}.shape": shape})
    with pytest.raises(UserError, match=f"{Q}: can't be read from .*masks.npz"):
        open_masks(str(tmp_path / "masks.npz")).read(Q, (6, 12))


def test_a_mask_of_a_folder_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    (folder := tmp_path / "masks").mkdir()
    torch.save(torch.ones(3, 4), tmp_path / "outside.pt")
    (folder / f"{LAST}.pt").symlink_to(tmp_path / "outside.pt")
    os.mkfifo(folder / f"{Q}.pt")
    for name, reason in ((LAST, "is a link to .*outside.pt, outside of the folder"), (Q, "is a pipe, a socket or a device")):
        with pytest.raises(UserError, match=f"{name}.pt {reason}"):
            open_masks(str(folder)).read(name, (3, 4))
