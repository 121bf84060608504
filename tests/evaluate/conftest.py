"""The task files of the evaluation harness."""

import functools

import pytest
from tqdm import tqdm


@pytest.fixture(scope="module")
def own_tasks_only():
    """Hides the thousands of task files that come with the harness.

    Reading them takes seconds at every call. The harness's progress bars are off as in main.
    """
    import lm_eval.api.task
    import lm_eval.tasks

    from optima_tpu.evaluate import tasks as module

    def manager(include_path=None):
        return lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=include_path is None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TaskManager", manager)
        patch.setattr(lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=True))
        yield
