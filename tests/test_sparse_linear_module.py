"""The layer: what it computes, what it keeps, how it moves, and the way back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from proxsparse import ProxsparseError, SparseLinear, ops

SHAPES = [(6, 16), (1, 4), (3, 20), (48, 32)]


def dense_layer(n: int, k: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    return linear


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0)])
def test_computes_what_the_dense_layer_computes(
    keep_dense: bool, bias: bool, n: int, k: int, lead: tuple[int, ...]
) -> None:
    linear = dense_layer(n, k, bias)
    sparse = SparseLinear.from_linear(linear, keep_dense=keep_dense)
    x = torch.randn(*lead, k)
    assert torch.equal(sparse(x), linear(x))
    assert (sparse.in_features, sparse.out_features) == (k, n)
    assert sparse.bias is linear.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_way_back_is_bitwise(dtype: torch.dtype, n: int, k: int) -> None:
    linear = dense_layer(n, k, dtype=dtype).eval()
    linear.weight.data[0, :4] = torch.tensor([0.0, -1.0, 0.0, 0.0])  # fewer than two non-zeros
    back = SparseLinear.from_linear(linear).to_linear()
    assert type(back) is nn.Linear and not back.training
    assert same_bits(back.weight, linear.weight) and back.bias is linear.bias
    assert back.weight.requires_grad
    assert (back.in_features, back.out_features) == (k, n)


def test_conv1d_is_transposed_and_comes_back_as_one() -> None:
    conv = Conv1D(12, 8)
    conv.weight.data = ops.project_2to4(conv.weight.data.T).T.contiguous()
    sparse = SparseLinear.from_linear(conv)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(sparse(x), conv(x))
    back = sparse.to_linear()
    assert type(back) is Conv1D and same_bits(back.weight, conv.weight)
    assert torch.equal(back(x), conv(x)) and back.weight.is_contiguous()


def test_a_pruned_minus_zero_becomes_plus_zero() -> None:
    linear = dense_layer(1, 4, bias=False)
    linear.weight.data = torch.tensor([[-0.0, 1.0, 2.0, -0.0]])
    assert not SparseLinear.from_linear(linear).weight.signbit().any()


def test_refuses_a_weight_that_is_not_2to4() -> None:
    linear = dense_layer(6, 16)
    linear.weight.data[2, 8:12] = 1.0
    message = r"^layers.0.up_proj is not 2:4: row 2, columns 8 to 11 hold \[1.0, 1.0, 1.0, 1.0\]"
    with pytest.raises(ProxsparseError, match=message):
        SparseLinear.from_linear(linear, name="layers.0.up_proj")
    with pytest.raises(ProxsparseError, match=r"^the weight of Linear\(in_features=16"):
        SparseLinear.from_linear(linear)
    with pytest.raises(ProxsparseError, match=r"^q has shape \[6, 18\].* multiple of 4"):
        SparseLinear.from_linear(nn.Linear(18, 6), name="q")
    with pytest.raises(ProxsparseError, match="keep_dense is 'fast': it must be True or False"):
        SparseLinear.from_linear(dense_layer(6, 16), keep_dense="fast")  # type: ignore[arg-type]


def test_state_dict_holds_the_packed_form_only() -> None:
    sparse = SparseLinear.from_linear(dense_layer(8, 16, dtype=torch.bfloat16), keep_dense=True)
    state = sparse.state_dict()
    assert set(state) == {"values", "codes", "bias"}
    assert state["values"].shape == (8, 8) and state["codes"].shape == (8, 2)
    assert sparse.memory_bytes() == {"packed": 144, "compressed": 0, "dense": 256}
    sparse.set_keep_dense_(False)
    assert sparse.memory_bytes() == {"packed": 144, "compressed": 0, "dense": 0}
    assert 144 / 256 == 0.5625


def test_other_forms_follow_a_loaded_weight() -> None:
    first, second = dense_layer(6, 16), dense_layer(6, 16)
    sparse = SparseLinear.from_linear(first, keep_dense=True)
    sparse.load_state_dict(SparseLinear.from_linear(second).state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(sparse.dense, second.weight) and torch.equal(sparse(x), second(x))


def test_a_layer_like_another_takes_its_weight() -> None:
    linear = dense_layer(3, 20).eval()
    with torch.device("meta"):
        sparse = SparseLinear.empty_like(nn.Linear(20, 3), keep_dense=True)
    assert sparse.values.is_meta and sparse.dense is None
    sparse.load_state_dict(SparseLinear.from_linear(linear).state_dict(), assign=True)
    x = torch.randn(3, 20)
    assert torch.equal(sparse(x), linear(x)) and sparse.dense is not None


@pytest.mark.parametrize("keep_dense", [False, True])
def test_dtype_moves(keep_dense: bool) -> None:
    linear = dense_layer(6, 16)
    sparse = SparseLinear.from_linear(linear, keep_dense=keep_dense).to(torch.bfloat16)
    linear = linear.to(torch.bfloat16)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    assert sparse.codes.dtype == torch.uint8
    assert torch.equal(sparse(x), linear(x)) and torch.equal(sparse.weight, linear.weight)
    dense = sparse.dense
    assert sparse.to("cpu").dense is dense  # nothing moved, nothing is rebuilt
    assert sparse.to("meta").dense is None
    with pytest.raises(ProxsparseError, match=r"x is torch.float32 on cpu, but the weight is"):
        SparseLinear.from_linear(linear)(x.float())


@pytest.mark.parametrize("keep_dense", [False, True])
def test_copies_and_pickles(keep_dense: bool) -> None:
    sparse = SparseLinear.from_linear(dense_layer(6, 16), keep_dense=keep_dense)
    x, file = torch.randn(2, 16), io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for other in (copy.deepcopy(sparse), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), sparse(x)) and other.values is not sparse.values
        assert other.keep_dense == keep_dense and (other.dense is None) == (not keep_dense)


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_dense_layer(keep_dense: bool, dtype: torch.dtype) -> None:
    linear = dense_layer(6, 16, dtype=dtype)
    sparse = SparseLinear.from_linear(linear, keep_dense=keep_dense)
    x = torch.randn(3, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = sparse(x), linear(x)
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    grads: Any = []
    for layer in (sparse, linear):
        z = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(z).sum().backward()
        grads.append(z.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_gradients_are_those_of_a_dense_layer(keep_dense: bool) -> None:
    linear = dense_layer(6, 16)
    sparse = SparseLinear.from_linear(copy.deepcopy(linear), keep_dense=keep_dense)
    x = torch.randn(2, 3, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    sparse(a).square().sum().backward()
    linear(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(sparse.bias.grad, linear.bias.grad)
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]


@pytest.mark.parametrize("keep_dense", [False, True])
def test_compiles_into_one_graph(keep_dense: bool) -> None:
    sparse = SparseLinear.from_linear(dense_layer(6, 16), keep_dense=keep_dense)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 16), torch.randn(7, 16)):
        assert torch.equal(compiled(x), sparse(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), sparse(x))


@pytest.mark.sparse_tc
@pytest.mark.parametrize("keep_dense", [False, True])
def test_compiles_into_one_graph_on_a_gpu(keep_dense: bool) -> None:
    layer = dense_layer(128, 256).to("cuda", torch.bfloat16)
    layer.weight.data.copy_(ops.project_2to4(layer.weight.data))
    sparse = SparseLinear.from_linear(layer, keep_dense=keep_dense)
    compiled = torch.compile(sparse, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 8, 128):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(compiled(x), sparse(x))


def test_weight_is_readable_only() -> None:
    linear = dense_layer(6, 16)
    for keep_dense in (False, True):
        sparse = SparseLinear.from_linear(linear, keep_dense=keep_dense)
        assert torch.equal(sparse.weight, linear.weight) and sparse.weight.device.type == "cpu"
        for value in (linear.weight, torch.zeros(6, 16)):
            with pytest.raises((KeyError, AttributeError)):
                sparse.weight = value


def test_repr_says_what_it_is() -> None:
    sparse = SparseLinear.from_linear(dense_layer(6, 16))
    assert repr(sparse) == (
        "SparseLinear(in_features=16, out_features=6, bias=True, keep_dense=False)"
    )


@pytest.mark.sparse_tc
@pytest.mark.parametrize(("n", "k"), [(256, 192), (80, 64)])
def test_one_copy_serves_every_kernel_of_a_gpu(n: int, k: int) -> None:
    linear = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    linear.weight.data = ops.project_2to4(linear.weight.data)
    layer = SparseLinear.from_linear(linear)
    assert layer.codes.dim() == 3
    if layer.compressed is not None:
        assert layer.memory_bytes()["compressed"] == 0
        assert torch.equal(layer.compressed, ops.compress_2to4(linear.weight.data))
    if torch.cuda.get_device_capability() == (9, 0):
        assert (layer.compressed is None) == (n % 64 != 0)
    values, codes = ops.pack_2to4(linear.weight.data)
    state = layer.state_dict()
    assert torch.equal(state["values"], values) and torch.equal(state["codes"], codes)
    for keep_dense in (False, True):
        layer.set_keep_dense_(keep_dense)
        for tokens in (1, 7, 64, 65, 300):
            x = torch.randn(tokens, k, device="cuda").bfloat16()
            torch.testing.assert_close(layer(x), linear(x), rtol=0.02, atol=0.02)
    other = SparseLinear.empty_like(linear)
    other.load_state_dict(state)
    assert torch.equal(other.to_linear().weight, linear.weight)
    moved = layer.cpu()
    assert moved.codes.dim() == 2 and torch.equal(moved.codes, codes.cpu())
    back = moved.cuda()
    assert back.codes.dim() == 3 and torch.equal(back.to_linear().weight, linear.weight)


@pytest.mark.parametrize("form", ["values", "codes", "bias"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_part_of_a_state_dict_leaves_the_rest(form: str, assign: bool) -> None:
    a, b = (SparseLinear.from_linear(dense_layer(6, 16), keep_dense=True) for _ in range(2))
    before, new = {k: v.clone() for k, v in a.state_dict().items()}, b.state_dict()
    a.load_state_dict({form: new[form]}, strict=False, assign=assign)
    expected = {**before, form: new[form]}
    assert all(torch.equal(v, expected[k]) for k, v in a.state_dict().items())
    assert torch.equal(a.dense, ops.unpack_2to4(expected["values"], expected["codes"]))


def test_a_layer_loads_one_tensor_at_a_time() -> None:
    source = SparseLinear.from_linear(dense_layer(6, 16))
    for order in (("values", "codes", "bias"), ("codes", "bias", "values")):
        layer = SparseLinear.empty_like(nn.Linear(16, 6, device="meta"))
        for form in order:
            layer.load_state_dict({form: source.state_dict()[form]}, strict=False, assign=True)
        assert torch.equal(layer.weight, source.weight)


def test_the_empty_weight_of_a_file_is_no_leftover_and_a_dense_one_is_refused() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16))
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": torch.empty(0, dtype=torch.uint8)})
    for more in ({}, state):
        with pytest.raises(ProxsparseError, match=r"is packed, the state dict has a dense weight"):
            layer.load_state_dict({**more, "weight": torch.randn(6, 16)}, strict=False)


BAD_CODES = {
    "viewed as int8": (lambda c: c.view(torch.int8), "int8"),
    "as floats": (lambda c: c.float(), "float32"),
    "not 2:4": (lambda c: c & 0xF0, "not 2:4: group 0 has code 0"),
    "the same place twice": (lambda c: torch.full_like(c, 0x45), "has code 5"),
    "one order for another": (lambda c: torch.full_like(c, 0x41), "has code 1"),
}


@pytest.mark.parametrize("change", BAD_CODES.values(), ids=BAD_CODES)
def test_unsound_codes_come_in_by_no_door(change: Any) -> None:
    bad, message = change
    layer = SparseLinear.from_linear(dense_layer(6, 20), keep_dense=True)
    before, codes = layer.weight.clone(), bad(layer.codes)
    with pytest.raises(ProxsparseError, match=message):
        SparseLinear(layer.values, codes)
    for assign in (False, True):
        with pytest.raises(ProxsparseError, match=message):
            layer.load_state_dict({"codes": codes}, strict=False, assign=assign)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(torch.ones(1, 20)), layer(torch.ones(1, 20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": lambda c: c.view(torch.int8)}, "codes torch.int8"),
        ({"codes": lambda c: c.to("meta")}, "codes on meta"),
        ({"values": lambda v: v.to("meta")}, "values are on meta"),
        ({"codes": lambda c: c[:, :1]}, "no packed 2:4 weight"),
        ({"codes": lambda c: c[:5]}, "no packed 2:4 weight"),
        ({"values": lambda v: v.int()}, "values are torch.int32"),
    ],
)
def test_operands_that_were_swapped_are_seen_at_the_next_call(change: Any, message: str) -> None:
    layer, x = SparseLinear.from_linear(dense_layer(6, 16)), torch.randn(2, 16)
    layer(x)
    for form, make in change.items():
        setattr(layer, form, make(getattr(layer, form)))
    with pytest.raises(ProxsparseError, match=message):
        layer(x)
    if "values" not in change or message != "values are on meta":
        with pytest.raises(ProxsparseError):
            SparseLinear(layer.values, layer.codes)


def test_the_layer_forgets_how_it_ran_when_a_form_is_replaced() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16))
    for form in ("values", "codes"):
        layer._runs[("key",)] = lambda *_: torch.zeros(0)
        setattr(layer, form, getattr(layer, form).clone())
        assert not layer._runs


def test_opcheck_of_the_ops_that_read_packed_weights() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16, bias=False))
    torch.library.opcheck(torch.ops.proxsparse.unpack_2to4, (layer.values, layer.codes))
    operands = (torch.randn(2, 16), layer.values, layer.codes, None, None, None)
    torch.library.opcheck(torch.ops.proxsparse.sparse_linear, operands)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(6, 1, dtype=torch.uint8),
        torch.zeros(5, 2, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(6, 2, dtype=torch.int8),
    ],
)
def test_the_raw_op_does_not_read_past_short_codes(codes: Tensor) -> None:
    with pytest.raises(ProxsparseError, match="need uint8 codes"):
        torch.ops.proxsparse.unpack_2to4(torch.randn(6, 8), codes)


def test_the_raw_op_reads_operands_with_strides() -> None:
    layer = SparseLinear.from_linear(dense_layer(6, 16))
    values, codes = (torch.stack((x, x), -1)[..., 0] for x in (layer.values, layer.codes))
    assert not values.is_contiguous()
    assert torch.equal(torch.ops.proxsparse.unpack_2to4(values, codes), layer.weight)


def test_an_empty_layer_can_be_made_in_memory_too() -> None:
    source = SparseLinear.from_linear(dense_layer(6, 20))
    layer = SparseLinear.empty_like(nn.Linear(20, 6))
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)
