"""Rank-3 factors say exactly what the paper's offset network says, and merging changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import offsets
from e4t_jax.errors import UserError

IN, OUT = 12, 7
KERNELS = {
    ("down", "attn1", "to_q", "kernel"): (IN, OUT),
    ("down", "attn2", "to_k", "kernel"): (5, OUT),
}


def random_network(seed):
    """The paper's network with every entry random, float32."""
    rng = np.random.default_rng(seed)
    shapes = [(1,), (IN, 1), (IN,), (OUT, 1), (OUT,), (IN, IN), (IN,), (OUT, OUT), (OUT,)]
    return offsets.OffsetNetwork(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


def random_factors(seed, kernels=KERNELS, rank=3):
    """Factors with every entry random, columns too."""
    factors = offsets.init_factors(jax.random.key(seed), kernels, rank)
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def unet_params(seed=0):
    """A parameter tree with two attention kernels and things that no offset may touch."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "down": {
            "attn1": {
                "to_q": {"kernel": draw(IN, OUT)},
                "to_out_0": {"kernel": draw(OUT, OUT), "bias": draw(OUT)},
            },
            "attn2": {"to_k": {"kernel": draw(5, OUT)}},
        },
        "conv_in": {"kernel": draw(3, 3, 4, 8)},
    }


def literal_numpy(network):
    """Δ [in, out] by two O(n³) matrix products, float64."""
    n = offsets.OffsetNetwork(*(np.asarray(x, np.float64) for x in network))
    vx, vy = n.linear1_weight @ n.v + n.linear1_bias, n.linear2_weight @ n.v + n.linear2_bias
    over_rows = np.stack([n.column_weight @ column + n.column_bias for column in np.outer(vx, vy).T], axis=1)
    return np.stack([n.row_weight @ row + n.row_bias for row in over_rows], axis=0)


def literal_torch(torch, network):
    """The same with torch.nn.Linear, and the layers' parameters in the order of `OffsetNetwork`."""
    v = torch.tensor(network.v, requires_grad=True)
    layers = [
        torch.nn.Linear(1, IN),
        torch.nn.Linear(1, OUT),
        torch.nn.Linear(IN, IN),
        torch.nn.Linear(OUT, OUT),
    ]
    for layer, weight, bias in zip(layers, network[1::2], network[2::2], strict=True):
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    linear1, linear2, column, row = layers
    outer = torch.outer(linear1(v), linear2(v))
    return row(column(outer.T).T), [v, *(p for layer in layers for p in (layer.weight, layer.bias))]


@pytest.mark.parametrize("seed", range(5))
def test_factors_equal_the_literal_network_in_numpy_to_1e_5(seed):
    network = random_network(seed)
    expected = literal_numpy(network)
    got = offsets.delta(offsets.factors_of_network(network))
    assert offsets.factors_of_network(network)["rows"].shape == (IN, 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(5))
def test_factors_equal_the_literal_network_in_pytorch_and_so_do_gradients_to_1e_5(seed):
    torch = pytest.importorskip("torch")
    network = random_network(seed)
    cotangent = np.random.default_rng(seed + 100).standard_normal((IN, OUT)).astype(np.float32)
    expected, parameters = literal_torch(torch, network)
    (expected * torch.from_numpy(cotangent)).sum().backward()

    got, gradient_of = jax.vjp(lambda n: offsets.delta(offsets.factors_of_network(n)), network)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for one, parameter in zip(gradient_of(jnp.asarray(cotangent))[0], parameters, strict=True):
        reference = parameter.grad.numpy()
        np.testing.assert_allclose(one, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_gradients_of_a_loss_with_respect_to_factors_are_those_of_autograd_to_1e_5():
    torch = pytest.importorskip("torch")
    params, domain, concept = unet_params(), random_factors(1), random_factors(3, rank=1)
    x = np.random.default_rng(0).standard_normal((6, IN)).astype(np.float32)

    def loss(domain, concept):
        kernel = offsets.merge(params, domain, concept)["down"]["attn1"]["to_q"]["kernel"]
        return jnp.sum(jnp.tanh(x @ kernel) ** 2)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(domain, concept)
    name = "down/attn1/to_q"
    leaves = [
        torch.tensor(np.asarray(factors[name][side]), requires_grad=True)
        for factors in (domain, concept)
        for side in ("rows", "columns")
    ]
    kernel = torch.tensor(np.asarray(params["down"]["attn1"]["to_q"]["kernel"]))
    kernel = kernel * (1 + leaves[0] @ leaves[1].T + leaves[2] @ leaves[3].T)
    reference = torch.tanh(torch.from_numpy(x) @ kernel).pow(2).sum()
    reference.backward()
    np.testing.assert_allclose(value, reference.item(), rtol=1e-5)
    got = [gradients[i][name][side] for i in range(2) for side in ("rows", "columns")]
    for one, leaf in zip(got, leaves, strict=True):
        np.testing.assert_allclose(one, leaf.grad.numpy(), rtol=0, atol=1e-5 * leaf.grad.abs().max().item())


def test_fresh_factors_change_nothing_and_their_columns_feel_a_gradient_at_once():
    params, factors = unet_params(), offsets.init_factors(jax.random.key(0), KERNELS)
    jax.tree.map(np.testing.assert_array_equal, offsets.merge(params, factors), params)

    def loss(factors):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(offsets.merge(params, factors)))

    for gradient in jax.grad(loss)(factors).values():
        assert jnp.abs(gradient["columns"]).min() > 0
    rows = [one["rows"] for one in factors.values()]
    assert not np.array_equal(rows[0][:5], rows[1][:5]), "every kernel draws its own rows"


def test_every_kernel_draws_its_rows_from_a_key_of_its_own():
    """Bit for bit, though those of one shape are drawn together; keys are split in the order of names."""
    kernels = {"a": (IN, OUT), "b": (5, OUT), "c": (IN, IN)}
    factors = offsets.init_factors(jax.random.key(0), kernels, rank=2)
    for name, key in zip("abc", jax.random.split(jax.random.key(0), 3), strict=True):
        np.testing.assert_array_equal(factors[name]["rows"], jax.random.normal(key, (kernels[name][0], 2)))
        assert factors[name]["columns"].shape == (kernels[name][1], 2)


def test_merging_shares_all_that_no_offset_names_and_leaves_its_input_alone():
    params = unet_params()
    before = jax.tree.map(np.array, params)
    merged = offsets.merge(params, random_factors(0, {("down", "attn2", "to_k"): (5, OUT)}))
    assert merged["conv_in"]["kernel"] is params["conv_in"]["kernel"]
    assert merged["down"]["attn1"]["to_q"]["kernel"] is params["down"]["attn1"]["to_q"]["kernel"]
    assert jnp.abs(merged["down"]["attn2"]["to_k"]["kernel"] - before["down"]["attn2"]["to_k"]["kernel"]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_merging_keeps_the_dtype_of_the_weights():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unet_params())
    merged = offsets.merge(params, random_factors(0))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kernels", [{("down", "attn3", "to_q"): (IN, OUT)}, {("down", "attn1", "to_q"): (IN, OUT + 1)}])
def test_offsets_of_another_base_are_refused_by_name(kernels):
    with pytest.raises(UserError, match=r"down/attn[13]/to_q .* another base model"):
        offsets.merge(unet_params(), random_factors(0, kernels))


def test_a_stack_of_kernels_is_each_of_them():
    """Offsets, merging, gradients and unit steps of kernels [2, 3, in, out], beside a loop over the stack: 1e-5."""
    stack = (2, 3)
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((*stack, IN, OUT)), jnp.float32)
    factors = random_factors(1, {"layers/to_q": (*stack, IN, OUT)})
    assert {side: leaf.shape for side, leaf in factors["layers/to_q"].items()} == {"rows": (2, 3, IN, 3), "columns": (2, 3, OUT, 3)}
    assert offsets.misfit(factors, {"layers/to_q": kernel}) is None

    def loss(factors):
        return jnp.sum(jnp.sin(offsets.merge({"layers": {"to_q": {"kernel": kernel}}}, factors)["layers"]["to_q"]["kernel"]))

    merged = offsets.merge({"layers": {"to_q": {"kernel": kernel}}}, factors)["layers"]["to_q"]["kernel"]
    gradient = jax.grad(loss)(factors)["layers/to_q"]
    rows, columns = (np.asarray(factors["layers/to_q"][side], np.float64) for side in ("rows", "columns"))
    for place in np.ndindex(stack):
        own = np.asarray(kernel[place], np.float64)
        expected = own * (1 + rows[place] @ columns[place].T)
        np.testing.assert_allclose(merged[place], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        slope = np.cos(expected) * own  # ∂loss / ∂Δ
        np.testing.assert_allclose(gradient["rows"][place], slope @ columns[place], rtol=0, atol=1e-4)
        np.testing.assert_allclose(gradient["columns"][place], slope.T @ rows[place], rtol=0, atol=1e-4)
    # A change of that length has the RMS 1 in Δ, over the stack as over one: of the columns, for rows ~ N(0, 1) of rank 1.
    units = offsets.unit_steps(factors)["layers/to_q"]
    assert units == {"rows": pytest.approx((6 * IN) ** 0.5), "columns": pytest.approx((6 * OUT) ** 0.5)}
    assert offsets.layout(factors["layers/to_q"]) == [2, 3, IN, OUT, 3]
    assert offsets.shapes_of([2, 3, IN, OUT, 3]) == {side: leaf.shape for side, leaf in factors["layers/to_q"].items()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": np.zeros((IN, 3))},
        {"rows": np.zeros((IN, 3)), "columns": np.zeros((OUT, 2))},
        {"rows": np.zeros((IN, 3)), "columns": np.zeros(OUT)},
        {"rows": np.zeros((IN, 3)), "columns": np.zeros((OUT, 3)), "more": np.zeros(1)},
        {"rows": np.zeros((OUT, 3)), "columns": np.zeros((IN, 3))},
        {"rows": {"rows": np.zeros((IN, 3))}, "columns": np.zeros((OUT, 3))},
        np.zeros((IN, 3)),
        {},
    ],
)
def test_offsets_that_do_not_fit_are_named(wrong):
    right = {"rows": np.zeros((IN, 3), np.float32), "columns": np.zeros((OUT, 3), np.float32)}
    kernels = {name: jax.ShapeDtypeStruct((IN, OUT), np.float32) for name in ("a", "b")}
    assert offsets.misfit({"a": right, "b": right}, kernels) is None
    wrong = jax.tree.map(np.float32, wrong)
    assert offsets.misfit({"a": right, "b": wrong}, kernels) == "b"
    assert offsets.misfit({"a": right, "c": right}, kernels) == "c"
