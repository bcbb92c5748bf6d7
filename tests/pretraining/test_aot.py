"""Compiling ahead of time: the figures are those of the step that pretraining runs, and what cannot be compiled for is one line."""

import importlib.util

import jax
import numpy as np
import pytest

from e4t_jax.bases import load_base, load_base_shapes
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.objective import make_method
from e4t_jax.pretraining.aot import (
    collective_bytes,
    compile_pretraining,
    domain_shapes,
    figures,
    lower_generate,
    lower_tune,
    topology_devices,
)
from e4t_jax.pretraining.step import PretrainSettings, init_trainable
from e4t_jax.testing import write_tiny_world
from e4t_jax.tuning import batching
from e4t_jax.tuning.tune import TuneSettings

POLICY = {"dtype": "bfloat16", "remat": "blocks"}
PROGRAM = """
  %all-reduce.1 = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), replica_groups={{0,1}}
  %all-gather.7 = bf16[8,16]{1,0} all-gather(%p), dimensions={0}
  %start = (f32[2]{0}, f32[4]{0}) all-gather-start(%q), dimensions={0}
  %fusion = f32[100]{0} fusion(%all-reduce.1), kind=kLoop
"""


def test_bytes_of_collectives_are_those_of_their_results():
    """Of an operation in two parts, the start holds what goes in beside what comes out: only the latter counts."""
    assert collective_bytes(PROGRAM, "all-reduce") == 4 * 6 + 2 * 4
    assert collective_bytes(PROGRAM, "all-gather") == 2 * 8 * 16 + 4 * 4


@pytest.mark.compiles
def test_the_step_of_a_pod_sums_the_gradients_of_what_learns_and_little_else(domain, tmp_path):
    """Compiled for the devices here: all-reduced is what learns and, beside it, no more than the kernels that the offsets change,
    once for each of the U-Net's two passes: the factors' gradients follow from theirs. In float32; nothing is gathered."""
    model = load_base_shapes(str(write_tiny_world(tmp_path).base), **POLICY)
    compiled = compile_pretraining(jax.devices(), model, 2, PretrainSettings())
    told = figures(compiled, jax.device_count(), 2)
    traffic = {"tflop_per_image", "gb_accessed_per_image", "all_reduce_mb", "all_gather_mb"}
    assert set(told) == {"devices", "hbm_gb", "weights_gb", *traffic}
    learns = init_trainable(make_method(domain.base, "creature"), jax.random.key(0))
    megabytes = sum(4 * leaf.size for leaf in jax.tree.leaves(learns)) / 1e6
    kernels = sum(4 * kernel.size for kernel in domain.base.offset_kernels(domain.base.param_shapes()["unet"]).values()) / 1e6
    assert megabytes <= told["all_reduce_mb"] <= 1.05 * (megabytes + 2 * kernels)
    assert told["all_gather_mb"] <= 0.01 and told["hbm_gb"] > 0 and told["gb_accessed_per_image"] > 0


@pytest.mark.compiles
@pytest.mark.parametrize("what", ["tune", "generate"])
def test_what_is_lowered_for_a_chip_is_what_runs(tmp_path, monkeypatch, what):
    """The program's text, lowered from shapes alone, is that of the program that a domain of these weights runs."""
    base = str(write_tiny_world(tmp_path).base)
    shapes, (model, params) = domain_shapes(load_base_shapes(base, **POLICY)), load_base(base, **POLICY)
    learned = init_trainable(make_method(model, "photo"), jax.random.key(0))
    domain = Domain(base, "photo", model, params, learned.encoder, learned.factors)
    settings, prompts, run = TuneSettings(steps=2, batch_size=2), ["a photo of *s"] * 2, []
    monkeypatch.setattr(
        batching, "kept", lambda program, static, arguments, devices: run.append(program.lower(*arguments)) or program
    )
    (concept,) = domain.tune([np.zeros((16, 16, 3), np.uint8)], settings)
    if what == "tune":
        lowered = lower_tune(shapes, settings, jax.devices()[:1])
    else:
        domain.generate([concept], prompts)
        lowered = lower_generate(shapes, settings, prompts, jax.devices()[:1])
    assert lowered.as_text() == run[-1].as_text()


def test_a_topology_that_is_none_is_one_line():
    with pytest.raises(UserError, match=r"topology: 'nowhere:9x9' is not to be compiled for .* install the compiler"):
        topology_devices("nowhere:9x9")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_program_is_compiled_where_there_is_no_tpu(tmp_path):
    devices = topology_devices("v5e:2x2")
    model = load_base_shapes(str(write_tiny_world(tmp_path).base), **POLICY)
    compiled = compile_pretraining(devices, model, 2, PretrainSettings(fsdp=2))
    assert figures(compiled, 4, 2)["all_gather_mb"] > 0
