"""sqat.Linear against int64 NumPy: exact to the bit on every instruction set, and what follows the product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from tests.runtime.nodes import available, computed_rows, needs_library, quantize, random_linear

pytestmark = needs_library
SETS = available()


@given(
    seed=st.integers(0, 2**31),
    rows=st.one_of(st.integers(1, 40), st.integers(41, 500)),
    inputs=st.integers(1, 200),
    channels=st.integers(1, 100),
    sparse=st.booleans(),
    threads=st.integers(1, 2),
    isa=st.sampled_from(SETS),
)
@settings(max_examples=60)
def test_products_are_exact(
    seed: int, rows: int, inputs: int, channels: int, sparse: bool, threads: int, isa: str
) -> None:
    linear = random_linear(seed, (rows, inputs), channels, sparse, y_scale=0.05)
    y, q = linear.node().run(isa, threads)
    np.testing.assert_array_equal(y, linear.y)
    np.testing.assert_array_equal(q, quantize(linear.y, 0.05))


@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("isa", SETS)
def test_a_step_for_each_channel(isa: str, channels: int) -> None:
    steps = np.linspace(0.01, 0.4, channels, dtype=np.float32)
    linear = replace(random_linear(7, (70, 48), channels, activation="relu"), steps=steps)
    y, q = linear.node().run(isa)
    np.testing.assert_array_equal(q, quantize(y, steps))
    assert len(np.unique(q.max(0))) > 3, "channels differ"


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("sparse", [True, False])
def test_extremes_do_not_saturate(isa: str, sparse: bool) -> None:
    linear = random_linear(1, (7, 512), 32, sparse)
    linear.x[:] = np.where(np.arange(7) % 2, 1, 255)[:, None]
    linear.weight[:] = np.where(linear.weight > 0, 127, np.where(linear.weight < 0, -127, 0))
    linear.weight[0] = np.abs(linear.weight[0])
    (y,) = linear.node("Y").run(isa)
    np.testing.assert_array_equal(y, linear.y)


@pytest.mark.parametrize("isa", SETS)
def test_a_byte_0_is_read_as_1(isa: str) -> None:
    linear = random_linear(2, (5, 64), 16)
    linear.x[:, ::3] = 1
    expected = linear.y
    linear.x[:, ::3] = 0
    np.testing.assert_array_equal(linear.node("Y").run(isa)[0], expected)


@pytest.mark.parametrize("isa", SETS)
def test_expanded_weights_give_the_same_bits(isa: str) -> None:
    node = random_linear(3, (2, 33, 72), 40, norm=True, y_scale=0.03).node()
    for sparse, dense in zip(node.run(isa, sparse="1"), node.run(isa, sparse="0"), strict=True):
        np.testing.assert_array_equal(sparse, dense)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_activations(name: str) -> None:
    linear = random_linear(4, (64, 48), 80, activation=name, y_scale=0.04)
    linear.scale[:] *= 10
    x = linear.y.astype(np.float64)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = {"relu": np.maximum(x, 0), "gelu": 0.5 * x * (1 + erf(x / np.sqrt(2))), "gelu_tanh": tanh}[name]
    y, q = linear.node().run()
    assert np.abs(x).max() > 5
    assert np.abs(y - exact).max() < 8e-5
    assert np.abs(q.astype(int) - quantize(exact, 0.04)).max() <= 1
    np.testing.assert_array_equal(q, quantize(y, 0.04))


@pytest.mark.parametrize("channels", [48, 37, 384])
@pytest.mark.parametrize("rows", [3, 600])
def test_residual_and_layer_norm(rows: int, channels: int) -> None:
    linear = random_linear(5, (rows, 64), channels, norm=True, y_scale=0.03, epsilon=1e-5)
    assert linear.residual is not None
    assert linear.gamma is not None
    x = linear.y.astype(np.float64) + linear.residual
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    y, q = linear.node().run(threads=2)
    np.testing.assert_allclose(y, normal * linear.gamma + linear.beta, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(q, quantize(y, 0.03))


@pytest.mark.parametrize("outputs", ["Y", "Q"])
def test_either_output_alone(outputs: str) -> None:
    linear = random_linear(6, (9, 32), 20, norm=True, y_scale=0.02)
    both = dict(zip("YQ", linear.node().run(), strict=True))
    np.testing.assert_array_equal(linear.node(outputs).run()[0], both[outputs])


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 300),
    inputs=st.integers(1, 100),
    channels=st.integers(1, 100),
    norm=st.booleans(),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "relu"]),
)
@settings(max_examples=30)
def test_the_same_bits_everywhere(
    seed: int, rows: int, inputs: int, channels: int, norm: bool, activation: str
) -> None:
    linear = random_linear(seed, (rows, inputs), channels, norm=norm, activation=activation, y_scale=0.05)
    node = linear.node()
    expected = node.run("scalar")
    for isa in SETS:
        for threads in (1, 2):
            for got, want in zip(node.run(isa, threads), expected, strict=True):
                np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@given(
    seed=st.integers(0, 2**31),
    texts=st.integers(1, 5),
    tokens=st.integers(1, 90),
    inputs=st.integers(1, 100),
    channels=st.integers(1, 600),
    norm=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    isa=st.sampled_from(SETS),
)
@settings(max_examples=40)
def test_rows_of_padding_are_zero_and_change_no_other_bit(
    seed: int, texts: int, tokens: int, inputs: int, channels: int, norm: bool, share: float, isa: str
) -> None:
    linear = random_linear(seed, (texts, tokens, inputs), channels, norm=norm, y_scale=0.05)
    mask = (np.random.default_rng(seed).random((texts, tokens)) < share) * 7  # anything but 0 is a token
    computed = computed_rows(mask)
    whole = linear.node().run(isa)
    for threads in (1, 2):
        for got, want, zero in zip(replace(linear, mask=mask).node().run(isa, threads), whole, (0, 128), strict=True):
            np.testing.assert_array_equal(got[computed].view(np.uint8), want[computed].view(np.uint8))
            assert (got[~computed] == zero).all()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    linear = replace(random_linear(7, shape, 24), mask=np.ones(shape[:-1], np.int64))
    y, q = linear.node().run()
    assert y.shape == q.shape == (*shape[:-1], 24)
