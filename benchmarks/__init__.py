"""Measurements that are not part of the tests.

Times are ratios within one process. Errors stand beside published errors.
"""

from optima_tpu.runtime.host_memory import keep_freed_memory

keep_freed_memory()  # as a command does: before any library starts a thread
