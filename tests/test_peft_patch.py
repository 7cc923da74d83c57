"""Patched PEFT models: everything of PEFT's but the forward stays as it is."""

import copy
import pickle
from pathlib import Path

import compare
import peft_layers
import pytest
import torch
from compare import BF16, F32, Dtypes
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import DoraCaching
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_layers import Setting
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ops.integrations import peft as integration
from lora_ops.integrations.peft import patch, register, report, unpatch

ALL = ["q_proj", "v_proj", "o_proj", "down_proj"]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def model_of(**options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=ALL, init_lora_weights=False, **options)).eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.arange(1, 1 + 5 * batch).view(batch, 5) % 64


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kinds of fused calls are made."""
    calls = []
    for name in ("lora_linear", "qlora_linear", "dora_linear", "multi_lora_linear"):
        real = getattr(integration.layers, name)

        def call(*args, real=real, name=name, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(integration.layers, name, call)
    return calls


def assert_as_near(actual: Tensor, stock: PeftModel) -> None:
    """To the logits in fp64 as the stock model's are."""
    eager, exact = (m(tokens()).logits for m in (stock, copy.deepcopy(stock).double()))
    compare.assert_within_bound({"logits": compare.error(actual, eager, exact)})


def test_every_layer_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    stock = copy.deepcopy(model)
    calls = counted(monkeypatch)
    assert patch(model) is model
    actual = model(tokens()).logits
    assert calls == ["lora_linear"] * len(ALL) * 2
    assert len(report(model).fused) == len(ALL) * 2
    assert report(model).not_fused == {}
    assert "8 of 8 LoRA layers run fused" in str(report(model))
    assert_as_near(actual, stock)


def test_patch_and_unpatch_move_no_state() -> None:
    model = model_of(use_dora=True)
    state, names = {k: (t.data_ptr(), t.clone()) for k, t in model.state_dict().items()}, repr(model)
    classes = [type(m) for m in model.modules()]
    patch(model)
    assert repr(model) == names
    model(tokens()).logits.sum().backward()
    patch(model)  # again
    unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(after[k].data_ptr() == at and torch.equal(after[k], t) for k, (at, t) in state.items())
    assert not any(name.startswith("_lora_ops") for m in model.modules() for name in m.__dict__)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = patch(model_of())
    model.save_pretrained(tmp_path)
    again = patch(PeftModel.from_pretrained(llama(), tmp_path)).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.base_model.model.model.layers[0].self_attn.q_proj._get_name() == "Linear"


def test_merging_switching_and_disabling_are_peft_s() -> None:
    stock = model_of()
    stock.add_adapter("other", LoraConfig(r=3, target_modules=ALL, init_lora_weights=False))
    model = patch(copy.deepcopy(stock))
    for each in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.delete_adapter("other"),
    ):
        each(stock)
        each(model)
        assert_as_near(model(tokens()).logits, stock)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in stock.parameters()]
    merged, expected = model.merge_and_unload(), stock.merge_and_unload()
    assert torch.equal(merged(tokens()).logits, expected(tokens()).logits)


def test_an_adapter_added_later_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(model_of())
    model.add_adapter("other", LoraConfig(r=3, target_modules=ALL, init_lora_weights=False))
    model.set_adapter("other")
    calls = counted(monkeypatch)
    model(tokens())
    assert len(calls) == len(report(model).fused) == 8


def test_mixed_batches_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = model_of()
    stock.add_adapter("other", LoraConfig(r=3, target_modules=ALL, init_lora_weights=False))
    model = patch(copy.deepcopy(stock))
    names = ["other", "__base__", "default"]
    calls = counted(monkeypatch)
    eager, exact = (m(tokens(3), adapter_names=names).logits for m in (stock, copy.deepcopy(stock).double()))
    actual = model(tokens(3), adapter_names=names).logits
    assert calls == ["multi_lora_linear"] * 8
    compare.assert_within_bound({"logits": compare.error(actual, eager, exact)})


def test_generate_and_deepcopy_and_pickle() -> None:
    stock = model_of()
    model = patch(copy.deepcopy(stock))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(input_ids=tokens(), **options)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(m.generate(input_ids=tokens(), **options), expected)


def test_dora_s_norms_are_kept_where_peft_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms, real = patch(model_of(use_dora=True)), [], integration.layers.weight_norm
    monkeypatch.setattr(integration.layers, "weight_norm", lambda *args: (norms.append(1), real(*args))[1])
    first = model(tokens()).logits
    with DoraCaching():
        for kept in (8, 0):
            norms.clear()
            assert torch.equal(model(tokens()).logits, first)
            assert len(norms) == kept
        model.train()
        with torch.no_grad():
            first_layer(model).lora_B["default"].weight.data.mul_(2)
        model.eval()
        assert not torch.equal(model(tokens()).logits, first)
    norms.clear()
    model(tokens())
    assert len(norms) == 8


def ready_to_swap(path: Path) -> PeftModel:
    """A patched model with the adapter that is saved as "a"; "b" is another one."""
    for name, r in (("a", 4), ("b", 2)):
        torch.manual_seed(r)
        config = LoraConfig(r=r, lora_alpha=3 * r, target_modules=ALL, init_lora_weights=False)
        get_peft_model(llama(), config).save_pretrained(path / name)
    model = patch(PeftModel.from_pretrained(llama(), path / "a")).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    return model


def test_hotswap(tmp_path: Path) -> None:
    """Also after it has padded the ranks and made tensors of the scalings."""
    model = ready_to_swap(tmp_path)
    for name in ("b", "a"):
        hotswap_adapter(model, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        assert report(model).not_fused == {}
        expected = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        assert_as_near(model(tokens()).logits, expected)


def test_register_makes_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules=ALL)
    torch.manual_seed(1)
    model = get_peft_model(llama(), register(config)).eval()
    calls = counted(monkeypatch)
    model(tokens())
    assert len(calls) == 8
    assert report(model).not_fused == {}
    conv1d = peft_layers.One(peft_layers.base_layer(Setting(Dtypes(F32, F32), kind="conv1d")))
    model = get_peft_model(conv1d, register(LoraConfig(r=2, target_modules=["layer"], fan_in_fan_out=True)))
    assert "not patched" in report(model).not_fused["base_model.model.layer"]
    assert report(patch(model)).not_fused == {}


def test_4bit_layers_keep_bitsandbytes_state() -> None:
    setting = Setting(Dtypes(BF16, F32), kind="4bit")
    model = peft_layers.make(setting)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    patch(model)
    peft_layers.run(model, setting, 0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], t) for k, t in before.items())
    assert report(model).bytes_4bit >= peft_layers.K * peft_layers.N // 2
    unpatch(model)
    assert report(model).bytes_4bit == 0


def hooked(model: PeftModel) -> None:
    first_layer(model).base_layer.register_forward_hook(lambda *_: None)


def trained_base(model: PeftModel) -> None:
    first_layer(model).base_layer.weight.requires_grad_(True)


def other_dropout(model: PeftModel) -> None:
    first_layer(model).lora_dropout["default"] = nn.AlphaDropout(0.1)


def parametrised(model: PeftModel) -> None:
    torch.nn.utils.parametrize.register_parametrization(first_layer(model).lora_A["default"], "weight", nn.Identity())


def first_layer(model: PeftModel) -> nn.Module:
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (hooked, "hooks"),
        (trained_base, "trained"),
        (other_dropout, "AlphaDropout"),
        (parametrised, "ParametrizedLinear"),
        (lambda model: model.base_model.disable_adapter_layers(), "disabled"),
        (lambda model: model.merge_adapter(), "merged"),
        (lambda model: first_layer(model).set_adapter([]), "no adapter"),
    ],
    ids=["hooks", "trained base", "other dropout", "parametrised", "disabled", "merged", "inactive"],
)
def test_what_is_not_fused_is_peft_s_and_says_why(prepare, why: str) -> None:
    stock = model_of()
    model = patch(copy.deepcopy(stock))
    for m in (stock, model):
        prepare(m)
    not_fused = report(model).not_fused
    assert why in not_fused["base_model.model.model.layers.0.self_attn.q_proj"]
    assert why in str(report(model))
    torch.manual_seed(0)
    expected = first_layer(stock)(torch.ones(2, 32))
    torch.manual_seed(0)
    assert torch.equal(first_layer(model)(torch.ones(2, 32)), expected)


@pytest.mark.parametrize("options", [{"use_bdlora": None}, {"layer_replication": [(0, 2), (1, 2)]}], ids=str)
def test_other_options_run(options: dict) -> None:
    stock = model_of(**options)
    model = patch(copy.deepcopy(stock))
    assert_as_near(model(tokens()).logits, stock)


def test_a_model_without_lora_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must have LoRA layers of PEFT's.*got a LlamaForCausalLM"):
        patch(llama())


def test_injected_models_are_patched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=ALL, init_lora_weights=False), llama())
    calls = counted(monkeypatch)
    patch(model)(tokens())
    assert len(calls) == 8


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_compiles_without_a_graph_break(options: dict) -> None:
    stock = model_of(**options)
    model = patch(copy.deepcopy(stock))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_as_near(compiled(tokens()).logits, stock)
    compiled(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_swapping_adapters_does_not_recompile(tmp_path: Path) -> None:
    model = ready_to_swap(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(tokens())
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
        assert torch.equal(compiled(tokens()).logits, model(tokens()).logits)
