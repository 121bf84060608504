"""Packed folders on devices: equal bits, and transfers of kept weights."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optima_tpu
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import on_devices
from optima_tpu.models.checkpoints.packed import SPARSE, Packed
from tests.models.test_packed import packed_folder, restored
from tests.support.meshes import mesh
from tests.support.runs import folder_tensors

ROWS, COLUMNS = 16, 24
SPECS = [P(), P("data"), P(None, "model"), P("model", "data"), P(("data", "model")), P(None, ("model", "data"))]


def random_bits(dtype: np.dtype, keep: np.ndarray) -> np.ndarray:
    """Random bits where ``keep``, with NaNs, denormals, -0.0; else zeros."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 256, (*keep.shape, dtype.itemsize), np.uint8)
    bits[~keep] = 0
    return bits.view(dtype)[..., 0]


def masks() -> dict[str, np.ndarray]:
    """Random and 2:4 masks, empty and full rows, empty and full matrices."""
    order = np.random.default_rng(1).random((ROWS, COLUMNS))
    half = order < 0.5
    half[3], half[4], half[-1] = False, True, False
    groups = order.reshape(ROWS, -1, 4).argsort().argsort() < 2
    return {
        "half": half,
        "2:4": groups.reshape(ROWS, COLUMNS),
        "few": order < 0.1,
        "none": np.zeros_like(half),
        "all": np.ones_like(half),
        "of odd sizes": order[:5, :7] < 0.5,
    }


def folder_of(room, dtype) -> tuple:
    dtype, name = np.dtype(dtype), {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[np.dtype(dtype).name]
    chosen = masks()
    arrays = {key: random_bits(dtype, keep) for key, keep in chosen.items()}
    arrays["norm"], arrays["scalar"] = random_bits(dtype, np.ones(COLUMNS, bool)), random_bits(dtype, np.ones((), bool))
    stored = {key: (name, array.shape, array.tobytes()) for key, array in arrays.items()}
    arrays["experts"] = random_bits(dtype, np.random.default_rng(2).random((4, 2, 8)) < 0.3)
    arrays["flags"] = np.arange(24).reshape(4, 6) % 5 == 0
    stored["experts"] = (name, (4, 2, 8), arrays["experts"].tobytes())
    stored["flags"] = ("BOOL", (4, 6), arrays["flags"].tobytes())
    stored["empty"], arrays["empty"] = (name, (0, 3), b""), np.zeros((0, 3), dtype)
    # A mask may keep weights that are zero.
    return packed_folder(room, stored, chosen | {"2:4": np.ones((ROWS, COLUMNS), bool), "empty": np.zeros((0, 3), bool)}), arrays


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_bits_are_those_of_the_plain_folder_on_every_mesh(tmp_path, dtype):
    folder, arrays = folder_of(tmp_path, dtype)
    opened = Packed(folder)
    assert {name for name in masks() if opened.tensors[name].encoding == SPARSE} == set(masks())
    for axes, specs in {(1, 1): [P()], (4, 2): SPECS}.items():
        grid = mesh(*axes)
        for spec in specs:
            wanted = {
                name: NamedSharding(grid, spec if array.shape == (ROWS, COLUMNS) else P()) for name, array in arrays.items()
            }
            loaded = optima_tpu.load_packed(folder, lambda name, shape, wanted=wanted: wanted[name])
            assert loaded.keys() == arrays.keys()
            for name, array in loaded.items():
                assert array.sharding == wanted[name] and (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape)
                assert np.asarray(array).tobytes() == opened.read(name).tobytes() == arrays[name].tobytes(), (name, spec)


def test_a_folder_without_shardings_is_on_the_first_device(tmp_path):
    folder, _ = folder_of(tmp_path, np.float32)
    plain = folder_tensors(restored(folder, tmp_path / "out"))
    for name, array in optima_tpu.load_packed(str(folder)).items():
        assert array.devices() == {jax.devices()[0]} and np.asarray(array).tobytes() == plain[name].tobytes()


def test_masks_and_kept_weights_are_what_travels():
    random = np.random.default_rng(0)
    keep = random.random((128, 256)) < 0.5
    elements = random.integers(1, 2**16, np.count_nonzero(keep), np.uint16)
    for shards in ([(slice(0, 128), slice(0, 256))], [(slice(0, 64), slice(at, at + 64)) for at in range(0, 256, 64)]):
        for bits, kept in zip(*on_devices._shards(keep, elements, shards), strict=True):
            weights = 8 * bits.size
            assert weights == 128 * 256 // (1 if len(shards) == 1 else 8)
            assert (bits.nbytes + kept.nbytes) / weights < 1 / 8 + 2 * (0.5 + 1 / 64 + 0.02)


def test_what_jax_cannot_hold_or_split_is_refused(tmp_path):
    wide = np.ones((4, 4))
    folder = packed_folder(tmp_path, {"wide": ("F64", (4, 4), wide.tobytes())})
    with pytest.raises(UserError, match="stores wide as float64, which JAX rounds unless JAX_ENABLE_X64=1"):
        optima_tpu.load_packed(folder)
    (tmp_path / "odd").mkdir()
    folder = packed_folder(tmp_path / "odd", {"odd": ("F32", (5, 6), np.ones((5, 6), np.float32).tobytes())})
    with pytest.raises(UserError, match=r"odd of shape \(5, 6\) does not fit its sharding"):
        optima_tpu.load_packed(folder, NamedSharding(mesh(4, 2), P("data")))
    with pytest.raises(UserError, match="no packed checkpoint"):
        optima_tpu.load_packed(tmp_path)
