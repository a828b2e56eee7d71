"""The thin layer in front of the engine: who may ask, what may be asked, and nothing else.

request ──host, key──▶ route ──size──▶ JSON ──types, model, length──▶ engine's dialect ──socket──▶ engine
                                                                                                     │
client ◀── one name, OpenAI's errors, streamed at once ◀── rewritten chunk by chunk ◀────────────────┘

Open routes: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/{id}, GET /health. The
engine's others (it can load any model, and reset) can't be reached. A client that leaves takes its generation along.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from foretune.logger import get_logger
from foretune.serving.answers import DONE, Refusal, Rewriter, as_event, chunks_of, fold
from foretune.serving.dialects import Dialect
from foretune.serving.model import ServedModel
from foretune.serving.requests import CHAT, TEXT, Endpoint, check_body, check_length, count_prompt_tokens, parse_body

_log = get_logger(__name__)

# An oversized body is read on and thrown away up to this many times the limit, or the client would see a broken
# connection instead of the 413 that tells it why.
_DRAINED_LIMITS = 16

# Generating may take minutes before the first byte; only reaching the engine's socket has to be quick.
_TIMEOUT = httpx2.Timeout(None, connect=10.0)


class Front:
    """The ASGI application. `ready` turns true once the engine has loaded the model; until then the answer is 503.

    Args:
        model: the one model that is served.
        dialect: how to talk to its engine.
        socket: the engine's Unix socket.
        api_key: what clients must send as a bearer token; None asks for none.
        max_request_bytes: larger bodies are answered with 413.
        hosts: names that a Host header may have; None takes any. Without a key this keeps web pages out that make
            their own name point at this machine (DNS rebinding).
    """

    def __init__(
        self,
        model: ServedModel,
        dialect: Dialect,
        *,
        socket: Path,
        api_key: str | None,
        max_request_bytes: int,
        hosts: Sequence[str] | None,
    ) -> None:
        self.ready = False
        self._model, self._dialect, self._socket = model, dialect, socket
        self._max_request_bytes = max_request_bytes
        self._created = int(time.time())
        self._one_at_a_time = anyio.CapacityLimiter(1)  # a fast tokenizer can't be borrowed by two threads at once
        app = Starlette(
            routes=[
                Route(CHAT, partial(self._generate, CHAT), methods=["POST"]),
                Route(TEXT, partial(self._generate, TEXT), methods=["POST"]),
                Route("/v1/models", self._list_models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._show_model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ],
            exception_handlers={Refusal: _answer_refusal, HTTPException: _answer_http_error, Exception: _answer_bug},
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        self._app: ASGIApp = _Gate(app, api_key=api_key, hosts=hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        transport = httpx2.AsyncHTTPTransport(
            uds=str(self._socket), limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        )
        async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=_TIMEOUT) as self._engine:
            yield

    async def _list_models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _show_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model.name:
            raise Refusal(404, f"this server has {self._model.name!r} only", param="model", code="model_not_found")
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "foretune",
            "max_model_len": self._model.context_length,  # vLLM's name for it
        }

    async def _health(self, _request: Request) -> Response:
        if not self.ready:
            return JSONResponse({"status": "loading"}, status_code=503)
        try:
            answer = await self._engine.get("/health", timeout=10.0)
        except httpx2.HTTPError:
            return JSONResponse({"status": "the engine does not answer"}, status_code=503)
        healthy = answer.status_code == 200
        return JSONResponse(
            {"status": "ok" if healthy else "the engine is unwell"}, status_code=200 if healthy else 503
        )

    async def _generate(self, endpoint: Endpoint, request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A web page may post plain text to any address without asking; JSON it may not.
            raise Refusal(415, "send the request with Content-Type: application/json")
        body = parse_body(await self._read(request))
        check_body(endpoint, body, self._model)
        self._dialect.refuse(body)
        tokens = await anyio.to_thread.run_sync(
            count_prompt_tokens, endpoint, body, self._model, limiter=self._one_at_a_time
        )
        check_length(body, prompt_tokens=tokens, context_length=self._model.context_length)
        if not self.ready:
            raise Refusal(503, "the model is still loading; try again soon", code="loading")
        stop = body.get("stop", [])
        stops = ([stop] if isinstance(stop, str) else stop) if self._dialect.keeps_stop_text else []
        said = self._dialect.translate(body, self._model, prompt_tokens=tokens)
        return _Answer(
            partial(self._ask, endpoint, said), Rewriter(self._model.name, stops), streams=bool(body.get("stream"))
        )

    async def _read(self, request: Request) -> bytes:
        """The body, counted as it comes: a chunked one has no length in its head."""
        limit, size, pieces = self._max_request_bytes, 0, []
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit * _DRAINED_LIMITS:
            raise self._too_large()
        try:
            async for piece in request.stream():
                size += len(piece)
                if size > limit * _DRAINED_LIMITS:
                    break
                if size <= limit:
                    pieces.append(piece)
        except ClientDisconnect:
            raise Refusal(400, "the client left before its request was whole") from None
        if size > limit:
            raise self._too_large()
        return b"".join(pieces)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self._max_request_bytes} bytes", code="request_too_large")

    @contextlib.asynccontextmanager
    async def _ask(self, endpoint: Endpoint, said: dict[str, Any], request_id: str) -> AsyncIterator[httpx2.Response]:
        """Open the engine's answer. Raises `Refusal` for its errors: a 4xx stays one, all else is 502."""
        headers = {"x-request-id": request_id, "content-type": "application/json"}
        content = json.dumps(said).encode()
        try:
            async with self._engine.stream("POST", endpoint, content=content, headers=headers) as answer:
                if answer.status_code >= 400:
                    raise _as_refusal(answer.status_code, await answer.aread())
                yield answer
        except httpx2.HTTPError as error:
            _log.error("the engine broke off: %r", error)
            raise Refusal(502, "the engine does not answer", code="engine_unavailable") from error


class _Answer(Response):
    """Relays one answer, and lets go of the engine as soon as the client is gone."""

    def __init__(
        self,
        ask: Callable[[str], contextlib.AbstractAsyncContextManager[httpx2.Response]],
        rewriter: Rewriter,
        *,
        streams: bool,
    ) -> None:
        self._ask, self._rewriter, self._streams = ask, rewriter, streams
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._leave_with_client, receive, group.cancel_scope)
            await self._relay(scope, receive, send)
            group.cancel_scope.cancel()

    @staticmethod
    async def _leave_with_client(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = str(uuid.uuid4())
        headers = {"x-request-id": request_id}
        started = False
        try:
            async with self._ask(request_id) as answer:
                if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                    whole = self._rewriter.rewrite(json.loads(await answer.aread()))
                    await JSONResponse(whole, headers=headers)(scope, receive, send)
                    return
                chunks = (self._rewriter.rewrite(chunk) async for chunk in chunks_of(answer.aiter_bytes()))
                if not self._streams:
                    whole = fold([chunk async for chunk in chunks])
                    await JSONResponse(whole, headers=headers)(scope, receive, send)
                    return
                async for chunk in chunks:
                    if not started:
                        started = True
                        await send(_stream_start(headers))
                    await send({"type": "http.response.body", "body": as_event(chunk), "more_body": True})
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
        except Refusal as refusal:
            if not started:
                await _answer_refusal(None, refusal, headers=headers)(scope, receive, send)
            else:  # the status is long gone: an error inside the stream, and no [DONE]
                await send({"type": "http.response.body", "body": as_event(refusal.as_object()), "more_body": False})


class _Gate:
    """Before any route: the right host, the right key. /health is open, so that a probe needs no key."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, hosts
        self._expected = None if api_key is None else b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(dict(scope["headers"]), scope["path"])
        app = self._app if refusal is None else _answer_refusal(None, refusal)
        await app(scope, receive, send)

    def _refuse(self, headers: dict[bytes, bytes], path: str) -> Refusal | None:
        if self._hosts is not None and _host_name(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            return Refusal(403, "this server answers to its own name only", code="wrong_host")
        if self._expected is None or path == "/health":
            return None
        # compare_digest takes as long for a wrong key as for a right one, so that time tells nothing.
        if hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            return None
        return Refusal(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.rsplit(":", 1)[0]
    name = name.strip("[]").lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        return "localhost" if ipaddress.ip_address(name).is_loopback else name
    return name


def _stream_start(headers: dict[str, str]) -> dict[str, Any]:
    fields = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",  # or an nginx between would collect the stream
        **headers,
    }
    encoded = [(key.encode(), value.encode()) for key, value in fields.items()]
    return {"type": "http.response.start", "status": 200, "headers": encoded}


def _as_refusal(status: int, content: bytes) -> Refusal:
    """The engine's error as ours: FastAPI says ``detail``, vLLM says ``error.message``, a crash says plain text."""
    if status >= 500:
        _log.error("the engine answered %d: %s", status, content[:500].decode(errors="replace"))
        return Refusal(502, "the engine failed on this request", code="engine_error")
    try:
        said = json.loads(content)
        error = said.get("error", said)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = content[:500].decode(errors="replace")
    return Refusal(400 if status == 422 else status, str(message))


def _answer_refusal(_request: Request | None, refusal: Exception, *, headers: dict[str, str] | None = None) -> Response:
    assert isinstance(refusal, Refusal)
    extra = {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
    extra |= {"retry-after": "5"} if refusal.status == 503 else {}
    extra |= {"connection": "close"} if refusal.status == 413 else {}  # or uvicorn reads the rest, were it endless
    return JSONResponse(refusal.as_object(), status_code=refusal.status, headers={**(headers or {}), **extra})


def _answer_http_error(_request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's format."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such route", 405: "this route does not take this method"}.get(
        error.status_code, "refused"
    )
    body = Refusal(error.status_code, what, code="unknown_route" if error.status_code == 404 else None).as_object()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _answer_bug(_request: Request, _error: Exception) -> Response:
    """Starlette logs the traceback on the server and raises it on; a client learns nothing of our insides."""
    return JSONResponse(Refusal(500, "the server failed on this request").as_object(), status_code=500)
