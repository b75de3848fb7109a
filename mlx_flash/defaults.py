"""Choices and defaults that more than one module needs. It imports nothing, so that `--help` is quick."""

DTYPES = ("float32", "float16", "bfloat16")  # types of a store's numbers
BITS = (16, 8, 4)  # bits per FFN weight in a store; 16: not quantised
MLX_BITS = (16, 8, 6, 5, 4, 3, 2)  # bits per weight in MLX's own form
STORED_PREDICTORS = ("lowrank", "shadow", "imported")
PREDICTORS = ("auto", "none", "exact", *STORED_PREDICTORS)
IO_MODES = ("direct", "buffered")
WIRE_MODES = ("auto", "on", "off")
DRAFTS = ("none", "ngram", "mtp")  # ways of drafting without a draft model

MOST_PARALLEL = 8  # answers that are decoded at once
KV_BITS = (8, 4)  # bits per number of a quantised KV cache
CONTEXT = 2048  # tokens; the least that is chosen, if a model has so many positions
MOST_CONTEXT = 32768  # tokens; the most that are chosen
MAX_CONTEXT = "max"  # stands for all positions of a model
THREADS = 16
PREFILL_TOKENS = 512  # prompt tokens per chunk, if the user says nothing; the memory plan has room for one
MOST_PREFILL_TOKENS = 16384

CALIBRATION_TOKENS = 2048
LEAST_CALIBRATION_TOKENS = 16
KV_STEP_TOKENS = 256  # mlx-lm's KV cache grows by this many tokens at a time
KEY_VARIABLE = "MLX_FLASH_API_KEY"  # environment variable with the server's API key
