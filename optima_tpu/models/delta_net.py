"""Gated DeltaNet: linear attention. Source: arXiv:2412.06464.

Each head remembers keys and values as one matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models.cache import Cache
from optima_tpu.models.family import Positions
from optima_tpu.models.layers import Linear, RMSNorm, einsum, split_heads


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers that shape a DeltaNet.

    Attributes:
      heads: number of heads, each with a value.
      key_heads: number of keys and queries; each is read by ``heads / key_heads`` heads that follow one another.
      key_dim, value_dim: width of a key or query, and of a value.
      kernel: how many tokens the convolution sees.
      joined: whether the outputs of two layers hold what belongs to each key head, one head after the other: queries, keys,
        values and gates, and the rates. If not, four layers project queries, keys and values, the gates, and each of the two
        rates.
    """

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    joined: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """Width of all queries, of all keys and of all values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.heads * self.value_dim


class Convolution(nnx.Module):
    """``silu(sum over j of w_j x[t - kernel + 1 + j])`` of each channel.

    The sum is taken in float32 and rounded; so is its silu.
    """

    def __init__(self, channels: int, kernel: int):
        self.weight = nnx.Param(jnp.zeros((channels, 1, kernel)))

    def __call__(self, x: Array) -> Array:
        """Returns [batch, length, channels].

        ``x`` is [batch, kernel - 1 + length, channels]; its first ``kernel - 1`` tokens come before the text that is read.
        """
        weight, x_wide = self.weight[...].astype(x.dtype).astype(jnp.float32), x.astype(jnp.float32)
        kernel = weight.shape[2]
        length = x.shape[1] - kernel + 1
        summed = sum(x_wide[:, offset : offset + length] * weight[:, 0, offset] for offset in range(kernel))
        return jax.nn.silu(jnp.asarray(summed).astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


class GatedNorm(RMSNorm):
    """``x / rms(x) * w * silu(gate)``, gated in float32."""

    def __call__(self, x: Array, gate: Array) -> Array:  # type: ignore[override]
        return (super().__call__(x).astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class DeltaNet(nnx.Module):
    """Linear attention: x [batch, length, d_model] to the same shape."""

    def __init__(self, d_model: int, sizes: Sizes, eps: float):
        self.sizes = sizes
        *_, values = sizes.widths
        if sizes.joined:
            self.in_proj_qkvz = Linear(d_model, sum(sizes.widths) + values)
            self.in_proj_ba = Linear(d_model, 2 * sizes.heads)
        else:
            self.in_proj_qkv = Linear(d_model, sum(sizes.widths))
            self.in_proj_z = Linear(d_model, values)
            self.in_proj_b = Linear(d_model, sizes.heads)
            self.in_proj_a = Linear(d_model, sizes.heads)
        self.conv1d = Convolution(sum(sizes.widths), sizes.kernel)
        self.dt_bias, self.A_log = nnx.Param(jnp.ones((sizes.heads,))), nnx.Param(jnp.zeros((sizes.heads,)))
        self.norm = GatedNorm(sizes.value_dim, eps=eps)
        self.out_proj = Linear(values, d_model)

    def __call__(self, x: Array, positions: Positions) -> Array:
        sizes, cache = self.sizes, positions.cache or Cache()
        mixed, z, b, a = self.projected(x)
        counted = cache.counted(x.shape[1])
        before = cache.kept("mixed", jnp.zeros((len(x), sizes.kernel - 1, mixed.shape[2]), x.dtype))
        mixed = jnp.concatenate([before, mixed], axis=1)
        cache.keep("mixed", jax.lax.dynamic_slice_in_dim(mixed, counted, sizes.kernel - 1, axis=1))
        is_counted = (jnp.arange(x.shape[1]) < counted)[:, None]
        decay, strength = (jnp.where(is_counted, rate, 0) for rate in self.rates(a, b))
        state = cache.kept("state", jnp.zeros((len(x), sizes.heads, sizes.key_dim, sizes.value_dim)))
        output, state = delta_rule(*self.read_heads(self.conv1d(mixed)), decay, strength, state)
        cache.keep("state", state)
        normed = self.norm(output.astype(x.dtype), split_heads(z, sizes.value_dim))
        return self.out_proj(normed.reshape(*x.shape[:2], -1))

    def projected(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Projects x to queries, keys and values, gates, and rates.

        Returns:
          (queries, keys and values joined, gates z) [batch, length, channels], (b, a) [batch, length, heads] for the rates
        """
        if not self.sizes.joined:
            return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
        key_heads, keys, group = self.sizes.key_heads, self.sizes.key_dim, self.sizes.heads // self.sizes.key_heads
        values = group * self.sizes.value_dim
        qkvz, ba = (each.reshape(*x.shape[:2], key_heads, -1) for each in (self.in_proj_qkvz(x), self.in_proj_ba(x)))
        parts = *jnp.split(qkvz, (keys, 2 * keys, 2 * keys + values), axis=-1), *jnp.split(ba, 2, axis=-1)
        q, k, v, z, b, a = (part.reshape(*x.shape[:2], -1) for part in parts)
        return jnp.concatenate([q, k, v], axis=-1), z, b, a

    def rates(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Decay and strength of updates, [batch, length, heads] float32."""
        rate, bias = jnp.exp(self.A_log[...].astype(jnp.float32)), self.dt_bias[...].astype(jnp.float32)
        return -rate * jax.nn.softplus(a.astype(jnp.float32) + bias), jax.nn.sigmoid(b).astype(jnp.float32)

    def read_heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [batch, length, heads, width] float32.

        Queries and keys are scaled to length 1, then queries by ``key_dim ** -0.5``.
        """
        sizes = self.sizes
        q, k, v = jnp.split(mixed.astype(jnp.float32), (sizes.widths[0], 2 * sizes.widths[0]), axis=-1)
        q, k = (unit(split_heads(each, sizes.key_dim)) for each in (q, k))
        q, k = (jnp.repeat(each, sizes.heads // sizes.key_heads, axis=2) for each in (q * sizes.key_dim**-0.5, k))
        return q, k, split_heads(v, sizes.value_dim)


def unit(x: Array) -> Array:
    """x divided by its norm, [..., width]."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


_CHUNK = 64
"""Tokens whose updates are computed together."""


def delta_rule(q: Array, k: Array, v: Array, decay: Array, strength: Array, state: Array) -> tuple[Array, Array]:
    """The gated delta rule, token by token:

        S = exp(decay) S,    S = S + strength k (v - S'k)',    output = S'q

    It is computed chunk by chunk, with S_0 before a chunk and the sums g of its decays up to each token:

        u_t = strength_t (v_t - exp(g_t) S_0'k_t - sum over s < t of exp(g_t - g_s) (k_t'k_s) u_s)
        output_t = exp(g_t) S_0'q_t + sum over s <= t of exp(g_t - g_s) (q_t'k_s) u_s

    which are products of matrices and one triangular system. Source: arXiv:2412.06464.

    Args:
      q, k: [batch, length, heads, key_dim] float32.
      v: [batch, length, heads, value_dim] float32.
      decay, strength: [batch, length, heads] float32; decay is at most 0. A token with zeros in both leaves S as it is.
      state: S before the first token, [batch, heads, key_dim, value_dim] float32.

    Returns:
      (output [batch, length, heads, value_dim] float32, S behind the last token)
    """
    batch, length, heads, _ = q.shape
    size = min(_CHUNK, length)
    chunks = -(-length // size)

    def cut(array: Array) -> Array:  # [chunks, batch, heads, size, ...]
        array = jnp.pad(array, [(0, 0), (0, chunks * size - length), *[(0, 0)] * (array.ndim - 2)])
        return jnp.moveaxis(array.reshape(batch, chunks, size, *array.shape[2:]), (1, 3), (0, 2))

    state, output = jax.lax.scan(_chunk, state, tuple(map(cut, (q, k, v, decay, strength))))
    return jnp.moveaxis(output, (0, 2), (1, 3)).reshape(batch, chunks * size, heads, -1)[:, :length], state


def _chunk(state: Array, of_chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    q, k, v, decay, strength = of_chunk
    total = jnp.cumsum(decay, axis=-1)[..., None]
    index = jnp.arange(q.shape[2])
    # Masked before the exponential: what lies above the diagonal would overflow.
    fading = jnp.exp(jnp.where(index[:, None] >= index, total - jnp.swapaxes(total, -1, -2), -jnp.inf))
    lower = jnp.where(index[:, None] > index, strength[..., None] * fading * einsum("bhtd,bhsd->bhts", k, k), 0)
    wanted = strength[..., None] * (v - jnp.exp(total) * einsum("bhtd,bhdv->bhtv", k, state))
    update = einsum("bhts,bhsv->bhtv", _inverse(lower), wanted)
    output = jnp.exp(total) * einsum("bhtd,bhdv->bhtv", q, state)
    output += einsum("bhts,bhsv->bhtv", fading * einsum("bhtd,bhsd->bhts", q, k), update)
    last = total[..., -1:, :]
    return jnp.exp(last) * state + einsum("bhtd,bhtv->bhdv", k * jnp.exp(last - total), update), output


def _inverse(lower: Array) -> Array:
    """``(I + lower)^-1`` of strictly lower triangular matrices.

    ``lower`` is [..., size, size]. Let A and D be the inverses of two blocks on the diagonal, and B the block below. The
    inverse of both together has A and D on its diagonal and -D B A below. So the computation takes products alone, which every
    mesh splits. It is as exact as a substitution, unlike a product of powers of ``lower``.
    """
    index = jnp.arange(lower.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(len(index)), lower.shape)
    for bit in range((len(index) - 1).bit_length()):
        block = index >> bit
        below = jnp.where((block[:, None] == block + 1) & (block % 2 == 0), lower, 0)
        inverse -= einsum("...ab,...bc->...ac", inverse, einsum("...ab,...bc->...ac", below, inverse))
    return inverse
