"""Which contexts fit into which memory: figures from a model's configuration, nothing is loaded."""
