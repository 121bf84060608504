"""A small sweep, and its file."""

from pathlib import Path

from optima_tpu.config import yaml12

TABLE = {
    "run": {"model": "org/name", "calibration": {"source": "random", "windows": 4, "length": 8}},
    "masks": {"wanda": {"selector": "wanda"}, "magnitude": {"selector": "magnitude"}},
    "updates": {"none": {"solver": None}, "cg": {"solver": {"name": "cg", "damping": 0.25}}},
    "patterns": {"50%": {"pattern": 0.5}, "2:4 MLP": {"pattern": "2:4", "layers": "self_attn.*=dense"}},
}


def write_sweep(path: Path, **changes) -> str:
    """Writes a sweep's file without keys that are None. Returns the path."""
    document = {key: value for key, value in (TABLE | changes).items() if value is not None}
    path.write_text(yaml12.dump(document))
    return str(path)
