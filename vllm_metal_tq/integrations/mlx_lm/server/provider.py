"""The one model that a server serves, with its page pools."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.server import ModelProvider

from .. import hook, lookup
from ..parts import batchable
from ..pools import CachePools


class Provider(ModelProvider):
    """mlx_lm's model provider for one model, which requests cannot change.

    mlx_lm loads, and even downloads, whatever model a request names. Here all pages belong to one
    model, and a client has no say in what a server loads.

    Args:
        args: mlx_lm's options.
        load: loads ``(model, tokenizer)`` by name and with the tokenizer's options, or returns
            None to leave it to mlx_lm.
        make_pools: makes the ``CachePools`` of a model and tokenizer.

    Attributes:
        pools: the page pools, once the model is loaded.
    """

    pools: CachePools

    def __init__(
        self,
        args: Namespace,
        load: Callable[[str, dict[str, Any]], tuple[nn.Module, Any] | None],
        make_pools: Callable[[nn.Module, Any], CachePools],
    ):
        super().__init__(args)
        self._own_load = load
        self._make_pools = make_pools

    def load(
        self,
        model_path: str | None = None,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> tuple[nn.Module, Any]:
        """Load the server's model at first use, whatever is named."""
        if self.model_key is None:
            args = self.cli_args
            self._load(args.model, args.adapter_path, args.draft_model)
        return self.model, self.tokenizer

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        loaded = self._own_load(model_path, self._tokenizer_config)
        if loaded is None:
            super()._load(model_path, adapter_path, draft_model_path)
        else:
            self.model, self.tokenizer = loaded
            self.processor = self.draft_model = None
            self.model_key = (model_path, None, None)
            if self.cli_args.use_default_chat_template and self.tokenizer.chat_template is None:
                self.tokenizer.chat_template = self.tokenizer.default_chat_template
        self.pools = self._make_pools(self.model, self.tokenizer)
        self.pools.attach()
        caches = self.pools.make_prompt_cache()
        if self.draft_model is not None:
            lookup.check_trimmable(caches + hook.host_caches(self.draft_model))
        self.is_batchable = self.draft_model is None and batchable(caches)

    @property
    def vocabulary(self) -> int | None:
        """How many logits the model has, where it says so."""
        args = getattr(self.model, "args", None)
        text = getattr(args, "text_config", None)  # where models that see keep it
        text = text if isinstance(text, dict) else vars(text) if text else {}
        size: int | None = getattr(args, "vocab_size", None) or text.get("vocab_size")
        return size
