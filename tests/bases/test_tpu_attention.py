"""The attention kernels for TPU, run by Pallas' interpreter: the plain form's values and gradients; and what they are used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from e4t_jax.bases.stable_diffusion import tpu_attention
from e4t_jax.bases.stable_diffusion.attention import _gradient_on_tpu, _on_tpu, _plain


@pytest.mark.parametrize(
    ("tokens", "others", "width"), [(1024, 1024, 40), (256, 77, 40), (257, 257, 24)], ids=["parts of both", "text", "odd"]
)
def test_the_kernels_compute_what_the_plain_form_does(tokens, others, width):
    """Relative 1e-5, in float32."""
    generator = np.random.default_rng(0)
    shapes = ((1, tokens, 2, width), (1, others, 2, width), (1, others, 2, width), (1, tokens, 2, width))
    query, key, value, change = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)
    with pltpu.force_tpu_interpret_mode():
        made, sums = _on_tpu(query, key, value)
        gradients = _gradient_on_tpu(query, key, value, made, sums, change)
    expected, transposed = jax.vjp(_plain, query, key, value)
    for one, other in zip((made, *gradients), (expected, *transposed(change)), strict=True):
        assert one.dtype == other.dtype
        assert jnp.linalg.norm(one - other) <= 1e-5 * jnp.linalg.norm(other)


def test_what_does_not_fit_the_kernels_is_left_to_others():
    assert tpu_attention.fits(4096, 77, 40) and tpu_attention.fits(9216, 9216, 64) and tpu_attention.fits(257, 257, 80)
    assert not tpu_attention.fits(4096, 4096, 512)  # the autoencoder's one head
    assert not tpu_attention.fits(1600, 1600, 40)  # no parts of whole registers
