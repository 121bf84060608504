"""Meshes of simulated devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def mesh(data: int, model: int) -> Mesh:
    """A mesh of the first ``data * model`` simulated devices."""
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
