"""GPU kernels, each beside the launch that runs it."""
