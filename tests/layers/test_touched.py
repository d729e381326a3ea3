"""Modules modified by third-party tools are called, with the same outputs."""

import copy
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rfa_mmdet.ops.receptive_field.backends import missing
from tests.helpers.registered import CONVS, PLUGINS, accepts, build, feature_map
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.touched import TOOLS, WEIGHED, inner


@pytest.fixture(params=CONVS + PLUGINS)
def name(request) -> str:
    return request.param


def fast(name: str, training: bool = True) -> nn.Module:
    """Return the layer in float64, with kernels if there are any."""
    kernels = accepts(name, "backend") and missing("cpu") is None
    return build(name, **dict(backend="cpu") if kernels else {}).double().train(training)


def slow(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    if hasattr(twin, "backend"):
        twin.backend = "auto"
    return twin


def run(layer, x: Tensor, parameters) -> list[Tensor | None]:
    """Return output and gradients of input and parameters for a random upstream gradient."""
    x = x.clone().requires_grad_()
    y = layer(x)
    for parameter in parameters:
        parameter.grad = None
    # Not with torch.autograd.grad, which reentrant checkpoints do not support.
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    return [y, x.grad, *(parameter.grad for parameter in parameters)]


def assert_same(layer: nn.Module, touched: nn.Module, call=None) -> None:
    """Run twice, because a graph may be freed after the first time, and statistics change."""
    x = feature_map().double()
    own = dict(layer.named_parameters())
    shared = [key for key in own if key in dict(touched.named_parameters())]
    for _ in range(2):
        expected = run(layer, x, [own[key] for key in shared])
        theirs = dict(touched.named_parameters())
        found = run(call or touched, x, [theirs[key] for key in shared])
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close((call or touched)(x), layer(x), rtol=1e-9, atol=1e-9)
    buffers = dict(touched.named_buffers())
    for key, value in layer.named_buffers():
        torch.testing.assert_close(buffers.get(key, value), value, rtol=1e-9, atol=1e-9)
    if hasattr(layer, "attention_map"):
        touched, layer = touched.eval(), layer.eval()
        torch.testing.assert_close(touched.attention_map(x), layer.attention_map(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_outputs_are_unchanged(name, tool, training):
    layer = fast(name, training)
    touched = slow(layer)
    TOOLS[tool](touched)
    assert_same(layer, touched)


@pytest.mark.parametrize("tool", TOOLS)
def test_state_dicts_pass_between_touched_layers(name, tool):
    a, b = build(name, seed=0).eval(), build(name, seed=1).eval()
    TOOLS[tool](a)
    TOOLS[tool](b)
    assert not torch.allclose(a(feature_map()), b(feature_map()))
    b.load_state_dict(a.state_dict(), strict=True)
    torch.testing.assert_close(b(feature_map()), a(feature_map()))


@pytest.mark.parametrize("tool", TOOLS)
def test_autocast(name, tool):
    layer = build(name).eval()
    touched = slow(layer)
    TOOLS[tool](touched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = touched(feature_map()), layer(feature_map())
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= TOLERANCES[torch.bfloat16].output * expected.norm()


def test_return_values_of_hooks_are_used(name):
    layer = build(name).eval()
    for key, module in layer.named_modules():
        if type(module) in WEIGHED:
            expected = layer(feature_map())
            handle = module.register_forward_hook(lambda module, inputs, out: out.roll(1, 1))
            if module.weight.shape[0] > 1:  # ECA's has one channel
                assert not torch.allclose(layer(feature_map()), expected), key
            handle.remove()
            assert layer(feature_map()).equal(expected)


def test_class_with_patched_call(name, monkeypatch):
    layer, called = build(name).eval(), []
    for kind in {type(module) for module in inner(layer)} & {*WEIGHED}:  # as torchstat does
        monkeypatch.setattr(
            kind, "__call__", lambda self, x: called.append(self) or nn.Module.__call__(self, x)
        )
    layer(feature_map())
    assert {*called} == {*inner(layer, *WEIGHED)}


def test_manually_fused_batch_norm(name):
    layer = fast(name, training=False)
    fused, pairs = slow(layer), dict(feature="norm", conv1="bn1")
    for module in fused.modules():
        for conv, norm in pairs.items():
            if hasattr(module, conv) and hasattr(module, norm):
                both = nn.utils.fusion.fuse_conv_bn_eval(
                    getattr(module, conv), getattr(module, norm)
                )
                setattr(module, conv, both)
                setattr(module, norm, nn.Identity())
    x = feature_map().double()
    torch.testing.assert_close(fused(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
def test_each_module_is_called_once(name, training):
    layer, calls = build(name).train(training), {}
    for module in inner(layer):
        calls[module] = []
        module.register_forward_hook(
            lambda module, inputs, out: calls[module].append((inputs[0].shape, out.shape))
        )
    for step in (1, 2):
        layer(feature_map())
        assert {len(shapes) for shapes in calls.values()} == {step}


@pytest.mark.parametrize("backward", [False, True])
def test_global_hooks_see_each_module(name, backward):
    layer, called = build(name), []
    hooks = nn.modules.module
    register = hooks.register_module_forward_hook
    if backward:
        register = hooks.register_module_full_backward_hook
    handle = register(lambda module, *_: called.append(module))
    try:
        layer(feature_map().requires_grad_()).square().sum().backward()
    finally:
        handle.remove()
    assert {*called} == {*layer.modules()}


def test_hook_based_and_operator_based_counts_agree(name):
    layer, counts = build(name).eval(), []

    def count(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        weight = module.weight
        counts.append(weight[0].numel() * out.numel())

    operators = count_of_operators(layer)
    for module in inner(layer, *WEIGHED):
        module.register_forward_hook(count)
    layer(feature_map())
    assert sum(counts) == operators


def count_of_operators(layer: nn.Module) -> int:
    """Multiply-adds of convolutions and of products with weights."""
    # Older versions do not watch modules, so they count the operators that replace them.
    watched = () if find_spec("torch.utils.module_tracker") else (layer,)
    with FlopCounterMode(*watched, display=False) as mode, torch.no_grad():
        layer(feature_map())
    counted = mode.get_flop_counts()["Global"]
    return sum(n for op, n in counted.items() if "bmm" not in str(op)) // 2


def steps(layer: nn.Module, count: int = 3) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        layer(feature_map()).square().mean().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured", "ln_structured"])
def test_pruned_layers_stay_pruned_in_training(name, method):
    layer = build(name)
    structured = dict(n=2, dim=0) if method == "ln_structured" else {}
    modules = inner(layer, *WEIGHED)
    for module in modules:
        getattr(prune, method)(module, "weight", amount=0.5, **structured)
    masks = [module.weight_mask.clone() for module in modules]
    steps(layer)
    expected = layer.eval()(feature_map())
    for module, mask in zip(modules, masks, strict=True):
        prune.remove(module, "weight")
        assert not module.weight[mask == 0].any()
    torch.testing.assert_close(layer(feature_map()), expected)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_trains(name, norm, old):
    layer = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarning: deprecated
        for module in inner(layer, *WEIGHED):
            getattr(nn.utils if old else nn.utils.parametrizations, norm)(module)
    steps(layer)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_cached_parametrisations_give_the_same_outputs(name):
    layer = fast(name)
    touched = slow(layer)
    TOOLS["parametrised"](touched)
    for module in inner(touched):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert_same(layer, touched)


def test_functional_call(name):
    layer = fast(name)
    touched = slow(layer)
    doubled = {key: 2 * p for key, p in touched.named_parameters()}
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    expected = layer.eval()(feature_map().double())
    found = torch.func.functional_call(touched.eval(), doubled, feature_map().double())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in touched.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel(name, training):
    layer = fast(name, training)
    original = slow(layer)
    copies = {module: module._replicate_for_data_parallel() for module in original.modules()}
    for module, replica in copies.items():  # as torch.nn.parallel.replicate does
        for key, child in module.named_children():
            setattr(replica, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.view_as(parameter))
        for key, buffer in module._buffers.items():
            setattr(replica, key, buffer)
    assert not list(copies[original].parameters())
    assert_same(layer, original, call=copies[original])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(name, reentrant):
    layer = fast(name)
    twin = slow(layer)
    for norm in inner(layer, nn.BatchNorm2d) + inner(twin, nn.BatchNorm2d):
        norm.eval()  # checkpoints would update them again, as for every layer
    assert_same(layer, twin, call=lambda x: checkpoint(twin, x, use_reentrant=reentrant))


def test_replaced_module_of_the_same_class(name):
    """An added bias or other arguments are not ignored."""
    layer = fast(name, training=False)
    changed = slow(layer)
    x = feature_map().double()
    for key, module in changed.named_modules():
        if type(module) in WEIGHED and module.bias is None:
            module.bias = nn.Parameter(torch.randn(len(module.weight)).to(x))
            assert not torch.allclose(changed(x), layer(x)), key
            hooked = copy.deepcopy(changed)
            TOOLS["forward hook"](hooked)
            torch.testing.assert_close(changed(x), hooked(x))
            module.bias = None


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantisation(name, dtype):
    layer = build(name).eval()
    linears = len(inner(layer, nn.Linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeprecationWarning: to migrate to torchao
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=dtype)
    x, kind = feature_map(), torch.ao.nn.quantized.dynamic.Linear
    assert len(inner(quantised, kind)) == linears
    expected = layer(x)
    assert (quantised(x) - expected).norm() < 0.02 * expected.norm()
    twin = copy.deepcopy(quantised)
    twin.load_state_dict(quantised.state_dict())
    assert twin(x).equal(quantised(x))


def test_observers_see_every_module_and_quantisation_aware_training_runs(name):
    layer = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        if not hasattr(torch.ao.nn.qat, "Conv1d"):
            for conv in inner(layer, nn.Conv1d):
                conv.qconfig = None
        trained = torch.ao.quantization.prepare_qat(layer.train())
    steps(trained)
    observers = [m for m in trained.modules() if isinstance(m, torch.ao.quantization.ObserverBase)]
    assert all(o.min_val.numel() and o.min_val.isfinite().all() for o in observers)


def test_average_model(name):
    layer = build(name)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.eval()(feature_map()), layer.eval()(feature_map()))


def test_partial_half_precision(name):
    """Wrap only one module at a time; the others stay unchanged."""
    layer = fast(name)
    for key, module in layer.named_modules():
        if module is not layer:
            touched, seen = slow(layer), []
            hook = lambda *call, seen=seen: seen.append(call)  # noqa: E731
            touched.get_submodule(key).register_forward_hook(hook)
            assert_same(copy.deepcopy(layer), touched)
            assert seen, key


def test_adapters_train(name):
    layer = build(name)
    TOOLS["wrapped"](layer)
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(key.endswith("scale"))
    steps(layer)
    learnt = [p for p in layer.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learnt)
    assert any(p != 1 for p in learnt)  # before a batch norm, a scale has no effect
