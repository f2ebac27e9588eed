"""Parameters and memory of T5-XXL's encoder and of the students' presets.

python examples/sizes.py
"""

import torch
from transformers import T5Config, T5EncoderModel

import t5slim

XXL = T5Config(
    d_model=4096,
    d_kv=64,
    num_heads=64,
    d_ff=10240,
    num_layers=24,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)

with torch.device("meta"):  # shapes without weights
    encoders: dict[str, torch.nn.Module] = {"T5-XXL": T5EncoderModel(XXL)}
    for name in ("xl", "large", "base", "small"):
        encoders[name] = t5slim.SlimT5Encoder(t5slim.SlimT5Config.preset(name))

sizes = {name: sum(p.numel() for p in encoder.parameters()) for name, encoder in encoders.items()}
print("| encoder | parameters | GiB in bfloat16 | of T5-XXL |\n|---|---:|---:|---:|")
for name, size in sizes.items():
    share = "1" if name == "T5-XXL" else f"1/{sizes['T5-XXL'] / size:.0f}"
    print(f"| {name} | {size / 1e6:,.0f} M | {size * 2 / 2**30:.2f} | {share} |")
