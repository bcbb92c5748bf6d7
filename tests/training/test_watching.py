"""The files of a run that other programs read."""

import json
from importlib import metadata

from e4t_jax.training import watching
from e4t_jax.training.watching import Watch


def test_a_run_from_a_checkout_that_is_not_installed_is_watched_too(tmp_path, monkeypatch):
    """`PYTHONPATH=checkout python -m train.pretrain`: the package has no version then, the libraries have theirs."""
    true = metadata.version

    def version(name):
        if name == "e4t-jax":
            raise metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(watching.metadata, "version", version)
    watch = Watch(tmp_path, 4, 10, {"seed": 3})
    watch.record(5, {"loss": 0.5})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"] == {"seed": 3}
    assert run["versions"]["e4t-jax"] == "not installed" and run["versions"]["jax"] == true("jax")
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"]) == (5, 0.5)
