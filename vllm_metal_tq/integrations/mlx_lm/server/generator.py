"""mlx_lm's generation thread, with requests admitted by the blocks that they need."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, Queue
from threading import Event
from typing import Any

import mlx.core as mx
from mlx_lm.server import GenerationContext, ModelDescription, ResponseGenerator

from ....types import Progress
from .. import distributed
from . import batch
from .admission import Admission, AgreedPools
from .errors import APIError, ClientGoneError, as_api_error, invalid, stopping
from .metrics import Stats, kv_state
from .prompts import PromptCache
from .provider import Provider
from .sessions import Replies, Session, Watch

_STOP = "stop"  # in place of a request
_PATIENCE = 15  # seconds until a step of several processes is taken for one that never ends
_DEFAULT = "default_model"  # mlx_lm's name for what the command line gave


class Generator(ResponseGenerator):
    """mlx_lm's response generator over page pools. Requests carry a ``Session``.

    A failure in the middle of a batch ends the requests in it, not the server: mlx_lm's loop is
    started afresh, with the model and the prompt cache that are there.

    Where several processes hold the model, all of them run this, and the first hands its requests
    on to the others. There a failure ends the server: what the others do by then is not known.

    Args:
        provider: the model and its pools.
        stats: what is counted for ``/metrics``.

    Attributes:
        joining: the session that was admitted last.
        kv_state: what the pools held a moment ago. Other threads read this, because the pools are
            the generation thread's alone.
        failure: why the model could not be loaded, or why several processes serve no more.
    """

    model_provider: Provider
    prompt_cache: PromptCache
    admission: Admission  # once the model is loaded

    def __init__(self, provider: Provider, stats: Stats):
        batch.install()
        self.stats = stats
        self.watch = Watch()
        self.joining: Session | None = None
        self.failure: Exception | None = None
        self.kv_state: dict[str, int] = {}
        self._loaded = Event()
        self._leaving = False
        self._live: set[Session] = set()  # that the thread has taken and not yet answered
        args = provider.cli_args
        prompts = PromptCache(
            args.prompt_cache_size, args.prompt_cache_bytes, lambda: provider.pools.used_bytes
        )
        super().__init__(provider, prompts)  # starts the thread

    def wait_until_loaded(self) -> None:
        """Wait for the model.

        Raises:
            Exception: what loading it raised.
        """
        self._loaded.wait()
        if self.failure is not None:
            self.stop_and_join()
            raise self.failure

    def stop_and_join(self) -> bool:
        """End the threads; requests that run are answered with an error. Once is enough.

        Returns:
            Whether they have ended. MLX may wait for ever for a process that is gone.
        """
        self.watch.stop()
        self._leaving = True
        if not self._is_distributed:  # else the thread tells the others first
            self._stop = True
        for session in tuple(self._live):
            session.stop()
        self._generation_thread.join(_PATIENCE if self._is_distributed else None)
        ended = not self._generation_thread.is_alive()
        if not ended:
            self._end_live(stopping)
        return ended

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        loaded = self._loaded.is_set() and self.failure is None
        return loaded and self._generation_thread.is_alive() and not self._leaving

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Progress | None = None,
    ) -> tuple[GenerationContext, Iterator[Any]]:
        """As mlx_lm's, and counted.

        Raises:
            Exception: there is no answer; ``request.session.error`` says what to tell the client.
        """
        session = request.session
        # Whatever name the client calls it by: others would make mlx_lm end the batch first.
        generation_args.model = ModelDescription(_DEFAULT, _DEFAULT, None)
        try:
            if not self.healthy:
                raise stopping()
            context, responses = super().generate(request, generation_args, progress_callback)
        except Exception as error:
            session.error = as_api_error(error)
            raise
        return context, self._counted(session, context, responses)

    def _counted(
        self, session: Session, context: GenerationContext, responses: Iterator[Any]
    ) -> Iterator[Any]:
        first = True
        for response in responses:
            if first:
                cached = max(context.prompt_cache_count, 0)
                self.stats.prompt(len(context.prompt), cached, session.started)
                first = False
            self.stats.token()
            yield response

    def _generate(self) -> None:
        try:
            self._serve()
        finally:
            # Streams that outlive their thread make MLX abort when the interpreter ends.
            if clear := getattr(mx, "clear_streams", None):
                clear()

    def _serve(self) -> None:
        batch.serving.set(self)
        try:
            self.model_provider.load_default()
            pools = AgreedPools(self.model_provider.pools)
            self.admission = Admission(pools, self.prompt_cache.evict)
            self.publish()
        except Exception as error:
            self.failure = error
            return
        finally:
            self._loaded.set()
        while not self._stop:
            try:
                super()._generate()
            except Exception as error:
                # The text of the traceback and not the traceback, which holds pages.
                logging.error("the batch failed: %s", traceback.format_exc())
                self.prompt_cache.let_go()
                failed = partial(APIError, 500, as_api_error(error).message, "internal_error")
                self._end_live(failed)
                if self._is_distributed:
                    self.failure, self._stop = error, True
        self._end_live(stopping)
        with contextlib.suppress(Empty):
            while True:
                replies, _, _ = self.requests.get_nowait()
                replies.put(stopping())

    def _end_live(self, make_error: Callable[[], APIError]) -> None:
        """Answer all requests that were taken with an error, each with its own."""
        for session in tuple(self._live):
            if session.replies is not None:
                session.replies.put(make_error())

    def publish(self) -> None:
        """Renew ``kv_state``; called by the generation thread whenever it may have changed."""
        pools, kept = self.model_provider.pools, len(self.prompt_cache)
        self.kv_state = kv_state(pools, self.admission, kept)

    def _next_request(self, timeout: float | None = None) -> tuple[Replies, Any, Any] | None:
        self.publish()
        taken = super()._next_request(timeout)
        if taken is None:
            return None
        queue, request, args = taken
        session = request.session
        replies = session.replies = Replies(queue, session, self._ended)
        self._live.add(session)
        return replies, request, args

    def _share_request(self, request: tuple[Any, Any, Any] | None) -> tuple[Any, Any, Any] | None:
        """As mlx_lm's, and the first process also tells the others when to stop."""
        if not self._is_distributed:
            return request
        told = self._share_object(_STOP if self._leaving else request and request[1:])
        self._stop = told == _STOP
        if self._stop and request is not None:
            request[0].put(stopping())
        return None if self._stop or told is None else (request[0] if request else Queue(), *told)

    def _ended(self, session: Session) -> None:
        self._live.discard(session)
        if session.reservation is not None:
            self.admission.release(session.reservation)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
        """As mlx_lm's; whoever gets past this joins right afterwards."""
        session = request.session
        if distributed.most(session.gone):
            raise ClientGoneError
        try:
            tokenized: tuple[Any, ...] = super()._tokenize(tokenizer, request, args)
        except Exception as error:
            raise invalid(f"the prompt cannot be tokenized: {error}") from None
        prompt, segments = tokenized[:2]
        if not isinstance(prompt, list) or not prompt:
            raise invalid("the prompt is empty")
        self._admit(session, args, prompt, len(segments))
        return tokenized

    def _admit(self, session: Session, args: Any, prompt: list[int], segments: int) -> None:
        # A request appends to a block that it shares with the prompt cache after it has forked
        # from there, and after every segment of its prompt, whose end is kept there.
        copies = 1 + segments
        ahead = self._drafted(args)
        capacity = self.admission.capacity(copies)
        if capacity is not None and not session.explicit:
            # Who leaves the length to us gets what fits, as with OpenAI's own servers.
            args.max_tokens = max(min(args.max_tokens, capacity - ahead - len(prompt)), 1)
        cached = self.prompt_cache.hold(self.model_provider.model_key, prompt)
        try:
            session.reservation = self.admission.reserve(
                len(prompt) + args.max_tokens + ahead, cached, copies
            )
        except APIError:
            self.prompt_cache.let_go()
            raise
        self.joining = session

    def _drafted(self, args: Any) -> int:
        """Tokens beyond the last that speculation stores for a while."""
        drafts = self.model_provider.draft_model is not None
        return int(args.num_draft_tokens) + 1 if drafts else 0

    def _serve_single(self, taken: tuple[Any, Any, Any], *rest: Any) -> None:
        _, request, args = taken
        session = request.session
        session.unstoppable = self._is_distributed
        replies = session.replies
        if not session.unstoppable:
            replies = replies.alone(self.publish)
        super()._serve_single((replies, request, args), *rest)
        self.prompt_cache.let_go()
