"""Model families that mlx-lm lacks, in mlx-lm's own form: one file per ``model_type``."""
