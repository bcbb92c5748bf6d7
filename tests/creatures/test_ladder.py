"""The ladder that a base model has to climb, on the shipped one."""

import pytest

from e4t_jax.creatures.learning.ladder import climb
from e4t_jax.creatures.shipped import base_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_shipped_base_climbs_most_of_the_ladder():
    """Rungs by a tenth of the pictures and of the steps, a few standard errors below what docs/results.md says of all."""
    found = climb(base_folder(), track=lambda items, **_: items, prompts=64, reach=2, reach_steps=60)
    assert found["psnr_db"] > 31
    assert found["hue_top1"] > 0.8 and min(found[f"{name}_top1"] for name in ("eyes", "context", "style")) > 0.9
    assert 0.6 < found["described_attributes_mean"] < 0.95
    assert found["reachable_identity_top1"] >= 0.5
