"""Hidden states on the host and on devices give every caller equal values."""

import numpy as np
import pytest

from optima_tpu.models.activations import Activations
from tests.support.meshes import mesh

WINDOWS, LENGTH, WIDTH, BATCH = 11, 3, 4, 2


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("first, last", [(0, WINDOWS), (0, 6), (5, 6), (6, WINDOWS)])
def test_batches_of_a_part_are_taken_and_put_alike_on_hosts_and_devices(shape, first, last):
    values = np.random.default_rng(0).standard_normal((WINDOWS, LENGTH, WIDTH)).astype(np.float32)
    host = Activations.of(mesh(*shape), values.copy())
    device = host.on_devices(BATCH)
    copies = host.copy(), device.copy()
    for states in (host, device):
        part = states.part(first, last)
        assert len(part) == last - first and part.length == LENGTH
        with part.put_behind() as put:
            for batch in part.batches(BATCH):
                inside = batch.rows < last
                expected = np.where(inside[:, None, None], values[np.minimum(batch.rows, WINDOWS - 1)], 0)
                assert (batch.hidden == expected).all() and (batch.filled == inside).all()
                put(batch.rows, batch.hidden + 1)
    moved = values + ((first <= np.arange(WINDOWS)) & (np.arange(WINDOWS) < last))[:, None, None]
    for states in (host, device):
        assert (states.take(states.rows) == moved).all(), "what is outside of the part was written"
    for copy in copies:
        assert (copy.take(copy.rows) == values).all()
    rooms = [states.room(WIDTH + 1) for states in (host, device)]
    assert [room.take(room.rows).shape for room in rooms] == [(WINDOWS, LENGTH, WIDTH + 1)] * 2


def test_room_on_the_devices_is_made_for_batches_of_one_size():
    device = Activations.of(mesh(1, 1), np.zeros((8, 1, 1), np.float32)).on_devices(2)
    list(device.batches(5))
    with pytest.raises(ValueError, match="room"):
        list(device.batches(6))
