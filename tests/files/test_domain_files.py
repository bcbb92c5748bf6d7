"""What a domain's files name is found where it is promised to be, and nowhere else."""

import dataclasses
import json

import numpy as np
import pytest

from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import _image_encoder_of, load_domain


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "../x", "a/../../x", "image_encoder/../../x", "./x", "x\\y", "a/b/c", "", "nothing"]
)
def test_an_image_encoder_outside_of_the_domain_is_refused(name, tmp_path):
    """Even where it exists; the line names file, key and value."""
    folder = tmp_path / "a" / "domain"
    folder.mkdir(parents=True)
    (folder / "image_encoder").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "a" / "x").mkdir()
    with pytest.raises(UserError) as raised:
        _image_encoder_of(folder / "domain.json", name)
    assert str(raised.value).startswith(f"{folder}/domain.json: image_encoder = {name!r} is neither a folder of the domain nor")
    assert len(str(raised.value).splitlines()) == 1


def test_image_encoders_that_may_be_named(tmp_path):
    """None, one in the domain's folder, a Hub id, a random one, a folder by its whole path."""
    (tmp_path / "image_encoder").mkdir()
    path = tmp_path / "domain.json"
    assert _image_encoder_of(path, None) is None
    assert _image_encoder_of(path, "image_encoder") == str(tmp_path / "image_encoder")
    for name in ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "random:vit-h14", "/models/clip"):
        assert _image_encoder_of(path, name) == name


def test_a_kind_of_features_that_is_unknown_is_said(domain, tmp_path):
    from e4t_jax.files.domain_files import save_domain
    from e4t_jax.storage import to_signed_json

    save_domain(tmp_path, domain)
    facts = json.loads((tmp_path / "domain.json").read_text())
    facts.pop("checksum")
    (tmp_path / "domain.json").write_text(to_signed_json({**facts, "clip_features": "words"}))
    with pytest.raises(UserError, match="clip_features = 'words' is unknown"):
        load_domain(tmp_path)


def test_the_regulariser_of_an_older_domain_weighs_what_it_weighed(domain, tmp_path):
    """Up to format 3, λ is that of ‖s E‖²; read, it is that of ‖s E‖² / ‖e_d‖²: relative 1e-6. A domain of today keeps its λ."""
    from e4t_jax import bases
    from e4t_jax.files.domain_files import save_domain
    from e4t_jax.storage import to_signed_json

    bases.save_folder(tmp_path / "base", domain.base, domain.params, np.float32)
    base, params = bases.load_base(str(tmp_path / "base"))
    own = dataclasses.replace(domain, base_name=str(tmp_path / "base"), base=base, params=params, regularisation=0.02)
    save_domain(tmp_path / "domain", own)
    file = tmp_path / "domain" / "domain.json"
    assert load_domain(tmp_path / "domain").regularisation == 0.02
    record = json.loads(file.read_text())
    record.pop("checksum")
    file.write_text(to_signed_json({**record, "format": 3}))
    words = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    squared = (np.asarray(words[domain.method.domain_id], np.float64) ** 2).sum()
    np.testing.assert_allclose(load_domain(tmp_path / "domain").regularisation, 0.02 * squared, rtol=1e-6)
