"""The methods of quantization by name. No heavy imports: the command line's help lists them."""

TORCHAO = {
    "int8": "weights in 8 bits (torchao)",
    "int4": "weights in 4 bits, 32 in a row share a scale (torchao)",
    "int8_dynamic": "weights in 8 bits, activations too while computing (torchao)",
}
GGUF = {
    "q8_0": "GGUF's Q8_0",
    "q4_k_m": "GGUF's Q4_K_M, by llama-cpp-python",
}
METHODS = {**TORCHAO, **GGUF}
