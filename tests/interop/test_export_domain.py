"""A domain in the public PyTorch code's format: its U-Net there is ours, and imported again it has the same numbers."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_checkpoints import write_checkpoints

from e4t_jax import bases
from e4t_jax.cli import export_domain as command
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.interop.e4t_diffusion import export_domain, import_checkpoint
from e4t_jax.interop.e4t_diffusion.nearest_network import bounded, nearest_network
from e4t_jax.interop.e4t_diffusion.tensors import read_encoder, read_image_encoder, read_networks
from e4t_jax.interop.e4t_diffusion.write_tensors import encoder_state, image_encoder_state, offsets_state
from e4t_jax.objective import Trainable, effective_unet, make_method
from e4t_jax.offsets import OffsetNetwork, delta
from e4t_jax.pretraining.step import init_trainable

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.compiles
LAYERS = ("linear1", "linear2", "linear_column", "linear_row")
FIELDS = ["v", *(f"{layer}.{leaf}" for layer in LAYERS for leaf in ("weight", "bias"))]  # the public code's, as ours are ordered


def random_factors(seed, rank=3, inputs=12, outputs=8):
    rng = np.random.default_rng(seed)
    return {"rows": rng.standard_normal((inputs, rank)), "columns": 0.1 * rng.standard_normal((outputs, rank))}


def literal_delta(network):
    """Δ through the network's linear layers in PyTorch, as the public code computes it."""
    part = {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in network._asdict().items()}
    linear = torch.nn.functional.linear
    vx = linear(part["v"], part["linear1_weight"], part["linear1_bias"])
    vy = linear(part["v"], part["linear2_weight"], part["linear2_bias"])
    columns = linear(torch.outer(vx, vy).T, part["column_weight"], part["column_bias"])
    return linear(columns.T, part["row_weight"], part["row_bias"]).numpy()


def test_what_a_network_can_say_it_says_exactly():
    """Δ = p qᵀ + b eᵀ + 1 dᵀ, and less; to 1e-6 of its largest entry."""
    for seed in range(5):
        factors = random_factors(seed)
        factors["rows"][:, seed % 3] = 1
        for rank in (1, 2, 3):
            said = {side: leaf[:, :rank] for side, leaf in factors.items()}
            wanted = said["rows"] @ said["columns"].T
            assert np.abs(literal_delta(nearest_network(said)) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_of_any_other_it_says_the_nearest():
    """What is missed is the third singular value of Δ without its columns' means; no network of 200 near it misses less."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        factors = random_factors(seed)
        wanted = factors["rows"] @ factors["columns"].T
        network = nearest_network(factors)
        missed = np.linalg.norm(literal_delta(network) - wanted)
        sizes = np.linalg.svd(wanted - wanted.mean(axis=0), compute_uv=False)
        assert missed == pytest.approx(sizes[2], rel=1e-5) and sizes[2] > 0.1
        for _ in range(200):
            moved = OffsetNetwork(*(part + 1e-3 * rng.standard_normal(part.shape) for part in network))
            assert np.linalg.norm(literal_delta(moved) - wanted) > missed


def test_no_offset_comes_near_minus_one():
    """A kernel is divided by 1 + Δ̂: where that would be small, all of Δ̂ is."""
    factors = random_factors(0)
    large = {"rows": factors["rows"], "columns": 20 * factors["columns"]}
    network = nearest_network(large)
    assert literal_delta(network).min() < -1
    assert literal_delta(bounded(network)).min() == pytest.approx(-0.9, abs=1e-4)
    same_bits(bounded(nearest_network(factors)), nearest_network(factors))


def tiny(domain, folder, clip_features="tokens"):
    """The tiny domain with a base on disk, seeing tokens, with settings that are not the library's."""
    bases.save_folder(folder / "base", domain.base, domain.params, np.float32)
    base, params = bases.load_base(str(folder / "base"), clip_features=clip_features)
    trainable = init_trainable(make_method(base, "creature"), jax.random.key(1))
    factors = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), trainable.factors)
    options = {"scale": 0.2, "regularisation": 0.003, "guidance": 3.5, "template": "creature"}
    return Domain(str(folder / "base"), "creature", base, params, trainable.encoder, factors, **options)


@pytest.fixture(scope="module")
def exported(domain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    own = tiny(domain, folder)
    save_domain(folder / "domain", own, np.float32)
    return folder, own, export_domain(own, folder / "public")


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def assert_same_domain(own, again):
    same_bits(own.factors, again.factors)
    same_bits(own.encoder, again.encoder)
    same_bits(own.params["image_encoder"]["vision_model"], again.params["image_encoder"]["vision_model"])
    assert again.fingerprint == own.fingerprint and again.base.image_encoder.module == own.base.image_encoder.module
    settings = ("domain_token", "scale", "regularisation", "guidance", "template", "clip_squash")
    assert {name: getattr(again, name) for name in settings} == {name: getattr(own, name) for name in settings}


def test_a_domain_comes_back_bit_by_bit(exported):
    """Numbers, settings and fingerprint: concepts of the one are concepts of the other."""
    folder, own, _ = exported
    imported = import_checkpoint(folder / "public", str(folder / "base"), folder / "again")
    assert imported.notes == ("Read with the numbers and settings that it was exported with (e4t_jax.safetensors).",)
    again = load_domain(folder / "again")
    assert_same_domain(own, again)
    assert again.networks is None  # those in the file say the factors only nearly


def test_an_imported_domain_goes_out_and_comes_back_bit_by_bit(domain, tmp_path):
    """A checkpoint of the public code's own: its networks go out as they are, and no kernels are needed."""
    parts = {part: domain.params[part] for part in ("vae", "unet", "text_encoder")}
    bases.save_folder(tmp_path / "base", domain.base, parts, np.float32)
    write_checkpoints(tmp_path, domain.base, tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    import_checkpoint(tmp_path / "pretrained", str(tmp_path / "base"), tmp_path / "domain")
    own = load_domain(tmp_path / "domain")
    made = export_domain(own, tmp_path / "public")
    assert made.error < 1e-5 and not any("miss" in note for note in made.notes)
    for file in ("weight_offsets.pt", "encoder.pt"):
        theirs, ours = (torch.load(tmp_path / name / file, weights_only=True) for name in ("pretrained", "public"))
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    import_checkpoint(tmp_path / "public", str(tmp_path / "base"), tmp_path / "again")
    again = load_domain(tmp_path / "again")
    assert_same_domain(own, again)
    same_bits(own.networks(), again.networks())
    # Without its networks the same factors are said by others, to rounding.
    other = export_domain(dataclasses.replace(own, networks=None), tmp_path / "other")
    assert 0 < other.error < 1e-5 and not any("miss" in note for note in other.notes)
    import_checkpoint(tmp_path / "other", str(tmp_path / "base"), tmp_path / "once-more")
    assert_same_domain(own, load_domain(tmp_path / "once-more"))


def public_unet(folder, checkpoint, inputs):
    """The U-Net as the public code makes it: the file's tensors over the base's own, then W (1 + Δ); output and φ_unet."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet").eval()
    state = {**unet.state_dict(), **torch.load(checkpoint / "weight_offsets.pt", weights_only=True)}
    for owner in [name.removesuffix(".v") for name in state if re.search(r"wo_[qkv]\.v$", name)]:
        part = {name.removeprefix(f"{owner}."): state.pop(name) for name in [*state] if name.startswith(f"{owner}.")}
        network = OffsetNetwork(*(part.pop(name) for name in FIELDS))
        assert not part
        name = owner.replace(".wo_", ".to_") + ".weight"
        state[name] = state[name] * (1 + torch.tensor(literal_delta(network).T, dtype=torch.float32))
    unet.load_state_dict(state)
    with torch.no_grad():
        return unet(*inputs).sample


def test_the_public_codes_unet_is_ours(exported):
    """Though its networks alone miss much of Δ: relative error 1e-4."""
    folder, own, made = exported
    assert 0.1 < made.error < 1 and f"miss {made.error:.1%} of Δ" in made.notes[0]
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, *own.base.latent_shape)).astype(np.float32)
    text = rng.standard_normal((2, 5, own.base.unet.cross_attention_dim)).astype(np.float32)
    t = np.array([10, 700])
    theirs = public_unet(folder, made.folder, (torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text)))
    unet = effective_unet(Trainable(), own.frozen)
    ours = np.asarray(jax.jit(lambda p: own.base.denoise(p, jnp.asarray(z), jnp.asarray(t), jnp.asarray(text))[0])(unet))
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    plain = np.asarray(
        jax.jit(lambda p: own.base.denoise(p, jnp.asarray(z), jnp.asarray(t), jnp.asarray(text))[0])(own.params["unet"])
    )
    assert np.abs(ours - plain).max() > 1e-2 * np.abs(theirs).max()


def test_written_tensors_are_read_as_they_were(domain, exported):
    """Networks, encoder and image encoder, bit by bit."""
    _, own, _ = exported
    shapes = {name: tuple(len(factors[side]) for side in ("rows", "columns")) for name, factors in own.factors.items()}
    rng = np.random.default_rng(0)

    def network(rows, columns):
        parts = [(1,), (rows, 1), (rows,), (columns, 1), (columns,), (rows, rows), (rows,), (columns, columns), (columns,)]
        return OffsetNetwork(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in parts))

    networks = {name: network(*shape) for name, shape in shapes.items()}
    same_bits(read_networks(offsets_state(networks), "weight_offsets.pt"), networks)
    same_bits(read_encoder(encoder_state(own.encoder), "encoder.pt"), own.encoder)
    config, tensors = read_image_encoder(image_encoder_state(own.params["image_encoder"]), "encoder.pt", "openai")
    flat = bases.Weights(None, {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()})
    shapes = {"vision_model": own.base.param_shapes()["image_encoder"]["vision_model"]}
    same_bits(bases.fill_part(flat, "image_encoder", shapes)["vision_model"], own.params["image_encoder"]["vision_model"])
    assert config["num_hidden_layers"] == own.base.image_encoder.module.num_hidden_layers


def test_config_and_readme_are_the_public_codes(exported):
    _, own, made = exported
    assert {path.name for path in made.folder.iterdir()} == {
        "config.json",
        "encoder.pt",
        "weight_offsets.pt",
        "e4t_jax.safetensors",
        "README.md",
    }
    config = json.loads((made.folder / "config.json").read_text())
    assert config["domain_class_token"] == "creature" and config["placeholder_token"] == "*s"
    assert config["pretrained_model_name_or_path"] == own.base_name and config["domain_embed_scale"] == 0.2
    assert config["prompt_template"] == "a photo of {placeholder_token}" and config["reg_lambda"] == 0.01
    told = (made.folder / "README.md").read_text()
    assert all(note in told for note in made.notes) and "before 2.23" in told and "antialiasing" in told


def test_networks_that_were_trained_on_count_more_than_what_lies_beside(exported, tmp_path):
    """e4t_jax.safetensors knows the file it was written with; kernels without it are refused, as they would be lost."""
    import shutil

    folder, own, made = exported
    shutil.copytree(made.folder, tmp_path / "public")
    state = torch.load(tmp_path / "public" / "weight_offsets.pt", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in state.items()}, tmp_path / "public" / "weight_offsets.pt")
    with pytest.raises(UserError, match=r"weight_offsets.pt holds kernels that belong to its offsets; give it with the e4t_jax"):
        import_checkpoint(tmp_path / "public", str(folder / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained = {name: 1.5 * tensor for name, tensor in state.items() if "wo_" in name}
    torch.save(trained, tmp_path / "public" / "weight_offsets.pt")
    imported = import_checkpoint(tmp_path / "public", str(folder / "base"), tmp_path / "out")
    name = sorted(own.factors)[0]
    owner = re.sub(r"\.to_([qkv])$", r".wo_\1", bases.torch_name("unet", f"{name}/kernel").removesuffix(".weight"))
    expected = literal_delta(OffsetNetwork(*(trained[f"{owner}.{field}"] for field in FIELDS)))
    np.testing.assert_allclose(delta(imported.domain.factors[name]), expected, atol=1e-5)
    assert imported.domain.base.image_encoder.features == "bicubic-tokens"


def test_what_the_format_cannot_hold_is_one_line(domain, exported, tmp_path):
    _, own, _ = exported
    with pytest.raises(
        UserError, match=r"^domain: its encoder sees layers of CLIP, the public code's sees tokens of the last [^\n]*$"
    ):
        export_domain(domain, tmp_path / "out")
    with pytest.raises(UserError, match=r"^domain: it has no offsets of "):
        export_domain(dataclasses.replace(own, factors={}), tmp_path / "out")
    half, params = bases.load_base(own.base_name, clip_features="tokens", dtype="bfloat16")
    with pytest.raises(UserError, match=r"^domain: it is loaded in bfloat16"):
        export_domain(dataclasses.replace(own, base=half, params=params), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^out: \S+config.json is no file of an export and would be lost"):
        export_domain(own, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_without_pytorch_it_is_one_line(exported, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        UserError, match=r"^the public code's files are PyTorch's own and need it [^\n]*pip install 'e4t-jax\[reference\]'.$"
    ):
        export_domain(exported[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    import os

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^Cannot write \S+: [^\n]*No space left on device"):
        export_domain(exported[1], tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_the_command_line_says_what_to_know(exported, tmp_path, capsys):
    folder, _, made = exported
    command.main(command.Config(tmp_path / "public", domain=str(folder / "domain")))
    assert capsys.readouterr().out.splitlines() == [f"Wrote {tmp_path / 'public'}", *made.notes]
    for name in ("weight_offsets.pt", "encoder.pt"):
        one, other = (torch.load(place / name, weights_only=True) for place in (tmp_path / "public", made.folder))
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
