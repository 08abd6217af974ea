"""vLLM on Apple silicon: the engine plans with compressed pages, and vllm-metal reads them."""
