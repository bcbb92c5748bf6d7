"""The E4T loss and its gradients, restated in PyTorch from the formulas on diffusers' and transformers' own classes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from e4t_jax import bases
from e4t_jax.bases.stable_diffusion.names import from_torch
from e4t_jax.objective import Draws, LossWeights, Trainable, e4t_loss_at

REGULARISATION = 0.05


def torch_loss(folder, domain, batch, t, noise, trainable):
    """The loss as a PyTorch graph over leaf tensors; returns it with the leaves, in the trees of `trainable`."""
    from benchmarks.plain_pytorch import Plain, offset_by_factors, tensor

    plain = Plain(folder, domain.method.empty_ids, int(domain.method.domain_id), domain.scale)
    leaves = jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(), trainable)
    weights = offset_by_factors(plain.unet_weights(), leaves.factors)
    return plain.loss(weights, leaves.encoder, batch, t, noise, REGULARISATION), leaves


@pytest.mark.compiles
def test_loss_and_gradients_match_pytorch_autograd(domain, concept_batch, tmp_path):
    """Loss to 1e-5, every gradient of encoder and offsets to 1e-3 of its largest entry; same noise, same timesteps."""
    pytest.importorskip("torch")
    bases.save_folder(tmp_path, domain.base, domain.params, np.float32)
    t = np.array([3, 250, 600, 990])
    noise = np.asarray(jax.random.normal(jax.random.key(5), concept_batch.latents.shape))
    trainable = Trainable(domain.factors, domain.encoder)
    frozen = domain.frozen._replace(factors=None, encoder=None)
    theirs, leaves = torch_loss(tmp_path, domain, concept_batch, t, noise, trainable)
    theirs.backward()

    def loss(trainable):
        return e4t_loss_at(domain.method, trainable, frozen, concept_batch, Draws(t, noise), weights=LossWeights(REGULARISATION))[0]

    ours, gradients = jax.jit(jax.value_and_grad(loss))(trainable)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    paired = jax.tree.map(lambda mine, leaf: (np.asarray(mine), leaf.grad.numpy()), gradients, leaves)
    for path, (mine, other) in jax.tree_util.tree_leaves_with_path(paired, is_leaf=lambda x: type(x) is tuple):
        assert np.abs(other).max() > 0, path
        assert np.abs(mine - other).max() <= 1e-3 * np.abs(other).max(), jax.tree_util.keystr(path)


def test_every_torch_name_leads_back_to_its_leaf(domain):
    """Names are one to one and layouts invert, for every part."""
    from e4t_jax.bases.stable_diffusion.names import to_torch

    for part, params in domain.params.items():
        flat = flatten_dict(params, sep="/")
        names = [bases.torch_name(part, path) for path in flat]
        assert len(set(names)) == len(names)
        for path, leaf in flat.items():
            np.testing.assert_array_equal(from_torch(path, to_torch(path, np.asarray(leaf)), leaf.shape), leaf)
