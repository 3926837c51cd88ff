"""Language models as a pipeline's encoders: compiled without a cache for next tokens, which who asks for it still gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

import sfast
from sfast.kv_cache import without_kv_cache
from tests.tiny import finished
from tests.tiny_transformers import IMAGES, LANGUAGE, Pipeline, gemma, qwen


def pipeline(encoder: nn.Module) -> Pipeline:
    pipe = IMAGES["sana"].build()
    pipe.text_encoder = encoder
    return pipe


def writer() -> nn.Module:
    torch.manual_seed(0)
    return finished(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=24, **LANGUAGE)))


def test_who_says_nothing_gets_no_cache() -> None:
    for forward in (transformers.Gemma2Model.forward, transformers.Qwen3Model.forward, transformers.LlamaModel.forward):
        assert without_kv_cache(forward, (1,), {"attention_mask": 2}) == {"attention_mask": 2, "use_cache": False}
        for asked in ({"use_cache": True}, {"use_cache": False}, {"past_key_values": ()}):
            assert without_kv_cache(forward, (1,), asked) is asked
        assert without_kv_cache(forward, (1, None, None, ()), {}) == {}
    seeing = transformers.LlavaForConditionalGeneration.forward  # hands its keyword arguments on
    assert without_kv_cache(seeing, (1,), {}) == {"use_cache": False}
    for other in (transformers.CLIPTextModel.forward, transformers.T5EncoderModel.forward, nn.Linear.forward, dict.get):
        assert without_kv_cache(other, (), {}) == {}


def test_encoders_are_compiled_and_a_cache_is_there_for_who_asks(said: Callable[[], list[str]]) -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    for make in (gemma, qwen):
        torch.manual_seed(0)
        eager = make()
        torch.manual_seed(0)
        pipe = sfast.compile(pipeline(make()))
        with torch.no_grad():
            for n in (6, 4):
                asked = {"attention_mask": mask[:, :n], "output_hidden_states": True}
                expected = eager(ids[:, :n], **asked)
                result = pipe.text_encoder(ids[:, :n], **asked)
                for mine, right in zip(result.hidden_states, expected.hidden_states, strict=True):
                    torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
                assert type(result) is type(expected) and result.past_key_values is None
            assert sfast.report(pipe).traces == 1 and said() == []
            cached = pipe.text_encoder(ids, attention_mask=mask, use_cache=True).past_key_values
            expected_cache = eager(ids, attention_mask=mask).past_key_values
        assert torch.equal(cached.layers[1].keys, expected_cache.layers[1].keys)
        assert "DynamicCache" in said()[0]
        sfast.restore(pipe)
        assert pipe.text_encoder(ids).past_key_values is not None


def test_a_module_compiled_alone_gives_what_it_gave(said: Callable[[], list[str]]) -> None:
    module = sfast.compile(gemma())
    assert module(torch.arange(6)[None]).past_key_values is not None
    assert "DynamicCache" in said()[0]


def test_generating_uses_the_cache(said: Callable[[], list[str]]) -> None:
    ids = torch.arange(3, 8)[None]

    def write(model: nn.Module) -> Tensor:
        result: Tensor = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[])
        return result

    compiled = sfast.compile(pipeline(writer())).text_encoder
    assert torch.equal(write(compiled), write(writer()))
    assert all("DynamicCache" in line for line in said())
