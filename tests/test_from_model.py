"""LinearLogits.from_model in one process: the model's own loss and gradients, without logits, or a refusal by name.

tests/test_data_parallel.py has DDP and FSDP2.
"""

import copy
import pickle
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCAB, WIDTH, TinyModel, distance, gradients
from torch import nn

from kdkernels import LinearLogits, fused_kl
from kdkernels.heads import scale_and_cap

IDS = torch.arange(14).view(2, 7)
TEACHER = 2 * torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(1))


def of_logits(model) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    fused_kl(model(IDS)["logits"], TEACHER).backward()
    return gradients(model)


def of_head(model, *, inner=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    fused_kl(LinearLogits.from_model(model, input_ids=IDS), TEACHER).backward()
    return gradients(inner or model)


def logits_of(head: LinearLogits) -> torch.Tensor:
    logits = head.scale * nn.functional.linear(head.hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


MODELS = {
    "plain": {},
    "tied": {"tied": True},
    "scaled and capped": {"logit_scale": 3.0, "final_logit_softcapping": 1.5},
    "checkpointed layers": {"checkpointed": "layers"},
    "checkpointed whole": {"checkpointed": "all", "tied": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(name):
    model = TinyModel(**MODELS[name])
    widths = []
    model.register_forward_hook(lambda module, inputs, output: widths.append(output["logits"].shape[-1]))
    want = of_logits(model)
    assert distance(of_head(model), want) <= 2e-6
    assert widths == [VOCAB, 0]
    assert model(IDS)["logits"].shape[-1] == VOCAB and "forward" not in vars(model.lm_head)
    with torch.no_grad():
        head = LinearLogits.from_model(model, IDS)
        assert not head.hidden.requires_grad
        torch.testing.assert_close(logits_of(head), model(IDS)["logits"])


def test_the_gradient_of_the_loss_passes_through_the_models_output():
    """DDP and FSDP2 hook a model's output, as this hook does."""
    model, seen = TinyModel(), []

    def hook_output(module, inputs, output):
        output["logits"].register_hook(lambda gradient: seen.append(gradient.shape))

    model.register_forward_hook(hook_output)
    fused_kl(LinearLogits.from_model(model, IDS), TEACHER).backward()
    assert seen == [(2, 7, 0)] and model.lm_head.weight.grad.any()


def test_a_scale_that_the_model_applies_before_its_head_is_not_taken_twice():
    """Inkling divides the head's input by this number, and TinyModel knows no such number."""
    model = TinyModel(logits_mup_width_multiplier=2.0)
    assert scale_and_cap(model.config)[0] == 0.5
    torch.testing.assert_close(logits_of(LinearLogits.from_model(model, IDS)), model(IDS)["logits"])


def test_frozen_parts_get_no_gradient():
    model = TinyModel()
    model.lm_head.requires_grad_(False)
    assert distance(of_head(model), of_logits(model)) <= 2e-6
    only_head = TinyModel().requires_grad_(False)
    only_head.lm_head.requires_grad_(True)
    assert set(of_head(only_head)) == {"lm_head.weight", "lm_head.bias"}
    assert distance(of_head(only_head), of_logits(only_head)) <= 2e-6
    assert not LinearLogits.from_model(TinyModel().requires_grad_(False), IDS).requires_grad


class UnderNoGrad(TinyModel):
    """Runs itself, or its head alone, without gradients."""

    def __init__(self, part):
        super().__init__()
        module = self if part == "model" else self.lm_head
        module.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None)
        module.register_forward_hook(lambda *_: torch.set_grad_enabled(True) and None)


@pytest.mark.parametrize("part", ["model", "head", "call"])
def test_a_head_without_gradients_has_those_of_the_plain_call_none(part):
    model = TinyModel() if part == "call" else UnderNoGrad(part)
    with torch.set_grad_enabled(part != "call"):
        assert not model(IDS)["logits"].requires_grad
        head = LinearLogits.from_model(model, IDS)
    assert torch.is_grad_enabled() and not head.requires_grad
    student = torch.randn(2, 7, VOCAB, requires_grad=True)
    fused_kl(student, head).backward()  # a loss refuses a teacher that requires grad
    assert not gradients(model) and student.grad.any()
    torch.testing.assert_close(logits_of(head), model(IDS)["logits"])


class LoRA(nn.Module):
    """A mock of a PEFT layer: a frozen base layer, and a trained product."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base_layer.in_features))
        self.b = nn.Parameter(torch.randn(base_layer.out_features, 2))

    def get_delta_weight(self, adapter):
        return self.b @ self.a

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()


class ModulesToSave(nn.Module):
    """A mock of PEFT's wrapper of a module that is trained whole: it runs the active adapter's copy."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module).requires_grad_(True)})
        self.active_adapters, self.disable_adapters = ["default"], False

    def forward(self, x):
        return (self.original_module if self.disable_adapters else self.modules_to_save["default"])(x)


class PassesAttributes(nn.Module):
    """A mock of PeftModel, which passes attributes of the model on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **inputs):
        return self.base_model(*args, **inputs)


def test_adapters_of_layers_and_a_head_that_is_trained_whole():
    model = TinyModel()
    model.layers[0] = LoRA(model.layers[0])
    model.lm_head = ModulesToSave(model.lm_head)
    model = PassesAttributes(model)
    want = of_logits(model)
    got = of_head(model)
    assert distance(got, want) <= 2e-6 and "base_model.lm_head.modules_to_save.default.weight" in got
    model.lm_head.disable_adapters = True
    assert distance(of_head(model), of_logits(model)) <= 2e-6
    assert LinearLogits.from_model(model, IDS).weight is model.lm_head.original_module.weight


def test_a_head_with_lora_is_refused_and_its_weight_is_documented():
    """The base layer's weight alone leaves the adapter out; the sum that the error names does not."""
    model = TinyModel()
    model.lm_head = LoRA(model.lm_head)
    want = of_logits(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    named = r"LoRA, an adapter's layer.*lm_head\.base_layer\.weight \+ lm_head\.get_delta_weight\(<adapter>\)"
    for refused in (
        lambda: LinearLogits.from_model(model, IDS),
        lambda: LinearLogits.from_module(torch.randn(3, WIDTH), model.lm_head, SimpleNamespace()),
    ):
        with pytest.raises(TypeError, match=named):
            refused()
    assert not calls
    hidden = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model(IDS)
    base = model.lm_head.base_layer
    weight = base.weight + model.lm_head.get_delta_weight("default")
    fused_kl(LinearLogits(hidden[0], weight, base.bias), TEACHER).backward()
    assert distance(gradients(model), want) <= 2e-6 and "lm_head.a" in want


def test_a_compiled_model():
    """The head's forward is replaced in compiled code too, and only for the call; no call compiles anew."""
    model = TinyModel(final_logit_softcapping=2.0)
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    want = of_logits(model)
    for _ in range(3):
        assert compiled(IDS)["logits"].shape[-1] == VOCAB
        assert distance(of_head(compiled, inner=model), want) <= 2e-6
    assert len(frames) == 2


def test_a_step_that_is_compiled_whole_is_refused_by_name():
    model = TinyModel()

    def step(ids):
        return fused_kl(LinearLogits.from_model(model, ids), TEACHER)

    with pytest.raises(Exception, match="compile the model, and call from_model and the loss outside"):
        torch.compile(step, backend="eager", fullgraph=True)(IDS)
    torch.compile(step, backend="eager")(IDS).backward()  # runs from_model outside of the graphs
    assert distance(gradients(model), of_logits(model)) <= 2e-6


def test_an_exception_restores_the_head():
    model = TinyModel()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LinearLogits.from_model(model, IDS)
    assert "forward" not in vars(model.lm_head)


def test_a_call_inside_a_call():
    """A teacher with the student's head that runs inside the student's forward."""
    model = TinyModel()
    teacher = copy.deepcopy(model)
    teacher.lm_head = model.lm_head
    found = []

    def run_teacher(*_):
        with torch.no_grad():
            found.append(LinearLogits.from_model(teacher, IDS))

    model.norm.register_forward_hook(run_teacher)
    student = LinearLogits.from_model(model, IDS)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(student.hidden, found[0].hidden) and student.hidden.requires_grad


def test_a_copy_that_is_made_inside_a_call_is_a_plain_model():
    """A hook of the model may copy it, as an average of weights does."""
    model, copies = TinyModel(), {}

    def copies_it(*_):
        if not copies:
            copies.update(deep=copy.deepcopy(model), pickled=pickle.loads(pickle.dumps(model.lm_head)))
            copies.update(shallow=copy.copy(model.lm_head))

    model.norm.register_forward_hook(copies_it)
    hidden = LinearLogits.from_model(model, IDS).hidden
    want = model.lm_head(hidden)
    assert torch.equal(copies["pickled"](hidden), want) and torch.equal(copies["shallow"](hidden), want)
    deep = copies["deep"]
    assert torch.equal(deep.lm_head(hidden), want)
    with torch.no_grad():
        deep.lm_head.bias += 1
    torch.testing.assert_close(deep.lm_head(hidden), want + 1)
    assert torch.equal(model.lm_head(hidden), want)
    assert distance(of_head(deep), of_logits(deep)) <= 2e-6
    head = LinearLogits.from_model(copies["deep"], IDS)
    assert head.weight is deep.lm_head.weight and torch.equal(logits_of(head), deep(IDS)["logits"])


def test_other_threads_get_logits_and_take_turns():
    model = TinyModel()
    inside, seen, ready = threading.Event(), {}, threading.Event()

    def first(module, inputs):
        if threading.current_thread().name == "first":
            inside.set()
            ready.wait(20)

    def other():
        inside.wait(20)
        seen["logits"] = model(IDS)["logits"].shape[-1]
        ready.set()
        seen["head"] = LinearLogits.from_model(model, IDS)

    model.lm_head.register_forward_pre_hook(first)
    threads = [
        threading.Thread(target=lambda: seen.update(first=LinearLogits.from_model(model, IDS)), name="first"),
        threading.Thread(target=other),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen["logits"] == VOCAB and torch.equal(seen["head"].hidden, seen["first"].hidden)
    assert "forward" not in vars(model.lm_head)


def test_a_plain_call_beside_another_threads_turn_gets_logits():
    """The second thread waits while the first has the head, and then serves the first thread's plain call."""
    model, seen = TinyModel(), {}
    first_is_inside, second_is_inside, plain_is_done = (threading.Event() for _ in range(3))

    def hold(module, inputs):
        name = threading.current_thread().name
        if name == "first" and "head" not in seen:
            first_is_inside.set()
            time.sleep(0.2)  # until the second thread waits for the head
        if name == "second":
            second_is_inside.set()
            plain_is_done.wait(20)

    def first():
        LinearLogits.from_model(model, IDS)
        seen["head"] = True
        second_is_inside.wait(20)
        seen["width"] = model(IDS)["logits"].shape[-1]
        plain_is_done.set()

    def second():
        first_is_inside.wait(20)
        LinearLogits.from_model(model, IDS)

    model.embedding.register_forward_pre_hook(hold)
    threads = [threading.Thread(target=run, name=run.__name__) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen["width"] == VOCAB


def test_a_turn_does_not_end_anothers():
    """If the second thread did not wait for its turn, the first one's end would take its forward off the head."""
    model, errors = TinyModel(), []
    second_is_inside, first_is_done = threading.Event(), threading.Event()

    def meet(module, inputs):
        if threading.current_thread().name == "first":
            second_is_inside.wait(0.3)  # comes too late, since the second thread waits for the head
        else:
            second_is_inside.set()
            first_is_done.wait(20)

    def call():
        try:
            LinearLogits.from_model(model, IDS)
        except RuntimeError as error:
            errors.append(error)
        first_is_done.set()

    model.embedding.register_forward_pre_hook(meet)
    first, second = (threading.Thread(target=call, name=name) for name in ("first", "second"))
    first.start()
    time.sleep(0.05)
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert not errors and "forward" not in vars(model.lm_head)


class OtherCalls(TinyModel):
    """Calls its head `calls` times, and returns `result` of its outputs."""

    def __init__(self, calls, result=lambda output: output):
        super().__init__()
        self.calls, self.result = calls, result

    def forward(self, input_ids, labels=None):
        if self.calls == 1:
            return self.result(super().forward(input_ids))
        hidden = self.embedding(input_ids)
        logits = [self.lm_head(hidden) for _ in range(self.calls)]
        return {"logits": torch.cat(logits or [hidden @ self.lm_head.weight.t()])}


def test_models_that_cannot_be_served_are_refused_by_name():
    no_config, no_head, quantised = TinyModel(), TinyModel(), TinyModel()
    no_config.config, no_head.get_output_embeddings = None, lambda: None
    quantised.lm_head = nn.Bilinear(2, 2, 2)
    for model, inputs, error, expected in (
        (OtherCalls(0), {}, RuntimeError, "expected one call of the head in a forward of OtherCalls; got 0"),
        (OtherCalls(2), {}, RuntimeError, "expected one call of the head.*got 2"),
        (OtherCalls(1, lambda output: output["hidden"]), {}, RuntimeError, "expected the head's logits in its output"),
        (OtherCalls(1, lambda output: None), {}, RuntimeError, "in its output, with their graph; got NoneType"),
        (
            OtherCalls(1, lambda output: output["logits"].argmax(-1)),
            {},
            RuntimeError,
            "gave it logits of no class: argmax",
        ),
        (TinyModel(checkpointed="reentrant"), {}, RuntimeError, "use_reentrant=True; leave the head out"),
        (TinyModel(), {"labels": IDS}, ValueError, "labels: expected no labels.*pass labels to the loss"),
        (nn.Linear(3, 3), {}, TypeError, r"whose get_output_embeddings\(\) returns its head; got Linear"),
        (no_head, {}, TypeError, r"expected a head from get_output_embeddings\(\); TinyModel has None"),
        (no_config, {}, TypeError, "config: expected a transformers config.*got NoneType"),
        (quantised, {}, TypeError, "expected a torch.nn.Linear; got Bilinear"),
    ):
        with pytest.raises(error, match=expected):
            LinearLogits.from_model(model, input_ids=IDS, **inputs)
        assert not isinstance(model, TinyModel) or "forward" not in vars(model.lm_head)
    for result in (lambda output: output["logits"], lambda output: (output["logits"], None), SimpleTuple):
        assert LinearLogits.from_model(OtherCalls(1, result), IDS).hidden.requires_grad


def SimpleTuple(output):
    return [(output["logits"],)]


def with_hooks_of_accelerate(module, before, after):
    """Accelerate's hooks: they replace the instance's forward, and keep the old one in _old_forward."""
    module._hf_hook, module._old_forward = object(), module.forward

    def forward(*args):
        before(module)
        output = module._old_forward(*args)
        after(module)
        return output

    module.forward = forward


def test_an_offloaded_head_is_named():
    """Accelerate's hook loads the head's numbers for its forward, and puts a tensor on meta in their place."""
    model = TinyModel()
    model.lm_head.bias = None
    weight, seen = model.lm_head.weight.detach().clone(), []

    def put(head, tensor):
        head.weight = nn.Parameter(tensor)
        seen.append(tensor.device.type)

    with_hooks_of_accelerate(model.lm_head, lambda head: put(head, weight), lambda head: put(head, weight.to("meta")))
    with pytest.raises(ValueError, match=r"weight: .*got meta; a tensor on meta.*offloading.*keep the head on its dev"):
        LinearLogits.from_model(model, IDS)
    assert seen == ["cpu", "meta"] and model(IDS)["logits"].shape[-1] == VOCAB


class ZeRO3:
    """A mock of DeepSpeed ZeRO-3: the weight is empty, but in its module's forward and inside `gathered`."""

    def __init__(self, head):
        self.weight, self.whole, self.held = head.weight, head.weight.data, False
        self.release()
        head.register_forward_pre_hook(lambda *_: self.gather())
        head.register_forward_hook(lambda *_: None if self.held else self.release())

    def gather(self):
        self.weight.data = self.whole

    def release(self):
        self.weight.data = torch.empty(0)

    def __enter__(self):
        self.held = True
        self.gather()

    def __exit__(self, *_):
        self.held = False
        self.release()


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("trains", [True, False])
def test_zero_3_is_named_before_and_in_backward(gradient, trains):
    model = TinyModel()
    model.lm_head.requires_grad_(trains)
    want = of_logits(model)
    sharded = ZeRO3(model.lm_head)
    named = r"deepspeed\.zero\.GatheredParameters\(\[weight\]\)"
    with pytest.raises(ValueError, match=rf"weight: expected shape \[V, {WIDTH}\]; got \[0\].*{named}"):
        LinearLogits.from_model(model, IDS)
    with sharded:
        loss = fused_kl(LinearLogits.from_model(model, IDS), TEACHER, gradient=gradient)
    if trains or gradient == "backward":
        shape = rf"backward: expected the tensor of shape \[{VOCAB}, {WIDTH}\].*got shape \[0\].*{named}"
        with pytest.raises(RuntimeError, match=shape):
            loss.backward(retain_graph=True)
    model.zero_grad()
    with sharded:
        loss.backward()
        assert distance(gradients(model), want) <= 2e-6


def test_a_weight_that_was_freed_before_backward_is_named():
    """FSDP frees the memory of a parameter and keeps its shape."""
    hidden, weight = torch.randn(3, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    loss = fused_kl(LinearLogits(hidden, weight), TEACHER[0, :3], gradient="backward")
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"shape \[{VOCAB}, {WIDTH}\].*got a tensor whose memory was freed"):
        loss.backward()


def test_saved_tensors_hooks_unpack_once():
    """Non-reentrant checkpoints and offloading hooks refuse, or pay for, a second look at a saved tensor."""
    packed, unpacked = [], []
    hidden, weight = torch.randn(3, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)
    hooks = (lambda x: packed.append(x) or x.clone()), (lambda x: unpacked.append(x) or x)
    for gradient in ("forward", "backward"):
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = fused_kl(LinearLogits(hidden, weight), TEACHER[0, :3], gradient=gradient)
        loss.backward()
        assert len(unpacked) == len(packed) > 0


def test_scales_of_the_head_s_input_are_left_to_the_model():
    for config, scale in (
        ({"model_type": "t5"}, 1.0),
        ({"model_type": "minicpm3", "logits_scaling": 4.0}, 1.0),
        ({"model_type": "granite", "logits_scaling": 4.0}, 0.25),
        ({"logits_mup_width_multiplier": 24.0, "final_logit_softcapping": None}, 1.0),
        ({"logit_scale": 0.5}, 0.5),
    ):
        assert scale_and_cap(SimpleNamespace(**config), at_head=True) == (scale, None)
    with pytest.raises(ValueError, match="mpt scales its logits by a rule in its code"):
        scale_and_cap(SimpleNamespace(model_type="mpt"), at_head=True)


SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
OF_TRANSFORMERS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.5},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "MiniCPM3": {"dim_model_base": 4, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4,
                 "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    kind = "ForConditionalGeneration" if name == "T5" else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    if not hasattr(transformers, name + kind):
        pytest.skip(f"this transformers has no {name}")
    options = OF_TRANSFORMERS[name] if name in ("GPT2", "T5") else SMALL | OF_TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": VOCAB} | options)
    model = getattr(transformers, name + kind)(config).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS} if name == "T5" else {"input_ids": IDS}
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        head = LinearLogits.from_model(model, **inputs)
        assert torch.equal(logits_of(head), model(**inputs).logits)
