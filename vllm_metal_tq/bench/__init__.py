"""Speed and memory of kernels and caches, beside what MLX and mlx_lm offer for the same work."""
