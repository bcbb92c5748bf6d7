"""Tuning: it learns, every scope runs, and a concept in a batch is the concept alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from concept_numbers import numbers
from PIL import Image

from e4t_jax.errors import UserError
from e4t_jax.objective import LossWeights, e4t_loss
from e4t_jax.tuning import batching
from e4t_jax.tuning.batching import Batch
from e4t_jax.tuning.recipe import Recipe, Views, draw_batch
from e4t_jax.tuning.scopes import SCOPES
from e4t_jax.tuning.tune import TuneSettings, start, tune_one


@pytest.fixture(scope="module")
def inputs(domain):
    keys = jax.random.split(jax.random.key(0), 2)
    views = Views(
        jax.random.normal(keys[0], (2, *domain.base.latent_shape)),
        jax.random.normal(keys[1], (domain.base.image_encoder.count, domain.base.image_encoder.width)),
        jnp.ones((2, *domain.base.latent_shape[:2])),
    )
    return views, tuple(jnp.asarray(part) for part in domain.tokenize(["*s", "a photo of *s"]))


FEW = {"steps": 1, "caption": "a photo of *s"}  # what compiles soonest


def write_random(folder, count):
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    return paths


@pytest.mark.compiles
def test_concept_whose_caption_is_read_in_a_batch_equals_the_concept_alone(domain, tmp_path):
    paths = write_random(tmp_path, 3)
    for path, together in zip(paths, domain.tune(paths, steps=1), strict=True):
        (alone,) = domain.tune([path], steps=1)
        assert np.abs(together.trainable.residual).max() > 1e-2
        np.testing.assert_allclose(numbers(together), numbers(alone), atol=1e-5)


@pytest.mark.slow
def test_a_concept_depends_on_seed_and_picture_alone(domain, tmp_path, monkeypatch):
    """Among others, in another order, in chunks of another size, on one device or two, equal to 1e-5; side by side, another
    program, to 1e-5 of the largest number; not by seed."""
    paths = write_random(tmp_path, 5)
    by_name = {concept.name: numbers(concept) for concept in domain.tune(paths, **FEW)}

    def check(concepts, scale=1.0):
        for concept in concepts:
            np.testing.assert_allclose(numbers(concept), by_name[concept.name], rtol=0, atol=1e-5 * scale, err_msg=concept.name)

    assert list(by_name) == ["0", "1", "2", "3", "4"]
    check(domain.tune(paths[::-1], **FEW))
    check(domain.tune(paths[3:4], **FEW))  # one device
    monkeypatch.setattr(batching, "_MOST", {"cpu": 2})
    monkeypatch.setattr(batching, "_one_by_one", lambda devices: False)
    check(domain.tune(paths, **FEW), max(np.abs(one).max() for one in by_name.values()))
    (other,) = domain.tune(paths[:1], **FEW, seed=1)
    assert np.abs(numbers(other) - by_name["0"]).max() > 1e-2


@pytest.mark.compiles
def test_a_broken_picture_fails_alone_and_what_is_done_is_left_out(domain, tmp_path):
    """Outcomes of four pictures: one damaged, one there already, two new."""
    paths = write_random(tmp_path, 4)
    paths[1].write_bytes(b"no picture")
    outcomes = domain.tune_many(paths, **FEW, done=lambda name, origin: name == "2")
    assert len(outcomes) == 4
    found = {outcome.name: outcome for outcome in outcomes}
    assert set(found) == {"0", "1", "2", "3"}
    assert "1.png" in str(found["1"].error) and found["1"].result is None
    assert found["2"].result is None and found["2"].error is None
    for name in ("0", "3"):
        assert found[name].result.name == name and found[name].result.origin == found[name].origin
    with pytest.raises(UserError, match=r"1\.png"):
        domain.tune(paths, **FEW)


def test_an_origin_tells_pictures_settings_and_domains_apart(domain, tmp_path):
    paths = write_random(tmp_path, 2)
    Image.open(paths[0]).save(tmp_path / "copy.png")

    def origin(path, domain=domain, **changes):
        (outcome,) = domain.tune_many([path], done=lambda *_: True, **changes)
        return outcome.origin

    assert origin(paths[0]) == origin(tmp_path / "copy.png")
    others = [origin(paths[1]), origin(paths[0], steps=3), origin(paths[0], seed=1), origin(paths[0], caption="a photo of *s")]
    others.append(origin(paths[0], dataclasses.replace(domain, encoder=jax.tree.map(lambda leaf: leaf + 1, domain.encoder))))
    assert len({origin(paths[0]), *others}) == 6


def test_want_of_memory_makes_chunks_smaller_and_then_says_so(domain, tmp_path, monkeypatch):
    """Room for less than two concepts a device: one each; for less than one: a line that names what to lower."""
    paths = write_random(tmp_path, 4)
    sizes, fitted = [], batching.fitted
    monkeypatch.setattr(batching, "fitted", lambda *a, **k: sizes.append(fitted(*a, **k)) or sizes[-1])
    monkeypatch.setattr(batching, "needed_bytes", lambda program: 1 << 50)
    with pytest.raises(UserError, match="batch_size: one concept takes"):
        domain.tune(paths, steps=0)
    needs = iter([1 << 50, 1])
    monkeypatch.setattr(batching, "needed_bytes", lambda program: next(needs))
    assert len(domain.tune(paths, steps=0)) == 4
    assert [one.size for one in sizes] == [2]


def test_a_device_that_runs_out_of_memory_gets_smaller_batches_and_then_a_line(domain, tmp_path, monkeypatch):
    """Every call of more than two concepts fails as a device does; then those of one, too."""
    monkeypatch.setattr(batching, "_MOST", {"cpu": 2})
    monkeypatch.setattr(batching, "_one_by_one", lambda devices: False)
    paths, run, sizes, most = write_random(tmp_path, 5), Batch.run, [], 2

    def run_out(self, rows):
        sizes.append(self.size)
        if self.size > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB")
        return run(self, rows)

    expected = domain.tune(paths, steps=0)
    monkeypatch.setattr(Batch, "run", run_out)
    for one, other in zip(domain.tune(paths, steps=0), expected, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.folded, other.folded, atol=1e-5)
    assert sizes == [4, 2, 2, 2]
    most = 0
    with pytest.raises(UserError, match="batch_size: one concept takes more memory than the device has"):
        domain.tune(paths, steps=0)


@pytest.mark.parametrize("scope", ["compact", "head", "full"])
def test_every_scope_starts_where_the_domain_is(domain, scope):
    """Δ = 0, r = 0 and the domain's own encoder and U-Net."""
    trainable = start(domain.method, domain.frozen, SCOPES[scope], jax.random.key(0))
    assert all(np.all(part["columns"] == 0) for part in trainable.factors.values())
    assert trainable.residual is None or np.all(trainable.residual == 0)
    assert trainable.encoder is (None if scope == "compact" else domain.encoder)
    assert (trainable.unet is not None) == (scope == "full")
    if scope == "full":
        jax.tree.map(np.testing.assert_array_equal, trainable.unet, domain.params["unet"])


def test_unknown_scope_is_refused(domain):
    with pytest.raises(UserError, match="scope: 'tiny'"):
        TuneSettings(scope="tiny").recipe_of(0.01)


@pytest.mark.compiles
@pytest.mark.parametrize("scope", ["compact", "head"])
def test_tuning_lowers_the_loss(domain, inputs, scope):
    """By more than 1 %, on draws of timesteps, noise, views and prompts that are the same before and after."""
    recipe = Recipe(scope=SCOPES[scope], steps=40, batch_size=4, learning_rate=0.01, word_rate=2.0, weights=LossWeights(1e-4))
    views, prompts = inputs
    tuned, _ = jax.jit(tune_one)(domain.method, domain.frozen, views, prompts, key=jax.random.key(0), recipe=recipe)
    keys = jax.random.split(jax.random.key(5), 3)
    batch = draw_batch(views, prompts, 64, view_key=keys[0], prompt_key=keys[1])
    loss = jax.jit(lambda trainable: e4t_loss(domain.method, trainable, domain.frozen, batch, keys[2], weights=LossWeights(0.0))[0])
    before = loss(start(domain.method, domain.frozen, SCOPES[scope], keys[0]))
    assert loss(tuned) < 0.99 * before


@pytest.mark.slow
def test_concepts_of_several_kinds_are_drawn_in_one_call(domain, tmp_path):
    """Tuned and untuned: each drawn as if alone, within 1 of 255."""
    paths = write_random(tmp_path, 3)
    concepts = [*domain.tune(paths[:2], **FEW), *domain.tune(paths[2:], steps=0)]
    drawn = domain.generate(concepts, ["*s"], steps=2)
    np.testing.assert_allclose(drawn[1:2].astype(int), domain.generate(concepts[1:2], ["*s"], steps=2), atol=1)
    strange = concepts[0]._replace(domain="another")
    outcomes = list(domain.generate_many([strange, concepts[2]], ["*s"], count=2, steps=2))
    assert "another domain" in str(outcomes[0].error)
    np.testing.assert_allclose(outcomes[1].unwrap().astype(int), drawn[2], atol=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "file"}, "mask: venus has none"),
        ({"caption": "a photo"}, "lacks the placeholder"),
        ({"caption": ["*s", "a photo of *s"]}, "there are 2 for 1 pictures"),
        ({"steps": -1}, "steps: -1"),
    ],
)
def test_wrong_options_are_refused(domain, tmp_path, options, said):
    Image.new("RGB", (16, 16)).save(tmp_path / "venus.png")
    with pytest.raises(UserError, match=said):
        domain.tune([tmp_path / "venus.png"], **options)


def test_an_unknown_mask_is_refused(domain, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "venus.png")
    settings = TuneSettings()
    object.__setattr__(settings, "mask", "soft")  # past what checks signatures in tests, and nowhere else
    with pytest.raises(UserError, match="mask: 'soft'"):
        domain.tune([tmp_path / "venus.png"], settings)
