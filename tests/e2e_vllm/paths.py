"""Lets the tests here, and scripts beside them, import what other folders of tests have."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FOLDERS = (TESTS, TESTS / "integrations" / "mlx_lm", TESTS / "integrations" / "vllm")
sys.path += [str(folder) for folder in FOLDERS if str(folder) not in sys.path]
