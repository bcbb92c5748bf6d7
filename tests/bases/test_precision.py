"""Networks computed in bfloat16 on float32 weights: how far loss and gradient of the shipped domain move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.creatures.judging.personalisation_trial import held_out
from e4t_jax.files.domain_files import load_domain
from e4t_jax.objective import ConceptBatch, Frozen, LossWeights, Trainable, e4t_loss

OPTIMISED = True  # the shipped domain computes for long

pytestmark = pytest.mark.slow


def loss_and_gradient(domain, pictures):
    base, params = domain.base, domain.params
    images = jnp.asarray(pictures, jnp.float32) / 127.5 - 1
    latents, clip = base.encode(params["vae"], images), base.see(params["image_encoder"], images, domain.clip_features)
    ids, placeholder = (jnp.asarray(part) for part in domain.tokenize(["a photo of *s in the snow"] * len(images)))
    batch = ConceptBatch(latents, clip, ids, placeholder)
    frozen = Frozen(params["unet"], params["text_encoder"])

    def loss(trainable):
        return e4t_loss(domain.method, trainable, frozen, batch, jax.random.key(0), weights=LossWeights(1e-4))[0]

    return jax.jit(jax.value_and_grad(loss))(Trainable(domain.factors, domain.encoder))


def test_bfloat16_moves_loss_by_1_percent_and_the_gradient_hardly_turns():
    """Pretraining's loss on 16 validation pictures: within 1 %; cosine of the whole gradient at least 0.99; results float32."""
    pictures = held_out(0, 16, split="validation").pictures
    exact, gradient = loss_and_gradient(load_domain("creatures"), pictures)
    rough, turned = loss_and_gradient(load_domain("creatures", dtype="bfloat16"), pictures)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(turned)) and rough.dtype == jnp.float32
    assert float(rough) != float(exact)
    np.testing.assert_allclose(rough, exact, rtol=0.01)
    one, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (gradient, turned))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= 0.99
