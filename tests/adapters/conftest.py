import pytest
import torch
from adapted_models import llama


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quantised_llama(tmp_path_factory):
    """Builds a Llama whose linear layers bitsandbytes quantised to 4 or 8 bits, on the CPU."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("llama")
    llama(hidden=64).save_pretrained(folder)

    def build(bits):
        config = {
            4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
            8: BitsAndBytesConfig(load_in_8bit=True),
        }[bits]
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    return build
