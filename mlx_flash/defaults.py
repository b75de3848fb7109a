"""Every choice and default that more than one place needs; imports nothing, so that `--help` is quick."""

DTYPES = ("float32", "float16", "bfloat16")  # that a store can be in
BITS = (16, 8, 4)  # of one number in a store; 16: as the type has it
STORED_PREDICTORS = ("lowrank", "shadow", "imported")
PREDICTORS = ("auto", "none", "exact", *STORED_PREDICTORS)
IO_MODES = ("direct", "buffered")

CONTEXT = 2048  # tokens
THREADS = 16
PREFILL_TOKENS = 512  # prompt tokens computed at once by our own functions; the plan counts on it

CALIBRATION_TOKENS = 2048
LEAST_CALIBRATION_TOKENS = 16
KV_STEP_TOKENS = 256  # mlx-lm's KV cache grows by so many tokens
