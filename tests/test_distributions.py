"""LinearLogits alone: properties, bad input, and the values that from_module reads from a model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdkernels import LinearLogits
from kdkernels.distributions import gathered

HIDDEN, WEIGHT = torch.randn(2, 3, 4), torch.randn(7, 4)


def test_a_head_has_the_properties_of_its_logits():
    for parts in ((), ("hidden",), ("weight",), ("bias",)):
        tensors = {"hidden": HIDDEN.bfloat16(), "weight": WEIGHT, "bias": torch.randn(7)}
        for name in parts:
            tensors[name] = tensors[name].clone().requires_grad_()
        head = LinearLogits(**tensors, scale=0.5, softcap=3.0)
        logits = nn.functional.linear(head.hidden, head.weight.bfloat16(), head.bias.bfloat16())
        assert (head.shape, head.dtype, head.device) == (logits.shape, logits.dtype, logits.device)
        assert head.requires_grad == bool(parts)
        detached = head.detach()
        assert not detached.requires_grad and (detached.scale, detached.softcap) == (0.5, 3.0)
        assert detached.weight.data_ptr() == head.weight.data_ptr() and detached.bias is not None


def test_a_head_is_frozen_and_no_tuple():
    head = LinearLogits(HIDDEN, WEIGHT)
    with pytest.raises(AttributeError, match="scale"):
        head.scale = 2.0
    assert head != LinearLogits(HIDDEN, WEIGHT)  # != compares identities and no tensors
    with pytest.raises(TypeError, match="positional"):
        LinearLogits(HIDDEN, WEIGHT, None, 2.0)


REGISTER = r"register_fsdp_forward_method\(model, 'method'\)"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "expected"),
    [
        (([1.0], WEIGHT), {}, TypeError, "hidden: expected a tensor; got list"),
        ((HIDDEN, None), {}, TypeError, "weight: expected a tensor; got NoneType"),
        ((HIDDEN, WEIGHT, 1.0), {}, TypeError, "bias: expected a tensor; got float"),
        ((torch.tensor(1.0), WEIGHT), {}, ValueError, r"hidden.*\[\.\.\., H\]; got a 0-d tensor"),
        ((HIDDEN, torch.randn(7, 5)), {}, ValueError, r"agree in their last dimension; got \[2, 3, 4\] and \[7, 5\]"),
        ((HIDDEN, torch.randn(7, 4, 1)), {}, ValueError, r"weight: expected shape \[V, 4\]; got \[7, 4, 1\]"),
        ((HIDDEN, torch.randn(28)), {}, ValueError, rf"\[V, 4\]; got \[28\]; for a parameter.*{REGISTER}"),
        ((HIDDEN, torch.randn(0)), {}, ValueError, rf"got \[0\]; for a parameter that is sharded.*{REGISTER}"),
        ((HIDDEN, torch.randn(0, 4)), {}, ValueError, rf"got \[0, 4\]; for a parameter.*{REGISTER}"),
        ((HIDDEN, WEIGHT, torch.randn(8)), {}, ValueError, r"bias: expected shape \[7\].*got \[8\]"),
        ((HIDDEN, WEIGHT, torch.randn(7, 1)), {}, ValueError, r"bias: expected shape \[7\].*got \[7, 1\]"),
        ((HIDDEN, WEIGHT, torch.randn(7).half()), {}, TypeError, "bias: expected the weight's dtype.*float16"),
        ((HIDDEN, WEIGHT.to("meta")), {}, ValueError, "weight: expected on the hidden states' device cpu; got meta"),
        ((HIDDEN, WEIGHT, torch.randn(7, device="meta")), {}, ValueError, "bias: expected on.*cpu; got meta"),
        ((HIDDEN, torch.ones(7, 4, dtype=torch.int8)), {}, TypeError, "weight.*torch.int8.*dequantise"),
        ((torch.ones(3, 4, dtype=torch.int64), WEIGHT), {}, TypeError, "hidden: expected fp32.*torch.int64"),
        ((HIDDEN, WEIGHT.to(torch.float8_e4m3fn)), {}, TypeError, "weight: expected fp32.*float8"),
        ((HIDDEN, WEIGHT.to_sparse()), {}, TypeError, "weight: expected a dense tensor; got layout torch.sparse_coo"),
        ((HIDDEN, WEIGHT), {"scale": 0}, ValueError, "scale: expected finite and not 0; got 0"),
        ((HIDDEN, WEIGHT), {"scale": float("nan")}, ValueError, "scale.*got nan"),
        ((HIDDEN, WEIGHT), {"scale": torch.ones(())}, TypeError, "scale: expected a number, a constant.*Tensor"),
        ((HIDDEN, WEIGHT), {"scale": True}, TypeError, "scale.*bool"),
        ((HIDDEN, WEIGHT), {"softcap": 0.0}, ValueError, "softcap: expected finite and > 0, or None; got 0.0"),
        ((HIDDEN, WEIGHT), {"softcap": -30}, ValueError, "softcap.*got -30"),
        ((HIDDEN, WEIGHT), {"softcap": float("inf")}, ValueError, "softcap.*got inf"),
        ((HIDDEN, WEIGHT), {"softcap": "30"}, TypeError, "softcap.*str"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_raises(arguments, options, error, expected):
    with pytest.raises(error, match=expected):
        LinearLogits(*arguments, **options)


def test_a_sharded_tensor_of_hidden_states_is_refused():
    class DTensorLike(torch.Tensor):
        device_mesh = None

    with pytest.raises(TypeError, match=r"hidden: expected a plain tensor.*hidden\.to_local\(\)"):
        LinearLogits(HIDDEN.as_subclass(DTensorLike), WEIGHT)
    assert gathered(WEIGHT, torch.bfloat16) is WEIGHT


# ---- from_module


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": None, "final_logit_softcapping": None}, 1.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),  # Cohere
        ({"logit_scale": -0.5, "logits_scaling": 2}, -0.25, None),
        ({"logits_scaling": 8.0}, 0.125, None),  # Granite
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0, None),
        ({"lm_head_multiplier": 0.04}, 0.04, None),  # Falcon-H1
        ({"output_multiplier": 0.5, "final_logit_softcapping": 30.0}, 0.5, 30.0),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),  # Gemma 2
        ({"output_logit_soft_cap": 15.0}, 1.0, 15.0),  # xLSTM
        ({"logits_soft_cap": 30.0}, 1.0, 30.0),  # RecurrentGemma
        ({"logits_mup_width_multiplier": 24.0}, 1 / 24, None),  # Inkling
    ],
)
def test_from_module_reads_scale_and_cap(config, scale, softcap):
    lm_head = nn.Linear(4, 7)
    text = SimpleNamespace(**config)
    text.get_text_config = lambda: text
    head = LinearLogits.from_module(HIDDEN, lm_head, text)
    assert head.weight is lm_head.weight and head.bias is lm_head.bias
    assert (head.scale, head.softcap) == (scale, softcap)
    around = SimpleNamespace(get_text_config=lambda: text, logit_scale=2.6592)  # config of an image model
    if (scale, softcap) == (1.0, None):
        assert LinearLogits.from_module(HIDDEN, lm_head, around).scale == 1
    else:
        with pytest.raises(ValueError, match=r"for a text model.*; call from_module with config\.get"):
            LinearLogits.from_module(HIDDEN, lm_head, around)
    assert LinearLogits.from_module(HIDDEN, nn.Linear(4, 7, bias=False), text).bias is None


class Adapter(nn.Module):
    """A mock with the attributes of a PEFT adapter layer."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.weight = next(iter(modules.values())).weight


class ScaledHead(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_from_module_refuses_all_but_a_linear_map():
    linear, patched = nn.Linear(4, 7), nn.Linear(4, 7)
    patched.forward = lambda x: 2 * x
    for head, expected in (
        (Adapter(base_layer=linear), "lacks the adapter; pass logits.*merge_and_unload"),
        (Adapter(original_module=linear, modules_to_save=nn.ModuleDict()), r"modules_to_save\[<adapter>\]"),
        (ScaledHead(4, 7), "ScaledHead has a forward of its own"),
        (nn.Embedding(7, 4), "expected a torch.nn.Linear; got Embedding"),
        (linear.weight, "expected a torch.nn.Linear; got Parameter"),
        (patched, "Linear has a forward of its own"),
    ):
        with pytest.raises(TypeError, match=expected):
            LinearLogits.from_module(HIDDEN, head, SimpleNamespace())
    for config in (None, {"logit_scale": 0.5}, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="config: expected a transformers config"):
            LinearLogits.from_module(HIDDEN, linear, config)
    for config, error, expected in (
        ({"logits_scaling": 0}, ValueError, "config.logits_scaling: expected finite and not 0; got 0"),
        ({"logit_scale": float("inf")}, ValueError, "config.logit_scale: expected finite.*got inf"),
        ({"logit_scale": "inv_sqrt_d_model"}, TypeError, "config.logit_scale: expected a number.*str"),
        ({"final_logit_softcapping": 30.0, "logits_soft_cap": 20.0}, ValueError, "expected one cap.*30.0.*20.0"),
        ({"model_type": "t5"}, ValueError, "t5 scales its logits by a rule in its code"),
    ):
        with pytest.raises(error, match=expected):
            LinearLogits.from_module(HIDDEN, linear, SimpleNamespace(**config))


def test_from_module_looks_through_the_hooks_of_accelerate():
    """from_module accepts a Linear with accelerate's hooks, which wrap the instance's forward."""
    linear, patched = nn.Linear(4, 7), nn.Linear(4, 7)
    patched.forward = lambda x: 2 * x
    for module in (linear, patched):
        module._hf_hook, module._old_forward = object(), module.forward
        module.forward = lambda x, old=module._old_forward: old(x)
    assert LinearLogits.from_module(HIDDEN, linear, SimpleNamespace()).weight is linear.weight
    with pytest.raises(TypeError, match="a forward of its own"):
        LinearLogits.from_module(HIDDEN, patched, SimpleNamespace())


def test_a_weight_whose_memory_was_freed_is_refused():
    weight = torch.randn(7, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=rf"of this weight \[7, 4\] was freed, as FSDP does after a forward; .*{REGISTER}"
    ):
        LinearLogits(HIDDEN, weight)


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("HyperCLOVAX", {"logits_scaling": 0.25}),
    ],
)
def test_from_module_makes_the_logits_of_transformers_models(name, options):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        tokens = torch.arange(1, 9)[None]
        want = model(tokens).logits
        head = LinearLogits.from_module(model.model(tokens).last_hidden_state, model.lm_head, model.config)
    logits = head.scale * nn.functional.linear(head.hidden, head.weight, head.bias)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, want)
