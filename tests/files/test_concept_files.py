"""Concept files: quantised factors come back as near as their bits allow, and a file of Stable Diffusion's size is small."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save_file

from e4t_jax.bases import load_base_shapes
from e4t_jax.concept import Concept
from e4t_jax.errors import UserError
from e4t_jax.files import concept_files
from e4t_jax.files.concept_files import concept_bytes, load_concept, save_concept
from e4t_jax.files.quantisation import dequantise, pack_bits, quantise, unpack_bits
from e4t_jax.objective import Frozen, Trainable, make_method
from e4t_jax.storage import pack
from e4t_jax.tuning.scopes import SCOPES
from e4t_jax.tuning.tune import start

GENERATOR = np.random.default_rng(0)


def random_concept(shapes, scope="compact"):
    """A concept of factors [in, out] and all else 8 wide; what Adam's like makes of columns has heavy tails."""
    factors = {
        name: {
            "rows": GENERATOR.standard_normal((rows, rank)).astype(np.float32),
            "columns": (0.03 * GENERATOR.standard_t(3, (columns, rank))).astype(np.float32),
        }
        for name, (rows, columns, rank) in shapes.items()
    }
    residual, folded = (GENERATOR.standard_normal(8).astype(np.float32) for _ in range(2))
    return Concept("venus", scope, "d", Trainable(factors, residual=residual), folded, "an origin")


def nearest(x, scale, bits):
    """Each number's nearest level, by looking at all levels."""
    levels = scale * (np.arange(2**bits) - (2**bits - 1) / 2)
    return levels[np.argmin(np.abs(x.reshape(-1, 1) - levels), axis=1)].reshape(x.shape)


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
def test_quantised_numbers_are_the_nearest_levels_of_the_best_scale(bits):
    """Beside a search of 4,000 scales: none leaves less; the scale is the one that the codes' least squares ask for."""
    for x in (GENERATOR.standard_normal((33, 3)), GENERATOR.standard_t(2, 50), np.array([3.0]), np.array([1.0, -1.0, 100.0])):
        x = x.astype(np.float32)
        codes, scale = quantise(x, bits)
        assert codes.shape == x.shape and codes.max() < 2**bits
        found = dequantise(codes, scale, bits)
        np.testing.assert_allclose(found, nearest(x, float(scale), bits), atol=1e-5 * np.abs(x).max())
        centred = codes - (2**bits - 1) / 2
        np.testing.assert_allclose(scale, np.sum(x * centred) / np.sum(centred**2), rtol=1e-5)
        left = np.sum((x - found) ** 2)
        most = np.abs(x).max()
        for other in np.linspace(most / 2**bits / 4, 2.5 * most, 4000):
            assert left <= np.sum((x - nearest(x, other, bits)) ** 2) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_packed_codes_are_a_string_of_bits(bits):
    codes = GENERATOR.integers(0, 2**bits, 37).astype(np.uint8)
    packed = pack_bits(codes, bits)
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    assert packed.tobytes() == bytes(int(text[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(text), 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, 37), codes)
    for wrong in (packed[:-1], np.append(packed, np.uint8(0))):
        with pytest.raises(ValueError, match="37 numbers"):
            unpack_bits(wrong, bits, 37)


def test_a_concept_comes_back_quantised(tmp_path):
    """Every factor the nearest levels of its own scale, all else in float16; columns of zero stay zero."""
    concept = random_concept({"up/to_q": (7, 5, 1), "down/to_k": (4, 9, 2), "down/attn/to_v": (3, 3, 1)})
    concept.trainable.factors["up/to_q"]["columns"][:] = 0
    save_concept(tmp_path / "venus.safetensors", concept)
    found = load_concept(tmp_path / "venus.safetensors", "d")
    assert (found.name, found.scope, found.origin) == ("venus", "compact", "an origin")
    assert set(found.trainable.factors) == set(concept.trainable.factors)
    for name, pair in concept.trainable.factors.items():
        for side, bits in zip(("rows", "columns"), concept_files._BITS["compact"], strict=True):
            x, read = pair[side], np.asarray(found.trainable.factors[name][side])
            assert read.shape == x.shape and read.dtype == np.float32
            np.testing.assert_allclose(read, nearest(x, float(quantise(x, bits)[1]), bits), rtol=1e-5)
            assert read.any() == x.any()
    np.testing.assert_array_equal(found.trainable.residual, concept.trainable.residual.astype(np.float16))
    np.testing.assert_array_equal(found.folded, concept.folded.astype(np.float16))


def test_a_concept_of_stacked_kernels_comes_back(tmp_path):
    """Quantised as a loop over the stack would not be: one scale for all of a tensor."""
    stacked = {"rows": GENERATOR.standard_normal((2, 3, 7, 1)), "columns": GENERATOR.standard_normal((2, 3, 5, 1))}
    concept = random_concept({"up/to_q": (7, 5, 1)})
    factors = {**concept.trainable.factors, "layers/to_q": jax.tree.map(np.float32, stacked)}
    save_concept(tmp_path / "venus.safetensors", concept._replace(trainable=concept.trainable._replace(factors=factors)))
    found = load_concept(tmp_path / "venus.safetensors").trainable.factors
    for side, bits in zip(("rows", "columns"), concept_files._BITS["compact"], strict=True):
        x = factors["layers/to_q"][side]
        np.testing.assert_allclose(found["layers/to_q"][side], nearest(x, float(quantise(x, bits)[1]), bits), rtol=1e-5)


def test_a_number_format_of_ones_own_is_exact(tmp_path):
    concept = random_concept({"up/to_q": (7, 5, 1)})
    save_concept(tmp_path / "venus.safetensors", concept, np.float32)
    found = load_concept(tmp_path / "venus.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found.trainable, concept.trainable)
    head = concept._replace(scope="head", trainable=concept.trainable._replace(residual=None))
    save_concept(tmp_path / "head.safetensors", head)
    rows = load_concept(tmp_path / "head.safetensors").trainable.factors["up/to_q"]["rows"]
    np.testing.assert_array_equal(rows, concept.trainable.factors["up/to_q"]["rows"].astype(np.float16))


@pytest.mark.compiles
def test_a_compact_file_of_stable_diffusion_is_at_most_100_kb(tmp_path):
    """At the geometry of 1.5, with header and checksum; nothing of the base is drawn."""
    base, params = load_base_shapes("random:sd15")
    method = make_method(base, "creature")
    shapes = jax.eval_shape(lambda unet: start(method, Frozen(unet, None), SCOPES["compact"], jax.random.key(0)), params["unet"])
    trainable = jax.tree.map(lambda leaf: GENERATOR.standard_normal(leaf.shape).astype(np.float32), shapes)
    assert len(trainable.factors) == 96 and trainable.residual.shape == (768,)
    folded = GENERATOR.standard_normal(base.image_encoder.width).astype(np.float32)
    size = save_concept(tmp_path / "venus.safetensors", Concept("venus", "compact", "d" * 16, trainable, folded, "o" * 64))
    assert size == (tmp_path / "venus.safetensors").stat().st_size
    assert 84_000 < size <= 100_000
    found = load_concept(tmp_path / "venus.safetensors")
    assert jax.tree.map(np.shape, found.trainable) == jax.tree.map(np.shape, trainable)


def test_a_concept_of_an_older_format_is_read(tmp_path):
    """As versions before wrote it, checksum included: a tensor a factor, in float16, format 2."""
    names = ["factors|up/to_q|columns", "factors|up/to_q|rows", "folded", "residual"]
    tensors = {name: GENERATOR.standard_normal((3, 1) if "|" in name else 4).astype(np.float16) for name in names}
    header = {"domain": "d", "format": "2", "kind": "e4t concept", "origin": "an origin", "scope": "compact"}
    checksum = hashlib.sha256(json.dumps(header).encode())
    for name in names:
        checksum.update(f"{name} float16 {tensors[name].shape};".encode() + tensors[name].tobytes())
    save_file(tensors, tmp_path / "venus.safetensors", {"header": json.dumps(header | {"checksum": checksum.hexdigest()})})
    found = load_concept(tmp_path / "venus.safetensors", "d")
    np.testing.assert_array_equal(found.trainable.factors["up/to_q"]["rows"], tensors["factors|up/to_q|rows"])
    np.testing.assert_array_equal(found.trainable.factors["up/to_q"]["columns"], tensors["factors|up/to_q|columns"])
    np.testing.assert_array_equal(found.trainable.residual, tensors["residual"])


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"up/to_q": [7, 5, 2]}},
        {"layout": {"up/to_q": [7, 5]}},
        {"layout": {"up/to_q": [-7, -5, -1]}},
        {"layout": {"up/to_q": ["7", 5, 1]}},
        {"layout": {"up/to_q": [10**30, 5, 1]}},
        {"layout": {"up/to_q": [7, 5, 1], "up/to_v": [7, 5, 1]}},
        {"layout": {}},
        {"layout": []},
        {"layout": None},
        {"bits": [4]},
        {"bits": [4, 9]},
        {"bits": [0, 5]},
        {"bits": None},
        {"bits": ...},
        {"layout": ...},
    ],
    ids=str,
)
def test_a_layout_that_the_tensors_do_not_have_is_one_line(tmp_path, changes):
    """Signed as if it had been written so."""
    content = concept_bytes(random_concept({"up/to_q": (7, 5, 1)}))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
    header = {name: value for name, value in {**header, **changes}.items() if value is not ... and name != "checksum"}
    (tmp_path / "venus.safetensors").write_bytes(pack(load(content), header))
    with pytest.raises(UserError, match=r"^\S+venus.safetensors (lacks a part|is no concept)"):
        load_concept(tmp_path / "venus.safetensors")


def test_an_unknown_scope_is_not_written():
    with pytest.raises(UserError, match="scope: 'tiny'"):
        concept_bytes(random_concept({"up/to_q": (7, 5, 1)}, scope="tiny"))
