"""Eight simulated devices for the whole suite."""

import jax

# Before any array exists. Meshes of fewer devices are made from the first ones.
jax.config.update("jax_num_cpu_devices", 8)
