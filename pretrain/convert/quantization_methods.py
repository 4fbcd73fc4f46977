"""Quantization methods by name. No heavy imports, since --help lists them."""

TORCHAO = {
    "int8": "8-bit weights (torchao)",
    "int4": "4-bit weights, one scale per 32 of a row (torchao)",
    "int8_dynamic": "8-bit weights, and activations quantized to 8 bits at run time (torchao)",
}
GGUF = {
    "q8_0": "GGUF's Q8_0",
    "q4_k_m": "GGUF's Q4_K_M, by llama-cpp-python",
}
METHODS = {**TORCHAO, **GGUF}
