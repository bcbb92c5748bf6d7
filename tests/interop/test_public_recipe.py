"""Recipe public beside the public PyTorch loop restated (`public_loop`), from the files of one checkpoint and on the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from public_checkpoints import HAS_TORCH, write_checkpoints

from e4t_jax import bases
from e4t_jax.bases.stable_diffusion.names import from_torch
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.e4t_diffusion import import_checkpoint
from e4t_jax.interop.e4t_diffusion.tensors import read_encoder, read_image_encoder, read_networks
from e4t_jax.process import draw_noise
from e4t_jax.testing import tiny_base
from e4t_jax.tuning.tune import tune_one

pytestmark = [pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is the witness"), pytest.mark.compiles]


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A checkpoint on the tiny base beside it, imported: folder, encoder.pt, weight_offsets.pt, domain. No bias is 0, lest what
    Adam makes of rounding errors be all of one."""
    folder, generator = tmp_path_factory.mktemp("public"), np.random.default_rng(0)
    base, params = tiny_base(
        block_out_channels=[32], down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"]
    )
    params = {part: params[part] for part in ("vae", "unet", "text_encoder")}
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * generator.standard_normal(leaf.shape).astype(np.float32), params)
    params = jax.tree.map(lambda leaf, other: other if leaf.ndim == 1 else leaf, params, moved)
    bases.save_folder(folder / "base", base, params, np.float32)
    unet = folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    encoder, offsets = write_checkpoints(folder, base, unet)
    import_checkpoint(folder / "pretrained", str(folder / "base"), folder / "domain")
    return folder, encoder, offsets, load_domain(folder / "domain")


PICTURE = np.random.default_rng(3).integers(0, 255, (20, 32, 3), np.uint8)
CAPTION = "a photo of *s"


ROWS = 4


def tuned_by_us(domain, steps, **settings):
    """(what is trained after the steps, losses, views, draws of all steps, what it began with)."""
    tuning = domain.tuning(recipe="public", steps=steps, batch_size=ROWS, **settings)
    tokens = tuple(jnp.asarray(part) for part in domain.tokenize([CAPTION]))
    own = tuning.read(PICTURE, "venus", CAPTION, tokens)[1]
    shared, recipe, key = tuning.shared(reads=False), tuning.recipe, jax.random.key(7)
    views = recipe.see(shared.method, shared.encoders, jnp.asarray(own.picture), jnp.asarray(own.mask), key=key)
    trained, losses = jax.jit(tune_one)(shared.method, shared.frozen, views, tokens, key=key, recipe=recipe)
    keys = jax.random.split(jax.random.split(key)[1], steps + 1)[:-1]  # as `tune_one` splits it
    draws = [recipe.draw(shared.method, views, tokens, one)[1] for one in keys]
    return trained, losses, views, own.picture, draws


def leaves(tree):
    """Path -> array of any tree of dictionaries and offset networks."""
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def by_our_names(learned, like):
    """What PyTorch holds, as trees like those of a `Trainable`."""
    states = {name: {key: leaf.detach().numpy().copy() for key, leaf in part.items()} for name, part in learned.items()}

    def part_of(part, tree, state):
        flat = {path: (bases.torch_name(part, path), leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}  # in transformers 5 without
        flat = {path: (name.removeprefix("text_model."), shape) for path, (name, shape) in flat.items()}
        found = {path: from_torch(path, state[name], shape) for path, (name, shape) in flat.items() if name in state}
        assert len(found) == len(state)
        return unflatten_dict(found, sep="/")

    found = {
        "networks": read_networks(states["networks"], ""),
        "encoder": read_encoder(states["encoder"], ""),
        "unet": part_of("unet", like.unet, states["unet"]),
    }
    if like.image_encoder is not None:
        found["image_encoder"] = part_of("image_encoder", like.image_encoder, read_image_encoder(states["encoder"], "", "")[1])
        found["text_encoder"] = part_of("text_encoder", like.text_encoder, states["text"])
    return found


def compare(trained, loop, begun):
    """The largest difference of a tensor over its largest number; by part, ‖difference‖ / ‖what was learned‖."""
    largest, shares = 0.0, {}
    for part, tree in by_our_names(loop.learned, trained).items():
        mine, theirs, start = leaves(getattr(trained, part)), leaves(tree), leaves(begun[part])
        gaps = {path: mine[path] - theirs[path] for path in theirs}
        largest = max(largest, *(np.abs(gap).max() / np.abs(theirs[path]).max() for path, gap in gaps.items()))
        learned = sum(((theirs[path] - start[path]) ** 2).sum() for path in theirs)
        shares[part] = float(np.sqrt(sum((gap**2).sum() for gap in gaps.values()) / learned))
    return largest, shares


@pytest.mark.parametrize(("steps", "also"), [(15, ()), pytest.param(4, ("image-encoder", "text-encoder"), marks=pytest.mark.slow)])
def test_fifteen_steps_are_those_of_the_public_loop(public, steps, also):
    """Losses to 1e-4, parameters to 1e-3, and what they learned to 2 %: where a gradient is all rounding, Adam goes by its sign."""
    from public_loop import PublicLoop

    folder, encoder, offsets, domain = public
    trained, losses, views, picture, draws = tuned_by_us(domain, steps, also=also)
    loop = PublicLoop(folder / "base", domain, encoder, offsets, [part[:4].replace("imag", "clip_vision") for part in also])
    begun = by_our_names(loop.learned, trained)
    ids, placeholder = domain.tokenize([CAPTION] * ROWS)
    theirs = loop.run(views.latents, picture, ids, placeholder, draws)
    np.testing.assert_allclose(losses, theirs, rtol=1e-4)
    largest, shares = compare(trained, loop, begun)
    assert largest < 1e-3
    assert max(shares.values()) < 0.02, shares


def test_the_latents_are_draws_from_the_posterior_of_one_square(public):
    """By diffusers' VAE from the recorded noise, 1e-5; the square lies at a random place, whole, and mirrored for some seeds."""
    import torch
    from diffusers import AutoencoderKL

    folder, _, _, domain = public
    tuning = domain.tuning(recipe="public", batch_size=3)
    _, own = tuning.read(PICTURE, "venus", CAPTION, None)
    shared, key = tuning.shared(reads=False), jax.random.key(1)
    views = tuning.recipe.see(domain.method, shared.encoders, jnp.asarray(own.picture), jnp.asarray(own.mask), key=key)
    vae = AutoencoderKL.from_pretrained(folder / "base" / "vae").eval()
    with torch.no_grad():
        posterior = vae.encode(torch.tensor(own.picture.copy()).permute(2, 0, 1)[None]).latent_dist
    mean, deviation = (part.permute(0, 2, 3, 1).numpy()[0] for part in (posterior.mean, posterior.std))
    noise = np.stack([draw_noise(one, (1, *mean.shape))[0] for one in jax.random.split(key, 3)])
    np.testing.assert_allclose(views.latents, (mean + deviation * noise) * vae.config.scaling_factor, atol=1e-5)
    read = {seed: domain.tuning(recipe="public", seed=seed).read(PICTURE, "venus", CAPTION, None)[1].picture for seed in range(8)}
    framings = [domain.tuning(recipe="public", seed=seed).recipe.framing(seed) for seed in range(8)]
    assert {framing.is_mirrored for framing in framings} == {True, False}
    for seed, (place, is_mirrored) in enumerate(framings):
        left = place * (32 - 20)
        square = Image.fromarray(PICTURE).resize((16, 16), Image.Resampling.LANCZOS, box=(left, 0, left + 20, 20))
        square = np.asarray(square, np.float32) / 127.5 - 1
        np.testing.assert_allclose(read[seed], square[:, ::-1] if is_mirrored else square, atol=1e-6)
