"""Networks computed in bfloat16: where their weights lie, and how far loss and gradient of the shipped domain move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from e4t_jax.creatures.judging.personalisation_trial import held_out
from e4t_jax.files.domain_files import base_fingerprint, load_domain
from e4t_jax.objective import ConceptBatch, Frozen, LossWeights, Trainable, e4t_loss
from e4t_jax.testing import write_tiny_world

OPTIMISED = True  # the shipped domain computes for long


def loss_and_gradient(domain, pictures):
    base, params = domain.base, domain.params
    images = jnp.asarray(pictures, jnp.float32) / 127.5 - 1
    latents, clip = base.encode(params["vae"], images), base.image_encoder.see(params["image_encoder"], images)
    ids, placeholder = (jnp.asarray(part) for part in domain.tokenize(["a photo of *s in the snow"] * len(images)))
    batch = ConceptBatch(latents, clip, ids, placeholder)
    frozen = Frozen(params["unet"], params["text_encoder"])

    def loss(trainable):
        return e4t_loss(domain.method, trainable, frozen, batch, jax.random.key(0), weights=LossWeights(1e-4))[0]

    return jax.jit(jax.value_and_grad(loss))(Trainable(domain.factors, domain.encoder))


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """The same domain, loaded in either precision."""
    world = write_tiny_world(tmp_path_factory.mktemp("precision"))
    return load_domain(world.domain), load_domain(world.domain, dtype="bfloat16", remat="blocks")


def test_kernels_lie_in_the_dtype_of_the_computation_and_all_else_in_float32(domains):
    """And so does the tree that shapes promise; what the domain learned stays float32."""
    _, half = domains
    flat = flatten_dict(half.params, sep="/")
    assert {path: str(leaf.dtype) for path, leaf in flat.items()} == {
        path: "bfloat16" if path.endswith("kernel") else "float32" for path in flat
    }
    promised = flatten_dict(half.base.param_shapes(), sep="/")
    assert {path: leaf.dtype for path, leaf in promised.items()} == {path: leaf.dtype for path, leaf in flat.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves((half.encoder, half.factors))} == {jnp.dtype("float32")}


def test_a_domain_knows_its_own_in_either_precision(domains):
    """Fingerprints are of the weights as stored, so that concepts of one serve the other."""
    exact, half = domains
    assert exact.fingerprint == half.fingerprint
    assert base_fingerprint(exact.stored) == base_fingerprint(half.stored) != base_fingerprint(half.params)


@pytest.mark.compiles
@pytest.mark.parametrize("scope", ["compact", "full"])
def test_what_tuning_learns_is_float32(domains, scope):
    _, half = domains
    (concept,) = half.tune([np.zeros((16, 16, 3), np.uint8)], steps=1, batch_size=2, scope=scope, caption="a photo of *s")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(concept.trainable)} == {"float32"}
