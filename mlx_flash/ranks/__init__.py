"""Several processes, on one machine or several, that compute one model: rank 0 leads, the others follow."""
