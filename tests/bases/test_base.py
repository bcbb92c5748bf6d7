"""A base is a value: a second load compiles nothing; and no class of diffusers or PyTorch is needed to use one."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import e4t_jax
from e4t_jax import bases
from e4t_jax.bases.stable_diffusion import Policy
from e4t_jax.bases.stable_diffusion.attention import attend

ASSETS = Path(e4t_jax.__file__).parent / "creatures" / "assets" / "base"


def test_a_second_load_compiles_nothing_anew():
    (base, params), (again, _) = bases.load_folder(ASSETS), bases.load_folder(ASSETS)
    other = base.with_scaling_factor(2.0)
    assert base == again and hash(base) == hash(again)
    assert base != other and base != bases.StableDiffusion(base.configs, base.tokenizer, Policy(dtype="bfloat16"))
    compiled = []

    @partial(jax.jit, static_argnums=0)
    def read(base, params, ids):
        compiled.append(base)
        return base.read(params["text_encoder"], ids)

    for one in (base, again):
        read(one, params, jnp.zeros((1, 4), int))
    assert len(compiled) == 1


def test_neither_diffusers_nor_a_flax_class_is_imported():
    code = (
        "import sys, e4t_jax.domain, e4t_jax.interop.diffusers;"
        "print([name for name in sys.modules if name.partition('.')[0] == 'diffusers' or 'modeling_flax' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flash_attention_is_split_over_the_mesh_that_is_set():
    """Lowered for two TPUs on this machine, with gradients."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(heads):
        return attend(heads, heads, heads, Policy()).sum()

    step = jax.jit(jax.grad(loss), in_shardings=jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        traced = step.trace(jax.ShapeDtypeStruct((4, 1024, 2, 8), jnp.float32))
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
