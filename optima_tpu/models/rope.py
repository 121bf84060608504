"""Rotary position embedding."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple, TypedDict

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
    beta_fast: Positive | None
    beta_slow: Positive | None
    truncate: bool | None
    mscale: Positive | None
    mscale_all_dim: Positive | None
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
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of slow frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    @classmethod
    def from_hf(cls, parameters: Mapping) -> "Llama3Scaling":
        factor, low, high, original = (parameters[name] for name in _NEEDED["llama3"])
        return cls(float(factor), float(low), float(high), int(original))

    def shares(self, frequencies: np.ndarray) -> np.ndarray:
        """What is left of each frequency.

        Fast ones stay and slow ones are divided by the factor. Between them the share is a blend by the wavelength.
        """
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_length * frequencies / (2 * math.pi)
        # Without a range between the two, as in transformers: fast from ``low`` on.
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns >= low).astype(np.float64)
        shares: np.ndarray = blend + (1 - blend) / self.factor
        return shares


@dataclasses.dataclass(frozen=True)
class FirstFrequencies:
    """Zeros for all but the first frequencies (``rope_type: proportional``).

    Attributes:
      share: the share of the frequencies that stay.
    """

    share: float


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """LongRoPE (``rope_type: longrope``): a divisor for each frequency.

    Attributes:
      short, long: divisors for texts of at most, and of more than ``original_length`` tokens.
      magnitude: cos and sin are multiplied by it.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float

    @classmethod
    def from_hf(cls, parameters: Mapping) -> "LongScaling":
        original, factor = int(parameters["original_max_position_embeddings"]), float(parameters["factor"])
        magnitude = parameters.get("attention_factor")
        if magnitude is None:
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return cls(tuple(parameters["short_factor"]), tuple(parameters["long_factor"]), original, float(magnitude))


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (``rope_type: yarn``): slow frequencies are divided by a factor.

    Fast ones stay, with a ramp over dimensions in between. Source: arXiv:2309.00071, as ``transformers`` computes it.

    Attributes:
      factor: the divisor.
      fast, slow: turns within the original length at which the ramp begins and ends.
      original_length: the longest text that the model was trained on before it was stretched.
      whole: whether the ramp begins and ends at whole dimensions.
      magnitude: cos and sin are multiplied by it.
    """

    factor: float
    fast: float
    slow: float
    original_length: int
    magnitude: float
    whole: bool = True

    @classmethod
    def from_hf(cls, parameters: Mapping) -> "YarnScaling":
        factor, magnitude = float(parameters["factor"]), parameters.get("attention_factor")
        if parameters["rope_theta"] <= 1:
            raise UserError(
                f"expected rope_theta above 1 for rope_type yarn, got {parameters['rope_theta']:g}: check config.json"
            )
        if magnitude is None:
            above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
            scales = (above, below) if above and below else (1.0, 0.0)
            numerator, denominator = (1 + 0.1 * scale * math.log(max(factor, 1.0)) for scale in scales)
            magnitude = numerator / denominator
        fast, slow = parameters.get("beta_fast") or 32.0, parameters.get("beta_slow") or 1.0
        original, whole = int(parameters["original_max_position_embeddings"]), parameters.get("truncate") is not False
        return cls(factor, float(fast), float(slow), original, float(magnitude), whole)

    def stretched(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies, [rotated dimensions / 2]."""
        size = len(frequencies)
        begin, end = (
            size * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta) for turns in (self.fast, self.slow)
        )
        if self.whole:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, 2 * size - 1)
        ramp = np.clip((np.arange(size) - begin) / (end - begin or 0.001), 0.0, 1.0)
        return frequencies * (1 - ramp + ramp / self.factor)


_SCALINGS: Mapping[str, type[Llama3Scaling | LongScaling | YarnScaling]] = {
    "llama3": Llama3Scaling,
    "longrope": LongScaling,
    "yarn": YarnScaling,
}

TYPES = ("default", "linear", "llama3", "yarn")
"""The rope types that most families know."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: base of the geometric sequence of frequencies.
      factor: positions are divided by it (``rope_type: linear`` or ``proportional``); 1 for none.
      share: the share of a head's dimensions that are rotated, the first ones.
      scaling: scaling of single frequencies, or None.
    """

    theta: float
    factor: float = 1.0
    share: float = 1.0
    scaling: FirstFrequencies | Llama3Scaling | LongScaling | YarnScaling | None = None

    @classmethod
    def from_hf(cls, parameters: Mapping, kinds: tuple[str, ...] = TYPES, partial: bool = False) -> "Rope":
        """From ``config.rope_parameters``.

        Args:
          kinds: the rope types that the family knows.
          partial: whether the family may rotate a part of a head.

        Raises:
          UserError: another rope type, or a setting of it that is not supported.
        """
        check_record(dict(parameters), _Parameters, "config.json", "check the file", inside="rope_parameters")
        kind = parameters.get("rope_type", "default")
        if kind not in kinds:
            raise UserError(f"expected rope_type {' or '.join(kinds)}, got {kind!r}: this model is not supported yet")
        share = parameters.get("partial_rotary_factor")
        share = 1.0 if share is None else float(share)
        if share != 1 and not partial and kind != "proportional":
            raise UserError(f"expected partial_rotary_factor 1 in this family, got {share:g}: not supported")
        needed = {"rope_theta", *_NEEDED.get(kind, ())}
        if missing := sorted(name for name in needed if parameters.get(name) is None):
            raise UserError(f"expected {', '.join(missing)} in the rope_parameters of config.json for rope_type {kind}, got none")
        theta = float(parameters["rope_theta"])
        if kind == "proportional":
            return cls(theta, factor=float(parameters.get("factor") or 1.0), scaling=FirstFrequencies(share))
        if kind == "linear":
            return cls(theta, factor=float(parameters["factor"]), share=share)
        return cls(theta, share=share, scaling=_SCALINGS[kind].from_hf(parameters) if kind in _SCALINGS else None)

    def of(self, block: int) -> "Rope":
        """The rotary embedding of a block: of every block this one."""
        return self

    def still(self) -> "Rope":
        """A rope that turns nothing (NoPE), with tables of the same shape."""
        return dataclasses.replace(self, factor=math.inf, scaling=None)

    def tables(self, length: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin), each [length, rotated dimensions of a head] float32."""
        size = int(head_dim * self.share)
        frequencies = geometric(self.theta, size)
        magnitude = 1.0
        match self.scaling:
            case FirstFrequencies(share):
                frequencies[int(share * size // 2) :] = 0
            case Llama3Scaling():
                frequencies = frequencies * self.scaling.shares(frequencies)
            case LongScaling(short, long, original, magnitude):
                frequencies = frequencies / np.asarray(long if length > original else short)
            case YarnScaling(magnitude=magnitude):
                frequencies = self.scaling.stretched(frequencies, self.theta)
        angles = np.outer(np.arange(length) / self.factor, frequencies)
        angles = np.concatenate([angles, angles], axis=1)
        return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


def geometric(theta: float, size: int) -> np.ndarray:
    """The frequencies of ``size`` dimensions before scaling, [size / 2]."""
    frequencies: np.ndarray = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    return frequencies


class RopeByBlock(NamedTuple):
    """Rotary embeddings that differ from block to block."""

    ropes: tuple[Rope, ...]

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Mapping], kinds: Sequence[str], types: tuple[str, ...] = TYPES) -> "RopeByBlock":
        """From ``config.rope_parameters`` by type and ``config.layer_types``.

        Args:
          types: the rope types that the family knows.
        """
        if missing := sorted(set(kinds) - {kind for kind, given in parameters.items() if given}):
            raise UserError(f"expected {', '.join(missing)} in the rope_parameters of config.json, as in layer_types, got none")
        ropes = {kind: Rope.from_hf(parameters[kind], types) for kind in set(kinds)}
        return cls(tuple(ropes[kind] for kind in kinds))

    @classmethod
    def where(cls, rotated: Iterable[bool], rope: Rope) -> "RopeByBlock":
        """``rope`` for rotated blocks, and none (NoPE) for the others."""
        return cls(tuple(rope if each else rope.still() for each in rotated))

    def of(self, block: int) -> Rope:
        """The rotary embedding of a block."""
        return self.ropes[block]


Rotation = Callable[[Array, Array | np.ndarray, Array | np.ndarray], Array]


def rotate(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """Applies the rotary embedding to x [batch, length, heads, head_dim].

    The pairs are (j, j + rotated dimensions / 2).
    """
    turning, still = jnp.split(x, [cos.shape[-1]], axis=-1)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    turning = turning * cos[None, :, None, :].astype(x.dtype) + turned * sin[None, :, None, :].astype(x.dtype)
    return jnp.concatenate([turning, still], axis=-1) if still.shape[-1] else turning


def rotate_wide(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """As :func:`rotate`, in float32 and rounded once."""
    return rotate(x.astype(jnp.float32), cos, sin).astype(x.dtype)


def rotate_neighbours(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """As :func:`rotate` with pairs (2j, 2j + 1).

    The first ones of all pairs come out before the second ones. Queries and keys are reordered alike, so their products stay.
    """
    turning, still = jnp.split(x, [cos.shape[-1]], axis=-1)
    return rotate(jnp.concatenate([turning[..., 0::2], turning[..., 1::2], still], axis=-1), cos, sin)


def rotate_neighbours_wide(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """As :func:`rotate_neighbours`, in float32 and rounded once."""
    return rotate_neighbours(x.astype(jnp.float32), cos, sin).astype(x.dtype)
