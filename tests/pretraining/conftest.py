"""What tests of pretraining share."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def rows(domain, concept_batch):
    """Four random pictures with their prompts, as `data.batches` yields them."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, domain.base.image_size, domain.base.image_size, 3)).astype(np.float32)
    prompts = {"ids": np.asarray(concept_batch.ids), "placeholder": np.asarray(concept_batch.placeholder)}
    return {"image": pixels, "mask": np.ones(pixels.shape[:3], np.float32), **prompts}
