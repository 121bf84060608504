"""Rotary position embedding."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, TypedDict

import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.runtime.records import Positive, Size, check_record


class _Parameters(TypedDict, total=False):
    """What is read of ``config.rope_parameters``."""

    rope_type: str
    rope_theta: Positive | None
    factor: Positive | None
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    original_max_position_embeddings: Size | None
    attention_factor: Positive | None
    short_factor: list[Positive] | None
    long_factor: list[Positive] | None


_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the slow rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """LongRoPE (``rope_type: longrope``): every frequency is divided by its own factor, of which there are two sets.

    Attributes:
      short, long: factors for texts of at most, and of more than ``original_length`` tokens.
      magnitude: cos and sin are multiplied by it.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: base of the geometric sequence of frequencies.
      factor: positions are divided by it (``rope_type: linear``); 1 for none.
      share: the share of a head's dimensions that are rotated, the first ones.
      scaling: scaling of single frequencies, or None.
    """

    theta: float
    factor: float = 1.0
    share: float = 1.0
    scaling: Llama3Scaling | LongScaling | None = None

    @classmethod
    def from_hf(cls, parameters: Mapping, kinds: tuple[str, ...] = ("default", "linear", "llama3")) -> "Rope":
        """From ``config.rope_parameters``.

        Args:
          kinds: the rope types that the family knows; where "longrope" is one, a part of a head may be rotated.

        Raises:
          UserError: another rope type, or a setting of it that is not supported.
        """
        check_record(dict(parameters), _Parameters, "config.json", "check the file", inside="rope_parameters")
        kind = parameters.get("rope_type", "default")
        if kind not in kinds:
            raise UserError(f"expected rope_type {' or '.join(kinds)}, got {kind!r}: this model is not supported yet")
        share = float(parameters.get("partial_rotary_factor", 1.0))
        if share != 1 and "longrope" not in kinds:
            raise UserError(f"expected partial_rotary_factor 1 in this family, got {share:g}: not supported")
        needed = {"rope_theta", *_NEEDED.get(kind, ())}
        if missing := sorted(name for name in needed if parameters.get(name) is None):
            raise UserError(f"expected {', '.join(missing)} in the rope_parameters of config.json for rope_type {kind}, got none")
        theta = float(parameters["rope_theta"])
        if kind == "linear":
            return cls(theta, factor=float(parameters["factor"]))
        if kind == "llama3":
            return cls(
                theta,
                scaling=Llama3Scaling(
                    float(parameters["factor"]),
                    float(parameters["low_freq_factor"]),
                    float(parameters["high_freq_factor"]),
                    int(parameters["original_max_position_embeddings"]),
                ),
            )
        if kind == "longrope":
            original, factor = int(parameters["original_max_position_embeddings"]), float(parameters["factor"])
            magnitude = parameters.get("attention_factor")
            if magnitude is None:
                magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return cls(
                theta,
                share=share,
                scaling=LongScaling(
                    tuple(parameters["short_factor"]), tuple(parameters["long_factor"]), original, float(magnitude)
                ),
            )
        return cls(theta, share=share)

    def tables(self, length: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin), each [length, rotated dimensions of a head] float32."""
        size = int(head_dim * self.share)
        frequencies = 1.0 / self.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
        magnitude = 1.0
        match self.scaling:
            case Llama3Scaling(factor, low, high, original):
                # Fast frequencies stay, slow ones are divided by the factor, those between are blended by their wavelength.
                turns = original * frequencies / (2 * math.pi)
                # Without a range between the two, as in transformers: fast from ``low`` on.
                blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns >= low).astype(np.float64)
                frequencies = frequencies * (blend + (1 - blend) / factor)
            case LongScaling(short, long, original, magnitude):
                frequencies = frequencies / np.asarray(long if length > original else short)
        angles = np.outer(np.arange(length) / self.factor, frequencies)
        angles = np.concatenate([angles, angles], axis=1)
        return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


def rotate(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """Applies the rotary embedding to x [batch, length, heads, head_dim]; pairs are (j, j + rotated dimensions / 2)."""
    turning, still = jnp.split(x, [cos.shape[-1]], axis=-1)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    turning = turning * cos[None, :, None, :].astype(x.dtype) + turned * sin[None, :, None, :].astype(x.dtype)
    return jnp.concatenate([turning, still], axis=-1) if still.shape[-1] else turning
