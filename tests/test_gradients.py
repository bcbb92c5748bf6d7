"""The E4T loss and its gradients, restated in PyTorch from the formulas on diffusers' and transformers' own classes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from e4t_jax import bases
from e4t_jax.bases.stable_diffusion.names import from_torch
from e4t_jax.objective import Trainable, e4t_loss_at

REGULARISATION = 0.05


def torch_loss(torch, folder, domain, batch, t, noise, trainable):
    """The loss as a PyTorch graph over leaf tensors; returns it with the leaves, in the trees of `trainable`."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    def tensor(x):
        return torch.tensor(np.asarray(x))

    leaves = jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(), trainable)
    encoder, factors = leaves.encoder, leaves.factors
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)
    text_model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")

    weights = dict(unet.named_parameters())
    for path, factor in factors.items():
        name = bases.torch_name("unet", f"{path}/kernel")
        weights[name] = weights[name] * (1 + factor["rows"] @ factor["columns"].T).T

    seen = [[], []]
    unet.conv_in.register_forward_hook(lambda m, i, o: seen[0].append(o))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda m, i, o: seen[0].extend(o[1]))
    unet.mid_block.register_forward_hook(lambda m, i, o: seen[1].append(o))

    def call(z, text):
        seen[0].clear()
        seen[1].clear()
        return torch.func.functional_call(unet, weights, (z, tensor(t), text)).sample

    latents, noise = (tensor(x).permute(0, 3, 1, 2) for x in (batch.latents, noise))
    z_t = scheduler.add_noise(latents, noise, tensor(t).long())
    target = scheduler.get_velocity(latents, noise, tensor(t).long())
    empty_ids = tensor(domain.method.empty_ids).long()
    call(z_t, text_model(empty_ids).last_hidden_state.expand(len(latents), -1, -1))
    features = torch.cat([one.mean(dim=(2, 3)) for one in (*seen[0], *seen[1])], dim=1)

    linear = torch.nn.functional.linear
    leaky = torch.nn.functional.leaky_relu
    hidden = leaky(linear(features, encoder["unet_hidden"]["kernel"].T, encoder["unet_hidden"]["bias"]))
    g = linear(hidden, encoder["unet_output"]["kernel"].T, encoder["unet_output"]["bias"])
    states = []
    for layer in range(batch.clip.shape[1]):
        joined = torch.cat([tensor(batch.clip[:, layer]), g], dim=1)
        shared = joined @ encoder["shared_kernel"] + encoder["shared_bias"]
        states.append(shared @ encoder["layer_kernels"][layer] + encoder["layer_biases"][layer])
    predicted = linear(leaky(torch.stack(states).mean(dim=0)), encoder["final"]["kernel"].T, encoder["final"]["bias"])
    table = text_model.get_input_embeddings().weight
    offset = domain.scale * predicted
    word = table[int(domain.method.domain_id)] + offset

    # The word takes its place by a hook: position embeddings are added afterwards, by the model itself.
    marks = tensor(batch.placeholder)[..., None]
    handle = text_model.get_input_embeddings().register_forward_hook(lambda m, i, o: torch.where(marks, word[:, None], o))
    text = text_model(tensor(batch.ids).long()).last_hidden_state
    handle.remove()
    error = (call(z_t, text) - target) ** 2
    mask = tensor(batch.mask)[:, None]
    loss = (error * mask).sum() / (mask.sum() * error.shape[1]) + REGULARISATION * (offset**2).sum(dim=1).mean()
    return loss, leaves


def test_loss_and_gradients_match_pytorch_autograd(domain, concept_batch, tmp_path):
    """Loss to 1e-5, every gradient of encoder and offsets to 1e-3 of its largest entry; same noise, same timesteps."""
    torch = pytest.importorskip("torch")
    bases.save_folder(tmp_path, domain.base, domain.params, np.float32)
    t = np.array([3, 250, 600, 990])
    noise = np.asarray(jax.random.normal(jax.random.key(5), concept_batch.latents.shape))
    trainable = Trainable(domain.factors, domain.encoder)
    frozen = domain.frozen._replace(factors=None, encoder=None)
    theirs, leaves = torch_loss(torch, tmp_path, domain, concept_batch, t, noise, trainable)
    theirs.backward()

    def loss(trainable):
        return e4t_loss_at(domain.method, trainable, frozen, concept_batch, t, noise, regularisation=REGULARISATION)[0]

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
