"""Fixtures that several parts share."""

import pytest

from contrec_dist.config import RayConfig
from sharding.ray_jobs import ray_session


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with 2 CPUs, started once, that stages join; gives the config it was started from."""
    config = RayConfig(num_workers=2, object_store_bytes=80_000_000)
    with ray_session(config):
        yield config
