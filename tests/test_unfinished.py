import multiprocessing
import os
import random
import signal
import time

import pytest

from terdit_jax.data import builder, schema
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.sources import make_digits_source

OPTIONS = {"codec": PixelCodec(), "mirror": True, "shard_bytes": 20_000}  # 39 records a shard
NUM_WORKERS = 3


def work(output, worker):
    builder.build(make_digits_source(), output, worker=(worker, NUM_WORKERS), **OPTIONS)


@pytest.fixture(scope="module")
def server():
    """Starts processes in milliseconds, with everything imported and none of pytest's state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["terdit_jax.data.builder", "sklearn.datasets"])
    return context


@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments_make_the_same_data_set(tmp_path, server, num_kills):
    builder.build(make_digits_source(), tmp_path / "whole", **OPTIONS)
    moments = random.Random(os.urandom(8))
    killed, seen = 0, []
    for _ in range(1000):
        workers = [server.Process(target=work, args=(str(tmp_path / "d"), k)) for k in range(NUM_WORKERS)]
        for worker in workers:
            worker.start()
        if killed < num_kills:
            before = set(os.listdir(tmp_path / "d")) if (tmp_path / "d").exists() else set()
            while not before < (set(os.listdir(tmp_path / "d")) if (tmp_path / "d").exists() else set()):
                if not any(worker.is_alive() for worker in workers):
                    break
                time.sleep(0.002)  # every round makes some progress
            time.sleep(moments.uniform(0, 0.05))
            for worker in workers:
                if worker.is_alive():
                    os.kill(worker.pid, signal.SIGKILL)
            killed += any(worker.exitcode != 0 for worker in workers if worker.join() is None)
        for worker in workers:
            worker.join()
        seen.append(sorted(file for file in os.listdir(tmp_path / "d") if "array_record" in file))
        if (tmp_path / "d" / schema.METADATA_FILE).exists() and killed >= num_kills:
            break
        if (tmp_path / "d" / schema.METADATA_FILE).exists():
            pytest.fail(f"finished after {killed} kills: too fast to test anything")
    assert killed >= num_kills
    assert all(set(earlier) <= set(later) for earlier, later in zip(seen, seen[1:], strict=False))  # nothing is lost
    files = {file: (tmp_path / "d" / file).read_bytes() for file in os.listdir(tmp_path / "d")}
    assert files == {file: (tmp_path / "whole" / file).read_bytes() for file in os.listdir(tmp_path / "whole")}
