"""Recipe public, apart from PyTorch (`interop/test_public_recipe.py`): what it keeps, what it begins with, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from concept_numbers import numbers
from test_tune import write_random

from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept, save_concept
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.objective import ConceptWord, Draws, Trainable, e4t_loss_at, effective_unet
from e4t_jax.offsets import delta, factors_of_network, factors_of_networks, init_networks
from e4t_jax.testing import write_tiny_world
from e4t_jax.tuning.public_recipe import SummedLossWeights
from e4t_jax.tuning.tune import TuneSettings, start


def moved(tree, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.05 * generator.standard_normal(leaf.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def networks(domain):
    """Of every kernel, at random."""
    return moved(init_networks(jax.random.key(0), domain.base.offset_kernels(domain.params["unet"])), 1)


@pytest.fixture(scope="module")
def imported(domain, networks):
    """A domain as an import makes it: factors made of networks."""
    return dataclasses.replace(domain, factors=factors_of_networks(networks), networks=lambda: networks)


def test_the_regulariser_is_summed_over_the_batch():
    """λ Σ ‖e*‖², of whole words; restated in NumPy, relative 1e-6."""
    words = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    word = ConceptWord(jnp.asarray(words), jnp.zeros((5, 7)), jnp.zeros(7))
    np.testing.assert_allclose(SummedLossWeights(0.3).total(jnp.float32(2.0), word), 2 + 0.3 * (words**2).sum(), rtol=1e-6)


def test_fresh_networks_say_nothing_and_learn_at_once(domain):
    """Δ = 0 exactly, and the row layer feels a gradient of Δ."""
    for network in init_networks(jax.random.key(1), {"a": jnp.zeros((6, 9)), "b": jnp.zeros((5, 4))}).values():
        assert np.all(delta(factors_of_network(network)) == 0)
        gradient = jax.grad(lambda own: jnp.sum(jnp.sin(1 + delta(factors_of_network(own)))))(network)
        assert np.abs(gradient.row_weight).max() > 0 and np.abs(gradient.row_bias).max() > 0
    recipe = domain.tuning(recipe="public").recipe
    begun = start(domain.method, recipe.frozen(domain.frozen), recipe.scope, jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal,
        effective_unet(begun, recipe.frozen(domain.frozen)),
        effective_unet(Trainable(), domain.frozen),
    )


def test_a_concept_holds_on_the_domains_factors_what_the_networks_learned(imported, networks):
    """U-Net with the concept's factors on top of the domain's, against the U-Net through the networks alone: 1e-5."""
    tuning = imported.tuning(recipe="public")
    frozen = tuning.shared(reads=False).frozen
    assert frozen.factors is None and frozen.networks is networks
    begun = start(imported.method, frozen, tuning.recipe.scope, jax.random.key(0))
    trained = begun._replace(networks=moved(begun.networks, 2), unet=moved(begun.unet, 3))
    kept = tuning.recipe.finish(frozen, trained)
    assert kept.networks is None and kept.image_encoder is None
    ours, literal = effective_unet(kept, imported.frozen), effective_unet(trained, frozen)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), ours, literal)
    assert jax.tree.leaves(tuning.recipe.finish(frozen, Trainable())) == []


def test_networks_are_kept_with_the_domain_and_read_when_asked_for(imported, networks, tmp_path):
    world = write_tiny_world(tmp_path)
    own = load_domain(world.domain)
    assert own.networks is None
    save_domain(tmp_path / "imported", dataclasses.replace(own, factors=imported.factors, networks=imported.networks), np.float32)
    loaded = load_domain(tmp_path / "imported")
    jax.tree.map(np.testing.assert_array_equal, loaded.networks(), networks)
    file = tmp_path / "imported" / "networks.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    again = load_domain(tmp_path / "imported")  # they are not read
    with pytest.raises(UserError, match=r"networks\.safetensors"):
        again.tuning(recipe="public").shared(reads=False)
    kernel = next(iter(networks))
    strange = {**networks, kernel: networks[kernel]._replace(row_bias=jnp.zeros(3))}
    save_domain(tmp_path / "strange", dataclasses.replace(own, factors=imported.factors, networks=lambda: strange), np.float32)
    with pytest.raises(UserError, match=r"networks\.safetensors does not fit the offsets beside it"):
        load_domain(tmp_path / "strange").networks()


@pytest.mark.compiles
def test_a_trained_text_encoder_learns_from_prompts_alone(domain, concept_batch):
    """The loss is that of a base with this text encoder, 1e-5, whatever the base's own; e_d feels no gradient, other words do."""
    zeros = jax.tree.map(jnp.zeros_like, domain.params["text_encoder"])
    text, draws = domain.params["text_encoder"], Draws(jnp.array([3, 250, 600, 990]), concept_batch.latents[::-1])

    def loss(text, held):
        own, still = Trainable(text_encoder=text), domain.frozen._replace(text_encoder=held)
        return e4t_loss_at(domain.method, own, still, concept_batch, draws, weights=SummedLossWeights(0.01))[0]

    whole, gradient = jax.jit(jax.value_and_grad(loss))(text, zeros)
    plain = e4t_loss_at(domain.method, Trainable(), domain.frozen, concept_batch, draws, weights=SummedLossWeights(0.01))[0]
    np.testing.assert_allclose(whole, plain, rtol=1e-5)
    table = gradient["text_model"]["embeddings"]["token_embedding"]["embedding"]
    assert np.abs(table[domain.method.domain_id]).max() == 0  # it stands in prompts at the placeholder only
    assert np.abs(table).max() > 0


def test_a_concept_with_its_own_text_encoder_is_read_back(domain, tmp_path):
    """In scope full and in no other; drawing reads its prompts with it."""
    from e4t_jax.concept import Concept
    from e4t_jax.objective import own_reader

    text = moved(domain.params["text_encoder"], 4)
    concept = Concept("venus", "full", domain.fingerprint, Trainable(text_encoder=text), jnp.ones(domain.base.image_encoder.width))
    save_concept(tmp_path / "venus.safetensors", concept, np.float32)
    loaded = load_concept(tmp_path / "venus.safetensors", domain.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, loaded.trainable.text_encoder, text)
    assert own_reader(loaded.trainable, domain.frozen).text_encoder is loaded.trainable.text_encoder
    save_concept(tmp_path / "ada.safetensors", concept._replace(scope="head"), np.float32)
    with pytest.raises(UserError, match="is no concept of this version"):
        load_concept(tmp_path / "ada.safetensors")


def test_programs_of_two_recipes_are_told_apart(domain):
    plain, public = (domain.tuning(recipe=name, scope="full", steps=2) for name in ("e4t", "public"))
    more = domain.tuning(recipe="public", steps=2, also=("text-encoder",))
    assert len({str(tuning.traced_from) for tuning in (plain, public, more)}) == 3
    rates = domain.tuning(recipe="public", steps=2, learning_rate=1e-3, regularisation=0.5)
    assert rates.traced_from == public.traced_from


def test_defaults_follow_the_recipe():
    ours, public = TuneSettings().filled(), TuneSettings(recipe="public").filled()
    assert (ours.scope, ours.steps, public.scope, public.steps) == ("compact", 5, "full", 15)
    recipe = TuneSettings(recipe="public").recipe_of(0.5)
    assert (recipe.learning_rate, recipe.weights.regularisation, recipe.batch_size) == (1.6e-5, 0.1, 16)
    assert TuneSettings(recipe="public", steps=30, regularisation=1e-4).recipe_of(0.5).weights.regularisation == 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "public", "scope": "head"}, "scope: recipe public trains all"),
        ({"recipe": "public", "word_rate": 0.1}, "word_rate: recipe public has no rate"),
        ({"recipe": "public", "mask": "file"}, "mask: recipe public takes no mask"),
        ({"recipe": "e4t", "also": ("text-encoder",)}, "also: only recipe public"),
    ],
)
def test_what_does_not_go_with_a_recipe_is_refused(domain, options, said):
    with pytest.raises(UserError, match=said):
        domain.tuning(**options)


@pytest.mark.slow
def test_many_concepts_by_recipe_public_are_each_alone(imported, tmp_path):
    """Three in one call and one by one, to 1e-5; each moved, each is drawn; a picture that is mirrored is read so."""
    paths = write_random(tmp_path, 3)
    settings = {"recipe": "public", "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    together = imported.tune(paths, **settings)
    for path, concept in zip(paths, together, strict=True):
        (alone,) = imported.tune([path], **settings)
        np.testing.assert_allclose(numbers(concept), numbers(alone), atol=1e-5)
    assert all(concept.scope == "full" for concept in together)
    assert imported.generate(together, ["*s"], steps=2).std() > 0
