"""The cells of a grid that the ordinary suite runs."""

from collections.abc import Mapping
from types import MappingProxyType

STAY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        # Each way to store a matrix, with experts and without, in one form of the settings.
        "test_every_array_is_where_maxtext_has_it_and_the_settings_describe_it": frozenset(
            ["qwen3-True", "mixtral-True", "gemma2-False"]
        ),
        # Each way to store experts, and each mesh.
        "test_transformers_computes_the_same_of_the_exported_model": frozenset(
            ["MixtralForCausalLM-1x1", "GptOssForCausalLM-4x2", "DeepseekV3ForCausalLM-2x2", "Llama4ForCausalLM-2x4"]
        ),
        # Stacked experts; a Llama's run is in test_launch.py, the half models of the other families are loaded without a run.
        "test_a_pruned_model_loads_in_transformers": frozenset(["GptOssForCausalLM"]),
        # The harder one: rows over devices that split their columns; another target.
        "test_the_residual_streams_drift_is_aimed_at_too": frozenset(["split"]),
        "test_no_row_is_worse_than_its_nearest_integers_and_none_beats_its_optimum": frozenset(["other"]),
        "test_logits_with_a_cache_are_those_of_one_pass": frozenset(
            f"{name}ForCausalLM" for name in ("Llama", "Gemma3", "Gemma4", "OPT", "Qwen3Next", "DeepseekV3", "GptOss", "Llama4")
        ),
        "test_masks_are_held_and_the_held_out_divergence_falls": frozenset(["float32"]),
        "test_the_walk_calls_what_was_compiled": frozenset(["best-shape1"]),
        "test_the_bits_are_those_of_the_plain_folder_on_every_mesh": frozenset(["bfloat16"]),
        # Each function that finds parts, each layout of experts, biases, and a configuration inside another one.
        "test_the_exported_model_computes_what_zeros_do": frozenset(
            {"Llama-one key left", "Phi3-one key", "OPT-no biases", "Starcoder2-no biases", "Nemotron-biases"}
            | {"Cohere-norms of every head", "Mixtral-head_dim", "Qwen2Moe-one mixture", "GptOss-no biases of attention"}
            | {"Llama4-one still", "DeepseekV3-stretched", "Qwen3Next-linear attention last", "Gemma4-values, biases"}
            | {"Gemma3ForConditionalGeneration-text half"}
        ),
        "test_a_signal_while_a_command_imports_its_modules": frozenset(["launch-orbax.checkpoint-15", "cli-jax-15"]),
        "test_a_cluster_that_the_platform_announces_is_joined": frozenset(["TPU slice", "Slurm"]),
        "test_every_command_of_a_header_is_a_sweep": frozenset(["adam", "two_four_mlp", "unstructured", "windows"]),
    }
)
"""By the name of a test, the ids of its cells that together have every kind. The others are slow."""
