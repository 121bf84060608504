"""Measurements that are not part of the tests: times as ratios within one process, errors against published errors."""

from optima_tpu.runtime.host_memory import keep_freed_memory

keep_freed_memory()  # as a command does: before any library starts a thread
